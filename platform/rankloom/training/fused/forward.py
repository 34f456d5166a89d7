"""FusedForward: the frozen base on the rows of many slots, each through its slot's adapter.

Both the steps and the evaluations of `host.py` use it. On a GPU the head computes losses in chunks and no logits; a
model that does more than its head to its hidden states has its own logits everywhere.

Shapes: N tokens of all rows, K slots, M predicted tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankloom.banks.bank import AdapterBank
from rankloom.kernels import use_on
from rankloom.kernels.cross_entropy import head_logits, head_losses
from rankloom.models import Base
from rankloom.training.fused.attention import (
    choose_attention,
    compute_hidden_states,
    compute_logits,
    is_close,
    use_packed_attention,
)
from rankloom.training.fused.packing import Arranged, Example, Packed, arrange, pack
from rankloom.training.precision import autocast


class FusedForward:
    """A base and its bank.

    Args:
        precision: dtype of the arithmetic; bf16 runs under autocast where the base needs it.
    """

    def __init__(self, base: Base, bank: AdapterBank, precision: torch.dtype) -> None:
        self.base, self.bank, self.precision = base, bank, precision
        self.attention = choose_attention(base.model, base.pad_id)
        dtypes = {p.dtype for p in base.model.parameters() if p.is_floating_point()}
        self.is_native = use_on(base.device) and dtypes == {precision}
        """Whether the base's arithmetic has the precision without autocast, which would look for casts at each call."""
        is_ragged = all(site.slots is not None for site in bank.sites.values())
        self.is_one_go = self.is_native and is_ragged and self.attention == "rows"
        """Whether a forward depends on its rows' sizes alone, and on tensors, so that a graph can hold it."""
        self.chunked = use_on(base.device) and self._is_head_all()
        """Whether the head's losses are computed in chunks."""

    @property
    def padded(self) -> bool:
        """Whether rows are padded, because the model's attention can't take packed rows."""
        return self.attention == "padded"

    def arrange(self, examples: Sequence[Example], slots: Sequence[int]) -> Arranged:
        """Lay rows out, with the slot of each token (`slots_N`) and of each predicted token (`slots_M`).

        Args:
            slots: each row's slot, ascending.
        """
        arranged = arrange(examples, self.attention, pad_id=self.base.pad_id)
        arranged.arrays["slots_N"] = np.repeat(slots, arranged.sizes)
        arranged.arrays["slots_M"] = np.repeat(slots, arranged.num_predicted)
        return arranged

    def describe_sites(self) -> tuple[bool, ...]:
        """Return whether any slot is DoRA with dropout; and for each site, whether any has an adapter, and DoRA."""
        sites = self.bank.sites.values()
        kinds = [kind for site in sites for kind in (any(site.ranks), any(site.dora_ranks))]
        return (self.bank.has_dropout_in_dora, *kinds)

    @contextmanager
    def apply_route(
        self, arranged: Arranged, tensors: Mapping[str, Tensor], dropout_seeds: dict[int, int] | None = None
    ) -> Iterator[Packed]:
        """Yield the packed rows; inside the context, the base's forward and backward include each slot's adapter."""
        owned_N = arranged.arrays["slots_N"]
        counts_K = np.bincount(owned_N[owned_N >= 0], minlength=self.bank.num_slots).tolist()
        packed = arranged.to_packed(tensors)
        noise = (tensors["seed_K"], tensors["rate_K"]) if "seed_K" in tensors else None
        with (
            self.bank.apply_route(tensors["slots_N"], counts_K, dropout_seeds=dropout_seeds, noise=noise),
            use_packed_attention(self.base.model, packed),
            nullcontext() if self.is_native else autocast(self.base.device, self.precision),
        ):
            yield packed

    def compute_losses(self, packed: Packed) -> Tensor:
        """Return [M], the predicted tokens' cross-entropies in fp32; call it inside `apply_route`."""
        return self.score(packed).losses_M

    def score(self, packed: Packed) -> Scores:
        """Compute the predicted tokens' losses and logits; call it inside `apply_route`."""
        if not self.chunked:
            logits_MV = compute_logits(self.base.model, packed)
            losses_M = F.cross_entropy(logits_MV.float(), packed.targets_M, reduction="none")
            return Scores(losses_M, lambda rows_R, choices_RC: logits_MV[rows_R[:, None], choices_RC])
        hidden_MD = compute_hidden_states(self.base.model, packed).to(self.precision)
        head = self.base.model.get_output_embeddings()
        weight_VD = head.weight.to(self.precision)
        bias_V = None if head.bias is None else head.bias.to(self.precision)
        with torch.autocast(self.base.device.type, enabled=False):
            losses_M = head_losses(hidden_MD, weight_VD, bias_V, packed.targets_M)
        return Scores(losses_M, partial(head_logits, hidden_MD, weight_VD, bias_V))

    def _is_head_all(self) -> bool:
        """Return whether the logits are those of a plain linear head on the hidden states, by a forward."""
        model, head = self.base.model, self.base.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or model.base_model is model:
            return False
        ids = np.arange(5) % head.out_features
        example = Example(ids, np.arange(4), np.ones(4, dtype=np.float32))
        packed = pack([example], self.attention, pad_id=self.base.pad_id, device=self.base.device)
        with torch.no_grad(), use_packed_attention(model, packed):
            found_MV = F.linear(compute_hidden_states(model, packed), head.weight, head.bias)
            return is_close(found_MV, compute_logits(model, packed))


@dataclass(frozen=True)
class Scores:
    """What a forward says of its predicted tokens."""

    losses_M: Tensor
    """Cross-entropies in fp32."""
    chosen: Callable[[Tensor, Tensor], Tensor]
    """Return [R, C]: the logits of some words [R, C] at some of the tokens, given by index [R]."""
