"""A study: a search over trials. `rankloom tune` reads it; it is checked without torch or ray.

Every trial is `trial` with a branch of `space` over it (see `space.py`). A sampled point becomes a `TrialConfig`, which
is validated like any other. Incompatible points are refused and counted, and the search continues.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from rankloom.config.base import Frozen, dump, is_whole_number, parse
from rankloom.config.metric import HANDED_OVER, OWN, Metric, Mode, check_mode, choose_mode, is_own
from rankloom.config.paths import IsFragment, IsPath
from rankloom.config.space import (
    Knob,
    LogUniform,
    Point,
    Tree,
    Uniform,
    count_grid,
    find_knobs,
    merge,
    place,
    probe_knobs,
    resolve_alpha,
    walk_grid,
)
from rankloom.config.trial import NAME_PATTERN, AdapterName, TrialConfig
from rankloom.errors import ConfigError, IncompatibleError

Fraction = Annotated[float, Field(gt=0, lt=1)]
Reduction = Annotated[int, Field(ge=2)]
TrialFragment = Annotated[dict[str, Any], IsFragment(TrialConfig)]
Objective = Literal["memory_bytes", "latency_ms"]
COSTS: tuple[str, ...] = get_args(Objective)
"""Costs of a trial in reports, the journal and results.parquet; None if not measured."""


class SearchConfig(Frozen):
    """The search algorithm, and what it optimises."""

    algorithm: Literal["random", "grid", "optuna", "hyperopt", "nevergrad", "bayesopt", "own"] = "random"
    """random; grid: every combination, in order; optuna: TPE. Ray Tune's hyperopt, nevergrad and
    bayesopt need the package of that name. They see the knobs of all branches at once, although those of the other
    branches have no effect on a trial; bayesopt only takes `uniform` knobs of a single branch. own: the searcher or
    sampler that Python code hands to `rankloom.tune`."""
    num_trials: Annotated[int, Field(ge=1)] | None = None
    """Number of trials, warm starts included; null: 16, in a grid every combination."""
    metric: Metric = "loss"
    """What is searched for, on the validation rows: loss, accuracy (needs classification data), or a function of your
    own as module:function (see eval.metric)."""
    mode: Mode | None = None
    """max or min, for a metric of your own; null: max. max for accuracy and min for loss may be omitted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the search. Trials keep `trial.seed`, so that they differ only in their settings."""
    objectives: list[Objective] = []
    """Costs to minimise as well: the result has the Pareto front of `metric` and these. optuna searches for the whole
    front, the other algorithms for `metric` alone. memory_bytes: weights of the base and the adapter. latency_ms: a
    decode step at batch 1 with the adapter, median of 32, measured once per trial while the study runs, to two digits.
    Both are measured at the trial's first report; for a trial that can't share a base at its end, so that one stopped
    by the scheduler is not on the front."""
    warm_start: list[TrialFragment] = []
    """Fragments of trials to try first. The first one is the study's baseline, which the winner is compared with.
    Without any, the baseline is `trial` itself, followed by a guess from "LoRA Without Regret" if a LoRA or DoRA
    branch permits it: alpha 32, all linear layers, learning rate 5e-4."""
    priors: list[Annotated[str, IsPath()]] = []
    """Earlier studies (a folder, or its results.parquet) whose trials the searcher learns from as if they were its own.
    Trials outside this space, or with another model, data, budget or metric, are skipped and counted."""

    @model_validator(mode="after")
    def _check_search(self) -> SearchConfig:
        check_mode(self.metric, self.mode)
        if len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives: each only once (given {self.objectives})")
        if self.priors and not self.learns:
            raise ConfigError(
                f"priors: algorithm={self.algorithm} learns nothing from earlier trials; use optuna, or warm_start"
            )
        return self

    @property
    def best(self) -> Mode:
        """Return whether the metric is best at its maximum or its minimum."""
        return choose_mode(self.metric, self.mode)

    @property
    def sign(self) -> int:
        """Return what makes a larger value the better one."""
        return 1 if self.best == "max" else -1

    @property
    def is_handed_over(self) -> bool:
        """Return whether the metric is a function that Python code handed over."""
        return self.metric.startswith(HANDED_OVER)

    @property
    def key(self) -> str:
        """Return what reports call the value that is searched for."""
        return OWN if is_own(self.metric) else self.metric

    @property
    def learns(self) -> bool:
        """Whether the points depend on the results so far."""
        return self.algorithm not in ("random", "grid")


class FifoConfig(Frozen):
    """Run every trial to its end."""

    type: Literal["fifo"] = "fifo"


class AshaConfig(Frozen):
    """Asynchronous successive halving (arXiv 1810.05934): only the best trials of each rung continue."""

    type: Literal["asha"] = "asha"
    grace: Fraction = 0.1
    """First rung, as a fraction of a trial's budget; each further rung is `reduction_factor` times later."""
    reduction_factor: Reduction = 3
    """Keep 1/reduction_factor of the trials at each rung."""
    brackets: Annotated[int, Field(ge=1)] = 1
    """Number of brackets, each with a later first rung."""


