"""The grouped low-rank product: every token goes through its own slot's A and B, all slots at once.

`grouped_lora_reference` says what is computed. `grouped_lora` (onto a result that is there) and `grouped_linear` (with
the frozen linear before it) compute the same, with gradients, in the way that was measured to be the fastest
(`fastest`): slot by slot on views of the tokens, or in batched products with each slot's tokens padded to the largest
count. `scale_rows` is DoRA's part.

Nothing that one slot holds, not even inf or nan, reaches another slot's tokens or gradients: padding repeats a slot's
own last token, and no product runs over the tokens of two slots.

Shapes: N tokens sorted by slot, K slots, C slots at work, T most tokens of a slot, P = C·T, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rankloom.models import onednn

PADDED = 3
"""On a GPU, the most positions that a host computes in its banks' products for one token, padding included."""
PAD_BELOW = 2**15
"""On a CPU: elements of an average slot's input and output below which calls cost more than padding them does."""


class Groups:
    """Which tokens are whose: the first `start` are nobody's, then come those of slot 0, of slot 1 and so on.

    Args:
        counts: tokens of each slot.
        ranks: true rank of each slot's adapter; A and B are zero beyond it. A slot of rank 0 has no adapter.
    """

    def __init__(self, counts: Sequence[int], ranks: Sequence[int], *, start: int = 0) -> None:
        self.counts, self.ranks, self.start = tuple(counts), tuple(ranks), start
        self.spans: dict[int, slice] = {}
        """Tokens of each slot at work: one that has both tokens and an adapter."""
        stop = start
        for slot, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
            if count and rank:
                self.spans[slot] = slice(stop, stop + count)
            stop += count
        self.num_tokens = stop
        self.slots = tuple(self.spans)
        self.rank = max((ranks[slot] for slot in self.slots), default=0)
        self.most = max((counts[slot] for slot in self.slots), default=0)
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    @cached_property
    def whole(self) -> slice | None:
        """The tokens of all slots at work, where they lie without a gap."""
        spans = list(self.spans.values())
        whole = slice(spans[0].start, spans[-1].stop)
        return whole if whole.stop - whole.start == sum(self.counts[slot] for slot in self.slots) else None

    @cached_property
    def is_even(self) -> bool:
        """Whether the slots at work have equally many tokens, without a gap: [N] is [C, T] then."""
        return self.whole is not None and len(self.slots) * self.most == self.whole.stop - self.whole.start

    @property
    def parts(self) -> Sequence[Groups]:
        """The slots at work, as many together as are padded to no more than `PADDED` times their tokens."""
        return self._parts or (self,)

    @cached_property
    def _parts(self) -> Sequence[Groups]:
        """Empty where all go together."""
        parts: list[list[int]] = []
        tokens = 0
        for slot in sorted(self.slots, key=lambda slot: -self.counts[slot]):
            tokens += self.counts[slot]
            if not parts or (len(parts[-1]) + 1) * self.counts[parts[-1][0]] > PADDED * tokens:
                parts.append([])
                tokens = self.counts[slot]
            parts[-1].append(slot)
        if len(parts) <= 1:
            return ()
        of_part = [[rank if slot in part else 0 for slot, rank in enumerate(self.ranks)] for part in parts]
        return [Groups(self.counts, ranks, start=self.start) for ranks in of_part]

    def picked(self, device: torch.device) -> slice | Tensor:
        """An index to the slots at work: a slice, and so a view, where they follow each other."""
        first, last = self.slots[0], self.slots[-1]
        if last - first + 1 == len(self.slots):
            return slice(first, last + 1)
        return self._on(device, "picked", lambda: torch.tensor(self.slots))

    def places(self, device: torch.device) -> Tensor:
        """[P]: the token at each place of [C, T]; on padding the slot's own last one."""
        return self._on(device, "places", lambda: self._places_CT().flatten())

    def tokens(self, device: torch.device) -> Tensor:
        """The tokens of the slots at work."""
        return self._on(device, "tokens", lambda: self._places_CT()[~self._padding_CT()])

    def places_of_tokens(self, device: torch.device) -> Tensor:
        """Where in P each token of the slots at work is."""
        return self._on(device, "places_of_tokens", lambda: torch.nonzero(~self._padding_CT().flatten()).flatten())

    def owners(self, device: torch.device) -> Tensor:
        """[N]: each token's slot; K, one too many, where that slot is not at work."""

        def make() -> Tensor:
            owners_N = torch.full((self.num_tokens,), len(self.counts))
            for slot, span in self.spans.items():
                owners_N[span] = slot
            return owners_N

        return self._on(device, "owners", make)

    def padding(self, device: torch.device) -> Tensor:
        """[C, T, 1]."""
        return self._on(device, "padding", lambda: self._padding_CT()[..., None])

    def scales(self, scale_K: Sequence[float], like: Tensor) -> Tensor:
        """[C, 1, 1]."""
        scale_C = tuple(scale_K[slot] for slot in self.slots)
        return self._on(
            like.device, (like.dtype, scale_C), lambda: torch.tensor(scale_C, dtype=like.dtype)[:, None, None]
        )

    def _on(self, device: torch.device, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Made once: most sites of a model ask for the same."""
        if (device, key) not in self._tensors:
            self._tensors[device, key] = make().to(device, non_blocking=True)
        return self._tensors[device, key]

    def _places_CT(self) -> Tensor:
        starts_C = torch.tensor([span.start for span in self.spans.values()])
        return starts_C[:, None] + torch.minimum(torch.arange(self.most), self._counts_C1() - 1)

    def _padding_CT(self) -> Tensor:
        return torch.arange(self.most) >= self._counts_C1()

    def _counts_C1(self) -> Tensor:
        return torch.tensor([[self.counts[slot]] for slot in self.slots])


def grouped_lora_reference(
    x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
) -> Tensor:
    """[N, O]: scale · B A x for each token, with its slot's scale, B and A; zero for the tokens of no adapter."""
    parts, done = [], 0
    for slot, span in groups.spans.items():
        parts.append(x_NI.new_zeros(span.start - done, b_KOR.shape[1]))
        parts.append(x_NI[span] @ a_KRI[slot].T @ b_KOR[slot].T * scale_K[slot])
        done = span.stop
    parts.append(x_NI.new_zeros(len(x_NI) - done, b_KOR.shape[1]))
    return torch.cat(parts)


def grouped_lora(
    onto: Tensor,
    x: Tensor,
    a_KRI: Tensor,
    b_KOR: Tensor,
    scale_K: Sequence[float],
    groups: Groups,
    way: Way | None = None,
) -> Tensor:
    """Add the product to `onto`, [..., O] of N rows and contiguous, in place.

    Args:
        x: [..., I] of N rows, of the stacks' dtype; `onto` may be of another.
    """
    if not groups.slots:
        return onto
    result: Tensor = _Onto.apply(onto, x, a_KRI, b_KOR, scale_K, groups, way or fastest(x, b_KOR, groups))
    return result


def grouped_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_KRI: Tensor,
    b_KOR: Tensor,
    scale_K: Sequence[float],
    groups: Groups,
    way: Way | None = None,
) -> Tensor:
    """A frozen linear layer plus the product, all of one dtype; x is kept once, its gradient added up in place."""
    if not groups.slots:
        return F.linear(x, weight_OI, bias_O)
    way = way or fastest(x, b_KOR, groups)
    y_NO: Tensor = _Linear.apply(x, weight_OI, bias_O, a_KRI, b_KOR, scale_K, groups, way)
    return y_NO.view(*x.shape[:-1], -1)  # here, for models may not change a view that a Function made in place


