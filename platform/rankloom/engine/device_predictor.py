"""DevicePredictor: a step on a GPU, from its tokens to the next ones, without the host in between.

What the host decides (tokens, lengths, pages, settings of sampling) goes to the device in one copy, and the tokens come
back in one. A step in which every sequence has one token has fixed shapes, for a number of rows that is rounded up; it
is a CUDA graph from its third time on. Constrained rows get their masks, and their tokens, after it; the host finds the
masks while the graph runs. What sampling on the device can't do, such as penalties, is done from the step's logits as
on a CPU.

Shapes: R rows, N tokens, M rows that predict, P pages of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rankloom.banks.served_bank import NO_SLOT
from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.kv_pool import NOBODYS, PAGE, KvPool, count_pages
from rankloom.engine.layers import PROBES
from rankloom.engine.model_runner import KeptTokens, ModelRunner
from rankloom.engine.paged_attention import PagedChunks, PagedRows
from rankloom.engine.protocol import SampledToken, Sampling
from rankloom.engine.runner import PromptOutputs
from rankloom.engine.sampling import (
    CANDIDATES,
    COLDEST,
    LARGEST,
    SamplingColumns,
    SamplingInput,
    compute_probabilities,
    cuts,
    draw_any,
    draw_candidate,
    needs_logits,
    sample_tokens,
    upload_masks,
)
from rankloom.kernels.graphs import GraphCache
from rankloom.models.staging import StagedTensors

Draw = Literal["likeliest", "any", "candidate"]
"""How a step's tokens are drawn: each the likeliest; from all tokens; from those that top-k and top-p leave."""
UNSOUND, UNCERTAIN = -1, -2
"""Instead of a token: its logits are not sound; it is not among the candidates that were considered."""
MOST_GRAPHS = 64