class HyperBandConfig(Frozen):
    """HyperBand (arXiv 1603.06560): brackets that wait for all their trials before each halving.

    Ray Tune fills the bracket with the fewest halvings first: with factor 3, the first five trials run to their end,
    the next eight are halved once, the next 15 twice.
    """

    type: Literal["hyperband"] = "hyperband"
    reduction_factor: Reduction = 3
    """Keep 1/reduction_factor of the trials in each halving."""


class MedianConfig(Frozen):
    """Stop a trial whose best result is worse than the median of the other trials' averages at the same step."""

    type: Literal["median"] = "median"
    grace: Fraction = 0.25
    """Fraction of its budget that every trial may use."""
    min_trials: Annotated[int, Field(ge=1)] = 3
    """Trials needed to form a median."""


class PbtConfig(Frozen):
    """Population based training (arXiv 1711.09846): the worst trials copy weights and settings from the best."""

    type: Literal["pbt"] = "pbt"
    interval: Fraction = 0.2
    """Time between two exploits, as a fraction of a trial's budget."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Fraction of the population that counts as worst, and as best."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability of resampling a knob instead of perturbing it."""


class OwnSchedulerConfig(Frozen):
    """The scheduler of Ray Tune's that Python code hands to `rankloom.tune`."""

    type: Literal["own"] = "own"
    is_population: bool = False
    """Whether it copies weights and settings between trials, as population based training does."""


Scheduler = Annotated[
    FifoConfig | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig | OwnSchedulerConfig,
    Field(discriminator="type"),
]


class HostsConfig(Frozen):
    """How trials share bases. It changes the speed, not the results."""

    num_slots: Annotated[int, Field(ge=1)] | None = None
    """Most trials that one host trains at once; null: as many as the study has for each host, up to 8 on a CPU and 32
    on a GPU. Where memory does not suffice, there are fewer."""
    max_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of a slot; null: the largest in the space."""
    token_budget: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in one forward pass, over all members; null: 8192 on a CPU, 32768 on a GPU. Where memory does not
    suffice, there are fewer."""
    run_ahead: Annotated[int, Field(ge=0)] = 1
    """Reports that a member may train ahead of the scheduler's decision; discarded if the scheduler stops it."""
    num_waiting: Annotated[int, Field(ge=0)] | None = None
    """Started trials that wait for a slot, so that no slot is ever empty. null: twice the number of slots; as many as
    slots if the searcher learns from results, so that it is not far ahead of them; all trials under hyperband and pbt,
    which compare started trials; half as many if some trials can't share a base, since each of those is a process.
    Every started trial keeps its last state on its host's disk."""
    max_hosts: Annotated[int, Field(ge=1)] | None = None
    """Most hosts per base; null: one per GPU, or without GPUs one per node."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 30.0
    """Least seconds between two checkpoints of a trial: the most work lost when a host dies."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of a trial from its checkpoint after the death of its process."""
    lease_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds without a sign of a trial after which its slot is freed."""

    def count_slots(self, num_trials: int, *, on_gpu: bool) -> int:
        """Return `num_slots`, or the default that null stands for; `num_trials` are the study's for each host."""
        return self.num_slots or max(1, min(num_trials, 32 if on_gpu else 8))

    def count_tokens(self, *, on_gpu: bool) -> int:
        """Return `token_budget`, or the default that null stands for."""
        return self.token_budget or (32_768 if on_gpu else 8192)


