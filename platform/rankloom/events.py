"""Events: what a run or a study reports to its caller, one frozen dataclass per kind.

    for event in read_events(run / "events.jsonl"):
        match event:
            case StepFinished(step=step, loss=loss):
                print(step, loss)

`rankloom.train(..., on_event=...)` and `rankloom.tune(..., on_event=...)` call back with these objects. A run writes
its own to events.jsonl, a study `TrialStarted`, `TrialEvaluated` and `TrialEnded` to journal.jsonl: one object a line,
with `v` (the schema's version), `time` (seconds since 1970) and `event` (the kind) before the event's own fields.
Version 1 names a field as the dataclass does. A reader accepts lines without `v`, which older releases wrote with the
same fields, and ignores unknown fields.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from rankloom.errors import RankloomError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

VERSION = 1
"""Version of the schema of events.jsonl and journal.jsonl."""
TrialStatus = Literal["running", "done", "stopped", "failed"]
"""done: a trial ran to its end; stopped: the scheduler ended it early; failed: it ended with an error."""


class _Printable:
    """Prints as its kind and the fields that are not None; `repr` shows all of them."""

    __slots__ = ()
    kind: ClassVar[str]

    def __str__(self) -> str:
        shown = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return "  ".join(
            [self.kind, *(f"{name}={_shorten(value)}" for name, value in shown.items() if value is not None)]
        )


def _shorten(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]} ..."


@dataclass(frozen=True, slots=True)
class PhaseStarted(_Printable):
    """A part of the work begins."""

    kind: ClassVar[str] = "phase"
    phase: str
    """launch, data, model, tune, train, export, score, publish, cost, priors or serve."""
    message: str
    """What begins, in words."""


@dataclass(frozen=True, slots=True)
class WarningRaised(_Printable):
    """Something is probably not as the user wants it; the work continues."""

    kind: ClassVar[str] = "warning"
    message: str
    """The warning, in words."""


@dataclass(frozen=True, slots=True)
class DataLoaded(_Printable):
    """The data set is rendered, split and checked."""

    kind: ClassVar[str] = "data"
    report: dict[str, Any]
    """`rankloom.data.check.DataReport` as plain data: `format`, `splits` (name to its counts of rows and tokens),
    `overlaps` (prompts that train shares with another split) and `warnings`."""


@dataclass(frozen=True, slots=True)
class RunResumed(_Printable):
    """A run resumes from a checkpoint; steps after it are repeated."""

    kind: ClassVar[str] = "resumed"
    step: int
    """Optimiser steps made before the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished(_Printable):
    """An optimiser step of a run is done."""

    kind: ClassVar[str] = "step"
    step: int
    """Its number, from 1."""
    total_steps: int
    """Steps that the budget allows."""
    epoch: float
    """Passes over the training rows so far."""
    loss: float
    """Mean cross-entropy per trained token of the step's rows, in nats."""
    learning_rate: float
    """Learning rate of the first parameter group."""
    grad_norm: float | None = None
    """L2 norm of the gradient before clipping; None where the method steps within the backward pass."""
    tokens: int
    """Tokens read so far, with prompts, without padding."""
    tokens_per_s: float
    """Speed of this step."""
    memory_bytes: int
    """Peak so far: allocated by torch on CUDA, the process's resident set on a CPU."""
    eta_s: float
    """Seconds to the last step, at the mean speed so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(_Printable):
    """A run's model is scored on the validation rows."""

    kind: ClassVar[str] = "eval"
    step: int
    """Optimiser steps made; 0: the untrained model."""
    loss: float
    """Mean cross-entropy per trained token, in nats."""
    accuracy: float | None = None
    """Share of rows with the right label, 0 to 1; None where `eval.metric` is loss."""
    metric: float | None = None
    """Value of `eval.metric`, where that is the user's own function."""
    best: bool
    """Whether it is the best so far; the untrained model never is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(_Printable):
    """A run ended, or stopped where it can be resumed. The fields from `scorecard` on are set when it is done."""

    kind: ClassVar[str] = "done"
    status: Literal["done", "interrupted"]
    """interrupted: `--resume` continues it."""
    name: str = ""
    """The trial's name."""
    steps: int
    """Optimiser steps made."""
    run: str | None = None
    """The run's folder or URL."""
    scorecard: dict[str, Any] | None = None
    """`rankloom.registry.scorecard.Scorecard` as plain data."""
    memory_bytes: int | None = None
    """Bytes of the base's weights with the adapter."""
    version: int | None = None
    """Version in the registry; None: not published."""
    registry: str | None = None
    """Root of the registry with the published version."""
    adapter: str | None = None
    """Folder or URL of the published version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A point of a trial's learning curve: the trial's state at one of its evaluations."""

    n: int
    """Number of the evaluation in its trial, from 1."""
    step: int
    """Optimiser steps made."""
    percent: float
    """Share of the trial's budget, 0 to 100."""
    loss: float
    """Mean cross-entropy per trained token of the validation rows, in nats."""
    accuracy: float | None = None
    """Share of validation rows with the right label, 0 to 1; None where `search.metric` is loss."""
    metric: float | None = None
    """Value of `search.metric`, where that is the user's own function."""
    train_loss: float
    """Loss of the last optimiser step, in nats per trained token."""
    tokens: int
    """Tokens trained on so far, with prompts, without padding."""
    train_s: float
    """Seconds of training so far: on a shared host, the trial's part."""
    best: bool = False
    """Whether it is the trial's best so far."""
    memory_bytes: float | None = None
    """Bytes that serving the adapter needs; None: not measured."""
    latency_ms: float | None = None
    """Milliseconds per generated token with the adapter; None: not measured."""

    def get_value(self, key: str) -> float:
        """Return the value that trials are compared by: the field `key` (`search.key`), else the loss."""
        value: float | None = getattr(self, key)
        return self.loss if value is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted(_Printable):
    """A trial of a study starts, or continues at another point of the space (population based training)."""

    kind: ClassVar[str] = "trial"
    trial: str
    """Its id, unique in the study."""
    name: str = ""
    """Its config's name; a journal without `v` has none."""
    method: str = ""
    """Its method with its base's quantisation: lora, qlora, dora, ...; a journal without `v` has none."""
    point: dict[str, Any]
    """Its values of the space's knobs, `number` (of the trial) and `refused` (points refused before it)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEvaluated(CurvePoint, _Printable):
    """A study's trial is scored on the validation rows."""

    kind: ClassVar[str] = "report"
    trial: str
    """Its id, unique in the study."""
    name: str = ""
    """Its config's name; a journal without `v` has none."""
    method: str = ""
    """Its method with its base's quantisation; a journal without `v` has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded(_Printable):
    """A study's trial ends."""

    kind: ClassVar[str] = "end"
    trial: str
    """Its id, unique in the study."""
    name: str = ""
    """Its config's name; a journal without `v` has none."""
    method: str = ""
    """Its method with its base's quantisation; a journal without `v` has none."""
    status: TrialStatus
    """done: at its end; stopped: by the scheduler; failed: with `error`."""
    error: str | None = None
    """Why it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderboardRow:
    """A trial among a study's best so far."""

    name: str
    """Its config's name."""
    method: str
    """Its method with its base's quantisation."""
    settings: str
    """Its values of the knobs, in short."""
    status: TrialStatus
    """Whether it still runs, or how it ended."""
    value: float
    """Its best value of `search.metric`: nats, or a share of 0 to 1."""
    percent: float
    """Share of its budget, 0 to 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatus:
    """A host, whose trials train at once on one shared base."""

    label: str
    """Its number and its base."""
    num_slots: int
    """Trials that it can train at once."""
    members: int
    """Trials that have joined it."""
    training: int
    """Trials that it trains now."""
    waiting: int
    """Trials that wait for one of its slots."""
    occupancy: float
    """Mean share of its slots that trained, 0 to 1."""
    tokens: int
    """Tokens trained on since its process began."""
    train_s: float
    """Seconds of training since its process began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus(_Printable):
    """A study's state, about once a second."""

    kind: ClassVar[str] = "status"
    metric: str
    """`search.metric`: loss, accuracy, or the name of the user's own function."""
    total: int
    """Trials that the study will have."""
    counts: dict[TrialStatus, int]
    """Status -> trials."""
    refused: int
    """Points of the searcher that no valid trial can have."""
    rungs: list[tuple[float, int]]
    """Successive halving: each rung in percent of a trial's budget, and how many trials reached it."""
    best: list[LeaderboardRow]
    """The best trials, the best first."""
    tokens: int
    """Tokens that the trials were trained on."""
    share: float
    """Estimated share of the study that is done, 0 to 1."""
    hosts: list[HostStatus] = field(default_factory=list)
    """The hosts that the study runs on."""
    elapsed_s: float = 0.0
    """Seconds since this start of the study."""
    eta_s: float | None = None
    """Estimated seconds to its end; None while there is no estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyProgress(_Printable):
    """A study's curve for trackers: the best so far against the trials that have ended."""

    kind: ClassVar[str] = "study"
    step: int
    """Trials that have ended."""
    best: float | None
    """The best value of `search.metric`; None before the first."""
    tokens: int
    """Tokens that the trials were trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalistScored:
    """One of a study's best trials, scored on the test rows."""

    trial: str
    """Its id, unique in the study."""
    name: str
    """Its config's name."""
    method: str
    """Its method with its base's quantisation."""
    step: int | None
    """Optimiser steps made at its best evaluation."""
    scorecard: dict[str, Any] | None
    """`rankloom.registry.scorecard.Scorecard` as plain data; None where `error` gives the reason."""
    published: list[str]
    """The versions that it was published as, such as `tickets@1`."""
    error: str | None = None
    """Why it could not be scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFinished(_Printable):
    """A study's search is done, and its best trials are scored and published."""

    kind: ClassVar[str] = "study_done"
    name: str
    """The study's name."""
    study: str
    """The study's folder, with its result.json."""
    winner: FinalistScored | None
    """The best trial on the validation rows; None where the finalists are not scored, as in a search for rates."""
    finalists: list[FinalistScored]
    """All scored trials, the best on the validation rows first."""
    registry: str | None = None
    """The registry with the published adapters."""
    beats_baseline: bool | None = None
    """Whether the winner's value on the test rows is better than the baseline's; None where they are the same trial."""


