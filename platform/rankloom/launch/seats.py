"""Seats: who trains in a host now. Pure; `host_actor.py` carries it out.

Reports of a member are numbered from 1. Its trial asks for the report after the n-th, which says that the n-th was
accepted; the member may be at most `run_ahead` reports further than what is asked for. There are more members than
slots: one that has run to its bound gives its slot to one that waits, and returns from the snapshot of its last
report. So slots stay full while the scheduler thinks, and what the scheduler refuses is never more than that bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class Seat:
    """A member, as far as the decision needs to know it."""

    key: str
    order: int
    """Who came first."""
    accepted: int = 0
    """The last report that the trial's driver has seen and answered by asking on."""
    made: int = 0
    """Reports made so far."""
    finished: bool = False
    """Trained to its end, or failed: nothing is left to do."""
    leaving: bool = False
    seated: bool = False

    def wants(self, run_ahead: int) -> bool:
        """Whether it has work to do."""
        return not self.finished and not self.leaving and self.made <= self.accepted + run_ahead

    @property
    def ahead(self) -> int:
        """Reports that nobody has asked for yet."""
        return self.made - self.accepted


class Seating(NamedTuple):
    """Who leaves the host, who enters, and who trains then."""

    evict: tuple[str, ...]
    admit: tuple[str, ...]
    train: tuple[str, ...]


def decide(seats: Sequence[Seat], num_slots: int, run_ahead: int) -> Seating:
    """Fill the slots: those that are furthest behind what their drivers ask for come first."""
    seated = [seat for seat in seats if seat.seated]
    evict = [seat for seat in seated if seat.finished or seat.leaving]
    staying = [seat for seat in seated if seat not in evict]
    waiting = sorted(
        (seat for seat in seats if not seat.seated and seat.wants(run_ahead)), key=lambda seat: (seat.ahead, seat.order)
    )
    idle = [seat for seat in staying if not seat.wants(run_ahead)]
    free = num_slots - len(staying)
    admit = waiting[: free + len(idle)]
    evict += idle[: max(0, len(admit) - free)]  # who stands idle at the bound gives way, to return from its snapshot
    train = [seat for seat in (*staying, *admit) if seat not in idle]
    return Seating(*(tuple(seat.key for seat in some) for some in (evict, admit, train)))
