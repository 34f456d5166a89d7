"""From logits to tokens: each sequence by its own rules, all sequences at once.

In order: penalties, allowed tokens, temperature, min-p, top-k, top-p. Each token takes one random number from the
sequence's own generator, so that its tokens do not depend on the rest of the batch.

Shapes: M sequences, of which G have masks, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankloom.engine.masks import TokenMask
from rankloom.engine.protocol import SampledToken, Sampling
from rankloom.models.staging import upload

COLDEST = 1e-5
"""Below this temperature sampling is greedy: fp32 does not hold the other tokens' probabilities."""
LARGEST = 1e30
"""Logits up to this stay finite when divided by any penalty and temperature that is allowed."""
CANDIDATES = 1024
"""Number of likeliest tokens that top-p considers first; it considers all where these are not likely enough."""


@dataclass(frozen=True)
class SamplingInput:
    """What sampling a sequence's next token needs."""

    sampling: Sampling
    prompt: Sequence[int]
    generated: Sequence[int]
    chance: float
    """In [0, 1)."""
    mask: TokenMask | None = None
    """The tokens to sample from; None: all."""


def sample_tokens(logits_MV: Tensor, inputs: Sequence[SamplingInput]) -> list[SampledToken]:
    """Sample one token for each sequence.

    Args:
        logits_MV: in fp32, within `LARGEST`; not changed.
    """
    adjusted_MV = _adjust(logits_MV, inputs)
    tokens = _list_likeliest(adjusted_MV)
    drawn = [m for m, item in enumerate(inputs) if item.sampling.temperature >= COLDEST]
    if drawn:
        drawn_MV = adjusted_MV if len(drawn) == len(inputs) else adjusted_MV[drawn]
        for m, token in zip(drawn, _draw(drawn_MV, [inputs[m] for m in drawn]), strict=True):
            tokens[m] = token
    return [_describe(logits_V, token, item) for logits_V, token, item in zip(logits_MV, tokens, inputs, strict=True)]


def _list_likeliest(logits_MV: Tensor) -> list[int]:
    if logits_MV.device.type == "cpu":  # numpy's argmax is 25 times as fast there
        return logits_MV.numpy().argmax(-1).tolist()
    found: list[int] = logits_MV.argmax(-1).tolist()
    return found


