"""The kernels of adapters in triton's interpreter against their references, which are held to plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankloom.kernels import lora
from rankloom.kernels.triton import lora as lora_triton

RANKS = [3, 16, 0, 37]
"""Of four slots. The first has a factor on the first part, the second a shift on the last, the third only a factor."""
RANK = 48
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
COUNTS = [(-1, 2), (0, 1), (1, 3), (3, 18), (2, 2), (-1, 20)]
"""Slot and number of its tokens."""


def table(num_in: int, widths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, factors and shifts, and the slots."""
    torch.manual_seed(0)
    num_parts, num_out, num_rows = len(widths), sum(widths), 1 + sum(RANKS)
    slots_PK4 = torch.full((num_parts, len(RANKS), 4), -1, dtype=torch.int32)
    for slot, rank in enumerate(RANKS):
        slots_PK4[:, slot, lora.FIRST], slots_PK4[:, slot, lora.RANK] = 1 + sum(RANKS[:slot]), rank
    slots_PK4[0, 0, lora.FACTOR], slots_PK4[-1, 1, lora.SHIFT], slots_PK4[:, 2, lora.FACTOR] = 1, 0, 2
    slots_PK4[-1, 3, lora.RANK] = 0 if num_parts > 1 else RANKS[3]  # not on all parts
    a_PXI = torch.randn(num_parts, num_rows, num_in).mul(num_in**-0.5).to(dtype)
    b_XO = torch.randn(num_rows, num_out).to(dtype)
    a_PXI[:, 0] = b_XO[0] = 0
    return a_PXI, b_XO, 1 + 0.3 * torch.randn(3, num_out), slots_PK4


def blocks(size: int) -> tuple[Tensor, Tensor]:
    """Each block's slot and first token; tokens without a slot are in one block, however many."""
    slots, starts, stop = [], [], 0
    for slot, count in COUNTS:
        for start in range(0, count, count if slot < 0 else size):
            slots.append(slot)
            starts.append(stop + start)
        stop += count
    return torch.tensor(slots, dtype=torch.int32), torch.tensor([*starts, stop], dtype=torch.int32)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernels_equal_their_references(dtype: torch.dtype, block: int) -> None:
    widths = [150, 33]
    a_PXI, b_XO, vectors_VO, slots_PK4 = table(72, widths, dtype)
    slot_G, start_G1 = blocks(block)
    x_NI, y_NO = torch.randn(int(start_G1[-1]), 72).to(dtype), torch.randn(int(start_G1[-1]), sum(widths)).to(dtype)
    results = []
    for shrink, expand in (
        (lora.lora_shrink, lora.lora_expand),
        (lora_triton.lora_shrink, lora_triton.lora_expand),
    ):
        h_SND, result_NO = shrink(x_NI, a_PXI, slots_PK4, slot_G, start_G1, block, RANK, 3), y_NO.clone()
        expand(result_NO, h_SND, b_XO, vectors_VO, slots_PK4, slot_G, start_G1, block, widths)
        results.append(result_NO)
    torch.testing.assert_close(results[1], results[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    nobodys = [*range(2), *range(len(y_NO) - 20, len(y_NO))]
    assert torch.equal(results[1][nobodys], y_NO[nobodys])


def test_the_reference_is_the_plain_product_of_each_token() -> None:
    widths = [24, 8]
    a_PXI, b_XO, vectors_VO, slots_PK4 = table(16, widths, torch.float32)
    slot_G, start_G1 = blocks(1)
    x_NI, y_NO = torch.randn(int(start_G1[-1]), 16), torch.randn(int(start_G1[-1]), 32)
    expected_NO = y_NO.clone()
    slots = [slot for slot, count in COUNTS for _ in range(count)]
    for n, slot in enumerate(slots):
        for part, span in enumerate((slice(0, 24), slice(24, 32))):
            if slot < 0:
                continue
            first, rank, factor, shift = slots_PK4[part, slot].tolist()
            rows = slice(first, first + rank)
            expected_NO[n, span] += x_NI[n] @ a_PXI[part, rows].T @ b_XO[rows, span]
            if factor >= 0:
                expected_NO[n, span] *= vectors_VO[factor, span]
            if shift >= 0:
                expected_NO[n, span] += vectors_VO[shift, span]
    h_SND = lora.lora_shrink(x_NI, a_PXI, slots_PK4, slot_G, start_G1, 1, RANK, 2)
    lora.lora_expand(y_NO, h_SND, b_XO, vectors_VO, slots_PK4, slot_G, start_G1, 1, widths)
    torch.testing.assert_close(y_NO, expected_NO, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_a_number_stays_with_its_adapter(bad: float, block: int) -> None:
    a_PXI, b_XO, vectors_VO, slots_PK4 = table(16, [24], torch.float32)
    slot_G, start_G1 = blocks(block)
    x_NI, y_NO = torch.randn(int(start_G1[-1]), 16), torch.zeros(int(start_G1[-1]), 24)
    a_PXI[:, 3 + 16 + 2] = b_XO[3 + 16 + 2] = bad  # rows of the last slot
    h_SND = lora_triton.lora_shrink(x_NI, a_PXI, slots_PK4, slot_G, start_G1, block, RANK, 1)
    lora_triton.lora_expand(y_NO, h_SND, b_XO, vectors_VO, slots_PK4, slot_G, start_G1, block, [24])
    assert torch.equal(
        y_NO.isfinite().all(1), torch.tensor([slot != 3 for slot, count in COUNTS for _ in range(count)])
    )


def launch_lora() -> None:
    """For test_compile.py: decoding rows and prompts of a 7B, on q, k and v."""
    widths = [4096, 1024, 1024]
    a_PXI, b_XO, vectors_VO, slots_PK4 = table(4096, widths, torch.bfloat16)
    for block in (1, 16):
        slot_G, start_G1 = blocks(block)
        x_NI, y_NO = torch.zeros(46, 4096).bfloat16(), torch.zeros(46, sum(widths)).bfloat16()
        h_SND = lora_triton.lora_shrink(x_NI, a_PXI, slots_PK4, slot_G, start_G1, block, RANK, 4)
        lora_triton.lora_expand(y_NO, h_SND, b_XO, vectors_VO, slots_PK4, slot_G, start_G1, block, widths)
