"""Attention over a `KvPool`, in few launches, of shapes that do not depend on the sequences' lengths.

Shapes: N tokens of the step, R sequences with one token each, C tokens of the others (chunks of prompts), B of these
others, H query heads, h key heads, E width of a head, P pages of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rankloom.engine.attention import AttentionTerms, get_layer
from rankloom.engine.kv_pool import KvPool
from rankloom.kernels.attention import chunk_attention, decode_attention


@dataclass(frozen=True)
class PagedRows:
    """Sequences with one token each, as an `AttentionLayout`; a step that decodes has nothing else."""

    pool: KvPool
    table_RP: Tensor
    length_R: Tensor
    """Tokens of each sequence, the new one included."""

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, terms: AttentionTerms
    ) -> Tensor:
        query_RHE, key_RhE, value_RhE = (x[0].transpose(0, 1) for x in (query_1HNE, key_1HNE, value_1HNE))
        pages = self.pool.get_layer(get_layer(module))
        return decode_attention(
            query_RHE, key_RhE, value_RhE, *pages, self.table_RP, self.length_R,
            terms.scale, terms.window, terms.softcap, terms.sinks_H,
        )  # fmt: skip


@dataclass(frozen=True)
class PagedChunks:
    """Any sequences, as an `AttentionLayout`."""

    pool: KvPool
    rows: PagedRows | None
    """The sequences with one token."""
    token_R: Tensor
    """The tokens of `rows` among the step's."""
    token_C: Tensor
    place_C: Tensor
    """Where their keys and values go, in tokens of the pool."""
    table_BP: Tensor
    length_B: Tensor
    starts: Tensor
    """int32 [B + 1]: the first of C of each sequence, and their number."""
    longest: int
    """The most tokens of a chunk."""

    def attend(
        self, module: nn.Module, query_1HNE: Tensor, key_1HNE: Tensor, value_1HNE: Tensor, terms: AttentionTerms
    ) -> Tensor:
        query_NHE, key_NhE, value_NhE = (x[0].transpose(0, 1) for x in (query_1HNE, key_1HNE, value_1HNE))
        keys_SThE, values_SThE = self.pool.get_layer(get_layer(module))
        if self.rows is None:
            query_CHE, key_ChE, value_ChE = query_NHE, key_NhE, value_NhE
        else:
            query_CHE, key_ChE, value_ChE = (x.index_select(0, self.token_C) for x in (query_NHE, key_NhE, value_NhE))
        keys_SThE.flatten(0, 1).index_copy_(0, self.place_C, key_ChE)
        values_SThE.flatten(0, 1).index_copy_(0, self.place_C, value_ChE)
        found_CHE = chunk_attention(
            query_CHE, keys_SThE, values_SThE, self.table_BP, self.length_B, self.starts, self.longest,
            terms.scale, terms.window, terms.softcap, terms.sinks_H,
        )  # fmt: skip
        if self.rows is None:
            return found_CHE
        query, key, value = (x[:, :, self.token_R] for x in (query_1HNE, key_1HNE, value_1HNE))
        found_RHE = self.rows.attend(module, query, key, value, terms)
        result_NHE = query_NHE.new_empty(query_NHE.shape)
        result_NHE.index_copy_(0, self.token_C, found_CHE)
        return result_NHE.index_copy_(0, self.token_R, found_RHE)
