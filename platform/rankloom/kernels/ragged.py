"""Low-rank products of many tokens, each with its slot's factors; a slot's tokens are adjacent, as many as it has.

Which tokens are whose is data on the device, `bounds`, so that a captured CUDA graph holds for any of it. Tokens before
the first slot's and after the last one's are nobody's: their products are zero. No value of one slot, not even inf or
nan, reaches the tokens or the gradients of another.

Sums are in fp32. What is multiplied has the dtype of the factors, and results are rounded once. Only the first `rank_K`
(int32) rank rows of each slot are read.

Shapes: N tokens, K slots, R rank, D width of the wide side, O outputs, S summands of a product of rank R.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rankloom.kernels import op


@op()
def ragged_bounds(slots_N: Tensor, num_slots: int) -> Tensor:
    """Return [K + 3], int32: 0, the first token of each slot, the token after the last slot's, and N.

    Args:
        slots_N: each token's slot, ascending; below 0 and from `num_slots` on: nobody's.
    """
    slot_K1 = torch.arange(num_slots + 1, device=slots_N.device, dtype=slots_N.dtype)
    inner = torch.searchsorted(slots_N, slot_K1, out_int32=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(slots_N))])


@op()
def ragged_shrink(x_ND: Tensor, factor_KRD: Tensor, scale_K: Tensor, rank_K: Tensor, bounds: Tensor) -> Tensor:
    """Return scale · factor x [S, N, R] in fp32, to be summed over S.

    It is undefined for nobody's tokens, and beyond a slot's rank.

    Args:
        factor_KRD: of any strides.
        scale_K: in fp32.
    """
    h_NR = x_ND.new_zeros(len(x_ND), factor_KRD.shape[1], dtype=torch.float32)
    for slot, span in _list_spans(bounds):
        rank = int(rank_K[slot])
        h_NR[span, :rank] = (x_ND[span].float() @ factor_KRD[slot, :rank].float().T) * scale_K[slot]
    return h_NR.unsqueeze(0)


@op()
def ragged_expand(h_SNR: Tensor, factor_KRD: Tensor, bias_D: Tensor | None, rank_K: Tensor, bounds: Tensor) -> Tensor:
    """Return h factor + bias [N, D] in the factor's dtype; nobody's tokens have the bias alone."""
    y_ND = _expand(h_SNR, factor_KRD, rank_K, bounds)
    return (y_ND if bias_D is None else y_ND + bias_D.float()).to(factor_KRD.dtype)


@op(mutates=("y_NO",))
def ragged_expand_scaled(
    y_NO: Tensor,
    h_SNR: Tensor,
    factor_KRO: Tensor,
    scale_KO: Tensor,
    bias_O: Tensor | None,
    rank_K: Tensor,
    bounds: Tensor,
) -> Tensor:
    """Return scale · (y + h factor) + bias [N, O]; y becomes y + h factor. It is DoRA's forward pass.

    Args:
        scale_KO: in fp32; nobody's tokens have a scale of 1.
    """
    sum_NO = y_NO.float() + _expand(h_SNR, factor_KRO, rank_K, bounds)
    y_NO.copy_(sum_NO)
    for slot, span in _list_spans(bounds):
        sum_NO[span] *= scale_KO[slot]
    return (sum_NO if bias_O is None else sum_NO + bias_O.float()).to(y_NO.dtype)


@op()
def ragged_scale_backward(
    dy_NO: Tensor, y_NO: Tensor, scale_KO: Tensor, weight_KO: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Return scale · dy [N, O], and weight · the sum of dy · y over each slot's tokens [K, O] in fp32.

    Args:
        y_NO: what `ragged_expand_scaled` has made of y.
        weight_KO: in fp32, the gradient of the scale with respect to the result's.
    """
    scaled_NO, sums_KO = dy_NO.to(torch.float32, copy=True), torch.zeros_like(scale_KO)
    for slot, span in _list_spans(bounds):
        sums_KO[slot] = (dy_NO[span].float() * y_NO[span].float()).sum(0)
        scaled_NO[span] = scaled_NO[span] * scale_KO[slot]
    return scaled_NO.to(dy_NO.dtype), sums_KO * weight_KO


