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

from rankloom.models import get_linear_widths, onednn
from rankloom.models.onednn import FrozenLinear
from rankloom.models.quantized import is_quantized, merge_quantized, merge_tensors


class LinearGroup:
    """One linear, or several that read the same input."""

    def __init__(self, linears: Mapping[str, nn.Module], *, pack: bool = False) -> None:
        """
        Args:
            linears: by full name, in the order of their outputs.
            pack: compute with a copy of their weights in the fastest layout (`onednn.pack`).
        """
        self.names = tuple(linears)
        self.modules = tuple(linears.values())
        self.widths = [get_linear_widths(module)[1] for module in self.modules]
        self.num_in = get_linear_widths(self.modules[0])[0]
        self.compute_base = _merge(self.modules, pack=pack) or _put_side_by_side(self.modules)
        """Returns the base's results [..., O] for x [..., I], side by side."""

    def get_outputs(self, part: int) -> slice:
        """Return where a linear's outputs are in O."""
        start = sum(self.widths[:part])
        return slice(start, start + self.widths[part])


def _merge(modules: Sequence[nn.Module], *, pack: bool) -> Callable[[Tensor], Tensor] | None:
    """Return one product with all weights, and biases; None: the linears' own forwards are to be used."""
    biases = [module.bias for module in modules if isinstance(module.bias, nn.Parameter)]
    if len({bias.dtype for bias in biases}) > 1 or len(biases) not in (0, len(modules)):
        return None
    if len(modules) > 1 and all(map(is_quantized, modules)):
        return merge_quantized(modules, _merge_parameters(biases))
    if any(type(module) not in (nn.Linear, FrozenLinear) for module in modules):
        return None
    weights = [module.get_parameter("weight") for module in modules]
    if len({weight.dtype for weight in weights}) > 1:
        return None
    if len(modules) == 1:
        return onednn.pack(weights[0].detach(), next(iter(biases), None)) if pack else None
    weight_OI, bias_O = _merge_parameters(weights), _merge_parameters(biases)
    assert weight_OI is not None
    return (onednn.pack(weight_OI, bias_O) if pack else None) or (lambda x: onednn.linear(x, weight_OI, bias_O))


def _put_side_by_side(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    forwards = [module.forward for module in modules]
    if len(forwards) == 1:
        return forwards[0]
    return lambda x: torch.cat([forward(x) for forward in forwards], -1)


def _merge_parameters(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Return one tensor, of which the parameters become views; None: there are none."""
    if not parameters:
        return None
    merged, parts = merge_tensors([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return merged
