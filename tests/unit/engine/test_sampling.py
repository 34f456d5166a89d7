"""Sampling: each rule by itself, rows apart from their neighbours, frequencies as the probabilities say."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from rankloom.engine.masks import TokenMask, set_bits
from rankloom.engine.protocol import Sampling
from rankloom.engine.sampling import COLDEST, LARGEST, SamplingInput, sample_tokens

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, -30.0])


def turn(
    chance: float = 0.5, prompt: tuple[int, ...] = (), generated: tuple[int, ...] = (), **settings: Any
) -> SamplingInput:
    mask = allow(settings.pop("allowed")) if "allowed" in settings else None
    return SamplingInput(Sampling(**settings), prompt, generated, chance, mask)


def allow(allowed: list[int]) -> TokenMask:
    bits = np.zeros((1, 1), np.int32)
    set_bits(bits[0], allowed)
    done: Future[None] = Future()
    done.set_result(None)
    return TokenMask(bits, 0, done)


def tokens(logits: torch.Tensor, *turns: SamplingInput) -> list[int]:
    return [chosen.token for chosen in sample_tokens(logits.expand(len(turns), -1), turns)]


def frequencies(logits: torch.Tensor, num: int = 4000, **settings: Any) -> torch.Tensor:
    chance = random.Random(0)
    found = tokens(logits, *(turn(chance.random(), **settings) for _ in range(num)))
    return torch.bincount(torch.tensor(found), minlength=len(logits)) / num


def test_greedy_takes_the_likeliest() -> None:
    assert tokens(LOGITS, turn(0.99, temperature=0)) == [0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6, COLDEST])
@pytest.mark.parametrize("scale", [1.0, 1e-3 * LARGEST])
def test_the_coldest_and_the_most_punished_rows_break_no_other(temperature: float, scale: float) -> None:
    extreme = turn(0.99, temperature=temperature, repetition_penalty=0.01, prompt=(1,), top_p=5e-324)
    logits = torch.stack([scale * LOGITS, LOGITS])
    extreme_token, other = (chosen.token for chosen in sample_tokens(logits, [extreme, turn(0.5)]))
    assert extreme_token == 1  # its logit is multiplied
    assert other == tokens(LOGITS, turn(0.5))[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    found = frequencies(LOGITS, temperature=temperature)
    torch.testing.assert_close(found, (LOGITS / temperature).softmax(-1), atol=0.03, rtol=0)


def test_top_k_keeps_so_many() -> None:
    found = frequencies(LOGITS, top_k=2)
    expected = torch.cat([LOGITS[:2].softmax(-1), torch.zeros(4)])
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_fewest_with_that_probability() -> None:
    # 0.636, 0.234, 0.086, ...: 0.8 needs two of them, 0.6 one
    assert (frequencies(LOGITS, top_p=0.8) > 0).tolist() == [True, True, False, False, False, False]
    assert (frequencies(LOGITS, top_p=0.6) > 0).tolist() == [True, False, False, False, False, False]


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # of the first two 0.731 and 0.269
    assert (frequencies(LOGITS, top_k=2, top_p=0.7) > 0).tolist() == [True] + [False] * 5


def test_top_p_looks_beyond_its_first_candidates() -> None:
    flat = torch.zeros(5000)
    found = frequencies(flat, num=3000, top_p=0.9)
    assert (found > 0).sum() > 1500


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert (frequencies(LOGITS, min_p=0.3) > 0).tolist() == [True, True] + [False] * 4


def test_a_row_with_no_cut_draws_the_same_beside_one_with() -> None:
    free, cut = turn(0.731), turn(0.2, top_k=2)
    assert tokens(LOGITS, free, cut)[0] == tokens(LOGITS, free)[0]


def test_penalties() -> None:
    again = dict(temperature=0, generated=(0, 0))
    assert tokens(LOGITS, turn(presence_penalty=0.9, **again)) == [0]
    assert tokens(LOGITS, turn(presence_penalty=1.1, **again)) == [1]
    assert tokens(LOGITS, turn(frequency_penalty=0.4, **again)) == [0]
    assert tokens(LOGITS, turn(frequency_penalty=0.6, **again)) == [1]
    assert tokens(LOGITS, turn(temperature=0, repetition_penalty=2.5, prompt=(0,))) == [1]
    negative = torch.tensor([-1.0, -1.5])
    assert tokens(negative, turn(temperature=0, repetition_penalty=2, generated=(0,))) == [1]


def test_only_what_is_allowed_is_chosen() -> None:
    assert tokens(LOGITS, turn(temperature=0, allowed=[3, 4])) == [3]
    found = sample_tokens(LOGITS[None].clone(), [turn(0.99999, allowed=[3, 4])])
    assert found[0].token in (3, 4)


def test_logprobs_are_the_models_own() -> None:
    settings = dict(logprobs=2, temperature=0.3, presence_penalty=1.0, generated=(0,), allowed=[4])
    (chosen,) = sample_tokens(LOGITS[None], [turn(**settings)])
    expected = LOGITS.log_softmax(-1)
    assert chosen.token == 4
    assert chosen.logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in chosen.top] == [0, 1]
    assert [value for _, value in chosen.top] == pytest.approx(expected[:2].tolist())


def test_logits_are_left_as_they_are() -> None:
    logits = LOGITS[None].clone()
    sample_tokens(logits, [turn(presence_penalty=1.0, generated=(0,), allowed=[1])])
    assert torch.equal(logits[0], LOGITS)


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_the_ends_of_chance_give_a_possible_token(chance: float, settings: dict[str, Any]) -> None:
    logits = torch.tensor([-torch.inf, 1.0, 0.5, 0.0, -torch.inf])
    assert tokens(logits, turn(chance, **settings))[0] in (1, 2, 3)
