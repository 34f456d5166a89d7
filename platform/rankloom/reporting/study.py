"""A study's report, from what is in its folder; a study that runs or was stopped has one too."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from rankloom.config import StudyConfig, load
from rankloom.config.metric import HANDED_OVER
from rankloom.config.space import Choice, Knob, LogUniform
from rankloom.config.study import OwnSchedulerConfig
from rankloom.errors import RankloomError
from rankloom.pages.pieces import Block, Facts, Listing, Note, Page, Section
from rankloom.reporting.charts import (
    draw_curves,
    draw_effect,
    draw_front,
    draw_importances,
    draw_parallel,
    draw_timeline,
)
from rankloom.reporting.data import make_data_section, read_digests
from rankloom.reporting.importance import MIN_TRIALS, measure_importances
from rankloom.reporting.tables import build_leaderboard, build_test_scores
from rankloom.reporting.trials import Axis, Goal, ReportedTrial, Stay, format_knob
from rankloom.reporting.verdict import contrast
from rankloom.search.leaderboard import Leaderboard, TrialState, format_settings
from rankloom.search.optuna_storage import Times, read_times
from rankloom.search.results import StudyResult
from rankloom.search.study_files import JOURNAL, OPTUNA, RESULT, STUDY
from rankloom.training.resume_check import ORIGIN, ORIGINS


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedStudy:
    """What a study's folder holds."""

    folder: Path
    config: StudyConfig
    leaderboard: Leaderboard
    times: Times
    result: StudyResult | None
    """None: the study is not finished."""
    trials: tuple[ReportedTrial, ...]
    """The best first, those without a report last."""
    goal: Goal

    @property
    def groups(self) -> list[str]:
        """The trials' methods, in the order of their colours."""
        return list(dict.fromkeys(trial.group for trial in self.trials))

    def find_trial(self, name: str | None) -> ReportedTrial | None:
        """Return the trial of a name."""
        return next((trial for trial in self.trials if trial.name == name), None)

    def title_branch(self, branch: int) -> str:
        """Return a branch's methods, with its number where several have the same."""
        titles = [
            " and ".join(dict.fromkeys(trial.group for trial in self.trials if trial.branch == number)) or "no trial"
            for number in range(len(self.config.space))
        ]
        return titles[branch] + (f", branch {branch}" if titles.count(titles[branch]) > 1 else "")


def make_study_page(folder: Path) -> Page:
    """Return the report of the study in a folder.

    Raises:
        RankloomError: a file of the study can't be read.
    """
    study = read_study(folder)
    counts = ", ".join(f"{count} {status}" for status, count in study.leaderboard.count_by_status().items() if count)
    state = "done" if study.result is not None else "not finished"
    return Page(
        title=study.config.name,
        subject=f"study, {state}: {counts or 'no trial yet'}",
        summary=tuple(_summarize(study)),
        sections=tuple(section for section in _make_sections(study) if section.blocks),
    )


def read_study(folder: Path) -> ReportedStudy:
    """Read a study's folder."""
    config = load(StudyConfig, folder / STUDY)
    leaderboard = Leaderboard.read(config, folder / JOURNAL)
    result = None
    if (folder / RESULT).is_file():
        try:
            result = StudyResult.model_validate_json((folder / RESULT).read_bytes())
        except ValueError:
            raise RankloomError(f"{folder / RESULT} is damaged; restore it, or remove it to report without") from None
    ranking = leaderboard.rank_trials()
    unranked = [trial for trial in leaderboard.trials.values() if not trial.curve]
    return ReportedStudy(
        folder=folder,
        config=config,
        leaderboard=leaderboard,
        times=read_times(folder / JOURNAL) if (folder / JOURNAL).is_file() else {},
        result=result,
        trials=tuple(_report_trial(trial, leaderboard, result) for trial in [*ranking, *unranked]),
        goal=Goal(config.search.metric.removeprefix(HANDED_OVER), config.search.best, config.search.key),
    )


def _report_trial(trial: TrialState, leaderboard: Leaderboard, result: StudyResult | None) -> ReportedTrial:
    search = leaderboard.study.search
    best = trial.find_best(search)
    value = best.get_value(search.key) if best else None
    scored = next((row for row in result.finalists if row.trial == trial.id), None) if result else None
    return ReportedTrial(
        name=trial.config.name,
        group=trial.method,
        settings=format_settings(trial),
        status=trial.status,
        value=value if value is not None and isfinite(value) else None,
        best=best,
        curve=tuple(trial.reports),
        branch=trial.point.get("branch"),
        knobs={name: value for name, value in trial.point.items() if name not in ("branch", "warm_start")},
        costs=trial.costs,
        on_front=trial in leaderboard.find_front(),
        is_baseline=trial is leaderboard.baseline,
        score=scored.scorecard if scored else None,
        published=scored.published if scored else (),
        error=trial.error,
    )


