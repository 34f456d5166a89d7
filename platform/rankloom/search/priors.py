"""Priors of a search: a good first guess, and the trials of earlier studies.

An earlier trial counts if a point of this space makes the same trial, with the same model, data, budget and measure.
The searcher then gets its result as if the trial had run here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankloom.config import TrialConfig, dump, parse
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.config.space import ALPHA_OVER_RANK, Choice, Knob, Point, RandInt, Tree
from rankloom.config.study import StudyConfig
from rankloom.errors import ConfigError, IncompatibleError
from rankloom.search.flat_space import BRANCH
from rankloom.search.samplers import PriorTrial

ALPHA, RATE = 32.0, 5e-4
"""LoRA Without Regret (Thinking Machines, 2025): on all linear layers, with alpha 32 and 1/r scaling, the best rate is
about ten times full fine-tuning's, whatever the rank. Full fine-tuning's usual rate is 5e-5, hence 5e-4."""
GUESS = {
    "method.alpha": ALPHA, "method.target_modules": "all-linear", "method.rslora": False, "method.init": "default",
    "optim.learning_rate": RATE, "optim.loraplus_ratio": 1.0,
}  # fmt: skip
RATIO = f"method.{ALPHA_OVER_RANK}"
NOTHING = object()
"""The value of a setting that a tree does not have."""


@dataclass(frozen=True)
class PriorCounts:
    """How many earlier trials the searcher got, and how many were left out."""

    told: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """By reason."""


@dataclass(frozen=True)
class Priors:
    """The points that the searcher begins with."""

    guess: Point | None
    priors: list[PriorTrial]
    skipped: dict[str, int]
    """Reason -> number of earlier trials left out for it."""

    @property
    def points(self) -> list[PriorTrial]:
        return [*self.priors, *([PriorTrial(self.guess, None)] if self.guess else [])]

    @property
    def counts(self) -> PriorCounts:
        return PriorCounts(len(self.priors), self.skipped)

    @classmethod
    def gather(cls, study: StudyConfig) -> Priors:
        """Gather a study's priors.

        Raises:
            ConfigError: one of `search.priors` is not a study.
        """
        return cls(guess_first(study), *read_priors(study))

    @classmethod
    def read(cls, file: Path) -> Priors:
        """Read the priors that a study began with; the earlier studies may be gone."""
        tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else asdict(cls(None, [], {}))
        return cls(tree["guess"], [PriorTrial(**each) for each in tree["priors"]], tree["skipped"])

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def guess_first(study: StudyConfig) -> Point | None:
    """Return a point of the first branch that permits the guidance, with its other knobs near the baseline's values.

    None if no branch permits it, if the baseline is this very trial, or if the study has its own warm starts.
    """
    if study.search.warm_start:
        return None
    baseline = dump(study.baseline)
    for branch, knobs in enumerate(study.knobs):
        near = {name: GUESS.get(name, _get_at(baseline, name)) for name in knobs}
        ranks = _sort_by_nearness(knobs["method.rank"], near["method.rank"]) if "method.rank" in knobs else [None]
        for rank in ranks:
            point: Point = {BRANCH: branch} | {name: _sort_by_nearness(knobs[name], near[name])[0] for name in knobs}
            point |= {} if rank is None else {"method.rank": rank}
            try:
                trial = study.resolve(point)
                if RATIO in knobs:
                    point[RATIO] = _sort_by_nearness(knobs[RATIO], ALPHA / trial.method.rank)[0]  # type: ignore[union-attr]
                    trial = study.resolve(point)
            except (ConfigError, IncompatibleError):
                continue
            if _is_guided(trial):
                return None if _are_alike(_strip_inessential(dump(trial)), _strip_inessential(baseline)) else point
    return None


def _is_guided(trial: TrialConfig) -> bool:
    method, optim = trial.method, trial.optim
    return (
        isinstance(method, (LoraConfig, DoraConfig))
        and (method.alpha, method.rslora, method.target_modules) == (ALPHA, False, "all-linear")
        and optim.loraplus_ratio == 1
        and RATE / 2 <= optim.learning_rate <= RATE * 2
    )


def _sort_by_nearness(knob: Knob, near: Any) -> Sequence[Any]:
    """Return a knob's values, the nearest first: all of a choice, only the nearest of a range."""
    number = isinstance(near, (int, float)) and not isinstance(near, bool)
    if isinstance(knob, Choice):
        if number and all(isinstance(value, (int, float)) for value in knob.choice):
            return sorted(knob.choice, key=lambda value: abs(value - near))
        return sorted(knob.choice, key=lambda value: not _fits(value, near))
    low, high = knob.bounds
    return [min(max(type(low)(near), low), high) if number else low]


