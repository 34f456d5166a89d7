"""A run's progress: a live bar on a terminal, plain lines in a pipe. Events in, text out."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rankloom.config.printable import escape_unprintable
from rankloom.events import DataLoaded, Evaluated, Event, OnEvent, PhaseStarted, RunResumed, StepFinished, WarningRaised

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

STEP_LINE_EVERY_S = 5.0
"""Seconds between two step lines in a pipe."""


@contextmanager
def show_run(*, on_stderr: bool) -> Iterator[OnEvent]:
    """Yield the function that shows an event; `on_stderr` leaves stdout to the result."""
    from rich.console import Console

    console = Console(stderr=on_stderr, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        with _build_bar(console) as progress:
            yield LiveProgress(console, progress).show
    else:
        stream = sys.stderr if on_stderr else sys.stdout
        yield PlainProgress(lambda line: print(line, file=stream, flush=True)).show


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second raises KeyboardInterrupt."""
    stop = threading.Event()

    def interrupt(signum: int, frame: object) -> None:  # noqa: ARG001
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        # the console may hold its lock when the signal comes, so bypass it
        os.write(2, b"\nstopping after this step, with a checkpoint (or after the scoring, once begun); "
                 b"press Ctrl-C again to abort now\n")  # fmt: skip

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_at_events(show: OnEvent) -> Iterator[OnEvent]:
    """Yield `show`, which raises KeyboardInterrupt at the first event after Ctrl-C; a second Ctrl-C raises it at once.

    Raised anywhere, it may leave a lock of an import or of logging held, on which another thread then waits for ever.
    """
    interrupted = False

    def interrupt(signum: int, frame: object) -> None:  # noqa: ARG001
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        os.write(2, b"\nstopping; press Ctrl-C again to abort now\n")  # as in `stop_on_interrupt`

    def show_or_raise(event: Event) -> None:
        if interrupted:
            raise KeyboardInterrupt
        show(event)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield show_or_raise
    finally:
        signal.signal(signal.SIGINT, previous)


def format_event(event: Event) -> list[str]:
    """Return an event as lines of text; `format_step` formats steps."""
    return [escape_unprintable(line, keep="\n\t") for line in _format_lines(event)]


def _format_lines(event: Event) -> list[str]:
    match event:
        case PhaseStarted(phase, message):
            return [f"{phase:<8} {message}"]
        case DataLoaded(report):
            return _report_lines(report)
        case RunResumed(step):
            return [f"resumed at step {step}"]
        case WarningRaised(message):
            return [f"warning: {message}"]
        case Evaluated():
            accuracy = "" if event.accuracy is None else f"  accuracy {100 * event.accuracy:.1f} %"
            own = "" if event.metric is None else f"  metric {event.metric:.4f}"
            best = "  best so far" if event.best else ""
            return [f"step {event.step}  validation loss {event.loss:.4f}{accuracy}{own}{best}"]
    return []


def format_step(event: StepFinished) -> str:
    """Return a step as one line."""
    return f"step {event.step}/{event.total_steps}  {_format_numbers(event)}  eta {format_duration(event.eta_s)}"


def _format_numbers(event: StepFinished) -> str:
    return (
        f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {event.tokens_per_s:,.0f} tokens/s  "
        f"{event.memory_bytes / 1e9:.1f} GB"
    )


def _report_lines(report: dict[str, Any]) -> list[str]:
    found = []
    for name, split in report["splits"].items():
        odd = [f"{split[key]} {key.replace('_', '-')}" for key in ("empty", "over_long", "truncated", "duplicates")]
        odd = [each for each in odd if not each.startswith("0 ")]
        labels = f", {len(split['labels'])} labels" if split.get("labels") else ""
        found.append(
            f"{name:<10} {split['rows']:,} rows, {split['trained_tokens']:,} of {split['tokens']:,} tokens trained on, "
            f"longest {split['max_length']}{labels}{'; ' + ', '.join(odd) if odd else ''}"
        )
    return found + [f"warning: {warning}" for warning in report["warnings"]]


def format_duration(seconds: float) -> str:
    """Return seconds as 59s, 2m05s or 1h02m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02}m"


class PlainProgress:
    """Writes one line per event; steps only every few seconds, and the last."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._next_step_line = 0.0

    def show(self, event: Event) -> None:
        if isinstance(event, StepFinished):
            now = time.monotonic()
            if now >= self._next_step_line or event.step == event.total_steps:
                self._next_step_line = now + STEP_LINE_EVERY_S
                self._write(format_step(event))
        for line in format_event(event):
            self._write(line)


class LiveProgress:
    """Prints lines, and a bar below them while steps run."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task: TaskID | None = None

    def show(self, event: Event) -> None:
        from rich.text import Text

        if isinstance(event, StepFinished):
            if self._task is None:
                self._task = self._progress.add_task("train", total=event.total_steps, numbers="", eta="")
            eta = f"eta {format_duration(event.eta_s)}"
            self._progress.update(self._task, completed=event.step, numbers=_format_numbers(event), eta=eta)
        elif isinstance(event, PhaseStarted) and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        for line in format_event(event):
            style = "yellow" if line.startswith("warning") else "dim" if isinstance(event, PhaseStarted) else ""
            self._console.print(Text(line, style=style))


def _build_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24),
        TextColumn("{task.fields[numbers]}"), TextColumn("{task.fields[eta]}"),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)
