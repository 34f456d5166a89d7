"""Plan: which members' rows go through the base together in the host's next step. Pure; no torch.

The host asks once a step, carries the plan out, and asks for its halves where the device ran out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PendingBatch:
    """A member's next micro-batch."""

    slot: int
    last_served: int
    """The host's step in which the member last had rows; the smallest comes first."""
    lengths: tuple[int, ...]
    """Tokens of each row, in the order in which the rows are to be taken."""


@dataclass(frozen=True)
class BatchSlice:
    """Rows `start` to `stop` of a member's micro-batch."""

    slot: int
    start: int
    stop: int
    lengths: tuple[int, ...]
    """Tokens of these rows."""


@dataclass(frozen=True)
class StepPlan:
    """What one forward and backward computes: a share of each member in it, by slot."""

    shares: tuple[BatchSlice, ...]
    num_tokens: int
    """Positions computed, padding included where rows are padded."""

    def halves(self, *, padded: bool = False) -> tuple[StepPlan, StepPlan] | None:
        """Two plans that do the same together; None where one row is left."""
        if len(self.shares) > 1:
            cut = len(self.shares) // 2
            return _plan(self.shares[:cut], padded), _plan(self.shares[cut:], padded)
        (share,) = self.shares
        cut = len(share.lengths) // 2
        if not cut:
            return None
        return _plan([_part(share, 0, cut)], padded), _plan([_part(share, cut, len(share.lengths))], padded)


def plan_step(work: Sequence[PendingBatch], token_budget: int, *, padded: bool = False) -> StepPlan | None:
    """Fill the budget with whole micro-batches, who waited longest first; None where there is no work.

    A micro-batch that is larger than the whole budget is cut: its rows' gradients add up over several steps. A row
    that is larger goes alone.

    Args:
        padded: rows are padded to the longest of all, and the padding counts.
    """
    shares: list[BatchSlice] = []
    for item in sorted(work, key=lambda w: (w.last_served, w.slot)):
        whole = BatchSlice(item.slot, 0, len(item.lengths), item.lengths)
        if num_positions([*shares, whole], padded) <= token_budget:
            shares.append(whole)
        elif num_positions([whole], padded) > token_budget and not shares:
            shares.append(_part(whole, 0, _num_fitting(item.lengths, token_budget, padded)))
    return _plan(shares, padded) if shares else None


def num_positions(shares: Sequence[BatchSlice], padded: bool) -> int:
    lengths = [length for share in shares for length in share.lengths]
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _num_fitting(lengths: tuple[int, ...], token_budget: int, padded: bool) -> int:
    """How many rows from the first on fit; at least one."""
    fitting = 1
    while (
        fitting < len(lengths) and num_positions([BatchSlice(0, 0, 0, lengths[: fitting + 1])], padded) <= token_budget
    ):
        fitting += 1
    return fitting


def _part(share: BatchSlice, start: int, stop: int) -> BatchSlice:
    return BatchSlice(share.slot, share.start + start, share.start + stop, share.lengths[start:stop])


def _plan(shares: Sequence[BatchSlice], padded: bool) -> StepPlan:
    ordered = tuple(sorted(shares, key=lambda share: share.slot))
    return StepPlan(ordered, num_positions(ordered, padded))