class DevicePredictor:
    """A `Predictor` over a `KvPool`."""

    overlaps = True

    def __init__(self, runner: ModelRunner, pool: KvPool, num_seqs: int, num_tokens: int, context: int) -> None:
        """
        Args:
            num_seqs, num_tokens: the most of a step.
            context: the most tokens of a sequence.
        """
        self._runner, self._pool, self._num_seqs = runner, pool, num_seqs
        device, rows, pages = pool.shape.device, round_rows(num_seqs), count_pages(context)
        self.graphs = GraphCache(device, MOST_GRAPHS)
        self._generation = runner.bank.generation
        settings = dict.fromkeys(("temperature", "min_p", "top_p"), (torch.float32, (rows, 1)))
        settings |= {"top_k": (torch.int64, (rows, 1)), "chance": (torch.float64, (rows, 1))}
        table = {"table": (torch.int64, (rows, pages)), "length": (torch.int64, (rows,))}
        row, token = (torch.int64, (rows,)), (torch.int64, (num_tokens,))
        self._rows = StagedTensors(
            device, {"ids": row, "positions": row, "slots": (torch.int32, (rows,)), **table, **settings}
        )
        of_chunks = {f"chunk_{name}": size for name, size in table.items()}
        self._tokens = StagedTensors(
            device,
            {"ids": token, "positions": token, "token_R": row, "token_C": token, "place_C": token, "kept": token}
            | {"starts": (torch.int32, (rows + 1,))} | table | of_chunks | settings,
        )  # fmt: skip

    @torch.inference_mode()
    def predict(self, chunks: Sequence[SequenceChunk], inputs: Sequence[SamplingInput]) -> _DeviceResult:
        if all(chunk.count == 1 and chunk.predicts and not chunk.scored for chunk in chunks):
            slots = self._runner.bank.find_slots([chunk.adapter for chunk in chunks])
            if slots is not None:
                return self._decode(chunks, slots, inputs)
        return self._prefill(chunks, inputs)

    @torch.inference_mode()
    def agrees(self) -> bool:
        """Return whether its logits are the plain path's: of prompts in two chunks, then token by token, in a graph."""
        probes = PROBES[: min(self._num_seqs, self._pool.size // PAGE)]
        names, last = [str(i) for i in range(len(probes))], [len(tokens) - 1 for tokens in probes]
        plain = KvCache(self._pool.shape, 1 << 16)
        for name, tokens in zip(names, probes, strict=True):
            plain.reserve(name, len(tokens))
            self._pool.reserve(name, len(tokens))

        def chunks(starts: Sequence[int], stops: Sequence[int]) -> list[SequenceChunk]:
            of_each = zip(names, probes, starts, stops, strict=True)
            return [SequenceChunk(name, None, start, tokens[start:stop]) for name, tokens, start, stop in of_each]

        none, two, whole = [0] * len(probes), [2] * len(probes), [len(tokens) for tokens in probes]
        inputs = [SamplingInput(Sampling(temperature=0), (), (), 0.0)] * len(probes)
        expected_MV = self._runner.forward(plain, chunks(none, whole))
        try:
            self.predict(chunks(none, two), inputs)
            self.predict(chunks(two, last), inputs)
            for _ in range(3):  # computed, recorded, replayed
                found_MV = self.predict(chunks(last, whole), inputs).logits_MV
                if not (found_MV - expected_MV).abs().max() <= self._runner.tolerance * expected_MV.abs().max():
                    return False
            return True
        finally:
            for name in names:
                self._pool.remove(name)

    def _decode(
        self, chunks: Sequence[SequenceChunk], slots: Sequence[int], inputs: Sequence[SamplingInput]
    ) -> _DeviceResult:
        rows, draw, generation = round_rows(len(chunks)), _choose_draw(inputs), self._runner.bank.generation
        host = self._rows.open()
        self._write_rows(host, "", chunks, rows)
        host["ids"][:rows] = 0
        host["ids"][: len(chunks)] = [chunk.tokens[0] for chunk in chunks]
        np.subtract(host["length"][:rows], 1, out=host["positions"][:rows])
        _write_settings(host, inputs, rows)
        host["slots"][:rows] = NO_SLOT
        host["slots"][: len(slots)] = slots
        on_device = self._rows.send()
        if generation != self._generation:
            self.graphs.clear()  # they read weights where these are no longer
            self._generation = generation
        slots_R = on_device["slots"][:rows] if any(slot != NO_SLOT for slot in slots) else None  # the base's own graph
        logits_MV, tokens_M = self.graphs.run(
            (rows, draw, slots_R is None), lambda: self._decode_rows(on_device, slots_R, rows, draw)
        )
        order = list(range(len(chunks)))
        tokens_M = _draw_masked_rows(logits_MV, tokens_M, _make_columns(on_device, rows), order, inputs)
        return _DeviceResult(logits_MV, tokens_M, order, inputs)

    def _decode_rows(
        self, of: dict[str, Tensor], slots_R: Tensor | None, rows: int, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """Compute the staged rows; all of it may be recorded."""
        route = self._runner.bank.route_rows(slots_R)
        layout = PagedRows(self._pool, of["table"][:rows], of["length"][:rows])
        logits_RV = self._runner.compute(route, of["ids"][:rows], of["positions"][:rows], layout, None)
        return logits_RV, _draw_tokens(logits_RV, _make_columns(of, rows), draw)

    def _prefill(self, chunks: Sequence[SequenceChunk], inputs: Sequence[SamplingInput]) -> _DeviceResult:
        """Compute a step with any chunks."""
        route, ordered = self._runner.order(chunks)
        host = self._tokens.open()
        stops = list(accumulate(chunk.count for chunk in ordered))
        starts = [stop - chunk.count for chunk, stop in zip(ordered, stops, strict=True)]
        singles = [i for i, chunk in enumerate(ordered) if chunk.count == 1]
        longer = [i for i, chunk in enumerate(ordered) if chunk.count > 1]
        _fill(host["ids"], [token for chunk in ordered for token in chunk.tokens])
        _fill(host["positions"], [p for chunk in ordered for p in range(chunk.start, chunk.start + chunk.count)])
        kept = KeptTokens.of_chunks(ordered)
        _fill(host["kept"], kept.indices)
        _fill(host["token_R"], [starts[i] for i in singles])
        token_C = [token for i in longer for token in range(starts[i], stops[i])]
        _fill(host["token_C"], token_C)
        _fill(host["place_C"], [place for i in longer for place in self._locate(ordered[i])])
        _fill(host["starts"], [0, *accumulate(ordered[i].count for i in longer)])
        self._write_rows(host, "", [ordered[i] for i in singles], len(singles))
        self._write_rows(host, "chunk_", [ordered[i] for i in longer], len(longer))
        index_of = {id: m for m, id in enumerate(kept.predicting)}
        order = [index_of[chunk.id] for chunk in chunks if chunk.predicts]
        by_row = dict(zip(order, inputs, strict=True))
        _write_settings(host, [by_row[m] for m in range(len(order))], len(order))

        of, num_tokens = self._tokens.send(), stops[-1]
        rows = PagedRows(self._pool, of["table"][: len(singles)], of["length"][: len(singles)])
        layout: Any = rows
        if longer:
            most = max(count_pages(ordered[i].start + ordered[i].count) for i in longer)
            layout = PagedChunks(
                self._pool,
                rows if singles else None,
                of["token_R"][: len(singles)],
                of["token_C"][: len(token_C)],
                of["place_C"][: len(token_C)],
                of["chunk_table"][: len(longer), :most],
                of["chunk_length"][: len(longer)],
                of["starts"][: len(longer) + 1],
                max(ordered[i].count for i in longer),
            )
        kept_K = of["kept"][: len(kept.indices)]
        ids_N, positions_N = of["ids"][:num_tokens], of["positions"][:num_tokens]
        logits_KV, prompts = self._runner.compute_kept(route, ids_N, positions_N, layout, kept_K, kept)
        if not order:
            return _DeviceResult(logits_KV, logits_KV.new_empty(0), (), (), prompts)
        logits_MV = logits_KV[list(kept.predicting.values())] if kept.scored else logits_KV
        columns = _make_columns(of, len(order))
        tokens_M = _draw_tokens(logits_MV, columns, _choose_draw(inputs))
        tokens_M = _draw_masked_rows(logits_MV, tokens_M, columns, order, inputs)
        return _DeviceResult(logits_MV, tokens_M, order, inputs, prompts)

    def _write_rows(self, host: dict[str, np.ndarray], prefix: str, chunks: Sequence[SequenceChunk], rows: int) -> None:
        table, length = host[f"{prefix}table"], host[f"{prefix}length"]
        for row, chunk in enumerate(chunks):
            pages = self._pool.get_pages(chunk.id)
            table[row, : len(pages)] = pages
            length[row] = chunk.start + chunk.count
        table[len(chunks) : rows, 0] = NOBODYS
        length[len(chunks) : rows] = 1

    def _locate(self, chunk: SequenceChunk) -> list[int]:
        pages = self._pool.get_pages(chunk.id)
        return [pages[at // PAGE] * PAGE + at % PAGE for at in range(chunk.start, chunk.start + chunk.count)]


class _DeviceResult:
    """A `StepResult` of a step that the device may still compute."""

    def __init__(
        self,
        logits_RV: Tensor,
        tokens_R: Tensor,
        rows_M: Sequence[int],
        inputs: Sequence[SamplingInput],
        prompts: PromptOutputs | None = None,
    ) -> None:
        """
        Args:
            rows_M: the row of each input.
        """
        self.prompts = prompts or PromptOutputs()
        self._logits_RV, self._tokens_R, self._rows_M, self._inputs = logits_RV, tokens_R, rows_M, inputs

    @property
    def logits_MV(self) -> Tensor:
        return self._logits_RV[list(self._rows_M)]

    def read(self) -> list[SampledToken | None]:
        if not self._rows_M:
            return []  # without waiting
        tokens_R: list[int] = self._tokens_R.tolist()
        tokens = [tokens_R[row] for row in self._rows_M]
        found = [None if token == UNSOUND else SampledToken(token, None, ()) for token in tokens]
        left = [
            m
            for m, (token, item) in enumerate(zip(tokens, self._inputs, strict=True))
            if token == UNCERTAIN or (token != UNSOUND and needs_logits(item))
        ]
        if left:
            logits_MV = self._logits_RV[[self._rows_M[m] for m in left]]
            sampled = sample_tokens(logits_MV, [self._inputs[m] for m in left])
            for m, each in zip(left, sampled, strict=True):
                found[m] = each
        return found


def round_rows(count: int) -> int:
    """Return the rows of the smallest graph that holds this many: 1, 2, 4, or a multiple of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def _fill(array: Any, values: Sequence[int]) -> None:
    array[: len(values)] = values


def _write_settings(host: dict[str, np.ndarray], inputs: Sequence[SamplingInput], rows: int) -> None:
    for name, neutral in (("temperature", 0), ("min_p", 0), ("top_k", 0), ("top_p", 1)):
        host[name][: len(inputs), 0] = [getattr(item.sampling, name) for item in inputs]
        host[name][len(inputs) : rows] = neutral
    host["chance"][: len(inputs), 0] = [item.chance for item in inputs]


def _make_columns(of: dict[str, Tensor], rows: int) -> SamplingColumns:
    return SamplingColumns(*(of[name][:rows] for name in ("temperature", "min_p", "top_k", "top_p", "chance")))


def _choose_draw(inputs: Sequence[SamplingInput]) -> Draw:
    """Return how to draw the tokens of all rows that have no masks."""
    return _choose_draw_of([i.sampling for i in inputs if i.mask is None and not needs_logits(i)])


def _choose_draw_of(settings: Sequence[Sampling]) -> Draw:
    drawn = [sampling for sampling in settings if sampling.temperature >= COLDEST]
    return "candidate" if any(map(cuts, drawn)) else "any" if drawn else "likeliest"


def _draw_masked_rows(
    logits_RV: Tensor,
    tokens_R: Tensor,
    columns: SamplingColumns,
    rows_M: Sequence[int],
    inputs: Sequence[SamplingInput],
) -> Tensor:
    """Return the tokens with those of the rows that have masks, which this waits for; the device does not.

    Args:
        rows_M: the row of each input.
    """
    masked = [(row, item) for row, item in zip(rows_M, inputs, strict=True) if item.mask and not needs_logits(item)]
    if not masked:
        return tokens_R
    rows_G, is_excluded_GV = upload_masks({row: item.mask for row, item in masked if item.mask}, logits_RV)
    logits_GV = logits_RV[rows_G].masked_fill_(is_excluded_GV, -torch.inf)
    own = SamplingColumns(*(column[rows_G] for column in vars(columns).values()))
    drawn_G = _draw_sound(logits_GV, own, _choose_draw_of([item.sampling for _, item in masked]))
    return tokens_R.index_copy(0, rows_G, drawn_G.where(tokens_R[rows_G] != UNSOUND, UNSOUND))


def _draw_tokens(logits_MV: Tensor, columns: SamplingColumns, draw: Draw) -> Tensor:
    """Return a token for each row, `UNSOUND` or `UNCERTAIN` [M]; the host waits for nothing."""
    is_sound_M = logits_MV.abs().amax(-1) < LARGEST  # nan is not
    return _draw_sound(logits_MV, columns, draw).where(is_sound_M, UNSOUND)


def _draw_sound(logits_MV: Tensor, columns: SamplingColumns, draw: Draw) -> Tensor:
    """Return a token for each row, or `UNCERTAIN` [M]. Some logits may be -inf."""
    tokens_M = logits_MV.argmax(-1)
    if draw != "likeliest":
        is_cold_M = columns.temperature[:, 0] < COLDEST
        columns = replace(columns, temperature=columns.temperature.clamp_min(COLDEST))
        probs_MV = compute_probabilities(logits_MV, columns, min_p=True)
        if draw == "any":
            drawn_M = draw_any(probs_MV, columns)
        else:
            num_candidates = min(CANDIDATES, probs_MV.shape[1])
            drawn_M, is_certain_M = draw_candidate(probs_MV, columns, num_candidates, some_are_free=True)
            if num_candidates < probs_MV.shape[1]:
                drawn_M = drawn_M.where(is_certain_M, UNCERTAIN)
        tokens_M = tokens_M.where(is_cold_M, drawn_M)
    return tokens_M
