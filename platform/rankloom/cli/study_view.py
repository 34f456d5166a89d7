"""A study on a terminal: a live table, or plain lines in a pipe. Events in, text out."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rankloom.cli.progress import format_duration
from rankloom.cli.progress import format_event as run_lines
from rankloom.config.printable import escape_unprintable
from rankloom.events import Event, HostStatus, OnEvent, PhaseStarted, StudyStatus, TrialEnded, WarningRaised
from rankloom.reporting.verdict import contrast

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rankloom.registry.scorecard import Measures, Proportion
    from rankloom.search.results import ScoredTrial, StudyResult

STATUS_LINE_EVERY_S = 10.0
"""Seconds between two status lines in a pipe."""


@contextmanager
def show_study(*, on_stderr: bool) -> Iterator[OnEvent]:
    """Yield the function that shows an event; `on_stderr` leaves stdout to the result."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=on_stderr, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        stream = sys.stderr if on_stderr else sys.stdout
        yield PlainStudyView(lambda line: print(line, file=stream, flush=True)).show
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(event: Event) -> None:
            if isinstance(event, StudyStatus):
                live.update(build_status_table(event))
            for line in format_study_event(event):
                live.console.print(Text(line, style="dim" if isinstance(event, PhaseStarted) else ""))

        yield show


class PlainStudyView:
    """Writes a line for each trial that ends, and a status line every few seconds."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._next_status = 0.0

    def show(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, StudyStatus) and now >= self._next_status:
            self._next_status = now + STATUS_LINE_EVERY_S
            self._write(format_status(event))
        for line in format_study_event(event):
            self._write(line)


def format_study_event(event: Event) -> list[str]:
    """Return an event as lines of text; `format_status` and `build_status_table` format the status."""
    match event:
        case PhaseStarted() | WarningRaised():
            return run_lines(event)
        case TrialEnded():
            reason = f": {event.error}" if event.error else ""
            return [escape_unprintable(f"{event.name}  {event.method:<8} {event.status}{reason}", keep="\n\t")]
    return []


def format_status(status: StudyStatus) -> str:
    """Return a study's status as one line."""
    counts, best = status.counts, status.best
    parts = [
        f"{counts['done'] + counts['stopped'] + counts['failed']}/{status.total} trials "
        f"({counts['running']} running, {counts['stopped']} stopped early, {counts['failed']} failed)"
    ]
    if best:
        parts.append(f"best {format_value(best[0].value, status.metric)} by {best[0].name} ({best[0].method})")
    parts += [format_host(host) for host in status.hosts]
    parts.append(
        f"{format_duration(status.elapsed_s)}" + (f", eta {format_duration(status.eta_s)}" if status.eta_s else "")
    )
    return "; ".join(parts)


def format_host(host: HostStatus) -> str:
    """Return a host's slots and speed."""
    speed = host.tokens / host.train_s if host.train_s else 0.0
    return f"{host.label} {host.training}/{host.num_slots} slots, {speed:,.0f} tokens/s"


def build_status_table(status: StudyStatus) -> RenderableType:
    """Return the live table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    counts = status.counts
    ended = counts["done"] + counts["stopped"] + counts["failed"]
    eta = f"   eta {format_duration(status.eta_s)}" if status.eta_s else ""
    head = (
        f"{ended}/{status.total} trials   {counts['running']} running   {counts['done']} done   "
        f"{counts['stopped']} stopped early   {counts['failed']} failed   {status.refused} refused   "
        f"{format_duration(status.elapsed_s)}{eta}"
    )
    body = Table("best", "method", "settings", "at", status.metric, box=None, header_style="bold", pad_edge=False)
    for row in status.best:
        body.add_row(
            Text(row.name),
            Text(row.method),
            Text(row.settings, overflow="ellipsis", no_wrap=True),
            Text(f"{row.percent:.0f} % {'' if row.status == 'running' else row.status}"),
            Text(format_value(row.value, status.metric)),
        )
    feet = [f"{format_host(host)}, {host.waiting} waiting, {100 * host.occupancy:.0f} % full" for host in status.hosts]
    if status.rungs:
        feet.append("rungs   " + "   ".join(f"{rung:.0f} %: {reached}" for rung, reached in status.rungs))
    return Group(Text(head), body, *map(Text, feet))


def format_value(number: float, metric: str) -> str:
    """Return a metric's value as text; an accuracy in percent."""
    return f"{100 * number:.1f} %" if metric == "accuracy" else f"{number:.4f}"


def build_result_rows(result: StudyResult) -> list[tuple[str, ...]]:
    """Return the finalists, best by validation first, with a header; then the untuned base."""
    front = bool(result.front)
    costs = ("front", "memory", "latency") if front else ()
    rows: list[tuple[str, ...]] = [("trial", "method", "validation", "test", "test loss", *costs, "published")]
    baseline = result.baseline and result.baseline.trial
    for row in result.finalists:
        metric = next((name for name in ("metric", "accuracy") if getattr(row.validation, name) is not None), "loss")
        test, loss = format_measures(row.scorecard.result) if row.scorecard else (row.error or "", "")
        name = row.name + (" (baseline)" if row.trial == baseline else "")
        validation = getattr(row.validation, metric)
        measured = format_costs(row) if front else ()
        rows.append(
            (name, row.method, format_value(validation, metric), test, loss, *measured, ", ".join(row.published))
        )
    base = next((row.scorecard.base for row in result.finalists if row.scorecard), None)
    if base is not None:
        rows.append(("base, untuned", "", "", *format_measures(base), *("" for _ in costs), ""))
    return rows


def format_measures(measures: Measures) -> tuple[str, str]:
    """Return the accuracy or exact match on the test rows, and the loss."""
    share = measures.accuracy or measures.exact_match
    return format_interval(share) if share else "", f"{measures.loss:.4f}"


def format_costs(row: ScoredTrial) -> tuple[str, str, str]:
    """Return whether a finalist is on the Pareto front, and its memory and latency where measured."""
    memory, latency = (row.costs.get(name) for name in ("memory_bytes", "latency_ms"))
    return (
        "yes" if row.on_front else "",
        f"{memory / 1e6:,.1f} MB" if memory else "",
        f"{latency:g} ms" if latency else "",
    )


def format_interval(share: Proportion) -> str:
    """Return a share with its 95 % interval."""
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def format_result(result: StudyResult, config: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return where the study's results are, and the commands to run next."""
    if result.winner is None:
        return [f"stopped; {shlex.join(['rankloom', 'tune', config, *overrides, '--resume'])} continues from here"]
    winner = result.winner
    lines = [f"winner   {winner.name} ({winner.method}), chosen on the validation rows"]
    baseline = result.baseline
    if winner.scorecard and baseline and baseline.scorecard and baseline.trial != winner.trial:
        verdict = contrast(winner.scorecard.result, baseline.scorecard.result)
        lines.append(f"test     {verdict.make_sentence('the winner', f'the baseline {baseline.name}')}")
    lines += [f"study    {result.folder}", f"trials   {result.results}"]
    if winner.adapter and result.registry:
        lines.append(f"next     rankloom adapters promote {winner.adapter} --registry {shlex.quote(result.registry)}")
    return lines
