"""A study: a search over trials. This is what `rankloom tune` reads; checked whole without torch or ray.

Every trial is `trial` with a branch of `space` over it (see `space.py`). A sampled point becomes a `TrialConfig` and is
checked as any other; what is incompatible is refused and counted, and the search goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from rankloom.config.base import Frozen, dump, is_whole_number, parse
from rankloom.config.compatible import COMPATIBLE
from rankloom.config.space import (
    Knob,
    LogUniform,
    Point,
    Tree,
    Uniform,
    grid,
    knobs_of,
    merge,
    place,
    probes,
    with_alpha,
)
from rankloom.config.trial import AdapterName, TrialConfig
from rankloom.errors import ConfigError, IncompatibleError

Share = Annotated[float, Field(gt=0, lt=1)]
Reduction = Annotated[int, Field(ge=2)]
Objective = Literal["memory_bytes", "latency_ms"]
COSTS: tuple[str, ...] = get_args(Objective)
"""What reports, the journal and results.parquet have of a trial's costs, None where it was not measured."""


class SearchConfig(Frozen):
    """Which points are tried."""

    algorithm: Literal["random", "grid", "optuna", "hyperopt", "nevergrad", "bayesopt"] = "random"
    """random; grid: every combination, in order; optuna: TPE (needs the extra `search`). Ray Tune's own hyperopt,
    nevergrad and bayesopt need the package of that name, and see all branches' knobs side by side, where those of a
    branch that was not chosen have no effect; bayesopt takes `uniform` knobs of a single branch alone."""
    num_trials: Annotated[int, Field(ge=1)] | None = None
    """Trials in all, warm starts included (16 where it is not given; in a grid: all of it)."""
    metric: Literal["accuracy", "loss"] = "loss"
    """What is searched for, on the validation rows; accuracy needs classification data."""
    mode: Literal["max", "min"] | None = None
    """max for accuracy, min for loss; it may be left out."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the searcher. The trials keep `trial.seed`: they differ in their settings alone."""
    objectives: list[Objective] = []
    """What else counts, the smaller the better: the result has the Pareto front of `metric` and these. optuna searches
    for the whole of it, the other algorithms for `metric` alone. memory_bytes: of the weights, the base as it is held
    and the adapter on it. latency_ms: of a decode step at batch 1 with the adapter on the base, the median of 32, timed
    once a trial amid the study's other work, to two digits. Both are measured on the trial's own adapter, at its first
    report; of a trial that can't share a base at its end, so one that the scheduler stopped is not on the front."""
    warm_start: list[dict[str, Any]] = []
    """Fragments of trials to try first. The first of them is the study's baseline, which the report compares the winner
    with. Without any, the baseline is `trial` as it stands, and the next is a first guess after "LoRA Without Regret",
    where a branch of LoRA or DoRA permits it: alpha 32, all linear layers, learning rate 5e-4."""
    priors: list[str] = []
    """Earlier studies (a folder, or its results.parquet) whose trials the searcher is told as if they were its own:
    those that lie in this space, with the same model, data, budget and measure; the others are skipped and counted."""

    @model_validator(mode="after")
    def _settings_agree(self) -> SearchConfig:
        if self.mode not in (None, self.best):
            raise ConfigError(f"mode: {self.metric} is best at its {self.best} (given {self.mode!r}); leave it out")
        if len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives: each only once (given {self.objectives})")
        if self.priors and not self.learns:
            raise ConfigError(
                f"priors: algorithm={self.algorithm} learns nothing from earlier trials; use optuna, or warm_start"
            )
        return self

    @property
    def best(self) -> Literal["max", "min"]:
        return "max" if self.metric == "accuracy" else "min"

    @property
    def learns(self) -> bool:
        """Whether the points that it proposes depend on the results so far."""
        return self.algorithm not in ("random", "grid")


class FifoConfig(Frozen):
    """Every trial runs to its end."""

    type: Literal["fifo"] = "fifo"


class AshaConfig(Frozen):
    """Asynchronous successive halving (arXiv 1810.05934): at each rung only the best part goes on."""

    type: Literal["asha"] = "asha"
    grace: Share = 0.1
    """The first rung, as a share of a trial's own budget; the next are `reduction_factor` times further."""
    reduction_factor: Reduction = 3
    """At a rung one of so many goes on."""
    brackets: Annotated[int, Field(ge=1)] = 1
    """Brackets with later first rungs."""


