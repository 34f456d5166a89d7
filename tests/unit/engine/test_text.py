"""Text bit by bit: whole characters, stop strings over token borders, nothing lost; choices as a walk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rankloom.data.encode import Encoder
from rankloom.engine.choices import ChoiceState, build_choice_tree
from rankloom.engine.prompts import Prompts
from rankloom.engine.text import LONGEST, Decoder, Stops, TextStream
from rankloom.errors import RequestError
from served import load


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return make_tokenizer()


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", ["hello, my card", "größer 日本語 👩‍👩‍👧 é", "  two  spaces\n\n", "ab\ufffdcd"])
def test_the_parts_are_the_whole_and_no_part_has_half_a_character(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    stream = TextStream(Decoder(tokenizer), ids(tokenizer, "prompt"))
    parts = [stream.push([token]) for token in ids(tokenizer, text)]
    assert "".join(parts) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(Decoder(tokenizer), [])
    parts = [stream.push([token]) for token in ids(tokenizer, "a日")[:-1]]
    assert parts == ["a", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_character_that_stands_for_a_half_one_does_not_wait(tokenizer: PreTrainedTokenizerBase) -> None:
    stream, tokens = TextStream(Decoder(tokenizer), []), ids(tokenizer, "\ufffd" * 50)
    parts = [stream.push([token]) for token in tokens]
    assert [part for part in parts if part] == ["\ufffd"] * 50


def test_bytes_that_are_no_text_do_not_wait_for_ever(tokenizer: PreTrainedTokenizerBase) -> None:
    stream, half = TextStream(Decoder(tokenizer), []), ids(tokenizer, "日")[0]
    parts = [stream.push([half]) for _ in range(10 * LONGEST)]
    assert [len(part) for part in parts if part] == [LONGEST] * 10


def test_a_character_split_between_prompt_and_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = ids(tokenizer, "日")
    assert len(tokens) == 3
    stream = TextStream(Decoder(tokenizer), tokens[:1])
    text = "".join(stream.push([token]) for token in [*tokens[1:], *ids(tokenizer, " ok")]) + stream.finish()
    assert text.endswith(" ok")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["twofold"], "one two three"),
        ("aaab", ["aab"], "a"),
        ("ends in tw", ["two"], "ends in tw"),
        ("größe", ["ö"], "gr"),
    ],
)
def test_the_text_ends_before_a_stop_string(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str], expected: str
) -> None:
    # byte by byte, so that every stop string lies over a border
    tokens = [token for byte in text.encode() for token in [tokenizer.convert_tokens_to_ids(_name(byte))]]
    stream, found = TextStream(Decoder(tokenizer), [], Stops(stop)), ""
    for token in tokens:
        found += stream.push([token])
        assert not any(s in found for s in stop)
        if stream.stopped:
            break
    assert found + stream.finish() == expected
    assert stream.stopped == (expected != text)


def _name(byte: int) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()[byte]


def test_pieces_are_bytes_that_make_up_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, text = Decoder(tokenizer).get_piece, "größe 日本 ok"
    assert b"".join(pieces(token) for token in ids(tokenizer, text)).decode() == text


def test_texts_become_the_tokens_that_the_tokenizer_says(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)  # as some tokenizer.json do
    tokenizer.backend_tokenizer.enable_padding(length=9)
    texts = ["my card was lost", "", "größer <|end|> 日本", "a"]
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    tokenizer.backend_tokenizer.enable_truncation(2)
    encoder = Encoder(tokenizer)
    assert encoder.encode(texts) == expected
    assert len(expected[0]) > 2


@pytest.fixture(scope="module")
def prompts(tiny_llama: Path) -> Prompts:
    base = load(tiny_llama)
    return Prompts(base.tokenizer, base.model)


def test_a_conversation_is_rendered_as_training_renders_it(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = tokenizer.decode(prompts.tokenize_chat([{"role": "user", "content": "my card"}]))
    assert found == "<|user|>my card<|end|>\n<|assistant|>"
    assert prompts.turn_end == tokenizer.convert_tokens_to_ids("<|end|>")


def test_without_a_template_a_conversation_is_refused(tiny_model: Callable[..., Path]) -> None:
    base = load(tiny_model("llama", chat=False))
    with pytest.raises(RequestError, match="no chat template"):
        Prompts(base.tokenizer, base.model).tokenize_chat([{"role": "user", "content": "a"}])


def test_a_choice_is_walked_to_its_end(prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    choices = ["card_lost", "card_found", "transfer", "card"]
    for wanted in choices:
        choice, tokens = ChoiceState(build_choice_tree(choices, prompts)), []
        target = prompts.tokenize_completion(wanted)
        while not choice.is_over:
            assert target[len(tokens)] in choice.allowed
            tokens.append(target[len(tokens)])
            choice.advance(tokens[-1])
            tokens += choice.take_forced()
        assert tokenizer.decode(tokens, skip_special_tokens=True) == wanted


def test_a_choice_of_thousands_of_tokens(prompts: Prompts) -> None:
    long = "".join("^~"[i % 7 // 6] for i in range(4096))
    choice, target = ChoiceState(build_choice_tree([long, "short"], prompts)), prompts.tokenize_completion(long)
    assert len(target) > 1000  # a call for each would be too deep
    choice.advance(target[0])
    assert choice.take_forced() == target[1:-1]
    assert choice.is_over


def test_choices_that_are_one_are_refused(prompts: Prompts) -> None:
    assert ChoiceState(build_choice_tree(["a", "a"], prompts)).allowed  # the same twice is one
    with pytest.raises(RequestError, match="choices"):
        build_choice_tree([], prompts)