def _adjust(logits_MV: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    penalised = [m for m, item in enumerate(inputs) if has_penalty(item.sampling)]
    masks = {m: item.mask for m, item in enumerate(inputs) if item.mask is not None}
    if not penalised and not masks:
        return logits_MV
    logits_MV = logits_MV.clone()
    for m in penalised:
        _penalise(logits_MV[m], inputs[m])
    if masks:
        _, is_excluded_GV = upload_masks(masks, logits_MV)
        for m, is_excluded_V in zip(masks, is_excluded_GV, strict=True):
            logits_MV[m].masked_fill_(is_excluded_V, -torch.inf)
    return logits_MV


def upload_masks(masks: Mapping[int, TokenMask], logits_MV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows [G] of some masks, and which tokens [G, V] these exclude; waits for them, but for no device."""
    bytes_G4 = np.stack([mask.read() for mask in masks.values()]).view(np.uint8)
    on_device = upload({"rows": np.array(list(masks)), "bytes": bytes_G4}, logits_MV.device)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=logits_MV.device)
    is_excluded_GV = (on_device["bytes"][:, :, None] & places).flatten(1)[:, : logits_MV.shape[1]] == 0
    return on_device["rows"], is_excluded_GV


def needs_logits(item: SamplingInput) -> bool:
    """Return whether a sequence needs more than its settings in `SamplingColumns`, or more than `CANDIDATES`."""
    sampling = item.sampling
    return sampling.logprobs is not None or has_penalty(sampling) or sampling.top_k > CANDIDATES


def has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


def _penalise(logits_V: Tensor, item: SamplingInput) -> None:
    sampling, device = item.sampling, logits_V.device
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*item.prompt, *item.generated}), device=device)
        values = logits_V[seen]
        factor = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if item.generated and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = torch.tensor(list(item.generated), device=device).unique(return_counts=True)
        logits_V[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts


@dataclass(frozen=True)
class SamplingColumns:
    """The settings of M sequences, as columns [M, 1] beside their logits."""

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    """0: all."""
    top_p: Tensor
    chance: Tensor
    """In fp64."""

    @staticmethod
    def from_inputs(inputs: Sequence[SamplingInput], device: torch.device) -> SamplingColumns:
        def column(values: list[float], dtype: torch.dtype | None = None) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        settings = [item.sampling for item in inputs]
        return SamplingColumns(
            column([s.temperature for s in settings]),
            column([s.min_p for s in settings]),
            column([s.top_k for s in settings]),
            column([s.top_p for s in settings]),
            column([item.chance for item in inputs], torch.float64),
        )


def _draw(logits_MV: Tensor, inputs: Sequence[SamplingInput]) -> list[int]:
    settings, columns = [item.sampling for item in inputs], SamplingColumns.from_inputs(inputs, logits_MV.device)
    probs_MV = compute_probabilities(logits_MV, columns, min_p=any(s.min_p for s in settings))
    if not any(cuts(s) for s in settings):
        return draw_any(probs_MV, columns).tolist()
    vocabulary, some_are_free = probs_MV.shape[1], not all(cuts(s) for s in settings)
    num_candidates = min(vocabulary, max(CANDIDATES, *(s.top_k for s in settings)))
    tokens_M, is_certain_M = draw_candidate(probs_MV, columns, num_candidates, some_are_free=some_are_free)
    if num_candidates < vocabulary and not bool(is_certain_M.all()):
        tokens_M, _ = draw_candidate(probs_MV, columns, vocabulary, some_are_free=some_are_free)
    return tokens_M.tolist()


def cuts(sampling: Sampling) -> bool:
    """Return whether top-k or top-p leaves tokens out."""
    return bool(sampling.top_k) or sampling.top_p < 1


def compute_probabilities(logits_MV: Tensor, columns: SamplingColumns, *, min_p: bool) -> Tensor:
    """Return the probabilities, or with `min_p` what it leaves of them, before top-k and top-p."""
    probs_MV = (logits_MV / columns.temperature).softmax(-1)
    if min_p:
        least_M1 = probs_MV.amax(-1, keepdim=True) * columns.min_p
        probs_MV = probs_MV.masked_fill(probs_MV < least_M1, 0)
    return probs_MV


def draw_any(probs_MV: Tensor, columns: SamplingColumns) -> Tensor:
    """Draw from all tokens, in the order of the vocabulary: [M]."""
    return _locate(probs_MV, columns.chance)[:, 0]


def draw_candidate(
    probs_MV: Tensor, columns: SamplingColumns, num_candidates: int, *, some_are_free: bool
) -> tuple[Tensor, Tensor]:
    """Draw from the likeliest tokens by top-k and top-p: the tokens [M], and whether these were candidates enough [M].

    Args:
        num_candidates: at least the largest top-k.
        some_are_free: whether a sequence has neither; it needs every token, in the order of the vocabulary, which it
            has alone too.
    """
    probs_MK, tokens_MK = probs_MV.topk(num_candidates)
    kept_MK = _keep_candidates(probs_MK, probs_MV, columns)
    found_M1 = tokens_MK.gather(1, _locate(kept_MK, columns.chance))
    is_free_M1 = (columns.top_k == 0) & (columns.top_p == 1)
    is_certain_M1 = (kept_MK[:, -1:] == 0) | is_free_M1 | (columns.top_k > 0)
    if some_are_free:
        found_M1 = torch.where(is_free_M1, _locate(probs_MV, columns.chance), found_M1)
    return found_M1[:, 0], is_certain_M1[:, 0]


def _keep_candidates(probs_MK: Tensor, probs_MV: Tensor, columns: SamplingColumns) -> Tensor:
    """Set the probabilities of candidates that top-k and top-p cut to 0."""
    num_candidates = probs_MK.shape[1]
    k_M1 = columns.top_k.masked_fill(columns.top_k == 0, num_candidates)
    among_k_MK = probs_MK.masked_fill(torch.arange(num_candidates, device=probs_MK.device) >= k_M1, 0)
    # without top-k, top-p is a share of all tokens' probability, not of the candidates'
    total_M1 = torch.where(columns.top_k > 0, among_k_MK.sum(-1, keepdim=True), probs_MV.sum(-1, keepdim=True))
    p_M1 = columns.top_p * total_M1
    before_MK = among_k_MK.cumsum(-1) - among_k_MK
    return among_k_MK.masked_fill((before_MK >= p_M1) & (p_M1 < total_M1), 0)


def _locate(probs_MK: Tensor, chance_M1: Tensor) -> Tensor:
    """Return the index [M, 1] at which `chance` falls in the cumulated probabilities, whatever their sum."""
    cumulated_MK = probs_MK.double().cumsum(-1)
    total_M1 = cumulated_MK[:, -1:]
    last_M1 = torch.searchsorted(cumulated_MK, total_M1.contiguous())  # the last candidate with any probability
    found_M1 = torch.minimum(torch.searchsorted(cumulated_MK, chance_M1 * total_M1, right=True), last_M1)
    return found_M1.clamp_max(probs_MK.shape[1] - 1)  # where the probabilities are nan


def _describe(logits_V: Tensor, token: int, item: SamplingInput) -> SampledToken:
    if item.sampling.logprobs is None:
        return SampledToken(token, None, ())
    logprobs_V = logits_V.log_softmax(-1)
    values, tokens = logprobs_V.topk(min(item.sampling.logprobs, len(logprobs_V)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return SampledToken(token, float(logprobs_V[token]), top)
