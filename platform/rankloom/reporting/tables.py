"""Tables of trials: the leaderboard by validation, and the scores on the test rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rankloom.pages.pieces import Cell, Line, Table
from rankloom.registry.scorecard import Measures, Scorecard
from rankloom.reporting.trials import Goal, ReportedTrial
from rankloom.reporting.verdict import contrast

Column = tuple[str, Callable[[ReportedTrial], Cell]]


def build_leaderboard(trials: Sequence[ReportedTrial], goal: Goal) -> Table:
    """Return all trials, in their order, with what the validation rows say of them."""
    columns: list[Column] = [
        ("trial", lambda trial: Cell(text=trial.name + (" (baseline)" if trial.is_baseline else ""))),
        ("method", lambda trial: Cell(text=trial.group)),
        ("settings", lambda trial: Cell(text=trial.settings)),
        ("status", lambda trial: Cell(text=f"{trial.status}: {trial.error}" if trial.error else trial.status)),
        (f"best {goal.name}", lambda trial: Cell(text=goal.format(trial.value), value=_sort_key(trial.value))),
    ]
    if goal.key != "loss":
        columns.append(("its loss", lambda trial: _format_number(trial.best.loss if trial.best else None, "{:.4f}")))
    columns += [
        ("at step", lambda trial: _format_number(trial.best.step if trial.best else None, "{:,}")),
        ("steps", lambda trial: _format_number(trial.curve[-1].step if trial.curve else None, "{:,}")),
        ("tokens", lambda trial: _format_number(trial.curve[-1].tokens if trial.curve else None, "{:,}")),
        ("training, s", lambda trial: _format_number(trial.curve[-1].train_s if trial.curve else None, "{:.1f}")),
    ]
    if any("memory_bytes" in trial.costs for trial in trials):
        columns.append(
            ("memory, MB", lambda trial: _format_number(_to_mega(trial.costs.get("memory_bytes")), "{:,.1f}"))
        )
    if any("latency_ms" in trial.costs for trial in trials):
        columns.append(("latency, ms", lambda trial: _format_number(trial.costs.get("latency_ms"), "{:g}")))
    if any(trial.on_front for trial in trials):
        columns.append(("front", lambda trial: Cell(text="yes" if trial.on_front else "")))
    caption = f"{len(trials)} trials by their best {goal.name} on the validation rows; {goal.direction}"
    return Table(caption=caption, header=_list_names(columns), lines=_build_lines(trials, columns), num_texts=4)


def build_test_scores(trials: Sequence[ReportedTrial], reference: ReportedTrial | None) -> Table:
    """Return the trials that were scored on the test rows, and the untuned base in the last line.

    Args:
        reference: the trial that the others are compared with; None: the untuned base.
    """
    scored = [trial for trial in trials if trial.score is not None]
    base = next((trial.score.base for trial in scored if trial.score and trial.score.base), None)
    other = reference.score.result if reference is not None and reference.score else base
    against = "baseline" if reference is not None else "base"
    lines = [
        Line(cells=(Cell(text=trial.name), Cell(text=trial.group), *_list_measures(trial.score.result, other),
                    _format_size(trial.score), Cell(text=", ".join(trial.published))), mark=trial.name)
        for trial in scored if trial.score
    ]  # fmt: skip
    if base is not None:
        cells = (Cell(text="base, untuned"), Cell(text=""), *_list_measures(base, other), Cell(text=""), Cell(text=""))
        lines.append(Line(cells=cells))
    rows = scored[0].score.result.num_rows if scored and scored[0].score else 0
    measures = (
        _name_score(base or other),
        "95 % interval",
        f"against the {against}",
        "macro F1",
        "loss",
        "retention loss",
        "latency, ms",
    )
    return Table(
        caption=f"Measured on {rows:,} test rows, which chose nothing; each verdict is one comparison, uncorrected",
        header=("trial", "method", *measures, "adapter, MB", "published"),
        lines=tuple(lines),
        num_texts=2,
    ).drop_empty_columns()


def _name_score(measures: Measures | None) -> str:
    if measures is None:
        return "score"
    if measures.metric is not None:
        return measures.metric.name
    return "accuracy" if measures.accuracy else "exact match" if measures.exact_match else "score"


def _list_measures(measures: Measures, other: Measures | None) -> tuple[Cell, ...]:
    share = measures.accuracy or measures.exact_match
    own = measures.metric
    value = own.value if own else share.value if share else None
    low, high = (own.low, own.high) if own else (share.low, share.high) if share else (None, None)
    form = "{:.4g}".format if own else lambda part: f"{100 * part:.1f} %"
    interval = "" if low is None or high is None else f"{form(low)} to {form(high)}"
    outcome = "" if other is None or other == measures else contrast(measures, other).outcome
    return (
        Cell(text="" if value is None else form(value), value=_sort_key(value)),
        Cell(text=interval, value=_sort_key(low)),
        Cell(text=outcome),
        _format_number(measures.macro_f1, "{:.3f}"),
        _format_number(measures.loss, "{:.4f}"),
        _format_number(measures.retention_loss, "{:.4f}"),
        _format_number(measures.latency_ms, "{:.1f}"),
    )


def _format_size(score: Scorecard) -> Cell:
    return _format_number(_to_mega(score.adapter_bytes), "{:,.2f}")


def _build_lines(trials: Sequence[ReportedTrial], columns: Sequence[Column]) -> tuple[Line, ...]:
    return tuple(Line(cells=tuple(cell(trial) for _, cell in columns), mark=trial.name) for trial in trials)


def _list_names(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(name for name, _ in columns)


def _format_number(value: float | None, form: str) -> Cell:
    return Cell(text="" if value is None else form.format(value), value=_sort_key(value))


def _sort_key(value: float | None) -> float | str:
    return "" if value is None else value


def _to_mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6