def fastest(x: Tensor, b_KOR: Tensor, groups: Groups) -> Way:
    """The way that was measured to be the fastest for products of this size."""
    if x.device.type != "cpu" or groups.is_even:  # nothing is padded
        return Stacked()
    elements = sum(groups.counts[slot] for slot in groups.slots) * (x.shape[-1] + b_KOR.shape[1])
    return Stacked() if elements < PAD_BELOW * len(groups.slots) else SlotBySlot()


class Way(Protocol):
    """How the product and its gradients are computed."""

    def add(
        self, y_NO: Tensor, x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
    ) -> list[Tensor]:
        """Add the product to y; what the gradients need is returned."""
        ...

    def gradients(
        self,
        dy_NO: Tensor,
        x_NI: Tensor,
        a_KRI: Tensor,
        b_KOR: Tensor,
        kept: list[Tensor],
        scale_K: Sequence[float],
        groups: Groups,
        dx_NI: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Of the stacks; that of x is added to `dx_NI`."""
        ...


class SlotBySlot:
    """A few products for each slot, each of its true rank, on views of its tokens."""

    def add(
        self, y_NO: Tensor, x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
    ) -> list[Tensor]:
        kept = []
        for slot, span in groups.spans.items():
            rank = groups.ranks[slot]
            h_TR = torch.mm(x_NI[span], a_KRI[slot, :rank].T).mul_(scale_K[slot])
            b_RO = b_KOR[slot, :, :rank].T
            if y_NO.dtype == h_TR.dtype:
                y_NO[span].addmm_(h_TR, b_RO)
            else:
                y_NO[span].add_(h_TR @ b_RO)
            kept.append(h_TR)
        return kept

    def gradients(
        self,
        dy_NO: Tensor,
        x_NI: Tensor,
        a_KRI: Tensor,
        b_KOR: Tensor,
        kept: list[Tensor],
        scale_K: Sequence[float],
        groups: Groups,
        dx_NI: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        da_KRI, db_KOR = torch.zeros_like(a_KRI), torch.zeros_like(b_KOR)
        for (slot, span), h_TR in zip(groups.spans.items(), kept, strict=True):
            rank = groups.ranks[slot]
            dy_TO = dy_NO[span]
            dh_TR = torch.mm(dy_TO, b_KOR[slot, :, :rank]).mul_(scale_K[slot])
            torch.mm(dh_TR.T, x_NI[span], out=da_KRI[slot, :rank])
            torch.mm(dy_TO.T, h_TR, out=db_KOR[slot, :, :rank])
            if dx_NI is not None:
                dx_NI[span].addmm_(dh_TR, a_KRI[slot, :rank])
        return da_KRI, db_KOR


class Stacked:
    """Batched products over all slots at work, each of the largest rank; tokens are padded where they are not even, and
    slots of very different counts are taken apart."""

    def add(
        self, y_NO: Tensor, x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float] | None, groups: Groups
    ) -> list[Tensor]:
        """As `Way.add`; without scales, for stacks that have them in B."""
        return [self._add(y_NO, x_NI, a_KRI, b_KOR, scale_K, part) for part in groups.parts]

    def _add(
        self, y_NO: Tensor, x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float] | None, groups: Groups
    ) -> Tensor:
        picked = groups.picked(x_NI.device)
        a_CRI, b_COR = a_KRI[picked, : groups.rank], b_KOR[picked, :, : groups.rank]
        h_CTR = torch.bmm(_stacked(x_NI, groups), a_CRI.mT)
        if scale_K is not None:
            h_CTR.mul_(groups.scales(scale_K, x_NI))
        if not groups.is_even:  # what padding repeats must not count in B's gradient
            h_CTR.masked_fill_(groups.padding(x_NI.device), 0)
        _add_bmm(y_NO, h_CTR, b_COR.mT, groups)
        return h_CTR

    def gradients(
        self,
        dy_NO: Tensor,
        x_NI: Tensor,
        a_KRI: Tensor,
        b_KOR: Tensor,
        kept: list[Tensor],
        scale_K: Sequence[float],
        groups: Groups,
        dx_NI: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        parts = [
            self._gradients(dy_NO, x_NI, a_KRI, b_KOR, h_CTR, scale_K, part, dx_NI)
            for part, h_CTR in zip(groups.parts, kept, strict=True)
        ]
        if parts[0][0].shape == a_KRI.shape:
            return parts[0]
        da_KRI, db_KOR = torch.zeros_like(a_KRI), torch.zeros_like(b_KOR)
        for part, (da_CRI, db_COR) in zip(groups.parts, parts, strict=True):
            picked = part.picked(x_NI.device)
            da_KRI[picked, : part.rank], db_KOR[picked, :, : part.rank] = da_CRI, db_COR
        return da_KRI, db_KOR

    def _gradients(
        self,
        dy_NO: Tensor,
        x_NI: Tensor,
        a_KRI: Tensor,
        b_KOR: Tensor,
        h_CTR: Tensor,
        scale_K: Sequence[float],
        groups: Groups,
        dx_NI: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Of the slots at work alone."""
        picked = groups.picked(x_NI.device)
        a_CRI, b_COR = a_KRI[picked, : groups.rank], b_KOR[picked, :, : groups.rank]
        dy_CTO = _stacked(dy_NO, groups)
        dh_CTR = torch.bmm(dy_CTO, b_COR).mul_(groups.scales(scale_K, x_NI))
        if not groups.is_even:
            dh_CTR.masked_fill_(groups.padding(x_NI.device), 0)
        da_CRI = torch.bmm(dh_CTR.mT, _stacked(x_NI, groups))
        db_COR = torch.bmm(dy_CTO.mT, h_CTR)
        if dx_NI is not None:
            _add_bmm(dx_NI, dh_CTR, a_CRI, groups)
        return da_CRI, db_COR


class _Onto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        onto: Tensor,
        x: Tensor,
        a_KRI: Tensor,
        b_KOR: Tensor,
        scale_K: Sequence[float],
        groups: Groups,
        way: Way,
    ) -> Tensor:
        kept = way.add(onto.view(-1, onto.shape[-1]), _rows(x), a_KRI, b_KOR, scale_K, groups)
        ctx.mark_dirty(onto)
        ctx.save_for_backward(x, a_KRI, b_KOR, *kept)
        ctx.scale_K, ctx.groups, ctx.way = scale_K, groups, way
        return onto

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a_KRI, b_KOR, *kept = ctx.saved_tensors
        dx_NI = torch.zeros_like(_rows(x)) if ctx.needs_input_grad[1] else None
        dy_NO = _rows(dy).to(x.dtype)
        da_KRI, db_KOR = ctx.way.gradients(dy_NO, _rows(x), a_KRI, b_KOR, kept, ctx.scale_K, ctx.groups, dx_NI)
        return dy, None if dx_NI is None else dx_NI.view(x.shape), da_KRI, db_KOR, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_KRI: Tensor,
        b_KOR: Tensor,
        scale_K: Sequence[float],
        groups: Groups,
        way: Way,
    ) -> Tensor:
        y_NO = onednn.linear(_rows(x), weight_OI, bias_O)
        kept = way.add(y_NO, _rows(x), a_KRI, b_KOR, scale_K, groups)
        ctx.save_for_backward(x, weight_OI, a_KRI, b_KOR, *kept)
        ctx.scale_K, ctx.groups, ctx.way = scale_K, groups, way
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, a_KRI, b_KOR, *kept = ctx.saved_tensors
        dx_NI = onednn.times(dy_NO, weight_OI) if ctx.needs_input_grad[0] else None
        da_KRI, db_KOR = ctx.way.gradients(dy_NO, _rows(x), a_KRI, b_KOR, kept, ctx.scale_K, ctx.groups, dx_NI)
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return dx, None, None, da_KRI, db_KOR, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _stacked(x_ND: Tensor, groups: Groups) -> Tensor:
    """[C, T, D]."""
    if groups.is_even:
        assert groups.whole is not None
        return x_ND[groups.whole].view(len(groups.slots), groups.most, -1)
    return x_ND.index_select(0, groups.places(x_ND.device)).view(len(groups.slots), groups.most, -1)


