"""Seats: who trains in a host now. Pure; `host_actor.py` carries it out.

Reports of a member are numbered from 1. Its trial asks for the report after the n-th, which says that the n-th was
accepted; the member may be at most `run_ahead` reports further than what is asked for. There are more members than
slots: one that has run to its bound gives its slot to one that waits, and returns from the snapshot of its last
report. So slots stay full while the scheduler thinks, and what the scheduler refuses is never more than that bound.

Those with the fewest reports come first, and one that is far ahead of who waits gives way too. So the trials that a
scheduler spares pile up and end together: were they trained at once, the last of them would end a study alone in its
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

FAR = 1.5
"""Who has made more than so many times the reports of one that waits gives way: a few moves in a trial's life."""


@dataclass
class Candidate:
    """A member, as far as the decision needs to know it."""

    key: str
    order: int
    """Who came first."""
    accepted: int = 0
    """The last report that the trial's driver has seen and answered by asking on."""
    made: int = 0
    """Reports made so far."""
    at_report: bool = True
    """It has not trained since its last report: nothing is lost if it leaves."""
    finished: bool = False
    """Trained to its end, or failed: nothing is left to do."""
    leaving: bool = False
    seated: bool = False

    def wants(self, run_ahead: int) -> bool:
        """Whether it has work to do."""
        return not self.finished and not self.leaving and self.made <= self.accepted + run_ahead


class SlotPlan(NamedTuple):
    """Who leaves the host, who enters, and who trains then."""

    evict: tuple[str, ...]
    admit: tuple[str, ...]
    train: tuple[str, ...]


def assign_slots(candidates: Sequence[Candidate], num_slots: int, run_ahead: int) -> SlotPlan:
    """Fill the slots, those with the fewest reports first."""
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
