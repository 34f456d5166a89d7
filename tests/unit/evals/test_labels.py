"""Constrained decoding: batched, cached and with forced tokens skipped, it equals the plain row-by-row way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rankloom.data.render import Row
from rankloom.errors import DataError
from rankloom.evals.labels import LabelTrie, compute_macro_f1, predict_labels

PAD, END = 0, 1
ARCHITECTURES = ["llama", "qwen", "gpt2"]
LABELS = {
    "a": [9, END],
    "a b": [9, 20, END],
    "a b c": [9, 20, 21, 22, END],  # after 9, 20: END or a chain
    "a b d": [9, 20, 21, 23, END],
    "e": [10, 30, 31, 32, 40, END],  # a chain of three before the choice
    "f": [10, 30, 31, 32, 41, 50, END],
    "g": [10, 30, 31, 32, 41, 51, END],
    "h": [11, END],
}


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def make_rows(count: int) -> list[Row]:
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 300) for _ in range(rng.randint(1, 25))] for _ in range(count)]
    return [Row([*p, 9, END], [0.0] * len(p) + [1.0, 1.0], len(p), "a") for p in prompts]


def plainly_predicted(model: torch.nn.Module, row: Row, labels: dict[str, list[int]]) -> str:
    """One token a time, no cache, no batch, no skipping: the definition."""
    chosen: list[int] = []
    while chosen not in labels.values():
        allowed = sorted({t[len(chosen)] for t in labels.values() if t[: len(chosen)] == chosen})
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids[: row.prompt_length] + chosen])).logits[0, -1]
        chosen.append(max(allowed, key=lambda token: logits[token].item()))
    return next(label for label, tokens in labels.items() if tokens == chosen)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_plain_greedy_decoding(tiny_model, architecture: str) -> None:
    model, rows, trie = load(tiny_model(architecture)), make_rows(40), LabelTrie(LABELS)
    expected = [plainly_predicted(model, row, LABELS) for row in rows]
    assert len(set(expected)) >= 4  # the rows take different ways, and leave the batch at different steps
    for batch_size in (1, 7, 40):
        assert predict_labels(model, rows, trie, pad_id=PAD, batch_size=batch_size) == expected


def test_counts_choices_not_tokens() -> None:
    trie = LabelTrie(LABELS)
    assert trie.num_decisions == 4  # a b c: among 9, 10, 11; END, 20; END, 21; 22, 23
    assert trie.longest == 7
    assert LabelTrie({"x": [5, 6, 7, END]}).num_decisions == 0


def test_the_trie_is_no_larger_than_its_decisions() -> None:
    # thousands of tokens: no recursion over them, and no node for each
    labels = {str(i): [9] * (5000 - i) + [7 + i % 2, END] for i in range(200)}
    trie = LabelTrie(labels)
    assert (trie.longest, trie.num_decisions) == (5002, 199)
    nodes, tokens = [trie.root], 0
    for node in nodes:
        nodes += node.children.values()
        tokens += len(node.tokens)
    assert len(nodes) == 2 * len(labels) - 1
    assert tokens < 6000
    for label, path in labels.items():
        node, found = trie.root, [*trie.root.tokens]
        while node.children:
            node = node.children[path[len(found)]]
            found += node.tokens
        assert (found, node.label) == (path, label)


def test_a_row_stops_at_its_last_choice(tiny_llama: Path) -> None:
    model, forwards = load(tiny_llama), []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: forwards.append(kwargs["input_ids"].shape), with_kwargs=True)
    labels = {"x": [5, 6, 7, END], "y": [5, 8, 9, 9, 9, END]}
    found = predict_labels(model, make_rows(3), LabelTrie(labels), pad_id=PAD, batch_size=1)
    assert set(found) <= {"x", "y"}
    assert len(forwards) == 3  # each row's prompt with the 5 that all labels begin with, and no more


def test_in_lockstep_every_batch_takes_as_many_forwards(tiny_llama: Path) -> None:
    model, rows, trie = load(tiny_llama), make_rows(6), LabelTrie(LABELS)
    expected = predict_labels(model, rows, trie, pad_id=PAD, batch_size=1)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert predict_labels(model, rows, trie, pad_id=PAD, batch_size=1, lockstep=True) == expected
    assert len(forwards) == len(rows) * (1 + trie.num_decisions)


def with_common_start(rows: list[Row]) -> list[Row]:
    start = list(range(100, 112))
    return [Row(start + r.input_ids, [0.0] * 12 + r.loss_weights, 12 + r.prompt_length, r.completion) for r in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prompts_common_start_is_computed_once(tiny_model, architecture: str) -> None:
    model, rows, forwards = load(tiny_model(architecture)), with_common_start(make_rows(20)), []
    expected = [plainly_predicted(model, row, LABELS) for row in rows]
    model.register_forward_pre_hook(lambda _m, _a, kwargs: forwards.append(kwargs["input_ids"].shape), with_kwargs=True)
    assert predict_labels(model, rows, LabelTrie(LABELS), pad_id=PAD, batch_size=20) == expected
    assert len(set(expected)) >= 3
    assert forwards[:2] == [(1, 12), (20, max(row.prompt_length for row in rows) - 12)]


def test_a_sliding_window_shorter_than_the_rows(tiny_model) -> None:
    folder = tiny_model("qwen")
    config = AutoConfig.from_pretrained(folder)
    config.sliding_window, config.layer_types = 6, ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    rows = with_common_start(make_rows(20))
    expected = [plainly_predicted(model, row, LABELS) for row in rows]
    assert expected != [plainly_predicted(load(folder), row, LABELS) for row in rows]
    assert predict_labels(model, rows, LabelTrie(LABELS), pad_id=PAD, batch_size=7) == expected


def test_a_prompt_that_fills_the_context_loses_its_start(tiny_model) -> None:
    model = load(tiny_model("gpt2"))  # 512 learned positions: one more would be out of range
    prompt = [(7 * i) % 290 + 5 for i in range(511)]
    row = Row([*prompt, END], [0.0] * 511 + [1.0], 511, "h")
    trie = LabelTrie(LABELS)
    cut = prompt[-(512 - trie.longest) :]
    expected = plainly_predicted(model, Row([*cut, END], [0.0] * len(cut) + [1.0], len(cut), "h"), LABELS)
    assert predict_labels(model, [row], trie, pad_id=PAD, batch_size=1) == [expected]


def test_a_single_label_needs_no_model(tiny_llama: Path) -> None:
    trie = LabelTrie({"only": [5, END]})
    assert predict_labels(load(tiny_llama), make_rows(3), trie, pad_id=PAD, batch_size=2) == ["only"] * 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "no label"),
        ({"x": [5, 6], "y": [5, 6]}, "'x' and 'y'"),
        ({"x": [5, 6, 7], "z": [8], "y": [5, 6]}, "'y' and 'x'"),
        ({"x": [], "y": [5]}, "'x' and 'y'"),
    ],
)
def test_labels_that_decoding_can_not_tell_apart_are_refused(labels: dict[str, list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelTrie(labels)


def test_macro_f1() -> None:
    # by hand, as sklearn.metrics.f1_score(average="macro"): a 2/3, b 2/5, c 0 (predicted only), d 0 (true only)
    truths, predictions = ["a", "a", "b", "b", "d"], ["a", "b", "b", "c", "b"]
    assert compute_macro_f1(truths, predictions) == pytest.approx((2 / 3 + 2 / 5 + 0 + 0) / 4)
    assert compute_macro_f1(["a", "b"], ["a", "b"]) == 1