Event: TypeAlias = (
    PhaseStarted
    | WarningRaised
    | DataLoaded
    | RunResumed
    | StepFinished
    | Evaluated
    | RunFinished
    | TrialStarted
    | TrialEvaluated
    | TrialEnded
    | StudyStatus
    | StudyProgress
    | StudyFinished
)
OnEvent: TypeAlias = Callable[[Event], None]
"""Callback that takes events as they happen."""
KINDS: dict[str, type[Event]] = {each.kind: each for each in get_args(Event)}
"""The value of `event` in a line -> its class."""


def to_dict(event: Event) -> dict[str, Any]:
    """Return an event as plain data, with its kind under `event`."""
    return {"event": event.kind, **asdict(event)}


def from_dict(tree: dict[str, Any]) -> Event:
    """Return the event that plain data describes; keys that its kind does not know are ignored.

    Raises:
        RankloomError: an unknown kind, a field that is missing or of another type, or a newer schema.
    """
    from pydantic import ValidationError

    if (version := tree.get("v", VERSION)) != VERSION:
        raise RankloomError(f"events of schema v={version}, and this rankloom reads v={VERSION}; update rankloom")
    kind = tree.get("event")
    if kind not in KINDS:
        raise RankloomError(f"event={kind!r}: unknown kind of event; known are {', '.join(KINDS)}")
    if kind == StudyFinished.kind and "result" in tree:
        tree = _lift_result(tree["result"])
    try:
        return _build_adapter(kind).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RankloomError(f"event={kind}: {where}: {first['msg']}") from None


