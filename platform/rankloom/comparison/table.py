"""The table of a comparison: a row for each method, from what its studies left; and its cells as text. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rankloom.comparison.outcomes import Measure, Outcomes
from rankloom.comparison.results import CompareResult, Estimate, MethodResult, MethodTest
from rankloom.comparison.statistics import Bootstrap, Interval, correct_by_holm, estimate_seed_variance, run_paired_test
from rankloom.registry.checks import CONFIG, WEIGHTS
from rankloom.registry.scorecard import Measures, MethodCost, Scorecard
from rankloom.search.leaderboard import TrialState
from rankloom.search.results import ScoredTrial

MB = 1e6
COSTS_NOTE = (
    "Memory, of tensors in MB, and tokens/s are of each method alone on the device. Each part is at its own most, so "
    "the parts do not add up to the peak. Trials and seconds include the choice of the learning rate. The latency is "
    "PEFT's, which computes DoRA's norms at each step; rankloom's engine computes them once."
)
"""What a reader has to know of the cells of `build_cost_rows`."""


@dataclass(frozen=True)
class ScoredSeed:
    """One trial of a method, trained and scored on the test rows."""

    trial: TrialState
    scored: ScoredTrial
    scorecard: Scorecard

    @property
    def seed(self) -> int:
        return self.trial.config.seed


def build_method_result(
    name: str,
    trials: Sequence[TrialState],
    seeds: Sequence[ScoredSeed],
    tuned: Sequence[TrialState],
    outcomes: Outcomes | None,
    measure: Measure,
    *,
    errors: Sequence[str] = (),
    cost: MethodCost | None = None,
    served_by: Sequence[str] = (),
    validation: float | None = None,
) -> MethodResult:
    """Return a method's row.

    Args:
        trials: its trials, one for each seed.
        seeds: those of them that were scored.
        tuned: the trials that chose its learning rate.
        outcomes: the results of `seeds` on the test rows, in their order; None where there are none.
    """
    lasts = [trial.last for trial in trials if trial.last is not None]
    spent = [trial.last.train_s for trial in (*trials, *tuned) if trial.last is not None]
    results = [each.scorecard.result for each in seeds]
    extractions = [each.scorecard.extraction for each in seeds if each.scorecard.extraction is not None]
    before = [value for each in extractions if (value := read_measure(each.trained, measure)) is not None]
    published = [each.scored.adapter for each in seeds if each.scored.adapter is not None]
    return MethodResult(
        name=name,
        seeds=tuple(each.seed for each in seeds),
        errors=tuple(errors),
        learning_rate=trials[0].config.optim.learning_rate if trials else None,
        num_trials=len(trials) + len(tuned),
        tokens=max((last.tokens for last in lasts), default=None),
        train_s=statistics.mean(last.train_s for last in lasts) if lasts else None,
        all_train_s=sum(spent) if spent else None,
        validation=validation,
        before_extraction=_average(before),
        energy=_average(each.energy for each in extractions),
        latency_ms=_take_median(each.latency_ms for each in results),
        generated_tokens_per_s=_take_median(each.generated_tokens_per_s for each in results),
        retention_loss=_average(each.retention_loss for each in results),
        adapter_bytes=round(statistics.mean(each.scorecard.adapter_bytes for each in seeds)) if seeds else None,
        cost=cost,
        served_by=tuple(served_by),
        adapter=published[0] if published else None,
        **estimate_quality(results, outcomes),
    )


def build_base_result(name: str, measures: Measures, outcomes: Outcomes) -> MethodResult:
    """Return the row of an untuned base."""
    return MethodResult(
        name=name,
        retention_loss=measures.retention_loss,
        latency_ms=measures.latency_ms,
        generated_tokens_per_s=measures.generated_tokens_per_s,
        **estimate_quality([measures], outcomes),
    )


def estimate_quality(results: Sequence[Measures], outcomes: Outcomes | None) -> dict[str, Estimate | None]:
    """Return the measures over seeds and test rows with their intervals."""
    if not results or outcomes is None:
        return {}
    first, bootstrap = results[0], Bootstrap(len(outcomes.tables), outcomes.num_rows)
    found: dict[str, Estimate | None] = {"loss": _to_estimate(bootstrap.estimate_mean(outcomes.get_values("loss")))}
    if first.accuracy is not None:
        found["accuracy"] = _to_estimate(bootstrap.estimate_mean(outcomes.get_values("accuracy")))
        found["macro_f1"] = _to_estimate(bootstrap.estimate_macro_f1(outcomes.references, outcomes.predictions))
    if first.exact_match is not None:
        found["exact_match"] = _to_estimate(bootstrap.estimate_mean(outcomes.get_values("exact_match")))
    if first.metric is not None and outcomes.has_row_metric:
        found["metric"] = _to_estimate(bootstrap.estimate_mean(outcomes.get_values("metric")))
    elif first.metric is not None:
        found["metric"] = Estimate(value=statistics.mean(each.metric.value for each in results if each.metric))
    return found


def compare_pairs(
    outcomes: Mapping[str, Outcomes], seeds: Mapping[str, Sequence[int]], measure: Measure
) -> tuple[MethodTest, ...]:
    """Test each pair of methods on the seeds that both have, with Holm's correction for the number of pairs."""
    most = max(map(len, seeds.values()), default=0)
    pooled = estimate_seed_variance(
        [each.get_values(measure) for name, each in outcomes.items() if len(seeds[name]) == most]
    )
    found = []
    for first, second in combinations(outcomes, 2):
        common = [seed for seed in seeds[first] if seed in seeds[second]]
        if not common:
            continue
        values = [
            outcomes[name].select([seeds[name].index(seed) for seed in common]).get_values(measure)
            for name in (first, second)
        ]
        found.append((first, second, len(common), run_paired_test(values[0], values[1], pooled)))
    adjusted = correct_by_holm([test.p_value for *_, test in found])
    return tuple(
        MethodTest(
            first=first, second=second, difference=test.difference, p_value=test.p_value, adjusted=value,
            test=test.test, num_seeds=count,
        )
        for (first, second, count, test), value in zip(found, adjusted, strict=True)
    )  # fmt: skip


