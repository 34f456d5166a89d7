"""The grouped low-rank product: every token goes through its own slot's A and B, all slots at once.

`grouped_lora_reference` says what is computed; `grouped_lora` computes the same, with gradients, in whichever of two
ways was measured to be faster (`_pads`): slot by slot on views, without a copy, or all slots in batched matrix
products, with the tokens of each padded to the largest count. `scale_rows` is DoRA's part.

Nothing that one slot holds, not even inf or nan, reaches another slot's tokens or gradients: padding repeats a slot's
own last token, and no product runs over the tokens of two slots.

Shapes: N tokens sorted by slot, K slots, C slots with tokens, T most tokens of a slot, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PADDED_BELOW = 2**16
"""On a CPU: elements of the average slot's input below which calls cost more than padding does."""


class Groups:
    """Which tokens are whose: the first `start` are nobody's, then come those of slot 0, of slot 1 and so on.

    Args:
        counts: tokens of each slot.
        ranks: true rank of each slot's adapter; A and B are zero beyond it. A slot of rank 0 has no adapter.
    """

    def __init__(self, counts: Sequence[int], ranks: Sequence[int], *, start: int = 0) -> None:
        self.num_slots = len(counts)
        self.spans: dict[int, slice] = {}
        """Tokens of each slot that has both tokens and an adapter."""
        stop = start
        for slot, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
            if count and rank:
                self.spans[slot] = slice(stop, stop + count)
            stop += count
        self.num_tokens = stop
        self.counts, self.ranks = tuple(counts), tuple(ranks)
        self.slots = tuple(self.spans)
        self.rank = max((ranks[slot] for slot in self.slots), default=0)
        self.most = max((counts[slot] for slot in self.slots), default=0)
        self._layouts: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def block(self) -> slice | None:
        """The tokens of all slots with an adapter, where these are equally many of each and lie without a gap."""
        spans = list(self.spans.values())
        whole = slice(spans[0].start, spans[-1].stop)
        return whole if whole.stop - whole.start == len(spans) * self.most else None

    @cached_property
    def picked(self) -> slice | list[int]:
        """The slots in `slots`: a slice, and so a view, where they follow each other."""
        first, last = self.slots[0], self.slots[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.slots) else list(self.slots)

    def layout(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The token at each of C*T places, each token's place among them, and [C, T, 1] where padding is."""
        if device not in self._layouts:
            starts_C = torch.tensor([span.start for span in self.spans.values()])
            counts_C = torch.tensor([self.counts[slot] for slot in self.slots])
            t_T = torch.arange(self.most)
            tokens_CT = starts_C[:, None] + torch.minimum(t_T, counts_C[:, None] - 1)
            padding_CT = t_T >= counts_C[:, None]
            places_N = torch.nonzero(~padding_CT.flatten()).flatten()
            found = (tokens_CT.flatten(), places_N, padding_CT[..., None])
            tokens, places, padding = (t.to(device, non_blocking=True) for t in found)
            self._layouts[device] = tokens, places, padding
        return self._layouts[device]


def grouped_lora_reference(
    x_NI: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
) -> Tensor:
    """[N, O]: scale · B A x for each token, with its slot's scale, B and A; zero for tokens of no adapter."""
    parts, done = [], 0
    for slot, span in groups.spans.items():
        parts.append(x_NI.new_zeros(span.start - done, b_KOR.shape[1]))
        parts.append(x_NI[span] @ a_KRI[slot].T @ b_KOR[slot].T * scale_K[slot])
        done = span.stop
    parts.append(x_NI.new_zeros(len(x_NI) - done, b_KOR.shape[1]))
    return torch.cat(parts)


def grouped_lora(
    x_NI: Tensor,
    a_KRI: Tensor,
    b_KOR: Tensor,
    scale_K: Sequence[float],
    groups: Groups,
    *,
    onto: Tensor | None = None,
    padded: bool | None = None,
) -> Tensor:
    """`grouped_lora_reference`, faster.

    Args:
        onto: [..., O] of N rows, contiguous: the product is added to it in place.
        padded: which way; None: the one that was measured to be faster.
    """
    if onto is None:
        onto = x_NI.new_zeros(*x_NI.shape[:-1], b_KOR.shape[1])
    if not groups.slots:
        return onto
    if padded is None:
        padded = _pads(x_NI, groups)
    way = _Padded if padded else _SlotBySlot
    result: Tensor = way.apply(onto, x_NI, a_KRI, b_KOR, scale_K, groups)
    return result


def _pads(x: Tensor, groups: Groups) -> bool:
    if x.device.type != "cpu" or groups.block is not None:
        return True
    return groups.num_tokens * x.shape[-1] < PADDED_BELOW * len(groups.slots)


class _SlotBySlot(torch.autograd.Function):
    """A few products for each slot, each of its true rank, on views of its tokens."""

    @staticmethod
    def forward(
        ctx: Any, onto: Tensor, x: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
    ) -> Tensor:
        x_NI, y_NO = x.reshape(-1, x.shape[-1]), onto.view(-1, onto.shape[-1])
        inner = []
        for slot, span in groups.spans.items():
            rank = groups.ranks[slot]
            h_TR = torch.mm(x_NI[span], a_KRI[slot, :rank].T).mul_(scale_K[slot])
            _add_product(y_NO[span], h_TR, b_KOR[slot, :, :rank].T)
            inner.append(h_TR)
        ctx.mark_dirty(onto)
        ctx.save_for_backward(x, a_KRI, b_KOR, *inner)
        ctx.scale_K, ctx.groups = scale_K, groups
        return onto

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a_KRI, b_KOR, *inner = ctx.saved_tensors
        groups: Groups = ctx.groups
        x_NI = x.reshape(-1, x.shape[-1])
        dy_NO = gradient.reshape(-1, gradient.shape[-1]).to(x.dtype)
        da_KRI, db_KOR = torch.zeros_like(a_KRI), torch.zeros_like(b_KOR)
        dx_NI = torch.zeros_like(x_NI) if ctx.needs_input_grad[1] else None
        for (slot, span), h_TR in zip(groups.spans.items(), inner, strict=True):
            rank = groups.ranks[slot]
            dy_TO = dy_NO[span]
            dh_TR = torch.mm(dy_TO, b_KOR[slot, :, :rank]).mul_(ctx.scale_K[slot])
            torch.mm(dh_TR.T, x_NI[span], out=da_KRI[slot, :rank])
            db_KOR[slot, :, :rank] = dy_TO.T @ h_TR
            if dx_NI is not None:
                torch.mm(dh_TR, a_KRI[slot, :rank], out=dx_NI[span])
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return gradient, dx, da_KRI, db_KOR, None, None


class _Padded(torch.autograd.Function):
    """Batched products over all slots, each of the largest rank; the tokens are padded where they are not even."""

    @staticmethod
    def forward(
        ctx: Any, onto: Tensor, x: Tensor, a_KRI: Tensor, b_KOR: Tensor, scale_K: Sequence[float], groups: Groups
    ) -> Tensor:
        x_NI, y_NO = x.reshape(-1, x.shape[-1]), onto.view(-1, onto.shape[-1])
        scale_C11 = torch.tensor([scale_K[slot] for slot in groups.slots], dtype=x.dtype)[:, None, None]
        scale_C11 = scale_C11.to(x.device, non_blocking=True)
        a_CRI, b_COR = a_KRI[groups.picked, : groups.rank], b_KOR[groups.picked, :, : groups.rank]
        h_CTR = torch.bmm(_padded(x_NI, groups), a_CRI.mT).mul_(scale_C11)
        if groups.block is not None and y_NO.dtype == x.dtype:
            _padded(y_NO, groups).baddbmm_(h_CTR, b_COR.mT)
        else:
            _add_unpadded(y_NO, torch.bmm(h_CTR, b_COR.mT), groups)
        ctx.mark_dirty(onto)
        ctx.save_for_backward(x, a_KRI, b_KOR, h_CTR, scale_C11)
        ctx.groups = groups
        return onto

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a_KRI, b_KOR, h_CTR, scale_C11 = ctx.saved_tensors
        groups: Groups = ctx.groups
        a_CRI, b_COR = a_KRI[groups.picked, : groups.rank], b_KOR[groups.picked, :, : groups.rank]
        dy_CTO = _padded(gradient.reshape(-1, gradient.shape[-1]).to(x.dtype), groups)
        dh_CTR = torch.bmm(dy_CTO, b_COR).mul_(scale_C11)
        if groups.block is None:  # what padding repeats must not be counted again
            padding_CT1 = groups.layout(x.device)[2]
            dh_CTR.masked_fill_(padding_CT1, 0)
            h_CTR = h_CTR.masked_fill(padding_CT1, 0)
        x_NI = x.reshape(-1, x.shape[-1])
        da_KRI, db_KOR = torch.zeros_like(a_KRI), torch.zeros_like(b_KOR)
        da_KRI[groups.picked, : groups.rank] = torch.bmm(dh_CTR.mT, _padded(x_NI, groups))
        db_KOR[groups.picked, :, : groups.rank] = torch.bmm(dy_CTO.mT, h_CTR)
        dx = None
        if ctx.needs_input_grad[1]:
            dx_NI = torch.zeros_like(x_NI)
            _add_unpadded(dx_NI, torch.bmm(dh_CTR, a_CRI), groups)
            dx = dx_NI.view(x.shape)
        return gradient, dx, da_KRI, db_KOR, None, None


def _padded(x_ND: Tensor, groups: Groups) -> Tensor:
    """[C, T, D]."""
    if groups.block is not None:
        return x_ND[groups.block].view(len(groups.slots), groups.most, -1)
    return x_ND.index_select(0, groups.layout(x_ND.device)[0]).view(len(groups.slots), groups.most, -1)


def _add_unpadded(y_ND: Tensor, x_CTD: Tensor, groups: Groups) -> None:
    x_PD = x_CTD.flatten(0, 1)
    if groups.block is not None:
        y_ND[groups.block] += x_PD
        return
    tokens_P, places_N, _ = groups.layout(x_PD.device)
    x_PD = x_PD.index_select(0, places_N)
    spans = list(groups.spans.values())
    if spans[-1].stop - spans[0].start == len(x_PD):  # no gap between slots
        y_ND[spans[0].start : spans[-1].stop] += x_PD
    else:
        y_ND.index_add_(0, tokens_P.index_select(0, places_N), x_PD)


def _add_product(y_TO: Tensor, h_TR: Tensor, b_RO: Tensor) -> None:
    if y_TO.dtype == h_TR.dtype:
        y_TO.addmm_(h_TR, b_RO)
    else:
        y_TO.add_(h_TR @ b_RO)


def scale_rows_reference(y_NO: Tensor, factor_KO: Tensor, bias_O: Tensor | None, groups: Groups) -> Tensor:
    """factor · (y - bias) + bias for the tokens in `groups`, with their slots' factors; the others as they are."""
    parts, done = [], 0
    for slot, span in groups.spans.items():
        parts.append(y_NO[done : span.start])
        y_TO = y_NO[span] if bias_O is None else y_NO[span] - bias_O
        y_TO = y_TO * factor_KO[slot]
        parts.append(y_TO if bias_O is None else y_TO + bias_O)
        done = span.stop
    return torch.cat([*parts, y_NO[done:]])


def scale_rows(y: Tensor, factor_KO: Tensor, bias_O: Tensor | None, groups: Groups) -> Tensor:
    """`scale_rows_reference` without its copies, for [..., O] of N rows; no gradient goes to the bias."""
    if not groups.slots:
        return y
    result: Tensor = _ScaleRows.apply(y, factor_KO, bias_O, groups)  # type: ignore[no-untyped-call]
    return result


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, factor_KO: Tensor, bias_O: Tensor | None, groups: Groups) -> Tensor:
        result = y.clone() if len(groups.spans) < groups.num_slots else torch.empty_like(y)
        result = y.clone()
        y_NO, result_NO = y.view(-1, y.shape[-1]), result.view(-1, y.shape[-1])
        factor_KO = factor_KO.to(y.dtype)
        for slot, span in groups.spans.items():
            factor_O = factor_KO[slot]
            torch.mul(y_NO[span], factor_O, out=result_NO[span])
            if bias_O is not None:
                result_NO[span] += bias_O * (1 - factor_O)
        ctx.save_for_backward(y, factor_KO, bias_O)
        ctx.groups = groups
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, factor_KO, bias_O = ctx.saved_tensors
        y_NO = y.view(-1, y.shape[-1])
        dy_NO = gradient.reshape(y_NO.shape).clone()
        dfactor_KO = torch.zeros_like(factor_KO, dtype=torch.float32)
        for slot, span in ctx.groups.spans.items():
            g_TO = dy_NO[span]
            dfactor_KO[slot] = (g_TO * y_NO[span]).sum(0)
            if bias_O is not None:
                dfactor_KO[slot] -= g_TO.sum(0) * bias_O
            g_TO *= factor_KO[slot]
        return dy_NO.view(y.shape), dfactor_KO, None, None
