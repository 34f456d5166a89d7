"""HostLoop: the blocking work of a host actor on its `TrialHost`, which the actor runs in a thread.

`open_host` makes the host. A `HostLoop` moves members in and out, trains until a report is due, and makes the reports:
validation, a snapshot, and the adapter where it is the best so far. It takes one call at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankloom.config import StudyConfig, TrialConfig
from rankloom.errors import ConfigError, RankloomError, RegistryError, TrialError
from rankloom.hosts.membership import BEST, Membership
from rankloom.hosts.reports import FAILED_LOSS, TrialReport, round_costs

if TYPE_CHECKING:
    from rankloom.training.fused.validation import Evaluation

COST_ROWS = 64
"""Validation rows to choose the prompt for a latency from."""
SAFE = 0.9
"""Share of the free memory that a host plans with; the rest covers the allocator's fragmentation."""


@dataclass(frozen=True)
class HostDevice:
    """The resources of each host."""

    cpus: float
    gpus: float
    threads: int
    memory_bytes: float
    """Its share of a node's memory as Ray reports it."""


@dataclass(frozen=True)
class BankShape:
    """The shape of a host's slots, so that any trial of the study fits, memory permitting."""

    ranks: tuple[int, ...]
    """The ranks that slots may have, ascending."""
    with_magnitudes: bool
    """Whether slots may be DoRA."""
    num_slots: int


@dataclass
class Seat:
    """A trial's time in a slot."""

    trial: str
    """The trial's id."""
    slot: int
    start: float
    """Seconds since 1970."""
    end: float | None = None
    """None: the trial is still in the slot."""


@dataclass
class HostStats:
    """Counters of a host since its process started."""

    steps: int = 0
    filled: float = 0.0
    """Sum over the steps of the share of slots that trained."""
    tokens: int = 0
    train_s: float = 0.0
    eval_s: float = 0.0
    save_s: float = 0.0
    move_s: float = 0.0
    load_s: float = 0.0
    import_s: float = 0.0
    """The part of `load_s` for imports."""
    first_steps: dict[str, list[float]] = field(default_factory=dict)
    """Trial -> start and end of its first step here, in seconds since 1970."""
    memory_bytes: int = 0
    """The peak."""
    size: str = ""
    """Its slots, its tokens and its device, in words; empty before its base is loaded."""
    seats: list[Seat] = field(default_factory=list)
    """Who was in which slot, in the order of the starts."""

    def seat(self, trial: str, slot: int) -> None:
        """Record that a trial takes a slot; whoever was in it has left it."""
        self.unseat(lambda seat: seat.slot == slot)
        self.seats.append(Seat(trial, slot, time.time()))

    def unseat(self, leaves: Callable[[Seat], bool] = lambda _: True) -> None:
        """Record that trials leave their slots."""
        for seat in self.seats:
            if seat.end is None and leaves(seat):
                seat.end = time.time()


@dataclass(kw_only=True)
class HostReport(HostStats):
    """A host's counters, and the states of its members now."""

    label: str
    members: int
    seated: int
    training: int
    """Members that train now."""
    waiting: int
    """Members that wait for a slot."""
    num_slots: int
    occupancy: float
    """Mean share of the slots that trained, 0 to 1."""