@op()
def ragged_gradients(
    dh_SNR: Tensor, x_NI: Tensor, h_SNR: Tensor, dy_NO: Tensor, rank_K: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dhᵀ x [K, R, I] and dyᵀ h [K, O, R] of each slot's tokens, in fp32; zero where there are none."""
    dh_NR, h_NR = (h.sum(0).to(x_NI.dtype).float() for h in (dh_SNR, h_SNR))
    da_KRI = h_NR.new_zeros(len(bounds) - 3, h_NR.shape[1], x_NI.shape[1])
    db_KOR = h_NR.new_zeros(len(bounds) - 3, dy_NO.shape[1], h_NR.shape[1])
    for slot, span in _list_spans(bounds):
        rank = int(rank_K[slot])
        da_KRI[slot, :rank] = dh_NR[span, :rank].T @ x_NI[span].float()
        db_KOR[slot, :, :rank] = dy_NO[span].float().T @ h_NR[span, :rank]
    return da_KRI, db_KOR


@op()
def ragged_dropout(x_ND: Tensor, seed_K: Tensor, rate_K: Tensor, salt: int, bounds: Tensor) -> Tensor:
    """Return x with each slot's share of values zeroed and the others scaled up; nobody's tokens are unchanged.

    What is zeroed is a function of the seed, the salt and a value's place among its slot's, so that calls repeat it.

    Args:
        seed_K: int32.
        rate_K: the probability of being zeroed, in fp32.
        salt: differs from layer to layer.
    """
    result_ND = x_ND.clone()
    place_D = torch.arange(x_ND.shape[1], device=x_ND.device)
    for slot, span in _list_spans(bounds):
        place_TD = torch.arange(span.stop - span.start, device=x_ND.device)[:, None] * x_ND.shape[1] + place_D
        key = _mix(seed_K[slot].long() & MASK) ^ _mix(torch.tensor(salt, device=x_ND.device))
        drawn_TD = (_mix((place_TD & MASK) ^ _mix(key)) >> 8).float() * 2**-24
        kept_TD = (drawn_TD >= rate_K[slot]) / (1 - rate_K[slot])
        result_ND[span] = torch.where(kept_TD > 0, x_ND[span].float() * kept_TD, 0).to(x_ND.dtype)
    return result_ND


MASK = 2**32 - 1


def _mix(x: Tensor) -> Tensor:
    """Return the finaliser of MurmurHash3 on 32 bits, which are kept in 64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


@op(launches=3)
def dora_scale(
    weight_OI: Tensor,
    squares_O: Tensor,
    a_KRI: Tensor,
    b_KOR: Tensor,
    scale_K: Tensor,
    magnitude_KO: Tensor,
    is_dora_K: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return m / |W + s B A| [K, O], and 1 / |W + s B A|, of the rows, in fp32; slots without DoRA have 1, and 0.

    |w + s d|² = |w|² + 2 s <w, d> + s² |d|² with d a row of B A, so that <w, d> is the row product of B and W Aᵀ, and
    |d|² that of B and B (A Aᵀ). The norm of a zero row is 1.

    Args:
        squares_O: |w|² of the rows of W, in fp32.
        a_KRI, b_KOR: of W's dtype.
        is_dora_K: which slots have magnitudes here.
    """
    a, b = a_KRI.float(), b_KOR.float()
    across_KOR = torch.einsum("oi,kri->kor", weight_OI.float(), a)
    across_KO = (across_KOR * b).sum(-1)
    own_KO = (torch.bmm(b, torch.bmm(a, a.mT)) * b).sum(-1)
    s_K1 = scale_K.unsqueeze(1)
    squares_KO = squares_O + 2 * s_K1 * across_KO + s_K1.square() * own_KO
    inverse_KO = torch.where(squares_KO > 0, squares_KO, 1).rsqrt()
    is_dora_K1 = is_dora_K.unsqueeze(1)
    return torch.where(is_dora_K1, magnitude_KO * inverse_KO, 1), torch.where(is_dora_K1, inverse_KO, 0)


def _expand(h_SNR: Tensor, factor_KRD: Tensor, rank_K: Tensor, bounds: Tensor) -> Tensor:
    """Return h factor [N, D] in fp32."""
    h_NR = h_SNR.sum(0).to(factor_KRD.dtype).float()
    y_ND = h_NR.new_zeros(len(h_NR), factor_KRD.shape[2])
    for slot, span in _list_spans(bounds):
        rank = int(rank_K[slot])
        y_ND[span] = h_NR[span, :rank] @ factor_KRD[slot, :rank].float()
    return y_ND


def _list_spans(bounds: Tensor) -> list[tuple[int, slice]]:
    """Return the tokens of each slot that has some; none where tensors have shapes alone."""
    if bounds.is_meta or torch._subclasses.fake_tensor.is_fake(bounds):
        return []
    starts: list[int] = bounds.tolist()
    spans = [slice(start, stop) for start, stop in pairwise(starts[1:-1])]
    return [(slot, span) for slot, span in enumerate(spans) if span.start < span.stop]