def _summarize(study: ReportedStudy) -> Iterator[str]:
    ranked = [trial for trial in study.trials if trial.value is not None]
    if not ranked:
        yield "No trial has reported yet."
        return
    best, result, goal = ranked[0], study.result, study.goal
    if result is None or result.winner is None:
        yield (
            f"The study is not finished. So far {best.name} ({best.group}, {best.settings}) has the best {goal.name} "
            f"on the validation rows, {goal.format(best.value)}, of {len(ranked)} trials."
        )
        return
    winner = study.find_trial(result.winner.name) or best
    baseline = study.find_trial(result.baseline.name) if result.baseline else None
    chosen = (
        f"{winner.name} ({winner.group}, {winner.settings}) was chosen among {len(ranked)} trials for its {goal.name} "
        f"on the validation rows, {goal.format(winner.value)}."
    )
    if baseline is None or winner.score is None:
        yield chosen
    elif baseline.name == winner.name:
        yield f"The search found nothing better than the baseline, {winner.name} ({winner.group})."
        yield chosen
    elif baseline.score is not None:
        verdict = contrast(winner.score.result, baseline.score.result)
        yield verdict.make_sentence(f"The winner {winner.name} ({winner.group})", f"the baseline {baseline.name}")
        yield chosen
    if winner.score is not None and winner.score.base is not None:
        yield contrast(winner.score.result, winner.score.base).make_sentence("The winner", "the untuned base")


def _make_sections(study: ReportedStudy) -> Iterator[Section]:
    trials, goal = study.trials, study.goal
    baseline = next((trial for trial in trials if trial.is_baseline), None)
    if any(trial.score for trial in trials):
        yield Section(id="scores", title="Test scores", blocks=(build_test_scores(trials, baseline),))
    yield Section(id="leaderboard", title="Leaderboard", blocks=(build_leaderboard(trials, goal),))
    if not any(trial.curve for trial in trials):
        return
    fields = dict.fromkeys([goal.key, "loss"])
    charts = (
        draw_curves(trials, key, f"validation {goal.name if key == goal.key else key}", f"curves-{key}")
        for key in fields
    )
    yield Section(id="curves", title="Learning curves", blocks=tuple(charts))
    yield Section(id="knobs", title="Knobs", blocks=tuple(_show_knobs(study)))
    yield Section(id="branches", title="Parallel coordinates", blocks=tuple(_show_branches(study)))
    yield Section(id="costs", title="Quality and cost", blocks=tuple(_show_costs(study)))
    yield Section(id="timeline", title="Timeline", blocks=tuple(_show_timeline(study)))
    origins = read_digests([*(study.folder / ORIGINS).glob(f"*/{ORIGIN}")])
    yield make_data_section(study.config, origins)
    yield Section(
        id="environment", title="Environment", blocks=(Facts(facts=tuple(_list_environment(study, origins))),)
    )
    yield Section(id="repeat", title="Repeat it", blocks=tuple(_show_commands(study)))


def _show_knobs(study: ReportedStudy) -> Iterator[Block]:
    """Yield the importance of the knobs, then the effect of each; a knob of several branches has one chart."""
    drawn = [trial for trial in study.trials if trial.branch is not None and trial.value is not None]
    if not drawn or not any(study.config.knobs):
        return
    shares = measure_importances(study.leaderboard)
    if shares:
        yield draw_importances({_title_knob(study, name): share for name, share in shares.items()})
        yield Note(
            text=f"How much each knob decides whether a trial is among the best, by PED-ANOVA over {len(drawn)} "
            f"trials; a trial that was stopped counts with its best value until then."
        )
    else:
        yield Note(
            text=f"The importance of the knobs needs {MIN_TRIALS} trials with different values ({len(drawn)} here)."
        )
    axes: dict[str, list[Axis]] = {}
    for knobs in study.config.knobs:
        for name, knob in knobs.items():
            axes.setdefault(name, []).append(make_axis(name, knob))
    for number, found in enumerate(axes.values()):
        yield draw_effect(drawn, _join(found), study.goal, f"effect-{number}")


def _title_knob(study: ReportedStudy, parameter: str) -> str:
    branch, colon, name = parameter.partition(":")
    if not colon:
        return "which branch"
    return f"{name} ({study.title_branch(int(branch))})" if len(study.config.space) > 1 else name


def _show_branches(study: ReportedStudy) -> Iterator[Block]:
    for branch, knobs in enumerate(study.config.knobs):
        axes = [make_axis(name, knob) for name, knob in knobs.items()]
        trials = [
            trial
            for trial in study.trials
            if trial.branch == branch
            and trial.value is not None
            and all(axis.holds(trial.knobs.get(axis.name)) for axis in axes)
        ]
        if len(trials) > 1 and knobs:
            title = f"{study.title_branch(branch)}: {len(trials)} trials"
            yield draw_parallel(trials, axes, study.goal, title, f"parallel-{branch}")


