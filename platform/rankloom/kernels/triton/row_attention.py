"""Row attention on CUDA: torch's flash attention, which takes rows of different lengths as they lie."""

from __future__ import annotations

import torch
from torch import Tensor


def row_attention_forward(
    q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, starts_B1: Tensor, longest: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    result_NHE, logs_HN, *_ = torch.ops.aten._flash_attention_forward(
        q_NHE, k_NGE, v_NGE, starts_B1, starts_B1, longest, longest, 0.0, window == 0, False,
        scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0,
    )  # fmt: skip
    return result_NHE, logs_HN


def row_attention_backward(
    dresult_NHE: Tensor, q_NHE: Tensor, k_NGE: Tensor, v_NGE: Tensor, result_NHE: Tensor, logs_HN: Tensor,
    starts_B1: Tensor, longest: int, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    unused = torch.empty(2, dtype=torch.uint64, device=q_NHE.device)  # the state of a dropout that there is not
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dresult_NHE, q_NHE, k_NGE, v_NGE, result_NHE, logs_HN, starts_B1, starts_B1, longest, longest, 0.0, window == 0,
        unused, unused[:0],
        scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0,
    )  # fmt: skip
    return dq, dk, dv
