"""AdamW over slots: the norm of each slot's gradient, and a step with settings per slot.

Shapes: G parameters of one shape, K slots, S settings of a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.kernels import op

IDLE = (0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
"""The settings of a slot that keeps its state: the gradient's factor, 1 - beta_1, 1 - beta_2, the factor on the second
moment's root that corrects its bias, eps, the step size with the first moment's correction, the decay's factor, and
the rank."""


@op(launches=2)
def slot_squares(stack: Tensor) -> Tensor:
    """Return [K] in fp32: each slot's sum of squares in [G, K, ...]."""
    return torch.linalg.vector_norm(stack.flatten(2), dim=2, dtype=torch.float32).square().sum(0)


@op(mutates=("data", "first", "second", "shadow"))
def slot_adamw(
    data: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    settings_SK: Tensor,
    shadow: Tensor | None,
    num_ranks: int,  # noqa: ARG001  # of use to the kernel alone
    inner: int,  # noqa: ARG001
) -> None:
    """Step parameters and moments [G, K, ...], views of stacks that are contiguous beyond K.

    Values beyond a slot's rank are zero in all of them, and stay so; they need not be read.

    Args:
        gradient: of any float dtype; in slots whose factor is 0 it may be anything.
        settings_SK: as `IDLE`, in fp32.
        shadow: a copy of the parameters in another dtype, which follows them; None: there is none.
        num_ranks, inner: size of the rank's axis, and of what lies within it.
    """
    shape = (data.shape[1], *[1] * (data.dim() - 2))
    factor, lean_1, lean_2, correction, eps, size, keep, _ = (column.view(shape) for column in settings_SK)
    clipped, is_idle = gradient * factor, factor == 0
    if torch._subclasses.fake_tensor.is_fake(is_idle) or is_idle.any():  # one pass more
        clipped.masked_fill_(is_idle, 0)
    first.lerp_(clipped, lean_1)
    second.lerp_(clipped.square_(), lean_2)
    update = torch.sqrt(second, out=clipped).mul_(correction).add_(eps)  # in place: fresh pages are slow
    torch.div(first, update, out=update)
    data.mul_(keep).sub_(update.mul_(size))
    if shadow is not None:
        shadow.copy_(data)