def add_orders(methods: Iterable[MethodResult], tests: Sequence[MethodTest], best: str) -> tuple[MethodResult, ...]:
    """Return the methods with the names of those that each is really better and worse than."""
    above: dict[str, set[str]] = {}
    for test in tests:
        if test.is_real and test.difference:
            first_wins = (test.difference > 0) == (best == "max")
            winner, loser = (test.first, test.second) if first_wins else (test.second, test.first)
            above.setdefault(winner, set()).add(loser)
    methods = list(methods)
    names = [method.name for method in methods]
    return tuple(
        method.model_copy(
            update={
                "better_than": tuple(name for name in names if name in above.get(method.name, ())),
                "worse_than": tuple(name for name in names if method.name in above.get(name, ())),
            }
        )
        for method in methods
    )


def find_servers(folder: Path, quantization: str) -> list[str]:
    """Return what can serve a PEFT folder: rankloom and PEFT any; vLLM, with rankloom's plug-in, LoRA and DoRA on
    linears of a plain base."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        embeds = any(".lora_embedding_" in name for name in list(file.keys()))
    more = any(config.get(key) for key in ("lora_bias", "target_parameters", "modules_to_save"))
    return ["rankloom", "PEFT"] + (["vLLM"] if quantization == "none" and not embeds and not more else [])


def read_measure(measures: Measures, measure: Measure) -> float | None:
    """Return one measure's value."""
    value: Any = getattr(measures, measure)
    return float(getattr(value, "value", value)) if value is not None else None


