"""AdamW's kernel and CUDA's norms equal their references, bit patterns of idle slots included."""

from __future__ import annotations

import pytest
import torch

from rankloom.kernels import adamw
from rankloom.kernels.triton import adamw as adamw_triton

G, K = 2, 4


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(G, K, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "axis"), [((5, 7), (7, 1)), ((7, 5), (7, 5)), ((3000,), (1, 1))], ids=str)
@pytest.mark.parametrize("used", [K, 3])
def test_the_kernel_steps_as_its_reference(shape: tuple[int, ...], axis: tuple[int, int], used: int) -> None:
    settings = torch.tensor([adamw.IDLE] * used).T.contiguous()
    settings[:, 0] = torch.tensor([0.5, 0.1, 0.01, 1.7, 1e-8, 1e-2, 0.99, 7])
    settings[:, 2] = torch.tensor([1.0, 0.5, 0.1, 1.2, 1e-3, 1e-1, 1.0, 2])
    gradient = drawn(*shape, seed=3).bfloat16()
    gradient[:, 1] = float("nan")  # an idle slot's
    padding = (torch.arange(gradient[0, 0].numel()) // axis[1] % axis[0] >= 2).view(shape)  # slot 2's
    gradient[:, 2].masked_fill_(padding, 0)
    found = []
    for step in (adamw.slot_adamw, adamw_triton.slot_adamw):
        state = [drawn(*shape, seed=seed) for seed in range(3)]
        for part in state:
            part[:, 2].masked_fill_(padding, 0)
        state[2].square_()
        before = [t.clone() for t in state]
        shadow = state[0].bfloat16()
        step(*(t[:, :used] for t in state), gradient[:, :used], settings, shadow[:, :used], *axis)
        for one in (1, *range(used, K)):
            assert all(torch.equal(now[:, one], then[:, one]) for now, then in zip(state, before, strict=True))
        torch.testing.assert_close(shadow.float(), state[0], rtol=1e-2, atol=0)  # triton's interpreter rounds down
        assert not torch.equal(state[0], before[0])
        found.append(state)
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_norms_are_each_slots_own() -> None:
    stack = drawn(5, 7, seed=0)
    stack[0, 1, 0, 0] = float("nan")
    expected = (stack.double() ** 2).sum((0, 2, 3)).float()
    for squares in (adamw.slot_squares, adamw_triton.slot_squares):
        torch.testing.assert_close(squares(stack), expected, equal_nan=True)


def launch_all() -> None:
    """Launch each kernel on shapes of real models."""
    settings = torch.empty(8, 16)
    for shape, axis in (((16, 576), (16, 576)), ((1536, 16), (16, 1)), ((4096,), (1, 1))):
        stacks = [torch.empty(2, 16, *shape) for _ in range(3)]
        for shadow in (None, stacks[0].bfloat16()):
            adamw_triton.slot_adamw(*stacks, stacks[0].clone(), settings, shadow, *axis)
