"""EngineLoader: fetches an adapter from the registry, and checks, folds and probes it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rankloom.adapters.probe import check_logits, find_largest_difference, probe_tokens
from rankloom.banks.rounding import round_adapter
from rankloom.banks.served_adapter import ServedAdapter, fold
from rankloom.errors import IncompatibleError, OverloadedError
from rankloom.models import Base
from rankloom.registry import Record, Registry
from rankloom.registry.checks import rename_in_errors

NOISE = 64
"""How far rounded weights may move a logit, in the precision of the largest: 8e-6 of it in fp32, whose own rounding
moves SmolLM2's by 2e-6."""

Logits = Callable[[ServedAdapter | None, list[int]], Tensor]
"""Returns the logits [V] after tokens, with an adapter or without."""


class EngineLoader:
    """Loads adapters of one base."""

    def __init__(self, base: Base, registry: Registry, logits: Logits, *, rounds: bool) -> None:
        """
        Args:
            rounds: whether to hold an adapter as integers where its probe shows no difference.
        """
        self._base, self._registry, self._logits, self._rounds = base, registry, logits, rounds

    def load(self, ref: str) -> ServedAdapter:
        """Load and verify a version. This may take seconds.

        Raises:
            AdapterNotFoundError: no such version.
            IncompatibleError: it was tuned on another base.
            RegistryError: it is broken, or does nothing.
            OverloadedError: memory does not suffice for it now.
        """
        record = self._registry.get(ref)
        check_base(self._base, record)
        with tempfile.TemporaryDirectory(prefix="rankloom-") as scratch:
            folder = self._registry.fetch(record.ref, Path(scratch) / "adapter")
            try:
                with rename_in_errors(folder, record.ref):
                    return self._verify(folder)
            except torch.OutOfMemoryError:
                pass  # the memory is freed once this block is left
        raise OverloadedError(f"there is no memory to load {record.ref} now; try again later")

    def _verify(self, folder: Path) -> ServedAdapter:
        adapter = fold(self._base.model, folder)
        vocabulary = self._base.model.get_input_embeddings().weight.shape[0]
        tokens = probe_tokens(folder, vocabulary)
        found, plain = self._logits(adapter, tokens), self._logits(None, tokens)
        check_logits(folder, found, plain, quantization=self._base.quantization)
        if self._rounds:
            rounded = round_adapter(adapter)
            noise = NOISE * torch.finfo(found.dtype).eps * float(found.abs().max())
            if find_largest_difference(self._logits(rounded, tokens), found) <= noise:
                return rounded
        return adapter

    def forget(self, ref: str) -> None:
        """Do nothing: weights are freed with their last reference."""


def check_base(base: Base, record: Record) -> None:
    """Raise IncompatibleError if an adapter was tuned on another base."""
    its = record.base
    if its.fingerprint != base.fingerprint:
        raise IncompatibleError(
            f"{record.ref} was tuned on {its.id} ({its.fingerprint[:19]}), but this engine serves {base.id} "
            f"({base.fingerprint[:19]}); serve it over its own base"
        )
    if its.quantization != base.quantization:
        raise IncompatibleError(
            f"{record.ref} was tuned on a base with quantization {its.quantization}, but this engine's has "
            f"{base.quantization}; serve it over its own"
        )
