"""Padding, and the order in which rows are seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankloom.data.batching import Cursor, collate
from rankloom.data.render import Row
from rankloom.errors import DataError

SIZES = [(1, 1), (7, 3), (64, 8), (1000, 16), (3, 10)]


def skewed_lengths(num_rows: int, seed: int = 0) -> np.ndarray:
    return 5 + np.random.default_rng(seed).lognormal(3, 1, num_rows).astype(int)


def epoch_of(cursor: Cursor) -> list[list[int]]:
    return [cursor.next() for _ in range(cursor.batches_per_epoch)]


def test_collate_pads_on_the_right_and_never_predicts_the_first_token() -> None:
    batch = collate([Row([5, 6, 7], [1.0, 0.0, 2.0], 2, ""), Row([8], [1.0], 0, "")], pad_id=9)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.loss_weights_BT.tolist() == [[0, 0, 2], [0, 0, 0]]
    assert (batch.input_ids_BT.dtype, batch.loss_weights_BT.dtype) == (torch.long, torch.float32)
    assert batch.num_tokens == 4
    assert batch.to("cpu").num_tokens == 4


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(("num_rows", "batch_size"), SIZES)
def test_every_row_comes_once_an_epoch(num_rows: int, batch_size: int, group: bool) -> None:
    cursor = Cursor(skewed_lengths(num_rows), batch_size, seed=3, group_by_length=group)
    for epoch in range(3):
        assert cursor.epoch == epoch
        batches = epoch_of(cursor)
        assert sorted(i for batch in batches for i in batch) == list(range(num_rows))
        assert all(0 < len(batch) <= batch_size for batch in batches)
    assert cursor.epoch == 3


@pytest.mark.parametrize("group", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(group: bool) -> None:
    lengths = skewed_lengths(200)
    one, other = (Cursor(lengths, 8, seed=1, group_by_length=group) for _ in range(2))
    first, second = epoch_of(one), epoch_of(one)
    assert [first, second] == [epoch_of(other), epoch_of(other)]
    assert first != second
    assert first != epoch_of(Cursor(lengths, 8, seed=2, group_by_length=group))


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("seen", [0, 1, 12, 13, 40])  # 13 batches an epoch: also at its very end
def test_a_restored_cursor_goes_on_exactly(seen: int, group: bool) -> None:
    lengths = skewed_lengths(100)
    cursor = Cursor(lengths, 8, seed=1, group_by_length=group)
    for _ in range(seen):
        cursor.next()
    restored = Cursor(lengths, 8, seed=1, group_by_length=group)
    restored.load_state_dict(cursor.state_dict())
    assert restored.epoch == cursor.epoch
    assert [restored.next() for _ in range(30)] == [cursor.next() for _ in range(30)]
    assert all(isinstance(value, int) for value in cursor.state_dict().values())


def test_a_cursor_over_other_data_is_refused() -> None:
    state = Cursor(skewed_lengths(100), 8, seed=1, group_by_length=True).state_dict()
    with pytest.raises(DataError, match=r"num_rows=100.*has 99"):
        Cursor(skewed_lengths(99), 8, seed=1, group_by_length=True).load_state_dict(state)
    with pytest.raises(DataError, match="batch_size=8"):
        Cursor(skewed_lengths(100), 4, seed=1, group_by_length=True).load_state_dict(state)


def test_grouping_removes_most_padding_and_keeps_batches_in_random_order() -> None:
    lengths = skewed_lengths(2000)

    def padded(group: bool) -> tuple[int, list[int]]:
        batches = epoch_of(Cursor(lengths, 16, seed=0, group_by_length=group))
        longest = [int(lengths[batch].max()) for batch in batches]
        return sum(m * len(b) for m, b in zip(longest, batches, strict=True)) - int(lengths.sum()), longest

    (grouped, longest), (plain, _) = padded(True), padded(False)
    assert grouped < 0.25 * plain
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        Cursor([], 4, seed=0, group_by_length=True)