def make_axis(name: str, knob: Knob) -> Axis:
    """Return a knob's axis."""
    if isinstance(knob, Choice):
        choices = tuple(dict.fromkeys(format_knob(value) for value in knob.choice))
        return Axis(name=name, is_log=False, choices=choices, low=0.0, high=len(choices) - 1.0)
    low, high = knob.bounds
    return Axis(name=name, is_log=isinstance(knob, LogUniform), choices=None, low=low, high=high)


def _join(axes: list[Axis]) -> Axis:
    """Return one axis for a knob that several branches have, perhaps with other values.

    A knob that is a choice in one branch and a range in another, which is of numbers, becomes a range.
    """
    if all(axis.choices is not None for axis in axes):
        choices = tuple(dict.fromkeys(choice for axis in axes for choice in axis.choices or ()))
        return replace(axes[0], choices=choices, high=len(choices) - 1.0)
    ranges = [axis for axis in axes if axis.choices is None]
    low, high = min(axis.low for axis in ranges), max(axis.high for axis in ranges)
    return replace(ranges[0], low=low, high=high)


def _show_costs(study: ReportedStudy) -> Iterator[Block]:
    measured = [name for name in ("memory_bytes", "latency_ms") if any(name in trial.costs for trial in study.trials)]
    for name in measured:
        yield draw_front(study.trials, name, study.goal)
    if measured:
        yield Note(text="Large and joined: no other trial is as good in both and better in one of these two.")
    else:
        yield Note(
            text="Memory and latency of each trial are measured with search.objectives: [memory_bytes, latency_ms]."
        )


def _show_timeline(study: ReportedStudy) -> Iterator[Block]:
    stays = list(list_stays(study))
    if stays:
        yield draw_timeline(stays, study.groups)


def list_stays(study: ReportedStudy) -> Iterator[Stay]:
    """Yield each trial's stays in the slots of hosts, where a finished study recorded them; else from start to end."""
    seats = [(host.label, seat) for host in (study.result.hosts if study.result else ()) for seat in host.seats]
    starts = [start for start, _ in study.times.values() if start is not None]
    starts += [seat.start for _, seat in seats]
    ends = [end for _, end in study.times.values() if end is not None]
    if not starts or not ends:
        return
    begin, last, seated = min(starts), max(ends), set()
    for label, seat in seats:
        state = study.leaderboard.trials.get(seat.trial)
        if state is not None:
            seated.add(state.id)
            yield Stay(
                lane=f"{label} slot {seat.slot}",
                trial=state.config.name,
                group=state.method,
                start_s=seat.start - begin,
                end_s=max(seat.start, seat.end or last) - begin,
            )
    for id, state in study.leaderboard.trials.items():
        start, end = study.times[id]
        if id not in seated and start is not None:
            lane = "own process" if seated else state.config.name
            end = last if end is None else end
            yield Stay(
                lane=lane,
                trial=state.config.name,
                group=state.method,
                start_s=start - begin,
                end_s=max(start, end) - begin,
            )


def _list_environment(study: ReportedStudy, origins: dict[str, str]) -> Iterator[tuple[str, str]]:
    scored = next((trial.score for trial in study.trials if trial.score is not None), None)
    if scored is not None:
        yield "device", scored.device
    for versions in dict.fromkeys(origins.values()):
        yield "libraries", versions
    yield "model", study.config.baseline.model.id
    for digest in origins:
        yield "rows", digest
    for host in study.result.hosts if study.result else ():
        speed = host.tokens / host.train_s if host.train_s else 0.0
        yield (
            host.label,
            (
                f"{host.num_slots} slots, {100 * host.occupancy:.0f} % full, {speed:,.0f} tokens/s, "
                f"{host.memory_bytes / 1e6:,.0f} MB at its peak"
            ),
        )
    yield "folder", str(study.folder)


def _show_commands(study: ReportedStudy) -> Iterator[Block]:
    config, folder = study.config, study.folder
    again = ["rankloom", "tune", str(folder / STUDY), f"name={config.name}-again"]
    yield Listing(title="The same study again", text=shlex.join(again))
    if (
        config.search.is_handed_over
        or config.search.algorithm == "own"
        or isinstance(config.scheduler, OwnSchedulerConfig)
    ):
        yield Note(text="Its metric, searcher or scheduler came from Python code, which has to hand it over again.")
    if (folder / OPTUNA).is_file():
        yield Listing(title="In optuna-dashboard", text=shlex.join(["optuna-dashboard", str(folder / OPTUNA)]))
    winner = study.result.winner if study.result else None
    if winner is not None and winner.adapter and study.result and study.result.registry:
        promote = ["rankloom", "adapters", "promote", winner.adapter, "--registry", study.result.registry]
        yield Listing(title="Promote the winner", text=shlex.join(promote))
    yield Listing(title=STUDY, text=(folder / STUDY).read_text(encoding="utf-8"), is_folded=True)
