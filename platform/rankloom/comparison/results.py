"""Results of a comparison, for Python and notebooks; result.json holds `to_dict`, and `--json` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rankloom.launch.results import Result, render_html_table
from rankloom.registry.scorecard import MethodCost

if TYPE_CHECKING:
    import pandas


class Estimate(Result):
    """A mean over seeds, with its 95 % interval over seeds and test rows."""

    value: float
    low: float | None = None
    high: float | None = None


class MethodResult(Result):
    """One method of a comparison: how well it does, and what it costs. None: not measured."""

    name: str
    """Its name in the comparison; `base` is the untuned base."""
    seeds: tuple[int, ...] = ()
    """The seeds with which it was trained and scored."""
    errors: tuple[str, ...] = ()
    """Why a seed is missing."""
    learning_rate: float | None = None
    num_trials: int = 0
    """Its trials, those that chose its learning rate included."""
    tokens: int | None = None
    """Tokens that each trial trained on."""
    train_s: float | None = None
    """Mean seconds of a trial's training in this comparison; of trials that shared a host, each one's part."""
    all_train_s: float | None = None
    """Seconds of all its trials, those that chose its learning rate included."""
    validation: float | None = None
    """Mean over seeds of the best validation result of `metric`."""
    accuracy: Estimate | None = None
    macro_f1: Estimate | None = None
    exact_match: Estimate | None = None
    metric: Estimate | None = None
    """The user's own metric; without an interval where it gives one number for all rows."""
    loss: Estimate | None = None
    """Mean cross-entropy per trained token, in nats."""
    retention_loss: float | None = None
    """Mean over seeds of the loss on the retention data set."""
    before_extraction: float | None = None
    """Mean of the comparison's measure for the trained weights, before their change was made an adapter; only where a
    method trains the base's own weights. The other figures are the adapter's."""
    energy: float | None = None
    """Share of that change's squared norm that the adapter keeps, 0 to 1."""
    latency_ms: float | None = None
    """Median over seeds of the time of one decode step at batch 1 in PEFT, which computes DoRA's norms at each."""
    generated_tokens_per_s: float | None = None
    adapter_bytes: int | None = None
    cost: MethodCost | None = None
    """Memory by part and speed, of the method alone on the device."""
    served_by: tuple[str, ...] = ()
    """What can serve its adapter; vLLM with rankloom's plug-in."""
    adapter: str | None = None
    """Its published version: the best of its seeds on the validation rows."""
    better_than: tuple[str, ...] = ()
    """Methods that it is better than: the difference on the test rows is real after Holm's correction."""
    worse_than: tuple[str, ...] = ()


class MethodTest(Result):
    """The test of the difference between two methods on the test rows."""

    first: str
    second: str
    difference: float
    """Mean of the first less that of the second."""
    p_value: float
    adjusted: float
    """The p value after Holm's correction for the number of pairs."""
    test: str
    """seeds and rows, McNemar, or rows (a paired t test)."""
    num_seeds: int

    @property
    def is_real(self) -> bool:
        """Return whether chance is an unlikely reason for the difference, at 5 % over all pairs."""
        return self.adjusted < 0.05


class CompareResult(Result):
    """A comparison: the table, the tests, and what they say."""

    status: Literal["done", "interrupted"]
    """interrupted: it was stopped; compare again with `resume=True`."""
    name: str
    folder: str
    """The comparison's folder."""
    metric: str = "loss"
    """What chose checkpoints, learning rates and the leader on the validation rows."""
    measure: Literal["metric", "accuracy", "exact_match", "loss"] | None = None
    """What the methods are compared by on the test rows; metric: `metric`, which is the user's own."""
    best: Literal["max", "min"] = "max"
    """Whether the measure is best at its maximum or its minimum."""
    num_rows: int = 0
    """Test rows."""
    methods: tuple[MethodResult, ...] = ()
    """The best on the validation rows first."""
    bases: tuple[MethodResult, ...] = ()
    """The untuned base, once for each quantisation."""
    tests: tuple[MethodTest, ...] = ()
    verdict: tuple[str, ...] = ()
    """What the comparison shows, in sentences."""
    notes: tuple[str, ...] = ()
    registry: str | None = None

    @property
    def measure_name(self) -> str:
        """The measure in words."""
        return self.metric if self.measure == "metric" else (self.measure or "").replace("_", " ")

    @property
    def is_share(self) -> bool:
        """Whether the measure is a share of the test rows, 0 to 1."""
        return self.measure in ("accuracy", "exact_match")

    def read_measure(self, method: MethodResult) -> Estimate | None:
        """Return the measure of a method."""
        estimate: Estimate | None = getattr(method, self.measure or "loss")
        return estimate

    @property
    def leader(self) -> MethodResult | None:
        """The method that is best on the validation rows, on average over the seeds."""
        return self.methods[0] if self.methods and self.methods[0].seeds else None

    @property
    def winner(self) -> MethodResult | None:
        """The leader, if it is better on the test rows than every other method; None where they are not told apart."""
        others = {method.name for method in self.methods if method.seeds} - {self.leader.name if self.leader else ""}
        return self.leader if self.leader is not None and others <= set(self.leader.better_than) else None

    @property
    def adapter(self) -> str | None:
        """The leader's published version, such as `tickets-qlora@1`."""
        return None if self.leader is None else self.leader.adapter

    @property
    def table(self) -> pandas.DataFrame:
        """One row for each method and base, as in table.csv and table.parquet."""
        import pandas

        from rankloom.comparison.table import build_records

        return pandas.DataFrame(build_records(self))

    def __repr__(self) -> str:
        return f"CompareResult({self.name}: {self.status}{'; ' if self.verdict else ''}{' '.join(self.verdict[:1])})"

    def _repr_html_(self) -> str:
        from rankloom.comparison.table import build_quality_rows

        header, *rows = build_quality_rows(self)
        return render_html_table(f"{self.name}, {self.status}", header, rows)
