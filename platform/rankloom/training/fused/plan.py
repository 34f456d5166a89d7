"""Choose which members' rows the host's next step computes together. Pure; no torch.

The host makes a plan per step, computes it, and halves it where the device runs out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_RECORDED = 2**15
"""Most tokens of a step that a graph holds: the device takes longer over more tokens than Python does to launch."""


@dataclass(frozen=True)
class PendingBatch:
    """A member's next micro-batch."""

    slot: int
    last_served: int
    """The host's step in which the member last had rows; the smallest goes first."""
    lengths: tuple[int, ...]
    """Tokens of each row, in the order of training."""


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
    """The rows of one forward and backward: at most one share per member."""

    shares: tuple[BatchSlice, ...]
    """Sorted by slot."""
    num_tokens: int
    """Number of positions, padding included where rows are padded."""

    def split(self, *, padded: bool = False) -> tuple[StepPlan, StepPlan] | None:
        """Return two plans with the same rows in total; None where the plan has only one row."""
        if len(self.shares) > 1:
            cut = len(self.shares) // 2
            return _make_plan(self.shares[:cut], padded), _make_plan(self.shares[cut:], padded)
        (share,) = self.shares
        cut = len(share.lengths) // 2
        if not cut:
            return None
        return _make_plan([_cut(share, 0, cut)], padded), _make_plan([_cut(share, cut, len(share.lengths))], padded)


def plan_step(work: Sequence[PendingBatch], token_budget: int, *, padded: bool = False) -> StepPlan | None:
    """Fill the budget with whole micro-batches, those that waited longest first.

    A micro-batch larger than the whole budget is cut, and its rows' gradients accumulate over several steps. A row
    larger than the budget goes alone.

    Args:
        token_budget: most positions of a plan.
        padded: whether rows are padded to the longest of the plan; the padding counts.

    Returns:
        The plan; None where there is no work.
    """
    shares: list[BatchSlice] = []
    for item in sorted(work, key=lambda w: (w.last_served, w.slot)):
        whole = BatchSlice(item.slot, 0, len(item.lengths), item.lengths)
        if count_positions([*shares, whole], padded) <= token_budget:
            shares.append(whole)
        elif count_positions([whole], padded) > token_budget and not shares:
            shares.append(_cut(whole, 0, _count_fitting(item.lengths, token_budget, padded)))
    return _make_plan(shares, padded) if shares else None


def count_positions(shares: Sequence[BatchSlice], padded: bool) -> int:
    """Return the number of positions that the shares take in one forward."""
    lengths = [length for share in shares for length in share.lengths]
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _count_fitting(lengths: tuple[int, ...], token_budget: int, padded: bool) -> int:
    """Return how many of the first rows fit; at least one."""
    fitting = 1
    while (
        fitting < len(lengths)
        and count_positions([BatchSlice(0, 0, 0, lengths[: fitting + 1])], padded) <= token_budget
    ):
        fitting += 1
    return fitting


def _cut(share: BatchSlice, start: int, stop: int) -> BatchSlice:
    return BatchSlice(share.slot, share.start + start, share.start + stop, share.lengths[start:stop])


def _make_plan(shares: Sequence[BatchSlice], padded: bool) -> StepPlan:
    ordered = tuple(sorted(shares, key=lambda share: share.slot))
    return StepPlan(ordered, count_positions(ordered, padded))
