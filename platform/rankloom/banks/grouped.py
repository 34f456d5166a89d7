"""The grouped low-rank product: each token goes through its own slot's A and B, all slots at once.

`grouped_lora_reference` defines the product. `grouped_lora` (added to an existing result) and `grouped_linear` (with
the frozen linear layer before it) compute it with gradients, in the way that was measured to be the fastest
(`choose_way`): slot by slot on views of the tokens, or in batched products with each slot's tokens padded to the
largest count. `scale_rows` is DoRA's part. On CUDA, `ragged.py` computes all of this in few launches; this is its
reference.

No value of one slot, not even inf or nan, reaches another slot's tokens or gradients: padding repeats a slot's own last
token, and no product runs over the tokens of two slots.

Shapes: N tokens sorted by slot, K slots, C slots at work, T most tokens of a slot, P = C·T, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rankloom.banks.groups import Groups
from rankloom.models import onednn

PAD_BELOW = 2**15
"""On a CPU: elements of an average slot's input and output below which calls cost more than padding does."""


def grouped_lora_reference(
    x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
) -> Tensor:
    """Return scale · B A x [N, O] for each token, with its slot's scale, B and A; zero without an adapter."""
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
    """Add the product in place to `onto`, which is [..., O] of N rows and contiguous.

    Args:
        x: [..., I] of N rows, of the stacks' dtype; `onto` may be of another.
    """
    if not groups.slots:
        return onto
    result: Tensor = _Onto.apply(onto, x, a_KRI, b_KOR, scale_K, groups, way or choose_way(x, b_KOR, groups))
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
    """Apply a frozen linear layer and the product, all of one dtype; keeps x once, and sums its gradient in place."""
    if not groups.slots:
        return F.linear(x, weight_OI, bias_O)
    way = way or choose_way(x, b_KOR, groups)
    y_NO: Tensor = _Linear.apply(x, weight_OI, bias_O, a_KRI, b_KOR, scale_K, groups, way)
    return y_NO.view(*x.shape[:-1], -1)  # here, because models may not change in place a view that a Function made


def choose_way(x: Tensor, b_KOR: Tensor, groups: Groups) -> Way:
    """Return the way that was measured to be the fastest for products of this size."""
    if x.device.type != "cpu" or groups.is_even:  # nothing is padded
        return Stacked()
    elements = sum(groups.counts[slot] for slot in groups.slots) * (x.shape[-1] + b_KOR.shape[1])
    return Stacked() if elements < PAD_BELOW * len(groups.slots) else SlotBySlot()


class Stacks(NamedTuple):
    """The adapters of all slots, and the tokens that go through them."""

    a_KRI: Tensor
    b_KOR: Tensor
    scale_K: Sequence[float] | None
    """None: B contains them."""
    groups: Groups


