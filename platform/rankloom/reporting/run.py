"""A single trial's report, from its run's folder; a run that trains or was stopped has one too."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from rankloom.config import TrialConfig, load
from rankloom.config.metric import HANDED_OVER, OWN, is_own
from rankloom.errors import RankloomError
from rankloom.events import Evaluated, StepFinished, WarningRaised, read_events
from rankloom.launch.results import TrialResult
from rankloom.launch.run_folder import EVENTS, RESULT, TRIAL
from rankloom.pages.pieces import Block, Cell, Facts, Line, Listing, Note, Page, Section, Table
from rankloom.registry.card import list_scorecard_rows
from rankloom.reporting.charts import draw_series
from rankloom.reporting.data import make_data_section, read_digests
from rankloom.reporting.verdict import contrast
from rankloom.training.resume_check import ORIGIN


def make_run_page(folder: Path) -> Page:
    """Return the report of the run in a folder.

    Raises:
        RankloomError: a file of the run can't be read.
    """
    trial, result = load(TrialConfig, folder / TRIAL), None
    if (folder / RESULT).is_file():
        try:
            result = TrialResult.model_validate_json((folder / RESULT).read_bytes())
        except ValueError:
            raise RankloomError(f"{folder / RESULT} is damaged; restore it, or remove it to report without") from None
    # a step that was repeated after a restart is there twice; the later one counts
    steps: dict[int, StepFinished] = {}
    evaluations: dict[int, Evaluated] = {}
    warnings = []
    for event in read_events(folder / EVENTS) if (folder / EVENTS).is_file() else ():
        match event:
            case StepFinished():
                steps[event.step] = event
            case Evaluated():
                evaluations[event.step] = event
            case WarningRaised(message):
                warnings.append(message)
    blocks: list[Block] = [Note(text=message, is_warning=True) for message in dict.fromkeys(warnings)]
    if result is not None and result.scorecard is not None:
        blocks.append(_build_scorecard(result))
    sections = [Section(id="scores", title="Test scores", blocks=tuple(blocks))]
    sections.append(
        Section(id="curves", title="Learning curves", blocks=tuple(_show_curves(trial, steps, evaluations)))
    )
    origins = read_digests(sorted(folder.rglob(ORIGIN)))
    sections.append(make_data_section(trial, origins))
    facts = tuple(_list_environment(trial, result, origins, steps, folder))
    sections.append(Section(id="environment", title="Environment", blocks=(Facts(facts=facts),)))
    sections.append(Section(id="repeat", title="Repeat it", blocks=tuple(_show_commands(trial, result, folder))))
    state = "not finished" if result is None else result.status
    return Page(
        title=trial.name,
        subject=f"trial, {trial.method.type} on {trial.model.id}, {state}",
        summary=tuple(_summarize(trial, result, steps)),
        sections=tuple(section for section in sections if section.blocks),
    )


def _summarize(trial: TrialConfig, result: TrialResult | None, steps: dict[int, StepFinished]) -> Iterator[str]:
    if result is None or result.scorecard is None:
        last = steps[max(steps)] if steps else None
        yield (
            f"The run is not finished: step {last.step} of {last.total_steps}."
            if last
            else "No step has been made yet."
        )
        return
    score = result.scorecard
    if score.base is None:
        yield f"{trial.name} has a loss of {score.result.loss:.4f} on {score.result.num_rows:,} test rows."
    else:
        yield contrast(score.result, score.base).make_sentence(trial.name, "the untuned base")
    yield f"It made {score.steps:,} steps in {score.train_s:,.0f} s and trains {score.trainable_parameters:,} numbers."


def _build_scorecard(result: TrialResult) -> Table:
    assert result.scorecard is not None
    lines = tuple(
        Line(cells=(Cell(text=name), Cell(text=ours), Cell(text=base)))
        for name, ours, base in list_scorecard_rows(result.scorecard)
    )
    return Table(caption="Measured on the test rows", header=("measure", "adapter", "base"), lines=lines)


def _show_curves(
    trial: TrialConfig, steps: dict[int, StepFinished], evaluations: dict[int, Evaluated]
) -> Iterator[Block]:
    ordered, scored = [steps[n] for n in sorted(steps)], [evaluations[n] for n in sorted(evaluations)]
    losses = {"training": [(each.step, each.loss) for each in ordered]}
    losses["validation"] = [(each.step, each.loss) for each in scored]
    if any(losses.values()):
        yield draw_series({name: points for name, points in losses.items() if points}, "loss", "curves-loss")
    metric = trial.eval.metric
    key = OWN if is_own(metric) else metric
    values = [(each.step, value) for each in scored if (value := getattr(each, key)) is not None]
    if key != "loss" and values:
        title = f"validation {metric.removeprefix(HANDED_OVER)}"
        yield draw_series({title: values}, title, "curves-metric")
    for field, title in (
        ("learning_rate", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_s", "tokens/s"),
    ):
        points = [(each.step, value) for each in ordered if (value := getattr(each, field))]
        if points:
            yield draw_series({title: points}, title, f"curves-{field.replace('_', '-')}", is_small=True)


def _list_environment(
    trial: TrialConfig,
    result: TrialResult | None,
    origins: dict[str, str],
    steps: dict[int, StepFinished],
    folder: Path,
) -> Iterator[tuple[str, str]]:
    if result is not None and result.scorecard is not None:
        yield "device", result.scorecard.device
    for versions in dict.fromkeys(origins.values()):
        yield "libraries", versions
    yield "model", f"{trial.model.id}, quantization {trial.quantization.type}"
    for digest in origins:
        yield "rows", digest
    if steps:
        yield "peak memory", f"{max(each.memory_bytes for each in steps.values()) / 1e6:,.0f} MB"
    yield "seed", str(trial.seed)
    yield "folder", str(folder)


def _show_commands(trial: TrialConfig, result: TrialResult | None, folder: Path) -> Iterator[Block]:
    again = ["rankloom", "train", str(folder / TRIAL), f"name={trial.name}-again"]
    yield Listing(title="The same trial again", text=shlex.join(again))
    if trial.eval.metric.startswith(HANDED_OVER):
        yield Note(text="Its metric came from Python code, which has to hand it over again.")
    if result is not None and result.adapter and result.registry:
        evaluate = ["rankloom", "evaluate", result.adapter, "--registry", result.registry]
        yield Listing(title="Score its adapter again", text=shlex.join(evaluate))
    yield Listing(title=TRIAL, text=(folder / TRIAL).read_text(encoding="utf-8"), is_folded=True)
