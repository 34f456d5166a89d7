"""From logits to tokens: each sequence by its own rules, all sequences at once.

In order: penalties, allowed tokens, temperature, min-p, top-k, top-p. Each token takes one random number from the
sequence's own generator, so that its tokens do not depend on the rest of the batch.

Shapes: M sequences, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.engine.protocol import Sampling

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
    allowed: Sequence[int] | None = None
    """The tokens to sample from; None: all."""


@dataclass(frozen=True)
class SampledToken:
    token: int
    logprob: float | None
    """None: not asked for."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their logprobs."""


def sample_tokens(logits_MV: Tensor, inputs: Sequence[SamplingInput]) -> list[SampledToken]:
    """Sample one token for each sequence.

    Args:
        logits_MV: in fp32, within `LARGEST`; not changed.
    """
    adjusted_MV = _adjust(logits_MV, inputs)
    tokens = _likeliest(adjusted_MV)
    drawn = [m for m, item in enumerate(inputs) if item.sampling.temperature >= COLDEST]
    if drawn:
        drawn_MV = adjusted_MV if len(drawn) == len(inputs) else adjusted_MV[drawn]
        for m, token in zip(drawn, _draw(drawn_MV, [inputs[m] for m in drawn]), strict=True):
            tokens[m] = token
    return [_describe(logits_V, token, item) for logits_V, token, item in zip(logits_MV, tokens, inputs, strict=True)]


def _likeliest(logits_MV: Tensor) -> list[int]:
    if logits_MV.device.type == "cpu":  # numpy's argmax is 25 times as fast there
        return logits_MV.numpy().argmax(-1).tolist()
    found: list[int] = logits_MV.argmax(-1).tolist()
    return found


def _adjust(logits_MV: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    changed = [m for m, item in enumerate(inputs) if item.allowed is not None or _has_penalty(item.sampling)]
    if not changed:
        return logits_MV
    logits_MV = logits_MV.clone()
    for m in changed:
        item, logits_V = inputs[m], logits_MV[m]
        if _has_penalty(item.sampling):
            _penalise(logits_V, item)
        if item.allowed is not None:
            allowed = torch.tensor(list(item.allowed), device=logits_V.device)
            kept = logits_V[allowed]
            logits_V.fill_(-torch.inf)
            logits_V[allowed] = kept
    return logits_MV


def _has_penalty(sampling: Sampling) -> bool:
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


def _draw(logits_MV: Tensor, inputs: Sequence[SamplingInput]) -> list[int]:
    device = logits_MV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    settings = [item.sampling for item in inputs]
    probs_MV = (logits_MV / column([s.temperature for s in settings])).softmax(-1)
    if any(s.min_p for s in settings):
        least_M1 = probs_MV.amax(-1, keepdim=True) * column([s.min_p for s in settings])
        probs_MV = probs_MV.masked_fill(probs_MV < least_M1, 0)
    chance_M1 = torch.tensor([[item.chance] for item in inputs], dtype=torch.float64, device=device)
    if not any(s.top_k or s.top_p < 1 for s in settings):
        return _locate(probs_MV, chance_M1)[:, 0].tolist()
    vocabulary = probs_MV.shape[1]
    # without top-k or top-p a sequence needs every token, in the order of the vocabulary, which it has alone too
    unbounded = [not s.top_k and s.top_p == 1 for s in settings]
    num_candidates = min(vocabulary, max(CANDIDATES, *(s.top_k for s in settings)))
    while True:
        probs_MK, tokens_MK = probs_MV.topk(num_candidates)
        kept_MK = _keep_candidates(probs_MK, probs_MV, settings)
        if num_candidates == vocabulary or bool(((kept_MK[:, -1] == 0) | torch.tensor(unbounded, device=device)).all()):
            break
        num_candidates = vocabulary
    found: list[int] = tokens_MK.gather(1, _locate(kept_MK, chance_M1))[:, 0].tolist()
    if any(unbounded):
        free: list[int] = _locate(probs_MV, chance_M1)[:, 0].tolist()
        found = [free[m] if unbounded[m] else token for m, token in enumerate(found)]
    return found


def _keep_candidates(probs_MK: Tensor, probs_MV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Set the probabilities of candidates that top-k and top-p cut to 0."""
    device, num_candidates = probs_MK.device, probs_MK.shape[1]
    k_M1 = torch.tensor([[s.top_k or num_candidates] for s in settings], device=device)
    among_k_MK = probs_MK.masked_fill(torch.arange(num_candidates, device=device) >= k_M1, 0)
    # without top-k, top-p is a share of all tokens' probability, not of the candidates'
    total_M1 = torch.where(
        torch.tensor([[s.top_k > 0] for s in settings], device=device),
        among_k_MK.sum(-1, keepdim=True),
        probs_MV.sum(-1, keepdim=True),
    )
    p_M1 = torch.tensor([[s.top_p] for s in settings], device=device) * total_M1
    before_MK = among_k_MK.cumsum(-1) - among_k_MK
    return among_k_MK.masked_fill((before_MK >= p_M1) & (p_M1 < total_M1), 0)


def _locate(probs_MK: Tensor, chance_M1: Tensor) -> Tensor:
    """Return the index [M, 1] at which `chance` falls in the cumulated probabilities, whatever their sum."""
    cumulated_MK = probs_MK.double().cumsum(-1)
    total_M1 = cumulated_MK[:, -1:]
    last_M1 = torch.searchsorted(cumulated_MK, total_M1.contiguous())  # the last candidate with any probability
    return torch.minimum(torch.searchsorted(cumulated_MK, chance_M1 * total_M1, right=True), last_M1)


def _describe(logits_V: Tensor, token: int, item: SamplingInput) -> SampledToken:
    if item.sampling.logprobs is None:
        return SampledToken(token, None, ())
    logprobs_V = logits_V.log_softmax(-1)
    values, tokens = logprobs_V.topk(min(item.sampling.logprobs, len(logprobs_V)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return SampledToken(token, float(logprobs_V[token]), top)