class FinalConfig(Frozen):
    """Scoring and publishing of the best trials."""

    top_k: Annotated[int, Field(ge=1)] = 3
    """Number of best trials by validation to score on the test rows; each method's best, the Pareto front and the
    baseline are scored too."""
    publish: bool = True
    """Publish the winner under the study's name, each method's best as `<study>-<method>`, and the Pareto front as
    `<study>-front`."""


class StudyConfig(Frozen):
    """A search over trials."""

    name: AdapterName
    """Name of the study, of its folder `<output.root>/studies/<name>`, and of the winner in the registry."""
    trial: TrialFragment = {}
    """Settings that all trials share: those of a trial, without a name."""
    space: Annotated[list[TrialFragment], Field(min_length=1)]
    """Branches: fragments of a trial in which a leaf may be {choice: [...]}, {uniform: [low, high]},
    {loguniform: [low, high]} or {randint: [low, high]}; `method.alpha_over_rank` stands for alpha. A branch's `name`
    stands for its method on the leaderboard, in results.parquet and in the registry, as `<study>-<name>`."""
    search: SearchConfig = SearchConfig()
    scheduler: Scheduler = AshaConfig()
    hosts: HostsConfig = HostsConfig()
    final: FinalConfig = FinalConfig()

    @model_validator(mode="after")
    def _check_branches(self) -> StudyConfig:
        if "name" in self.trial:
            raise ConfigError("trial.name: a study names its trials itself; remove it")
        for index in range(max(1, len(self.search.warm_start))):  # without any, `trial` itself
            self.resolve({"warm_start": index})
        for origin, fragments in (("search.warm_start", self.search.warm_start), ("space", self.space)):
            for index, fragment in enumerate(fragments):
                _check_label(fragment, f"{origin}[{index}]")
        for index in range(len(self.space)):
            self._check_branch(index)
        mixed = len(self.space) > 1 or self.search.warm_start or self.search.algorithm != "random"
        if self.is_population and mixed:
            raise ConfigError(
                "scheduler.type=pbt copies weights between the trials of one population: it needs a space of one "
                "branch, search.algorithm=random and no search.warm_start"
            )
        return self

    @cached_property
    def baseline(self) -> TrialConfig:
        """The trial that a user would train without a search: the first warm start, else `trial` itself."""
        return self.resolve({"warm_start": 0})

    @property
    def is_population(self) -> bool:
        """Return whether the scheduler copies weights between trials, which therefore are drawn at once."""
        return isinstance(self.scheduler, PbtConfig) or (
            isinstance(self.scheduler, OwnSchedulerConfig) and self.scheduler.is_population
        )

    @cached_property
    def num_trials(self) -> int:
        if self.search.num_trials is not None:
            return self.search.num_trials
        if self.search.algorithm != "grid":
            return 16
        return self.num_warm_starts + sum(map(count_grid, self.knobs))

    @property
    def num_warm_starts(self) -> int:
        """Number of warm starts, the baseline included; 0 with pbt, whose trials must be able to become one another."""
        return 0 if self.is_population else max(1, len(self.search.warm_start))

    @cached_property
    def knobs(self) -> list[dict[str, Knob]]:
        """Each branch's knobs, by dotted name."""
        return [find_knobs(branch) for branch in self.space]

    def __copy__(self) -> StudyConfig:
        """Copy the settings alone: what was computed from them may not hold for the copy's."""
        copy = super().__copy__()
        for name in copy.__dict__.keys() - StudyConfig.model_fields.keys():
            del copy.__dict__[name]
        return copy

    def resolve(self, point: Point, number: int = 0) -> TrialConfig:
        """Return the trial at a point.

        Raises:
            IncompatibleError: its settings exclude each other.
            ConfigError: one of them is wrong.
        """
        if "warm_start" in point:
            at = int(point["warm_start"])
            fragment = self._get_fragment(point)
            origin = f"search.warm_start[{at}]" if self.search.warm_start else "trial"
        else:
            branch = int(point["branch"])
            values = {name: point[name] for name in self.knobs[branch]}
            fragment, origin = place(self.space[branch], values), f"space[{branch}]"
        tree = merge(self.trial, fragment)
        metric = tree.get("eval", {}).get("metric", self.search.metric)
        if metric != self.search.metric:
            raise ConfigError(f"{origin}: eval.metric={metric} is not search.metric={self.search.metric}; remove it")
        own = {"mode": self.search.best} if is_own(metric) else {}
        tree = merge(tree, {"eval": {"metric": metric, **own}})
        return parse(TrialConfig, resolve_alpha(tree) | {"name": f"{self.name}-{number:04}"}, origin)

    def get_label(self, point: Point) -> str | None:
        """Return the name that a point's branch or warm start was given; None: its method stands for it."""
        name: str | None = self._get_fragment(point).get("name")
        return name

    def _get_fragment(self, point: Point) -> Tree:
        """Return the branch or the warm start that a point is of."""
        if "warm_start" not in point:
            return self.space[int(point["branch"])]
        return self.search.warm_start[int(point["warm_start"])] if self.search.warm_start else {}

    def probe_trials(self) -> Iterator[TrialConfig]:
        """Yield trials with each end of each knob; they decide the size and the number of hosts."""
        for index in range(self.num_warm_starts):
            yield self.resolve({"warm_start": index})
        for index, knobs in enumerate(self.knobs):
            for values in probe_knobs(knobs):
                try:
                    yield self.resolve({"branch": index, **values})
                except IncompatibleError:
                    continue  # the searcher skips it

    def _check_branch(self, index: int) -> None:
        """Raise ConfigError if a branch has a wrong setting, or none of its trials is possible."""
        origin = f"space[{index}]"
        try:
            knobs = find_knobs(self.space[index])
            for name, knob in knobs.items():
                if isinstance(knob, (Uniform, LogUniform)) and is_whole_number(TrialConfig, name):
                    raise ConfigError(_explain_no_fractions(name, knob))
            if self.search.algorithm == "grid":
                next(walk_grid(knobs))
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        method = self.space[index].get("method", {})
        if isinstance(method, dict) and "alpha" in method and "alpha_over_rank" in method:
            raise ConfigError(f"{origin}: method.alpha and method.alpha_over_rank exclude each other; remove one")
        refusals, allowed = [], 0
        for values in probe_knobs(knobs):
            try:
                self.resolve({"branch": index, **values})
                allowed += 1
            except IncompatibleError as error:
                refusals.append(error)
        if not allowed:
            raise IncompatibleError(f"{origin}: none of its trials is possible: {refusals[0]}")


