"""PromptPooler: a prompt's embedding, from the hidden states of its tokens as they are computed.

Shapes: t tokens of a chunk, n of these that are new, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rankloom.engine.protocol import Pooling


class PromptPooler:
    """Pools one prompt, chunk by chunk; a chunk that is computed again, after a preemption, changes nothing."""

    def __init__(self, pooling: Pooling, length: int) -> None:
        self._pooling, self._length = pooling, length
        self._num_done = 0
        self._pooled_D: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self._num_done == self._length

    def pool(self, start: int, hidden_tD: Tensor) -> None:
        """Add a chunk's hidden states.

        Args:
            start: the chunk's place in the prompt.
        """
        new_nD = hidden_tD[self._num_done - start :]
        if not len(new_nD):
            return
        self._num_done += len(new_nD)
        match self._pooling.kind:
            case "mean":
                sum_D = new_nD.sum(0, dtype=torch.float32)
                self._pooled_D = sum_D if self._pooled_D is None else self._pooled_D + sum_D
            case "last":
                self._pooled_D = new_nD[-1].float()
            case "cls" if self._pooled_D is None:
                self._pooled_D = new_nD[0].float()

    def read(self) -> bytes | None:
        """Return the embedding of a prompt that is done, in fp32; None: it is not finite."""
        assert self._pooled_D is not None
        embedding_D = self._pooled_D / self._length if self._pooling.kind == "mean" else self._pooled_D
        if not bool(embedding_D.isfinite().all()):
            return None
        embedding_D = embedding_D[: self._pooling.dimensions]
        if self._pooling.normalize:
            embedding_D = F.normalize(embedding_D, dim=0)
        return embedding_D.cpu().numpy().astype("<f4").tobytes()