def build_records(result: CompareResult) -> list[dict[str, Any]]:
    """Return a flat mapping for each method and base: the rows of table.csv and table.parquet."""
    found = []
    for method in (*result.methods, *result.bases):
        row = method.model_dump(mode="json", exclude={"cost"})
        flat: dict[str, Any] = {}
        for key, value in row.items():
            if key in ("accuracy", "macro_f1", "exact_match", "metric", "loss"):
                flat |= {key: value and value["value"]}
                flat |= {f"{key}_{end}": value and value[end] for end in ("low", "high")}
            else:
                flat[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
        cost = method.cost.model_dump() if method.cost is not None else dict.fromkeys(MethodCost.model_fields)
        found.append(flat | cost)
    return found


def build_quality_rows(result: CompareResult) -> list[tuple[str, ...]]:
    """Return the cells of how well each method does, with a header."""
    names = [n for n in ("metric", "accuracy", "macro_f1", "exact_match", "loss") if _has_any(result, n)]
    titles = {"metric": result.metric, "macro_f1": "macro F1", "exact_match": "exact match"}
    retention = _has_any(result, "retention_loss")
    trained = _has_any(result, "before_extraction")
    header = ["method", "rate", *(f"{titles.get(n, n)} [95 %]" for n in names)]
    header += ["before extraction"] * trained + ["retention loss"] * retention + ["better than", "worse than"]
    rows = [tuple(header)]
    for method in (*result.methods, *result.bases):
        cells = [method.name, f"{method.learning_rate:g}" if method.learning_rate else ""]
        cells += [format_estimate(getattr(method, n), is_share=n not in ("metric", "loss")) for n in names]
        if trained:
            cells.append(format_value(method.before_extraction, is_share=result.is_share))
        if retention:
            cells.append("" if method.retention_loss is None else f"{method.retention_loss:.4f}")
        ordered = [", ".join(method.better_than), ", ".join(method.worse_than)]
        rows.append((*cells, *(ordered if method.seeds else ["", "; ".join(method.errors)])))
    return rows


def build_cost_rows(result: CompareResult) -> list[tuple[str, ...]]:
    """Return the cells of what each method costs, with a header; memory in MB."""
    header = (
        "method", "trainable", "peak MB", "weights", "gradients", "optimiser", "activations", "tokens/s", "trials",
        "train s", "latency", "adapter MB", "served by", "adapter",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for method in result.methods:
        cost = method.cost
        parts = ("peak", "weight", "gradient", "optimizer", "activation")
        memory = [f"{getattr(cost, f'{part}_bytes') / MB:,.1f}" if cost else "" for part in parts]
        rows.append(
            (
                method.name,
                f"{cost.trainable_parameters / 1e6:.2f} M" if cost else "",
                *memory,
                f"{cost.tokens_per_s:,.0f}" if cost else "",
                str(method.num_trials),
                f"{method.all_train_s:,.1f}" if method.all_train_s is not None else "",
                f"{method.latency_ms:.1f} ms" if method.latency_ms is not None else "",
                f"{method.adapter_bytes / MB:,.1f}" if method.adapter_bytes is not None else "",
                ", ".join(method.served_by),
                method.adapter or "",
            )
        )
    return rows


def format_estimate(estimate: Estimate | None, *, is_share: bool) -> str:
    """Return an estimate with its interval; a share in percent."""
    if estimate is None:
        return ""
    low, high = estimate.low, estimate.high
    if is_share:
        return f"{100 * estimate.value:.1f} %" + (
            f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else ""
        )
    return f"{estimate.value:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else "")


def format_value(value: float | None, *, is_share: bool) -> str:
    """Return a value as text; a share in percent."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def _has_any(result: CompareResult, name: str) -> bool:
    return any(getattr(method, name) is not None for method in (*result.methods, *result.bases))


def _to_estimate(interval: Interval) -> Estimate:
    return Estimate(value=interval.value, low=interval.low, high=interval.high)


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _take_median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