def _add_bmm(y_ND: Tensor, left_CTR: Tensor, right_CRD: Tensor, groups: Groups) -> None:
    """Add left · right to the tokens of the slots at work."""
    if groups.is_even and y_ND.dtype == left_CTR.dtype:
        _stacked(y_ND, groups).baddbmm_(left_CTR, right_CRD)
        return
    product_PD = torch.bmm(left_CTR, right_CRD).flatten(0, 1)
    product_ND = product_PD.index_select(0, groups.places_of_tokens(y_ND.device))
    if groups.whole is not None:
        y_ND[groups.whole] += product_ND
    else:
        y_ND.index_add_(0, groups.tokens(y_ND.device), product_ND.to(y_ND.dtype))


def scale_rows_reference(y_NO: Tensor, factor_KO: Tensor, bias_O: Tensor | None, groups: Groups) -> Tensor:
    """factor · (y - bias) + bias for the tokens of slots at work, with their slot's factor; the others as they are."""
    parts, done = [], 0
    bias = 0 if bias_O is None else bias_O
    for slot, span in groups.spans.items():
        parts += [y_NO[done : span.start], (y_NO[span] - bias) * factor_KO[slot] + bias]
        done = span.stop
    return torch.cat([*parts, y_NO[done:]])


def scale_rows(
    y: Tensor,
    factor_KO: Tensor,
    bias_O: Tensor | None,
    groups: Groups,
    *,
    dtype: torch.dtype | None = None,
    by_slot: bool | None = None,
) -> Tensor:
    """`scale_rows_reference` for [..., O] of N rows, keeping y alone; no gradient goes to the bias.

    It is computed in the factors' own type, whatever y's: of a factor near 1, bf16 keeps nothing.

    Args:
        dtype: of the result, and of what is kept of y; None: y's.
        by_slot: whether slots of uneven sizes are taken one after the other, on views of their tokens (None: as on a
            CPU), or all at once in few calls, with a factor gathered for each token (None: as elsewhere).
    """
    dtype = dtype or y.dtype
    if not groups.slots:
        return y.to(dtype)
    by_slot = y.device.type == "cpu" if by_slot is None else by_slot
    result_NO: Tensor = _ScaleRows.apply(y, factor_KO, bias_O, groups, by_slot, dtype)
    return result_NO.view(y.shape)  # here, as in `grouped_linear`


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        factor_KO: Tensor,
        bias_O: Tensor | None,
        groups: Groups,
        by_slot: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(y.to(dtype), factor_KO, bias_O)
        ctx.dtype, ctx.groups, ctx.by_slot = y.dtype, groups, by_slot
        result_NO = _rows(y).to(factor_KO.dtype, copy=True)
        scale_spans(result_NO, factor_KO, groups, by_slot)
        if bias_O is not None:
            shift_spans(result_NO, bias_O * (1 - factor_KO), groups, by_slot)
        return result_NO.to(dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        y, factor_KO, bias_O = ctx.saved_tensors
        dy_NO = dy_NO.to(factor_KO.dtype, copy=True)
        dfactor_KO = _sums(dy_NO * _rows(y), factor_KO, ctx.groups, ctx.by_slot)
        if bias_O is not None:
            dfactor_KO -= _sums(dy_NO, factor_KO, ctx.groups, ctx.by_slot) * bias_O
        scale_spans(dy_NO, factor_KO, ctx.groups, ctx.by_slot)
        return dy_NO.to(ctx.dtype).view(y.shape), dfactor_KO, None, None, None, None


def scale_spans(y_NO: Tensor, factor_KO: Tensor, groups: Groups, by_slot: bool) -> None:
    """Multiply the tokens of the slots at work by their slot's factor, in place."""
    if groups.is_even:
        _stacked(y_NO, groups).mul_(factor_KO[groups.picked(y_NO.device)][:, None])
    elif by_slot:
        for slot, span in groups.spans.items():
            y_NO[span] *= factor_KO[slot]
    else:
        y_NO.mul_(F.pad(factor_KO, (0, 0, 0, 1), value=1).index_select(0, groups.owners(y_NO.device)))


def shift_spans(y_NO: Tensor, shift_KO: Tensor, groups: Groups, by_slot: bool) -> None:
    """Add their slot's shift to the tokens of the slots at work, in place."""
    if groups.is_even:
        _stacked(y_NO, groups).add_(shift_KO[groups.picked(y_NO.device)][:, None])
    elif by_slot:
        for slot, span in groups.spans.items():
            y_NO[span] += shift_KO[slot]
    else:
        y_NO.add_(F.pad(shift_KO, (0, 0, 0, 1)).index_select(0, groups.owners(y_NO.device)))


def _sums(y_NO: Tensor, like_KO: Tensor, groups: Groups, by_slot: bool) -> Tensor:
    """[K, O]: each slot's sum over its tokens."""
    found_KO = torch.zeros_like(like_KO)
    if groups.is_even or not by_slot:
        for part in groups.parts:
            y_CTO = _stacked(y_NO, part)
            if not part.is_even:
                y_CTO = y_CTO.masked_fill(part.padding(y_NO.device), 0)
            found_KO[part.picked(y_NO.device)] = y_CTO.sum(1, dtype=like_KO.dtype)
    else:
        for slot, span in groups.spans.items():
            torch.sum(y_NO[span], 0, dtype=like_KO.dtype, out=found_KO[slot])
    return found_KO