def to_line(event: Event) -> str:
    """Return an event as a line of JSON, without its newline."""
    return json.dumps({"v": VERSION, "time": round(time.time(), 3), **to_dict(event)})


def read_events(file: Path) -> Iterator[Event]:
    """Read events.jsonl or journal.jsonl; skip a half line that a killed process left.

    Raises:
        RankloomError: a line is not an event of this schema.
    """
    yield from (event for _, event in read_timed_events(file))


def read_timed_events(file: Path) -> Iterator[tuple[float | None, Event]]:
    """Read events as `read_events` does, each with its time in seconds since 1970; None: an old line has none."""
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            tree = json.loads(text)
        except json.JSONDecodeError:
            continue
        try:
            yield tree.get("time"), from_dict(tree)
        except RankloomError as error:
            raise RankloomError(f"{file}: line {number}: {error}") from None


def _lift_result(result: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `StudyFinished` of rankloom 0.2, which held the content of result.json."""

    def lift(trial: dict[str, Any]) -> dict[str, Any]:
        return trial | {"step": trial["validation"]["step"]}

    winner, finalists = result.get("winner"), result.get("finalists", [])
    return result | {"winner": winner and lift(winner), "finalists": [lift(trial) for trial in finalists]}


@cache
def _build_adapter(kind: str) -> TypeAdapter[Event]:
    from pydantic import TypeAdapter  # imported late: only reading needs it

    return TypeAdapter(KINDS[kind])
