"""LinearGroup: linears that read the same input, such as q, k and v, computed by one product.

Their weights become one tensor, of which each module's weight is a view, so that no weight is held twice; so do the
codes and scales of weights that are quantised alike. Other linears keep their own products, whose results are put side
by side.

Shapes: I in, O out of all linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankloom.models import get_linear_widths
from rankloom.models.onednn import FrozenLinear
from rankloom.models.quantized import is_quantized, merge_quantized, merge_tensors


class LinearGroup:
    """One linear, or several that read the same input."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        """
        Args:
            linears: by full name, in the order of their outputs.
        """
        self.names = tuple(linears)
        self.modules = tuple(linears.values())
        self.widths = [get_linear_widths(module)[1] for module in self.modules]
        self.num_in = get_linear_widths(self.modules[0])[0]
        self._forwards = [module.forward for module in self.modules]
        self._merged = _merge(self.modules) if len(self.modules) > 1 else None

    def compute_base(self, x: Tensor) -> Tensor:
        """Return the base's results [..., O], side by side."""
        if self._merged is not None:
            return self._merged(x)
        results = [forward(x) for forward in self._forwards]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def get_outputs(self, part: int) -> slice:
        """Return where a linear's outputs are in O."""
        start = sum(self.widths[:part])
        return slice(start, start + self.widths[part])


def _merge(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """Merge the weights, and the biases, and return the product with them; None: they are not of one known kind."""
    biases = [module.bias for module in modules if isinstance(module.bias, nn.Parameter)]
    if len({bias.dtype for bias in biases}) > 1 or len(biases) not in (0, len(modules)):
        return None
    if all(map(is_quantized, modules)):
        return merge_quantized(modules, _merge_parameters(biases))
    weights = [module.get_parameter("weight") for module in modules]
    if any(type(module) not in (nn.Linear, FrozenLinear) for module in modules) or len({w.dtype for w in weights}) > 1:
        return None
    weight_OI, bias_O = _merge_parameters(weights), _merge_parameters(biases)
    assert weight_OI is not None
    return lambda x: F.linear(x, weight_OI, bias_O)


def _merge_parameters(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Return one tensor, of which the parameters become views; None: there are none."""
    if not parameters:
        return None
    merged, parts = merge_tensors([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return merged
