"""PromptScorer: the logprobs of a prompt's own tokens, from the logits after each token before them.

Shapes: t tokens of a chunk, n of these that are new, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankloom.engine.protocol import SampledToken
from rankloom.engine.sampling import LARGEST


class PromptScorer:
    """Scores one prompt, chunk by chunk; a chunk that is computed again, after a preemption, gives nothing new."""

    def __init__(self, prompt: Sequence[int], num_likeliest: int) -> None:
        self._prompt, self._num_likeliest = prompt, num_likeliest
        self._num_done = 0

    @property
    def is_done(self) -> bool:
        return self._num_done == len(self._prompt)

    def score(self, start: int, logits_tV: Tensor) -> tuple[SampledToken, ...] | None:
        """Return the tokens that have become known; None: the logits are not sound.

        Args:
            start: the chunk's place in the prompt.
        """
        scored = [] if self._num_done else [SampledToken(self._prompt[0], None, ())]
        begin = max(0, self._num_done - 1) - start
        logits_nV = logits_tV[begin : len(self._prompt) - 1 - start]
        if len(logits_nV):
            if not bool(logits_nV.abs().amax() < LARGEST):  # nan is not
                return None
            scored += self._describe(start + begin + 1, logits_nV.log_softmax(-1))
        self._num_done += len(scored)
        return tuple(scored)

    def _describe(self, first: int, logprobs_nV: Tensor) -> list[SampledToken]:
        tokens = list(self._prompt[first : first + len(logprobs_nV)])
        token_n1 = torch.tensor(tokens, device=logprobs_nV.device)[:, None]
        values_nK, likeliest_nK = logprobs_nV.topk(min(self._num_likeliest, logprobs_nV.shape[1]))
        chosen = logprobs_nV.gather(1, token_n1)[:, 0].tolist()
        tops = zip(likeliest_nK.tolist(), values_nK.tolist(), strict=True)
        return [
            SampledToken(token, logprob, tuple(zip(*top, strict=True)))
            for token, logprob, top in zip(tokens, chosen, tops, strict=True)
        ]