def read_priors(study: StudyConfig) -> tuple[list[PriorTrial], dict[str, int]]:
    """Return the earlier trials that lie in this space, and the number left out for each reason.

    Raises:
        ConfigError: one of `search.priors` is not a study.
    """
    found, skipped = [], Counter[str]()
    metric = f"best_{study.search.key}"
    for place in study.search.priors:
        for row in _read_rows(Path(place).expanduser()):
            values: list[Any] = [row.get(name) for name in (metric, *study.search.objectives)]
            if row["status"] == "failed" or values[0] is None:
                skipped["failed, or measured otherwise"] += 1
            elif None in values:
                skipped["its costs were not measured"] += 1
            elif (point := locate(study, json.loads(row["config"]))) is None:
                skipped["not a trial of this space"] += 1
            else:
                found.append(PriorTrial(point, values))
    return found, dict(skipped)


def locate(study: StudyConfig, tree: Tree) -> Point | None:
    """Return the point of the space that makes this trial; None if there is none."""
    try:
        sought = _strip_inessential(dump(parse(TrialConfig, tree)))
    except (ConfigError, IncompatibleError):  # from another version of rankloom
        return None
    for branch, knobs in enumerate(study.knobs):
        axes = [list(_list_causes(knob, name, sought)) for name, knob in knobs.items()]
        for values in itertools.product(*axes):  # several only where choices hold whole sections
            point = {BRANCH: branch, **dict(zip(knobs, values, strict=True))}
            try:
                if _are_alike(_strip_inessential(dump(study.resolve(point))), sought):
                    return point
            except (ConfigError, IncompatibleError):
                continue
    return None


def _list_causes(knob: Knob, name: str, tree: Tree) -> Iterator[Any]:
    """Yield the knob's values that may have made this trial."""
    value = _get_at(tree, name)
    if name == RATIO and _get_at(tree, "method.alpha") is not NOTHING and _get_at(tree, "method.rank") is not NOTHING:
        value = _get_at(tree, "method.alpha") / _get_at(tree, "method.rank")
    if isinstance(knob, Choice):
        yield from (option for option in knob.choice if _fits(option, value))
    elif isinstance(value, (int, float)) and knob.bounds[0] <= value <= knob.bounds[1]:
        yield int(value) if isinstance(knob, RandInt) else float(value)


def _fits(option: Any, value: Any) -> bool:
    """Return whether a written setting (perhaps short, or without defaults) may have become this value."""
    if isinstance(value, Mapping):
        if isinstance(option, Mapping):
            return all(key in value and _fits(part, value[key]) for key, part in option.items())
        return option in (value.get("type", NOTHING), value.get("path", NOTHING))
    if isinstance(option, str) and isinstance(value, (int, float)):  # "8", which a trial reads as the number
        with suppress(ValueError):
            option = float(option)
    return _are_alike(option, value)


def _strip_inessential(tree: Tree) -> Tree:
    """Return the settings that decide a trial's result: not its name or where it ran."""
    measured = {name: tree["eval"][name] for name in ("metric", "max_rows")}
    return {key: tree[key] for key in ("model", "quantization", "data", "method", "optim", "budget", "seed")} | {
        "eval": measured
    }


def _are_alike(one: Any, other: Any) -> bool:
    """Return whether two values are equal, floats up to rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_are_alike(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _get_at(tree: Tree, name: str) -> Any:
    node: Any = tree
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return NOTHING
        node = node[part]
    return node


def _read_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    file = path / "results.parquet" if path.is_dir() else path
    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"search.priors: {path} is not a study with a results.parquet: {error}") from None
    if rows and not {"status", "config", "best_loss", "best_accuracy"} <= rows[0].keys():
        raise ConfigError(f"search.priors: {file} is not a study's results.parquet")
    return rows
