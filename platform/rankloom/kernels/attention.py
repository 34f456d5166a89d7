"""Attention over keys and values that lie in pages, for serving: of sequences' next tokens, and of prompts' chunks.

A sequence's tokens lie in the pages that its row of a table names, in order. Lengths and tables are tensors on the
device, so that a CUDA graph holds for all lengths. Query heads that are neighbours share a key head.

A layer may see a window of tokens alone, cap its scores, and have sinks, which take part in the softmax and have no
value. A window counts the token itself; 0: all before it. A cap of 0: none.

Shapes: N tokens, R sequences, H query heads, h key heads, E width of a head, P pages of a row, S pages in all, T tokens
of a page, B sequences of P queries and L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rankloom.kernels import op

MOST_SCORES = 1 << 26
"""Scores in memory at once, where they are computed one by one."""


@op(mutates=("keys_SThE", "values_SThE"), launches=2)
def decode_attention(
    query_RHE: Tensor,
    key_RhE: Tensor,
    value_RhE: Tensor,
    keys_SThE: Tensor,
    values_SThE: Tensor,
    table_RP: Tensor,
    length_R: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Write one token of each sequence into its pages, and return its attention to the whole sequence [R, H, E].

    Args:
        length_R: tokens of each sequence, the new one included, which is the last; at least 1.
    """
    num_rows, num_heads, width = query_RHE.shape
    page_size, last_R = keys_SThE.shape[1], length_R - 1
    page_R = table_RP.gather(1, (last_R // page_size)[:, None])[:, 0]
    keys_SThE.index_put_((page_R, last_R % page_size), key_RhE)
    values_SThE.index_put_((page_R, last_R % page_size), value_RhE)
    keys_RhLE, values_RhLE, seen_RL = _read_pages(keys_SThE, values_SThE, table_RP, length_R)
    if window:
        seen_RL &= torch.arange(seen_RL.shape[1], device=seen_RL.device) >= (length_R - window)[:, None]
    seen_R11L = seen_RL[:, None, None]
    if softcap or sinks_H is not None:
        query_RH1E = query_RHE.float()[:, :, None]
        found = attend_by_scores(query_RH1E, keys_RhLE, values_RhLE, seen_R11L, scale, softcap, sinks_H)
    else:
        query_RhGE = query_RHE.float().reshape(num_rows, keys_SThE.shape[2], -1, width)
        found = F.scaled_dot_product_attention(query_RhGE, keys_RhLE, values_RhLE, attn_mask=seen_R11L, scale=scale)
    return found.reshape(num_rows, num_heads, width).to(query_RHE.dtype)


def mask_chunks(
    query_NHE: Tensor,
    keys_SThE: Tensor,
    values_SThE: Tensor,
    table_RP: Tensor,
    length_R: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return the attention [N, H, E] of each sequence's last tokens, which are in its pages, to it up to themselves.

    It computes with masks, on any device and for any type and width.

    Args:
        starts: int32 [R + 1]; the queries of sequence r are from `starts[r]` up to `starts[r + 1]`.
        longest: the most queries of a sequence.
    """
    keys_RhLE, values_RhLE, seen_RL = _read_pages(keys_SThE, values_SThE, table_RP, length_R)
    device, starts_R, count_R = query_NHE.device, starts[:-1].long(), starts.diff().long()
    offset_Q = torch.arange(longest, device=device)
    token_RQ = (starts_R[:, None] + offset_Q).clamp_max(len(query_NHE) - 1)
    position_RQ = torch.minimum((length_R - count_R)[:, None] + offset_Q, length_R[:, None] - 1)
    key_L = torch.arange(seen_RL.shape[1], device=device)
    seen_RQL = key_L <= position_RQ[..., None]
    if window:
        seen_RQL &= key_L > position_RQ[..., None] - window
    query_RHQE, seen_R1QL = query_NHE[token_RQ].float().transpose(1, 2), seen_RQL[:, None]
    if softcap or sinks_H is not None:
        found_RHQE = attend_by_scores(query_RHQE, keys_RhLE, values_RhLE, seen_R1QL, scale, softcap, sinks_H)
    else:
        found_RHQE = F.scaled_dot_product_attention(
            query_RHQE, keys_RhLE, values_RhLE, attn_mask=seen_R1QL, scale=scale, enable_gqa=True
        )
    token_N = torch.arange(len(query_NHE), device=device)
    row_N = torch.searchsorted(starts[1:].long(), token_N, right=True).clamp_max(len(starts_R) - 1)
    place_N = (token_N - starts_R[row_N]).clamp_max(longest - 1)
    return found_RHQE.transpose(1, 2)[row_N, place_N].to(query_NHE.dtype)


chunk_attention = op(name="chunk_attention", launches=6)(mask_chunks)


def attend_by_scores(
    query_BHPE: Tensor,
    keys_BhLE: Tensor,
    values_BhLE: Tensor,
    seen_B1PL: Tensor,
    scale: float,
    softcap: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """Return the attention [B, H, P, E] with what torch's own does not have: capped scores, and sinks."""
    num_batch, num_heads, num_positions, _ = query_BHPE.shape
    most = max(1, MOST_SCORES // (num_batch * num_heads * keys_BhLE.shape[2]))
    if num_positions > most:
        parts = zip(query_BHPE.split(most, 2), seen_B1PL.split(most, 2), strict=True)
        return torch.cat(
            [attend_by_scores(query, keys_BhLE, values_BhLE, seen, scale, softcap, sinks_H) for query, seen in parts], 2
        )
    num_key_heads, num_keys = keys_BhLE.shape[1:3]
    query_BhGPE = query_BHPE.unflatten(1, (num_key_heads, -1))
    sizes = query_BhGPE.shape[2:4]
    score = (query_BhGPE.flatten(2, 3) @ keys_BhLE.transpose(2, 3)).float() * scale
    if softcap:
        score = softcap * (score / softcap).tanh()
    score = score.unflatten(2, sizes).masked_fill(~seen_B1PL[:, :, None], -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, num_key_heads, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat([score, sinks], -1)
    weight = score.softmax(-1)[..., :num_keys].to(values_BhLE.dtype)
    return (weight.flatten(2, 3) @ values_BhLE).unflatten(2, sizes).flatten(1, 2)


def _read_pages(
    keys_SThE: Tensor, values_SThE: Tensor, table_RP: Tensor, length_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sequence's keys and values [R, h, P·T, E] in fp32, and which of them are its tokens [R, P·T]."""
    pages = (blocks[table_RP].float() for blocks in (keys_SThE, values_SThE))
    keys_RhLE, values_RhLE = (each.flatten(1, 2).transpose(1, 2) for each in pages)
    seen_RL = torch.arange(keys_RhLE.shape[2], device=table_RP.device) < length_R[:, None]
    # what is masked is still multiplied, and must be finite
    return keys_RhLE, values_RhLE.masked_fill(~seen_RL[:, None, :, None], 0), seen_RL
