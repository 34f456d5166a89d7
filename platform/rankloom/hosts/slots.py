"""Decide which members of a host are seated, that is hold a slot, and train. Pure; `host_actor.py` executes it.

A member's reports are numbered from 1. When its trial asks for the report after the n-th, it accepts the n-th. The
member may be at most `run_ahead` reports ahead of the one that its trial asks for. A host has more members than slots:
a member at that bound gives its slot to a waiting one, and later continues from the snapshot of its last report. So
slots stay full while the scheduler decides, and the scheduler discards at most `run_ahead` reports per trial.

Members with the fewest reports come first, and a member far ahead of a waiting one is preempted too. So the trials that
survive the scheduler finish together. If each trained to its end at once, the last one would be alone in its host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

FAR = 1.5
"""A seated member is preempted once it has FAR times the reports of a waiting one: a few moves per trial."""


@dataclass
class Candidate:
    """The facts about a member that the decision needs."""

    key: str
    order: int
    """Order of joining; the earlier member wins a tie."""
    accepted: int = 0
    """The last report that the trial accepted by asking for the next one."""
    made: int = 0
    """Reports made so far."""
    at_report: bool = True
    """Whether it has not trained since its last report, so that it can leave without loss."""
    finished: bool = False
    """Whether it trained to its end or failed."""
    leaving: bool = False
    seated: bool = False

    def wants(self, run_ahead: int) -> bool:
        """Return whether it has work to do."""
        return not self.finished and not self.leaving and self.made <= self.accepted + run_ahead


class SlotPlan(NamedTuple):
    """The keys of the members to evict, then to admit, and then to train."""

    evict: tuple[str, ...]
    admit: tuple[str, ...]
    train: tuple[str, ...]


def assign_slots(candidates: Sequence[Candidate], num_slots: int, run_ahead: int) -> SlotPlan:
    """Assign slots to members, those with the fewest reports first."""
    seated = [candidate for candidate in candidates if candidate.seated]
    evict = [candidate for candidate in seated if candidate.finished or candidate.leaving]
    staying = [candidate for candidate in seated if candidate not in evict]
    waiting = sorted(
        (candidate for candidate in candidates if not candidate.seated and candidate.wants(run_ahead)),
        key=lambda candidate: (candidate.made, candidate.order),
    )
    free = num_slots - len(staying)
    admit = waiting[:free]
    pausable = [candidate for candidate in staying if candidate.at_report]
    pausable.sort(key=lambda candidate: (candidate.wants(run_ahead), -candidate.made))
    for candidate, other in zip(pausable, waiting[free:], strict=False):
        if candidate.wants(run_ahead) and candidate.made <= FAR * other.made:
            break
        evict.append(candidate)
        admit.append(other)
    train = [candidate for candidate in (*staying, *admit) if candidate not in evict and candidate.wants(run_ahead)]
    return SlotPlan(*(tuple(candidate.key for candidate in some) for some in (evict, admit, train)))
