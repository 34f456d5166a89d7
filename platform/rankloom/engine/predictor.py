"""A step's results: the tokens that its sequences generate next.

`PlainPredictor` computes logits and samples from them, on any device; it is the reference. `DevicePredictor`
(`device_predictor.py`) does all of it on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rankloom.engine.attention import SequenceChunk
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.protocol import SampledToken
from rankloom.engine.runner import PromptOutputs, Runner
from rankloom.engine.sampling import LARGEST, SamplingInput, sample_tokens


class StepResult(Protocol):
    @property
    def prompts(self) -> PromptOutputs:
        """What was read of prompts."""
        ...

    def read(self) -> list[SampledToken | None]:
        """Wait for a token for each chunk that predicts; None: its logits are not sound."""
        ...


class Predictor(Protocol):
    @property
    def overlaps(self) -> bool:
        """Whether a step is still computed when `predict` returns."""
        ...

    def predict(self, chunks: Sequence[SequenceChunk], inputs: Sequence[SamplingInput]) -> StepResult:
        """Begin a step.

        Args:
            chunks: at most one per sequence; each sequence has its place in the cache.
            inputs: of each chunk that predicts.
        """
        ...


class PlainPredictor:
    """A `Predictor` over a `KvCache`."""

    overlaps = False

    def __init__(self, runner: Runner, cache: KvCache) -> None:
        self._runner, self._cache = runner, cache

    def predict(self, chunks: Sequence[SequenceChunk], inputs: Sequence[SamplingInput]) -> StepResult:
        found = self._runner.compute_step(self._cache, chunks)
        return LogitsResult(found.logits_MV, inputs, found.prompts)


class LogitsResult:
    """A `StepResult` from logits [M, V], of the inputs in their order."""

    def __init__(self, logits_MV: Tensor, inputs: Sequence[SamplingInput], prompts: PromptOutputs) -> None:
        self._logits_MV, self._inputs, self.prompts = logits_MV, inputs, prompts

    def read(self) -> list[SampledToken | None]:
        logits_MV = self._logits_MV
        if not self._inputs:
            return []
        least_M, most_M = logits_MV.amin(-1), logits_MV.amax(-1)  # on a CPU 13 times as fast as aminmax
        is_sound = ((least_M > -LARGEST) & (most_M < LARGEST)).tolist()  # nan is not
        if all(is_sound):
            return list(sample_tokens(logits_MV, self._inputs))
        sound_MV = logits_MV[torch.tensor(is_sound, device=logits_MV.device)]
        sampled = iter(sample_tokens(sound_MV, [i for i, ok in zip(self._inputs, is_sound, strict=True) if ok]))
        return [next(sampled) if ok else None for ok in is_sound]
