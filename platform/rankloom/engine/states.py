"""The states of layers that keep no keys and values, such as recurrences and convolutions: how a forward gets them.

transformers' layers keep them in its cache, or (RecurrentGemma) in the modules themselves. Between forwards each
sequence has its own in the `KvCache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

IN_MODULES = {"RecurrentGemmaRecurrentBlock": ("conv1d_state",), "RecurrentGemmaRglru": ("recurrent_states",)}
"""Attributes that hold states, by the module's class."""


class StatePlace(Protocol):
    """Where the sequences of a forward have one of their states [R, ...]."""

    def read(self, cache: Cache) -> Tensor:
        """Return it after a forward with this cache."""
        ...

    def write(self, cache: Cache, state: Tensor | None) -> None:
        """Set it before a forward with this cache, which is new; None: the sequence begins."""
        ...


@dataclass(frozen=True)
class LayerState:
    """A `StatePlace` in a layer of transformers' cache."""

    layer: int
    kind: Literal["conv", "recurrent"]
    index: int

    def read(self, cache: Cache) -> Tensor:
        state: Tensor = getattr(cache.layers[self.layer], f"{self.kind}_states")[self.index]
        return state

    def write(self, cache: Cache, state: Tensor | None) -> None:
        if state is not None:
            layer = cache.layers[self.layer]
            layer.lazy_initialization(**{f"{self.kind}_states": state, "state_idx": self.index})
            getattr(layer, f"{self.kind}_states")[self.index] = state
            layer.has_previous_state[self.index] = True


@dataclass(frozen=True)
class ModuleState:
    """A `StatePlace` in a module, which thus can take part in one forward at a time."""

    module: nn.Module
    name: str

    def read(self, cache: Cache) -> Tensor:
        state: Tensor = getattr(self.module, self.name)
        return state

    def write(self, cache: Cache, state: Tensor | None) -> None:
        setattr(self.module, self.name, state)


def find_states(model: PreTrainedModel, cache: Cache) -> Iterator[StatePlace]:
    """Yield the places of a model's states; `cache` is that of a forward."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for index in range(layer.number_of_states):
                if layer.is_conv_states_initialized[index]:
                    yield LayerState(i, "conv", index)
                if layer.is_recurrent_states_initialized[index]:
                    yield LayerState(i, "recurrent", index)
    for module in model.modules():
        for name in IN_MODULES.get(type(module).__name__, ()):
            yield ModuleState(module, name)
