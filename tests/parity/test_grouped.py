"""The grouped products equal their references, forward and backward, and keep slots apart.

Shapes: N tokens, K slots, R rank, I in, O out.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rankloom.banks.grouped import (
    SlotBySlot,
    Stacked,
    Way,
    choose_way,
    grouped_linear,
    grouped_lora,
    grouped_lora_reference,
    scale_rows,
    scale_rows_reference,
)
from rankloom.banks.groups import PADDED, Groups

WAYS = [SlotBySlot(), Stacked()]
SCALES = [2.0, 0.5, 1.0, 4.0]
CASES = {
    "even": Groups([5, 5, 5, 5], [4, 4, 4, 4]),
    "uneven": Groups([3, 9, 1, 4], [4, 2, 3, 1]),
    "empty slots": Groups([0, 4, 0, 2], [4, 4, 4, 4]),
    "one slot": Groups([0, 0, 6, 0], [1, 2, 3, 4]),
    "rows of no slot first": Groups([3, 2, 2, 5], [4, 4, 4, 2], start=4),
    "a slot without an adapter between": Groups([3, 3, 3, 3], [4, 0, 2, 3]),
    "even around a gap": Groups([2, 7, 2, 0], [4, 0, 4, 0]),
    "lopsided": Groups([40, 1, 2, 1], [4, 2, 4, 3]),
    "lopsided, two of none": Groups([1, 9, 1, 60], [4, 0, 1, 3], start=2),
    "no slot at work": Groups([3, 0, 0, 2], [0, 4, 4, 0], start=1),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def groups(request: pytest.FixtureRequest) -> Groups:
    found: Groups = request.param
    return found


def stacks(groups: Groups, num_in: int = 6, num_out: int = 5, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """x, A and B, of which A and B are zero beyond each slot's rank."""
    torch.manual_seed(0)
    x_NI = torch.randn(groups.num_tokens, num_in)
    a_KRI, b_KOR = torch.randn(4, rank, num_in), torch.randn(4, num_out, rank)
    for slot, true_rank in enumerate(groups.ranks):
        a_KRI[slot, true_rank:] = 0
        b_KOR[slot, :, true_rank:] = 0
    return x_NI, a_KRI, b_KOR