class Way(Protocol):
    """One way to compute the product; a class, since `compute_gradients` must suit what its own `add` keeps."""

    def add(self, y_NO: Tensor, x_NI: Tensor, stacks: Stacks) -> list[Tensor]:
        """Add the product to y in place; returns what `compute_gradients` needs."""
        ...

    def compute_gradients(
        self, dy_NO: Tensor, x_NI: Tensor, stacks: Stacks, kept: list[Tensor], dx_NI: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of A and B; add that of x to `dx_NI`."""
        ...


class SlotBySlot:
    """A few products for each slot, each of its true rank, on views of its tokens."""

    def add(self, y_NO: Tensor, x_NI: Tensor, stacks: Stacks) -> list[Tensor]:
        a_KRI, b_KOR, scale_K, groups = stacks
        kept = []
        for slot, span in groups.spans.items():
            rank = groups.ranks[slot]
            h_TR = torch.mm(x_NI[span], a_KRI[slot, :rank].T)
            if scale_K is not None:
                h_TR.mul_(scale_K[slot])
            b_RO = b_KOR[slot, :, :rank].T
            if y_NO.dtype == h_TR.dtype:
                y_NO[span].addmm_(h_TR, b_RO)
            else:
                y_NO[span].add_(h_TR @ b_RO)
            kept.append(h_TR)
        return kept

    def compute_gradients(
        self, dy_NO: Tensor, x_NI: Tensor, stacks: Stacks, kept: list[Tensor], dx_NI: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a_KRI, b_KOR, scale_K, groups = stacks
        da_KRI, db_KOR = torch.zeros_like(a_KRI), torch.zeros_like(b_KOR)
        for (slot, span), h_TR in zip(groups.spans.items(), kept, strict=True):
            rank = groups.ranks[slot]
            dy_TO = dy_NO[span]
            dh_TR = torch.mm(dy_TO, b_KOR[slot, :, :rank])
            if scale_K is not None:
                dh_TR.mul_(scale_K[slot])
            torch.mm(dh_TR.T, x_NI[span], out=da_KRI[slot, :rank])
            torch.mm(dy_TO.T, h_TR, out=db_KOR[slot, :, :rank])
            if dx_NI is not None:
                dx_NI[span].addmm_(dh_TR, a_KRI[slot, :rank])
        return da_KRI, db_KOR


class Stacked:
    """Batched products over all slots at work, each of the largest rank.

    Tokens are padded where the slots are not even, and slots of very different counts are computed in parts.
    """

    def add(self, y_NO: Tensor, x_NI: Tensor, stacks: Stacks) -> list[Tensor]:
        return [self._add_part(y_NO, x_NI, stacks, part) for part in stacks.groups.parts]

    def compute_gradients(
        self, dy_NO: Tensor, x_NI: Tensor, stacks: Stacks, kept: list[Tensor], dx_NI: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        groups = stacks.groups
        parts = [
            self._compute_part_gradients(dy_NO, x_NI, stacks, part, h_CTR, dx_NI)
            for part, h_CTR in zip(groups.parts, kept, strict=True)
        ]
        if parts[0][0].shape == stacks.a_KRI.shape:
            return parts[0]
        da_KRI, db_KOR = torch.zeros_like(stacks.a_KRI), torch.zeros_like(stacks.b_KOR)
        for part, (da_CRI, db_COR) in zip(groups.parts, parts, strict=True):
            slots = part.get_index(x_NI.device)
            da_KRI[slots, : part.rank], db_KOR[slots, :, : part.rank] = da_CRI, db_COR
        return da_KRI, db_KOR

    def _add_part(self, y_NO: Tensor, x_NI: Tensor, stacks: Stacks, groups: Groups) -> Tensor:
        """Add one part of the slots; returns its h."""
        a_CRI, b_COR = _select_stacks(stacks, groups)
        h_CTR = torch.bmm(_stack(x_NI, groups), a_CRI.mT)
        if stacks.scale_K is not None:
            h_CTR.mul_(groups.get_scales(stacks.scale_K, x_NI))
        if not groups.is_even:  # padding repeats tokens, which must not count in B's gradient
            h_CTR.masked_fill_(groups.get_padding(x_NI.device), 0)
        _add_bmm(y_NO, h_CTR, b_COR.mT, groups)
        return h_CTR

    def _compute_part_gradients(
        self, dy_NO: Tensor, x_NI: Tensor, stacks: Stacks, groups: Groups, h_CTR: Tensor, dx_NI: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients for one part of the slots, of its slots at work alone."""
        a_CRI, b_COR = _select_stacks(stacks, groups)
        dy_CTO = _stack(dy_NO, groups)
        dh_CTR = torch.bmm(dy_CTO, b_COR)
        if stacks.scale_K is not None:
            dh_CTR.mul_(groups.get_scales(stacks.scale_K, x_NI))
        if not groups.is_even:
            dh_CTR.masked_fill_(groups.get_padding(x_NI.device), 0)
        da_CRI = torch.bmm(dh_CTR.mT, _stack(x_NI, groups))
        db_COR = torch.bmm(dy_CTO.mT, h_CTR)
        if dx_NI is not None:
            _add_bmm(dx_NI, dh_CTR, a_CRI, groups)
        return da_CRI, db_COR


def _select_stacks(stacks: Stacks, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return A [C, R, I] and B [C, O, R] of the slots at work, up to their largest rank; views of adjacent slots."""
    slots = groups.get_index(stacks.a_KRI.device)
    return stacks.a_KRI[slots, : groups.rank], stacks.b_KOR[slots, :, : groups.rank]


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
        kept = way.add(onto.view(-1, onto.shape[-1]), _flatten(x), Stacks(a_KRI, b_KOR, scale_K, groups))
        ctx.mark_dirty(onto)
        ctx.save_for_backward(x, a_KRI, b_KOR, *kept)
        ctx.scale_K, ctx.groups, ctx.way = scale_K, groups, way
        return onto

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a_KRI, b_KOR, *kept = ctx.saved_tensors
        dx_NI = torch.zeros_like(_flatten(x)) if ctx.needs_input_grad[1] else None
        dy_NO = _flatten(dy).to(x.dtype)
        stacks = Stacks(a_KRI, b_KOR, ctx.scale_K, ctx.groups)
        da_KRI, db_KOR = ctx.way.compute_gradients(dy_NO, _flatten(x), stacks, kept, dx_NI)
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
        y_NO = onednn.linear(_flatten(x), weight_OI, bias_O)
        kept = way.add(y_NO, _flatten(x), Stacks(a_KRI, b_KOR, scale_K, groups))
        ctx.save_for_backward(x, weight_OI, a_KRI, b_KOR, *kept)
        ctx.scale_K, ctx.groups, ctx.way = scale_K, groups, way
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, a_KRI, b_KOR, *kept = ctx.saved_tensors
        dx_NI = onednn.multiply(dy_NO, weight_OI) if ctx.needs_input_grad[0] else None
        stacks = Stacks(a_KRI, b_KOR, ctx.scale_K, ctx.groups)
        da_KRI, db_KOR = ctx.way.compute_gradients(dy_NO, _flatten(x), stacks, kept, dx_NI)
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return dx, None, None, da_KRI, db_KOR, None, None, None


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _stack(x_ND: Tensor, groups: Groups) -> Tensor:
    """Return the slots' tokens [C, T, D]."""
    if groups.is_even:
        assert groups.whole is not None
        return x_ND[groups.whole].view(len(groups.slots), groups.most, -1)
    return x_ND.index_select(0, groups.get_places(x_ND.device)).view(len(groups.slots), groups.most, -1)


def _add_bmm(y_ND: Tensor, left_CTR: Tensor, right_CRD: Tensor, groups: Groups) -> None:
    """Add left · right to the tokens of the slots at work."""
    if groups.is_even and y_ND.dtype == left_CTR.dtype:
        _stack(y_ND, groups).baddbmm_(left_CTR, right_CRD)
        return
    product_PD = torch.bmm(left_CTR, right_CRD).flatten(0, 1)
    product_ND = product_PD.index_select(0, groups.get_token_places(y_ND.device))
    if groups.whole is not None:
        y_ND[groups.whole] += product_ND
    else:
        y_ND.index_add_(0, groups.get_tokens(y_ND.device), product_ND.to(y_ND.dtype))


def scale_rows_reference(y_NO: Tensor, factor_KO: Tensor, bias_O: Tensor | None, groups: Groups) -> Tensor:
    """Return factor · (y - bias) + bias for the tokens of slots at work, with their slot's factor; others unchanged."""
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
    """Compute `scale_rows_reference` for [..., O] of N rows, keeping y alone; the bias gets no gradient.

    The arithmetic has the factors' dtype, whatever y's is: bf16 would round a factor near 1 to 1.

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
        result_NO = _flatten(y).to(factor_KO.dtype, copy=True)
        scale_spans(result_NO, factor_KO, groups, by_slot)
        if bias_O is not None:
            shift_spans(result_NO, bias_O * (1 - factor_KO), groups, by_slot)
        return result_NO.to(dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        y, factor_KO, bias_O = ctx.saved_tensors
        dy_NO = dy_NO.to(factor_KO.dtype, copy=True)
        dfactor_KO = _sum_spans(dy_NO * _flatten(y), factor_KO, ctx.groups, ctx.by_slot)
        if bias_O is not None:
            dfactor_KO -= _sum_spans(dy_NO, factor_KO, ctx.groups, ctx.by_slot) * bias_O
        scale_spans(dy_NO, factor_KO, ctx.groups, ctx.by_slot)
        return dy_NO.to(ctx.dtype).view(y.shape), dfactor_KO, None, None, None, None


def scale_spans(y_NO: Tensor, factor_KO: Tensor, groups: Groups, by_slot: bool) -> None:
    """Multiply the tokens of the slots at work by their slot's factor, in place."""
    if groups.is_even:
        _stack(y_NO, groups).mul_(factor_KO[groups.get_index(y_NO.device)][:, None])
    elif by_slot:
        for slot, span in groups.spans.items():
            y_NO[span] *= factor_KO[slot]
    else:
        y_NO.mul_(F.pad(factor_KO, (0, 0, 0, 1), value=1).index_select(0, groups.get_owners(y_NO.device)))


def shift_spans(y_NO: Tensor, shift_KO: Tensor, groups: Groups, by_slot: bool) -> None:
    """Add their slot's shift to the tokens of the slots at work, in place."""
    if groups.is_even:
        _stack(y_NO, groups).add_(shift_KO[groups.get_index(y_NO.device)][:, None])
    elif by_slot:
        for slot, span in groups.spans.items():
            y_NO[span] += shift_KO[slot]
    else:
        y_NO.add_(F.pad(shift_KO, (0, 0, 0, 1)).index_select(0, groups.get_owners(y_NO.device)))


def _sum_spans(y_NO: Tensor, like_KO: Tensor, groups: Groups, by_slot: bool) -> Tensor:
    """Return each slot's sum over its tokens [K, O]."""
    found_KO = torch.zeros_like(like_KO)
    if groups.is_even or not by_slot:
        for part in groups.parts:
            y_CTO = _stack(y_NO, part)
            if not part.is_even:
                y_CTO = y_CTO.masked_fill(part.get_padding(y_NO.device), 0)
            found_KO[part.get_index(y_NO.device)] = y_CTO.sum(1, dtype=like_KO.dtype)
    else:
        for slot, span in groups.spans.items():
            torch.sum(y_NO[span], 0, dtype=like_KO.dtype, out=found_KO[slot])
    return found_KO
