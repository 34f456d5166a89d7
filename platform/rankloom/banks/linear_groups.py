"""LinearGroup: linears that read the same input, such as q, k and v, computed by one product.

Their weights become one tensor, of which each module's weight is a view, so that no weight is held twice. Linears that
are not plain, such as quantised ones, keep their own products, whose results are put side by side.

Shapes: I in, O out of all linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankloom.models import linear_widths
from rankloom.models.onednn import FrozenLinear


class LinearGroup:
    """One linear, or several that read the same input."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        """
        Args:
            linears: by full name, in the order of their outputs.
        """
        self.names = tuple(linears)
        self.modules = tuple(linears.values())
        self.widths = [linear_widths(module)[1] for module in self.modules]
        self.num_in = linear_widths(self.modules[0])[0]
        self._forwards = [module.forward for module in self.modules]
        self._merged = _merge_weights(self.modules) if len(self.modules) > 1 else None

    def base(self, x: Tensor) -> Tensor:
        """Return the base's results [..., O], side by side."""
        if self._merged is not None:
            return F.linear(x, *self._merged)
        results = [forward(x) for forward in self._forwards]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def outputs(self, part: int) -> slice:
        """Return where a linear's outputs are in O."""
        start = sum(self.widths[:part])
        return slice(start, start + self.widths[part])


def _merge_weights(modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Make the weights, and the biases, of plain linears views of one tensor; None: they are not plain or not alike."""
    if any(type(module) not in (nn.Linear, FrozenLinear) for module in modules):
        return None
    weights = [module.get_parameter("weight") for module in modules]
    biases = [module.bias for module in modules if isinstance(module.bias, nn.Parameter)]
    if len({weight.dtype for weight in weights}) > 1 or len(biases) not in (0, len(modules)):
        return None
    return _merge(weights), _merge(biases) if biases else None


def _merge(parameters: Sequence[nn.Parameter]) -> Tensor:
    merged = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, merged.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = view
    return merged
