"""Free generation equals plain greedy decoding, ends where the turn does, and is compared as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankloom.data.batching import collate
from rankloom.data.render import Row
from rankloom.evals.generate import ROOM, decode_references, end_ids, generate_completions
from rankloom.evals.loss import compute_labelled_loss

TEXTS = {
    "my card was lost": "please send a new one",
    "balance": "check",
    "transfer money to a friend today": "yes",
    "how do i change the pin": "maybe no",
    "weather": "the sun shines",
}


def load(folder: Path) -> tuple[torch.nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def make_rows(tokenizer, texts: dict[str, str]) -> list[Row]:
    rows = []
    for prompt, completion in texts.items():
        before, after = tokenizer.encode(prompt + "\n"), [*tokenizer.encode(completion), tokenizer.eos_token_id]
        rows.append(Row(before + after, [0.0] * len(before) + [1.0] * len(after), len(before), completion))
    return rows


def memorise(model: torch.nn.Module, rows: list[Row]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = collate(rows, 0)
    for _ in range(60):
        loss, weight = compute_labelled_loss(model, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_equals_plain_greedy_decoding(tiny_model, architecture: str) -> None:
    model, tokenizer = load(tiny_model(architecture))
    model.generation_config.repetition_penalty = 1.8  # what a model recommends for chatting is not what is measured
    model.generation_config.do_sample = True
    rows = make_rows(tokenizer, TEXTS)
    limit = max(len(r.input_ids) - r.prompt_length for r in rows) + ROOM
    expected = []
    for row in rows:
        ids = row.input_ids[: row.prompt_length]
        while len(ids) < row.prompt_length + limit and (ids[-1] != 1 or len(ids) == row.prompt_length):
            with torch.no_grad():
                ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        expected.append(tokenizer.decode(ids[row.prompt_length :], skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    for batch_size in (1, 5):
        assert generate_completions(model, tokenizer, rows, batch_size=batch_size) == expected


def test_exact_match_of_a_model_that_has_learned_the_rows(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    rows = make_rows(tokenizer, TEXTS)

    def exact_matches(rows: list[Row]) -> list[bool]:
        texts = generate_completions(model, tokenizer, rows, batch_size=3)
        return [text == want for text, want in zip(texts, decode_references(tokenizer, rows), strict=True)]

    assert not any(exact_matches(rows))
    memorise(model, rows)
    assert generate_completions(model, tokenizer, rows, batch_size=3) == list(TEXTS.values())
    other = make_rows(tokenizer, {"balance": "checked", "weather": "the sun"})  # one too short, one too long
    assert exact_matches([*rows, *other]) == [True] * len(rows) + [False, False]


def test_generation_ends_at_the_chat_templates_end_of_turn(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    end_of_turn, newline = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.encode("\n")
    rows = [Row([7, 8, end_of_turn, *newline], [0.0, 1.0, 1.0, 0.0], 1, "")]
    assert end_ids(tokenizer, rows) == {tokenizer.eos_token_id, end_of_turn}