def gradients(result: Tensor, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    found = torch.autograd.grad(result, inputs, torch.randn_like(result), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("way", WAYS, ids=["slot by slot", "stacked"])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_the_product_is_the_references(way: Way, lead: tuple[int, ...], groups: Groups) -> None:
    x_NI, a_KRI, b_KOR = (t.requires_grad_() for t in stacks(groups))
    base_NO = torch.randn(groups.num_tokens, 5, requires_grad=True)
    expected = base_NO + grouped_lora_reference(x_NI, a_KRI, b_KOR, SCALES, groups)
    onto = (base_NO * 1).view(*lead, *base_NO.shape)
    found = grouped_lora(onto, x_NI.view(*lead, *x_NI.shape), a_KRI, b_KOR, SCALES, groups, way).view(expected.shape)
    torch.testing.assert_close(found, expected)
    inputs = base_NO, x_NI, a_KRI, b_KOR
    for one, other in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("way", WAYS, ids=["slot by slot", "stacked"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_with_the_linear_before_it(way: Way, bias: bool, transposed: bool, groups: Groups) -> None:
    x_NI, a_KRI, b_KOR = (t.requires_grad_() for t in stacks(groups))
    weight_OI = torch.randn(6, 5).T if transposed else torch.randn(5, 6)
    bias_O = torch.randn(5) if bias else None
    expected = F.linear(x_NI, weight_OI, bias_O) + grouped_lora_reference(x_NI, a_KRI, b_KOR, SCALES, groups)
    found = grouped_linear(x_NI[None], weight_OI, bias_O, a_KRI, b_KOR, SCALES, groups, way)[0]
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, x_NI, a_KRI, b_KOR), gradients(expected, x_NI, a_KRI, b_KOR), strict=True):
        torch.testing.assert_close(one, other)
    if groups.slots:  # the first layer's input asks for no gradient
        found = grouped_linear(x_NI.detach(), weight_OI, bias_O, a_KRI, b_KOR, SCALES, groups, way)
        for one, other in zip(gradients(found, a_KRI, b_KOR), gradients(expected, a_KRI, b_KOR), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_slot", [True, False])
def test_scaled_rows_are_the_references(by_slot: bool, bias: bool, groups: Groups) -> None:
    torch.manual_seed(0)
    y_NO = torch.randn(groups.num_tokens, 5, requires_grad=True)
    factor_KO = (torch.rand(4, 5) + 0.5).requires_grad_()
    bias_O = torch.randn(5) if bias else None
    expected = scale_rows_reference(y_NO, factor_KO, bias_O, groups)
    found = scale_rows(y_NO[None], factor_KO, bias_O, groups, by_slot=by_slot)[0]
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, y_NO, factor_KO), gradients(expected, y_NO, factor_KO), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("way", WAYS, ids=["slot by slot", "stacked"])
def test_a_model_may_change_what_a_layer_gave_in_place(way: Way, groups: Groups) -> None:
    """As Falcon, which adds attention's result to the MLP's."""
    x_NI, a_KRI, b_KOR = (t.requires_grad_() for t in stacks(groups))
    factor_KO, weight_OI = torch.rand(4, 5) + 0.5, torch.randn(5, 6)

    def layers() -> list[Tensor]:
        onto = F.linear(x_NI, weight_OI)[None]
        linear = grouped_linear(x_NI[None], weight_OI, None, a_KRI, b_KOR, SCALES, groups, way)
        return [
            grouped_lora(onto, x_NI[None], a_KRI, b_KOR, SCALES, groups, way),
            linear,
            scale_rows(linear.clone(), factor_KO, None, groups),
        ]

    for changed, kept in zip(layers(), layers(), strict=True):
        expected = gradients(kept * 2 + kept.detach(), x_NI, a_KRI, b_KOR)
        changed *= 2
        changed += kept.detach()
        for one, other in zip(gradients(changed, x_NI, a_KRI, b_KOR), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("way", WAYS, ids=["slot by slot", "stacked"])
def test_bf16_and_a_result_of_another_type(way: Way, groups: Groups) -> None:
    x_NI, a_KRI, b_KOR = stacks(groups)
    expected = 1 + grouped_lora_reference(x_NI, a_KRI, b_KOR, SCALES, groups)
    onto = torch.ones(groups.num_tokens, 5, dtype=torch.bfloat16)
    found = grouped_lora(onto, x_NI, a_KRI, b_KOR, SCALES, groups, way)  # a bf16 base without autocast
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)

    low = [t.bfloat16().requires_grad_() for t in (x_NI, a_KRI, b_KOR)]
    high = [t.detach().float().requires_grad_() for t in low]
    found = grouped_lora(torch.ones(groups.num_tokens, 5, dtype=torch.bfloat16), *low, SCALES, groups, way)
    expected = 1 + grouped_lora_reference(*high, SCALES, groups)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.03)
    if groups.slots:
        torch.manual_seed(1)
        dy = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, low, dy.bfloat16()), torch.autograd.grad(expected, high, dy), strict=True
        ):
            assert (one.float() - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("way", WAYS, ids=["slot by slot", "stacked"])
@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_slot_that_diverges_is_alone(poison: float, by_slot: bool, way: Way, groups: Groups) -> None:
    if 0 not in groups.slots:
        pytest.skip("slot 0 is the one to be poisoned")
    found: list[list[Tensor]] = []
    for is_poisoned in (False, True):
        x_NI, a_KRI, b_KOR = stacks(groups)
        factor_KO = torch.full((4, 5), 1.5)
        if is_poisoned:
            x_NI[groups.spans[0]] = a_KRI[0, 0] = b_KOR[0, :, 0] = factor_KO[0] = poison
        inputs = [t.requires_grad_() for t in (x_NI, a_KRI, b_KOR, factor_KO)]
        onto = torch.zeros(groups.num_tokens, 5)
        y = grouped_lora(onto, x_NI, a_KRI, b_KOR, SCALES, groups, way)
        y = scale_rows(y, factor_KO, torch.ones(5), groups, by_slot=by_slot)
        dx, da, db, dfactor = gradients(y, *inputs)
        others = [n for n in range(groups.num_tokens) if n not in range(*groups.spans[0].indices(groups.num_tokens))]
        found.append([y[others], dx[others], da[1:], db[1:], dfactor[1:]])
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("way", WAYS, ids=["slot by slot", "stacked"])
def test_padded_ranks_stay_zero_under_adamw(way: Way) -> None:
    groups = CASES["uneven"]
    x_NI, a_KRI, b_KOR = stacks(groups)
    a_KRI.requires_grad_(), b_KOR.requires_grad_()
    optimizer = torch.optim.AdamW([a_KRI, b_KOR], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        y = grouped_lora(torch.zeros(groups.num_tokens, 5), x_NI, a_KRI, b_KOR, SCALES, groups, way)
        (y - 1).square().sum().backward()
        optimizer.step()
    for slot, rank in enumerate(groups.ranks):
        assert not a_KRI[slot, rank:].any()
        assert not b_KOR[slot, :, rank:].any()
        assert a_KRI[slot, :rank].all()


class Largest(TorchDispatchMode):
    """Notes the most numbers that an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(t.numel() for t in (result,) if isinstance(t, Tensor)), 0)
        return result


@pytest.mark.parametrize("counts", [[900, *[4] * 15], [512, 300, 200, *[30] * 6, *[2] * 7], [64, 128, 512] * 5])
def test_padding_is_bounded_whatever_the_batch(counts: list[int]) -> None:
    groups = Groups(counts, [8] * len(counts))
    assert sorted(slot for part in groups.parts for slot in part.slots) == list(range(len(counts)))
    assert sum(len(part.slots) * part.most for part in groups.parts) <= PADDED * groups.num_tokens
    inputs = torch.randn(groups.num_tokens, 32), torch.randn(len(counts), 8, 32), torch.randn(len(counts), 32, 8)
    scales, factor_KO = [1.0] * len(counts), torch.ones(len(counts), 32, requires_grad=True)
    with Largest() as largest:
        for tensor in inputs:
            tensor.requires_grad_()
        y = grouped_lora(torch.zeros(groups.num_tokens, 32), *inputs, scales, groups, Stacked())
        scale_rows(y, factor_KO, None, groups, by_slot=False).sum().backward()
    assert 0 < largest.numbers <= PADDED * groups.num_tokens * 32


def test_both_ways_are_in_use_on_a_cpu() -> None:
    b_KOR = torch.empty(4, 576, 4)
    for counts, num_in, way in (
        ([3, 9, 1, 4], 64, Stacked), ([100, 200, 50, 90], 576, SlotBySlot),
        ([16, 16, 16, 16], 576, Stacked), ([128] * 4, 576, Stacked),
    ):  # fmt: skip
        groups = Groups(counts, [4] * 4)
        assert isinstance(choose_way(torch.empty(groups.num_tokens, num_in), b_KOR, groups), way), counts
