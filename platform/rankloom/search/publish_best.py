"""The end of a study, in the driver: choose the finalists, have them scored and published, and collect the result.

`score_finalists.py` is the other half, in a host's process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rankloom.config import StudyConfig
from rankloom.config.study import SearchConfig, is_fusable, make_host_key
from rankloom.errors import RankloomError, TrialError
from rankloom.events import OnEvent, PhaseStarted
from rankloom.hosts.hosts import share_out
from rankloom.launch import cluster
from rankloom.launch.background import Background, watch
from rankloom.launch.channel import Channel
from rankloom.launch.failures import to_failure
from rankloom.search.dedicated import ADAPTERS, build_dedicated_run, read_own_scorecard
from rankloom.search.finalists import Finalist, FinalistScore
from rankloom.search.journal import Journal
from rankloom.search.leaderboard import Leaderboard, TrialState
from rankloom.search.results import ScoredTrial, ValidationScore

Naming = Callable[[TrialState, Leaderboard], list[str]]
"""Returns the names to publish a finalist under."""


@dataclass(frozen=True, kw_only=True)
class StudyEnd:
    """The fields of a `StudyResult` that the scored finalists decide."""

    winner: ScoredTrial
    front: tuple[ScoredTrial, ...]
    baseline: ScoredTrial | None
    finalists: tuple[ScoredTrial, ...]
    registry: str
    beats_baseline: bool | None


def finish(
    study: StudyConfig, folder: Path, journal: Journal, hosts: Any, tell: OnEvent, *, naming: Naming | None = None
) -> StudyEnd:
    """Score the finalists on the test rows and publish the winners.

    Args:
        naming: chooses the names to publish under; None: `choose_names`.

    Raises:
        TrialError: none of them could be scored.
    """
    import ray

    leaderboard = journal.leaderboard
    finalists = leaderboard.choose_finalists()
    for trial in finalists:
        if not is_fusable(trial.config) and trial.status == "stopped":
            tell(PhaseStarted("export", f"{trial.config.name}, which was stopped early"))
            cpus = share_out(study, cluster.list_alive_nodes()).dedicated_cpus
            with suppress(RankloomError):  # without an adapter, the scoring reports why
                build_dedicated_run(study, trial.config, trial.id, folder, cpus).finish()
    memory = max((stats.memory_bytes for stats in journal.host_stats.values()), default=0)
    work = [
        Finalist(
            trial=trial.config,
            folder=str(folder / ADAPTERS / trial.id),
            names=(naming or choose_names)(trial, leaderboard) if study.final.publish else [],
            steps=best.step,
            tokens=best.tokens,
            train_s=best.train_s,
            memory_bytes=memory,
            own_run=read_own_scorecard(trial.config, trial.id, folder),
        )
        for trial in finalists
        if (best := trial.find_best(study.search))
    ]
    channel = ray.remote(Channel).options(**cluster.pin_to_this_node()).remote()
    groups: dict[str, list[int]] = {}
    for i, trial in enumerate(finalists):
        groups.setdefault(make_host_key(trial.config), []).append(i)
    chosen = ray.get(hosts.choose.remote([finalists[group[0]].config for group in groups.values()]))
    begun = [
        host.work.remote(score_remotely, study.name, [work[i] for i in group], channel)
        for host, group in zip(chosen, groups.values(), strict=True)
    ]
    scoring = Background(lambda: ray.get(begun))
    watch(scoring, channel, tell)
    try:
        scored = dict(zip(chain(*groups.values()), chain(*scoring.result()), strict=True))
    except Exception as error:
        cause = getattr(error, "cause", error)
        raise to_failure(cause if isinstance(cause, Exception) else error).error from None
    rows = tuple(_build_row(leaderboard, trial, scored[i]) for i, trial in enumerate(finalists))
    sound = [row for row in rows if row.error is None]
    if not sound:
        raise TrialError(f"none of the best trials could be scored: {rows[0].error}")
    winner, first = sound[0], leaderboard.baseline
    baseline = next((row for row in sound if first is not None and row.trial == first.id), None)
    return StudyEnd(
        winner=winner,
        front=tuple(row for row in sound if row.on_front),
        baseline=baseline,
        finalists=rows,
        registry=study.baseline.output.registry_root,
        beats_baseline=is_better(winner, baseline, study.search),
    )


def score_remotely(study: str, work: list[Finalist], channel: Any) -> list[FinalistScore]:
    """Score in a host's process, since the driver has no torch."""
    import ray

    from rankloom.search.score_finalists import score_finalists

    return score_finalists(study, work, lambda event: ray.get(channel.push.remote([event])))


def choose_names(trial: TrialState, leaderboard: Leaderboard) -> list[str]:
    """Return the names to publish a finalist under: the study's for the winner, and its method's or the front's."""
    ranking = leaderboard.list_candidates()
    names = [leaderboard.study.name] if trial is ranking[0] else []
    if trial is next(other for other in ranking if other.method == trial.method):
        names.append(f"{leaderboard.study.name}-{trial.method}")
    if trial in leaderboard.find_front():
        names.append(f"{leaderboard.study.name}-front")
    return names


def is_better(winner: ScoredTrial, baseline: ScoredTrial | None, search: SearchConfig) -> bool | None:
    """Return whether the winner is better on the test rows than the baseline, a trial without a search.

    None if they are the same trial, or if the baseline failed.
    """
    if baseline is None or baseline.trial == winner.trial:
        return None
    assert winner.scorecard is not None
    assert baseline.scorecard is not None
    ours, theirs = winner.scorecard.result, baseline.scorecard.result
    if search.key != "loss" and (mine := getattr(ours, search.key)) and (other := getattr(theirs, search.key)):
        return bool(search.sign * mine.value > search.sign * other.value)
    return ours.loss < theirs.loss


def _build_row(leaderboard: Leaderboard, trial: TrialState, score: FinalistScore) -> ScoredTrial:
    best = trial.find_best(leaderboard.study.search)
    return ScoredTrial(
        trial=trial.id,
        number=trial.number,
        name=trial.config.name,
        method=trial.method,
        point=trial.point,
        validation=ValidationScore(
            loss=best and best.loss,
            accuracy=best and best.accuracy,
            metric=best and best.metric,
            step=best and best.step,
        ),
        costs=trial.costs,
        on_front=trial in leaderboard.find_front(),
        scorecard=score.scorecard,
        published=tuple(score.published),
        error=score.error,
    )