class HyperBandConfig(Frozen):
    """HyperBand (arXiv 1603.06560): brackets that wait for all their trials before they halve.

    Ray Tune fills them from the one that halves least: with factor 3, five trials run to their end, the next eight are
    halved once, the next 15 twice.
    """

    type: Literal["hyperband"] = "hyperband"
    reduction_factor: Reduction = 3
    """In each halving one of so many goes on."""


class MedianConfig(Frozen):
    """Stop a trial whose best is below the median of the others' averages at the same point."""

    type: Literal["median"] = "median"
    grace: Share = 0.25
    """The share of its budget that a trial gets in any case."""
    min_trials: Annotated[int, Field(ge=1)] = 3
    """Trials needed for a median."""


class PbtConfig(Frozen):
    """Population based training (arXiv 1711.09846): the worst take over weights and settings of the best."""

    type: Literal["pbt"] = "pbt"
    interval: Share = 0.2
    """Between two exploits, as a share of a trial's budget."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """The share of the population that is worst, and best."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """How likely a knob is drawn anew instead of being changed a little."""


Scheduler = Annotated[FifoConfig | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig, Field(discriminator="type")]


class HostsConfig(Frozen):
    """How trials share bases; it changes the speed, not the results."""

    num_slots: Annotated[int, Field(ge=1)] = 8
    """Trials that one host trains at once."""
    max_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of a slot; null: the largest in the space."""
    token_budget: Annotated[int, Field(ge=1)] = 8192
    """Tokens of one forward, over all members."""
    run_ahead: Annotated[int, Field(ge=0)] = 1
    """Reports that a member may train ahead while the scheduler thinks; what it then refuses is thrown away."""
    num_waiting: Annotated[int, Field(ge=0)] | None = None
    """Trials under way that wait for a slot, so that none is ever empty. null: twice as many as there are slots; once
    where the searcher learns from results, and so must not be far ahead of them; all trials under hyperband and pbt,
    which compare those that are under way; half as many where some trials can't share a base, so that each is a
    process. Each trial under way keeps its last state on a host's disk."""
    max_hosts: Annotated[int, Field(ge=1)] | None = None
    """Hosts of one base; null: one a GPU, or one on CPUs."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 30.0
    """Least time between two checkpoints of a trial: what is lost at most when a host dies."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that a trial returns from its checkpoint after a process died under it."""
    lease_s: Annotated[float, Field(gt=0)] = 120.0
    """A member whose trial has not been heard of for so long gives its place back."""


class FinalConfig(Frozen):
    """What is done with the best trials."""

    top_k: Annotated[int, Field(ge=1)] = 3
    """Trials scored on the test rows, best by validation first; each method's best, the Pareto front and the baseline
    are scored too."""
    publish: bool = True
    """Put the winner into the registry under the study's name, each method's best under `<study>-<method>`, and the
    Pareto front under `<study>-front`."""