class HostLoop:
    """Moves, trains and reports on the members of an open host."""

    def __init__(self, host: Any, study: StudyConfig, work: HostStats) -> None:
        """
        Args:
            host: a `training.fused.host.TrialHost`.
            work: the counters to add to.
        """
        self.host = host
        self._search, self._work = study.search, work
        self._written: list[Future[None]] = []
        """The snapshots of the reports that are being made."""
        work.unseat()  # a host that was opened again is empty

    def move(self, evict: Iterable[Membership], admit: Iterable[Membership]) -> None:
        """Evict and admit members. A member that can't be admitted gets a `failure`; the others continue."""
        started = time.monotonic()
        for member in evict:
            self._work.unseat(lambda seat, trial=member.trial_id: seat.trial == trial)  # type: ignore[misc]
            self.host.evict(member.key)
            member.candidate.seated = False
        for member in admit:
            try:
                self.host.admit(member.key, member.trial, member.start)
                member.candidate.seated = True
                self._work.seat(member.trial_id, self.host.members[member.key].slot)
            except RankloomError as error:
                member.failure = str(error).removeprefix(f"{member.key}: ")
        self._work.move_s += time.monotonic() - started

    def train(self, members: Sequence[Membership], interrupted: Callable[[], bool]) -> list[Membership]:
        """Train these members until a report is due or `interrupted`; return the members whose report is due."""
        by_key = {member.key: member for member in members}
        while True:
            started, clock = time.monotonic(), time.time()
            steps = self.host.step(by_key)
            seconds = time.monotonic() - started
            self._work.steps += 1
            self._work.filled += len(members) / self.host.num_slots
            self._work.train_s += seconds
            for member in members:
                member.progress.train_s += seconds / len(members)
                member.candidate.at_report = False
            due = []
            for step in steps:
                member = by_key[step.name]
                self._work.first_steps.setdefault(member.trial_id, [clock, clock + seconds])
                now = member.progress
                self._work.tokens += step.tokens - now.tokens
                now.tokens, now.train_loss, now.step = step.tokens, step.loss, step.step
                member.failure = step.error
                if step.error or step.done or step.step % member.trial.eval.every == 0:
                    due.append(member)
            if due or interrupted():
                return due

    def report(self, members: Sequence[Membership]) -> list[TrialReport]:
        """Validate members, write their snapshots, and return their reports, in order.

        Raises:
            RankloomError: the snapshots can't be written.
        """
        from rankloom.training.memory import read_peak_memory_bytes

        started = time.monotonic()
        self._work.memory_bytes = read_peak_memory_bytes(self.host.base.device)
        sound = [member for member in members if member.failure is None]
        scores: dict[str, Evaluation] = {}
        try:
            scores = self.host.evaluate([member.key for member in sound])
        except TrialError as error:  # a row too long for the memory, or the user's metric, fails all of them
            for member in sound:
                member.failure = str(error)
        for member in sound:
            if member.key in scores and not math.isfinite(scores[member.key].loss):
                rate, step = member.trial.optim.learning_rate, member.progress.step
                member.failure = f"the validation loss is not finite at step {step}; lower optim.learning_rate"
                member.failure += f" ({rate:g})"
        evaluated = time.monotonic()
        with _translate_errors(), ThreadPoolExecutor(1, thread_name_prefix="rankloom-snapshots") as writer:
            self._written.clear()
            reports = [self._report(member, scores.get(member.key), writer) for member in members]
            for written in self._written:
                written.result()
            for member in members:
                if member.failure is None:
                    member.save(member.candidate.made + 1)
        self._work.eval_s += evaluated - started
        self._work.save_s += time.monotonic() - evaluated
        return reports

    def _report(self, member: Membership, scores: Evaluation | None, writer: Executor) -> TrialReport:
        if member.failure is not None:
            member.candidate.seated = member.key in self.host.members
            failed = member.report(0, FAILED_LOSS, 0.0, -self._search.sign * FAILED_LOSS)
            return replace(failed, best_value=None, done=True, error=member.failure)
        assert scores is not None
        now, value, sign = member.progress, getattr(scores, self._search.key), self._search.sign
        best = now.best_value is None or sign * value > sign * now.best_value
        now.best_value = value if best else now.best_value
        now.evals_since_best = 0 if best else now.evals_since_best + 1
        num_steps, patience = self.host.members[member.key].num_steps, member.trial.eval.patience
        done = now.step >= num_steps or (patience is not None and now.evals_since_best >= patience)
        self._save(member, member.candidate.made + 1, writer, export=best and member.best_folder is not None)
        report = member.report(num_steps, scores.loss, scores.accuracy, scores.metric)
        return replace(report, best=best, done=done, finished=done)

    def _save(self, member: Membership, n: int, writer: Executor, *, export: bool) -> None:
        """Have the member's snapshot written, while the device gets the next one ready."""
        if len(self._written) > 1:
            self._written[-2].result()  # at most two snapshots are in memory
        folder = member.get_folder(n)
        folder.mkdir(parents=True)
        snapshot = self.host.snapshot(member.key)

        def write() -> None:
            snapshot.write(folder)
            if export:
                (folder / BEST).mkdir()
                self.host.export(member.key, folder / BEST, snapshot)

        self._written.append(writer.submit(write))
        if export and self._search.objectives and not member.progress.costs:
            self._written[-1].result()
            member.progress.costs = self._measure_costs(folder / BEST)

    def _measure_costs(self, adapter: Path) -> dict[str, float]:
        """Measure the serving costs that are objectives of the study, on prompts from the validation rows."""
        base, names = self.host.base, self._search.objectives
        from rankloom.adapters.weights import load_beside  # with PEFT, which takes seconds to import
        from rankloom.evals.costs import measure_costs

        rows = list(self.host.data.validation.select(COST_ROWS))
        return round_costs(
            measure_costs(load_beside(base.model, adapter), rows, pad_id=base.pad_id, names=names), names
        )


