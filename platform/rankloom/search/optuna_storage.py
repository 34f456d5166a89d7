"""A study's trials as an Optuna study, for Optuna's analyses and for optuna-dashboard; no Ray.

The names of parameters are those that the samplers see: `0:method.rank` is the knob of branch 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankloom.config import StudyConfig
from rankloom.config.space import Point
from rankloom.events import TrialEnded, TrialStarted, TrialStatus, read_timed_events
from rankloom.search import flat_space
from rankloom.search.leaderboard import Leaderboard, TrialState, format_settings

if TYPE_CHECKING:
    import optuna

STATES: dict[TrialStatus, str] = {"running": "RUNNING", "done": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
Times = Mapping[str, tuple[float | None, float | None]]
"""Trial's id -> its first start and its end, in seconds since 1970."""


def write_optuna(leaderboard: Leaderboard, journal: Path, file: Path) -> None:
    """Write the trials to a file of Optuna's JournalStorage, which `optuna-dashboard FILE` opens."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    staged = file.with_suffix(".staged")
    staged.unlink(missing_ok=True)
    build_optuna(leaderboard, read_times(journal), JournalStorage(JournalFileBackend(str(staged))))
    staged.replace(file)


def build_optuna(leaderboard: Leaderboard, times: Times, storage: Any = None) -> optuna.Study:
    """Return the trials as an Optuna study; `storage`: one of Optuna's, None: memory."""
    import optuna

    study, search = leaderboard.study, leaderboard.study.search
    with silence_optuna():
        made = optuna.create_study(
            study_name=study.name,
            directions=[f"{search.best}imize", *("minimize" for _ in search.objectives)],
            storage=storage,
        )
        made.set_metric_names([search.metric, *search.objectives])
        for trial in sorted(leaderboard.trials.values(), key=lambda trial: trial.number):
            made.add_trial(_freeze(study, trial, *times.get(trial.id, (None, None))))
        return made


@contextmanager
def silence_optuna() -> Iterator[None]:
    """Silence Optuna: its log, and its warnings of new functions and of values that few trials have."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def read_times(journal: Path) -> Times:
    """Return when each trial of a journal started and ended."""
    starts: dict[str, float | None] = {}
    ends: dict[str, float | None] = {}
    for time, event in read_timed_events(journal):
        if isinstance(event, TrialStarted):
            starts.setdefault(event.trial, time)
        elif isinstance(event, TrialEnded):
            ends[event.trial] = time
    return {trial: (start, ends.get(trial)) for trial, start in starts.items()}


def _freeze(study: StudyConfig, trial: TrialState, start: float | None, end: float | None) -> optuna.trial.FrozenTrial:
    from optuna.trial import TrialState as State
    from optuna.trial import create_trial

    values, search = list_values(trial, study), study.search
    state = State[STATES[trial.status]]
    if state == State.COMPLETE and values is None:
        state = State.FAIL  # its costs were not measured
    content: dict[str, Any] = {
        "state": state,
        "values": values if state in (State.COMPLETE, State.PRUNED) else None,
        "intermediate_values": {each.step: each.get_value(search.key) for each in trial.reports},
        "user_attrs": {
            "name": trial.config.name,
            "method": trial.method,
            "settings": format_settings(trial),
            "tokens": trial.last.tokens if trial.last else 0,
            **({"error": trial.error} if trial.error else {}),
        },
    }
    try:
        params, distributions = list_parameters(study, trial.point)
        frozen = create_trial(params=params, distributions=distributions, **content)
    except ValueError:  # outside the space, where population based training has brought it
        frozen = create_trial(**content)
    if start is not None:  # else Optuna's default, now
        frozen.datetime_start = datetime.fromtimestamp(start)
        if state.is_finished() and end is not None:
            frozen.datetime_complete = datetime.fromtimestamp(end)
    return frozen


def list_values(trial: TrialState, study: StudyConfig) -> list[float] | None:
    """Return a trial's best value and its costs; None where one of them was not measured."""
    best = trial.find_best(study.search)
    if best is None or not trial.costs.keys() >= set(study.search.objectives):
        return None
    return [best.get_value(study.search.key), *(trial.costs[name] for name in study.search.objectives)]


def list_parameters(study: StudyConfig, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a point's parameters and their distributions; none for a warm start, which is not drawn from the space."""
    from optuna.trial import FixedTrial

    if "warm_start" in point:
        return {}, {}
    fixed = FixedTrial(flat_space.to_params(study, point))
    flat_space.suggest(study, fixed)
    return fixed.params, fixed.distributions