class StudyConfig(Frozen):
    """A search over trials."""

    name: AdapterName
    """Names the study, its folder `<output.root>/studies/<name>` and the winner in the registry."""
    trial: dict[str, Any] = {}
    """What all trials share: a trial's settings without a name."""
    space: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """Branches: fragments of a trial in which a leaf may be {choice: [...]}, {uniform: [low, high]},
    {loguniform: [low, high]} or {randint: [low, high]}; `method.alpha_over_rank` stands for alpha."""
    search: SearchConfig = SearchConfig()
    scheduler: Scheduler = AshaConfig()
    hosts: HostsConfig = HostsConfig()
    final: FinalConfig = FinalConfig()

    @model_validator(mode="after")
    def _every_branch_makes_trials(self) -> StudyConfig:
        if "name" in self.trial:
            raise ConfigError("trial.name: a study names its trials itself; remove it")
        self.baseline  # noqa: B018
        for index in range(len(self.search.warm_start)):
            self.resolve({"warm_start": index})
        for index in range(len(self.space)):
            self._check_branch(index)
        mixed = len(self.space) > 1 or self.search.warm_start or self.search.algorithm != "random"
        if isinstance(self.scheduler, PbtConfig) and mixed:
            raise ConfigError(
                "scheduler.type=pbt copies weights between the trials of one population: it needs a space of one "
                "branch, search.algorithm=random and no search.warm_start"
            )
        return self

    @property
    def baseline(self) -> TrialConfig:
        """What a user would train without a search: the first warm start, else `trial` as it stands."""
        return self.resolve({"warm_start": 0})

    @property
    def num_trials(self) -> int:
        if self.search.num_trials is not None:
            return self.search.num_trials
        if self.search.algorithm != "grid":
            return 16
        return self.num_warm_starts + sum(1 for knobs in self.knobs for _ in grid(knobs))

    @property
    def num_warm_starts(self) -> int:
        """The baseline is one of them; a population has none, for its trials must be able to become one another."""
        return 0 if isinstance(self.scheduler, PbtConfig) else max(1, len(self.search.warm_start))

    @property
    def knobs(self) -> list[dict[str, Knob]]:
        """Each branch's knobs by dotted name."""
        return [knobs_of(branch) for branch in self.space]

    def resolve(self, point: Point, number: int = 0) -> TrialConfig:
        """The trial at a point.

        Raises:
            IncompatibleError: its settings exclude each other. ConfigError: one of them is wrong by itself.
        """
        if "warm_start" in point:
            at = int(point["warm_start"])
            fragment: Tree = self.search.warm_start[at] if self.search.warm_start else {}
            origin = f"search.warm_start[{at}]" if self.search.warm_start else "trial"
        else:
            branch = int(point["branch"])
            values = {name: point[name] for name in knobs_of(self.space[branch])}
            fragment, origin = place(self.space[branch], values), f"space[{branch}]"
        tree = merge(self.trial, fragment)
        metric = tree.get("eval", {}).get("metric", self.search.metric)
        if metric != self.search.metric:
            raise ConfigError(f"{origin}: eval.metric={metric} is not search.metric={self.search.metric}; remove it")
        tree = merge(tree, {"eval": {"metric": metric}})
        return parse(TrialConfig, with_alpha(tree) | {"name": f"{self.name}-{number:04}"}, origin)

    def members(self) -> Iterator[TrialConfig]:
        """Trials that together show the space: each end of each knob. For how large hosts must be, and how many."""
        for index in range(self.num_warm_starts):
            yield self.resolve({"warm_start": index})
        for index, knobs in enumerate(self.knobs):
            for values in probes(knobs):
                try:
                    yield self.resolve({"branch": index, **values})
                except IncompatibleError:
                    continue  # the searcher's to refuse

    def _check_branch(self, index: int) -> None:
        """Refuse a branch with a wrong setting, or whose every trial would be refused."""
        origin = f"space[{index}]"
        try:
            knobs = knobs_of(self.space[index])
            for name, knob in knobs.items():
                if isinstance(knob, (Uniform, LogUniform)) and is_whole_number(TrialConfig, name):
                    raise ConfigError(_no_fractions(name, knob))
            if self.search.algorithm == "grid":
                next(grid(knobs))
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        method = self.space[index].get("method", {})
        if isinstance(method, dict) and "alpha" in method and "alpha_over_rank" in method:
            raise ConfigError(f"{origin}: method.alpha and method.alpha_over_rank exclude each other; remove one")
        refusals, allowed = [], 0
        for values in probes(knobs):
            try:
                self.resolve({"branch": index, **values})
                allowed += 1
            except IncompatibleError as error:
                refusals.append(error)
        if not allowed:
            raise IncompatibleError(f"{origin}: none of its trials is possible: {refusals[0]}")


def _no_fractions(name: str, knob: Uniform | LogUniform) -> str:
    (kind,) = type(knob).model_fields
    low, high = (f"{bound:.0f}" for bound in knob.bounds)
    return (
        f"{name}.{kind}: {name} is a whole number, and {kind} draws others too; allowed: randint or choice, for "
        f"example {{randint: [{low}, {high}]}}"
    )


def is_fusable(trial: TrialConfig) -> bool:
    """Whether it can be a host's member."""
    method = trial.method
    # pissa, olora and orthogonal begin from a decomposition, and the first two rewrite the shared base
    plain = getattr(method, "init", "default") in ("default", "gaussian")
    # nor has a bank places for experts, which are no layers
    plain = plain and not getattr(method, "experts", None)
    # a scaler of gradients and recomputed activations would have to be each member's own
    shared = trial.compute.precision != "fp16" and not trial.compute.activation_checkpointing
    return COMPATIBLE[method.type].fusable and plain and shared and trial.quantization.type != "int8"


def host_key(trial: TrialConfig) -> str:
    """Trials with the same key can share a host: one base, one data set, one way of measuring."""
    tree = dump(trial)
    measured = {name: tree["eval"][name] for name in ("metric", "max_rows", "batch_size")}
    shared = {name: tree[name] for name in ("model", "quantization", "data")}
    compute = {name: tree["compute"][name] for name in ("device", "precision", "cpus_per_worker")}
    return json.dumps([shared, measured, compute], sort_keys=True)