def _check_label(fragment: Tree, origin: str) -> None:
    name = fragment.get("name", "a-name")
    if not isinstance(name, str) or not re.match(NAME_PATTERN, name):
        raise ConfigError(f"{origin}.name: expected lower-case letters, digits, '.', '_' and '-' (given {name!r})")


def _explain_no_fractions(name: str, knob: Uniform | LogUniform) -> str:
    (kind,) = type(knob).model_fields
    low, high = (f"{bound:.0f}" for bound in knob.bounds)
    return (
        f"{name}.{kind}: {name} is a whole number, but {kind} also draws fractions; allowed: randint or choice, for "
        f"example {{randint: [{low}, {high}]}}"
    )


def is_fusable(trial: TrialConfig) -> bool:
    """Return whether a trial can be a host's member."""
    method = trial.method
    # pissa, olora and orthogonal start from a decomposition, and the first two rewrite the shared base
    plain = getattr(method, "init", "default") in ("default", "gaussian")
    # a bank has no slots for experts, which are not layers
    plain = plain and not getattr(method, "experts", None)
    # each member would need its own gradient scaler and its own recomputed activations
    shared = trial.compute.precision != "fp16" and not trial.compute.activation_checkpointing
    return method.row.fusable and plain and shared


def make_host_key(trial: TrialConfig) -> str:
    """Return a key; trials with equal keys can share a host: one base, one data set, one evaluation."""
    tree = dump(trial)
    measured = {name: tree["eval"][name] for name in ("metric", "max_rows", "batch_size")}
    shared = {name: tree[name] for name in ("model", "quantization", "data")}
    compute = {name: tree["compute"][name] for name in ("device", "precision", "cpus_per_worker")}
    return json.dumps([shared, measured, compute], sort_keys=True)