def describe_host(host: Any) -> str:
    """Return what a `TrialHost` became on its device."""
    from rankloom.models.device import describe_device
    from rankloom.training.precision import describe_precision

    slots = f"{host.num_slots} slots of rank {host.max_rank}, {host.token_budget} tokens a step"
    return f"{slots}, in {describe_precision(host.precision)} on {describe_device(host.base.device)}"


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, TrialError, RegistryError) as error:  # would fail every trial
        raise RankloomError(
            f"a host can't write its trials' snapshots: {error}; make room there, and --resume continues"
        ) from None


def open_host(
    study: StudyConfig, trial: TrialConfig, bank: BankShape, device: HostDevice, folder: Path | None = None
) -> Any:
    """Read the data, load the base and make a `TrialHost`, as large as the study wants and memory allows.

    Args:
        trial: a trial with the base and the data that all members share.
        folder: the study's folder, whose data and base must not change; None: no check.

    Raises:
        RankloomError: the data or the base can't be loaded, or has changed. TrialError: there is no room for a slot.
    """
    import torch

    from rankloom.data import load_data
    from rankloom.launch.handed_over import load_study_metric
    from rankloom.models import load_tokenizer
    from rankloom.models.device import choose_device
    from rankloom.training.fused.host import TrialHost
    from rankloom.training.memory import read_free_bytes, read_peak_memory_bytes, read_shape
    from rankloom.training.memory_plan import HostSize, fit_host
    from rankloom.training.precision import check_lengths, choose_precision, load_trial_base
    from rankloom.training.resume_check import Origin, hold_study_to

    torch.set_num_threads(device.threads)
    place = choose_device(trial.compute.device)
    data = load_data(trial.data, load_tokenizer(trial.model))
    if study.search.metric == "accuracy" and data.labels is None:
        raise ConfigError("search.metric: accuracy needs classification data (text, label); use loss")
    base = load_trial_base(trial, place)
    check_lengths(data, base)
    if folder is not None:
        hold_study_to(folder, trial, Origin.collect(data, base))
    if place.type == "cuda":
        mine = torch.cuda.mem_get_info(place)[1] * device.gpus - torch.cuda.memory_allocated(place)
        free = min(read_free_bytes(place) or 0.0, mine)
    else:
        free = device.memory_bytes - read_peak_memory_bytes(place)
    tokens = study.hosts.count_tokens(on_gpu=place.type == "cuda")
    wanted = HostSize(bank.num_slots, max(bank.ranks), tokens, bank.with_magnitudes)
    longest = max(int(rows.lengths.max()) for rows in (data.train, data.validation))
    size = fit_host(wanted, read_shape(base, data), ranks=bank.ranks, longest=longest, available=SAFE * free)
    metric = load_study_metric(study.search.metric, folder)
    return TrialHost(base, data, precision=choose_precision(trial, place), metric=metric, **asdict(size))
