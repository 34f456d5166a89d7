"""Logprobs are of the tokens in context: their bytes are the text, their offsets point into it, streamed or whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rankloom.engine.jobs import JobProgress
from rankloom.engine.protocol import Delta, SampledToken, TokenLogprobs
from rankloom.engine.text import Decoder, Stops, TextStream
from rankloom.engine.transcript import Transcript
from rankloom.gateway.openai.responses import ResponseBuilder

WORDS = ["true", "false", "the", "card", "größe", "日本", "a b c"]


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """A space is a part of the word behind it, and is left out where a text begins; unknown letters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*"".join(WORDS[:5]).replace(" ", "")} - {"ö", "ß"})
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *letters,
        "▁true",
        "▁the",
        "true",
    ]
    vocabulary = {name: number for number, name in enumerate(names)}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> PreTrainedTokenizerBase:
    return make_tokenizer() if request.param == "bytes" else sentencepiece_like()


def deltas(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()
) -> list[Delta]:
    """As an engine makes them, with four other tokens beside each."""
    end = frozenset([int(tokenizer.eos_token_id)])
    transcript, chance, found = Transcript(Decoder(tokenizer), prompt, Stops(stop), end), random.Random(1), []
    for number, token in enumerate(tokens, 1):
        others = chance.sample([t for t in range(len(tokenizer)) if t != token], 4)
        text = transcript.push(
            [token], [SampledToken(token, -0.5, tuple((t, -1.0) for t in (others[0], token, *others[1:])))]
        )
        last = transcript.stopped or number == len(tokens)
        if last:
            text += transcript.finish()
        found.append(Delta(text, (token,), transcript.take_logprobs(last=last), "stop" if last else None))
        if last:
            break
    return found


def draws(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens as a bad model chooses them, and those of texts, whole and cut."""
    chance = random.Random(0)
    wild = [[chance.randrange(len(tokenizer)) for _ in range(30)] for _ in range(40)]
    texts = [tokenizer(" ".join(chance.choices(WORDS, k=6)), add_special_tokens=False).input_ids for _ in range(20)]
    end = int(tokenizer.eos_token_id)
    return [*wild, *texts, *([*ids[: -1 - number % 3], end] for number, ids in enumerate(texts))]


def pieces(entries: Sequence[TokenLogprobs]) -> bytes:
    return b"".join(entry.chosen.piece for entry in entries)


def test_the_pieces_are_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for tokens in draws(tokenizer):
        for prompt in ([], tokens[:3]):
            found = deltas(tokenizer, prompt, tokens)
            stream = TextStream(Decoder(tokenizer), prompt)
            ends = {int(tokenizer.eos_token_id)}
            text = "".join(stream.push([token]) for token in tokens if token not in ends) + stream.finish()
            entries = [entry for delta in found for entry in delta.logprobs]
            assert "".join(delta.text for delta in found) == text
            assert pieces(entries).decode("utf-8", "replace") == text
            assert [entry.chosen.token for entry in entries] == tokens
            for entry in entries:
                assert (entry.top[1].piece, entry.top[1].name) == (entry.chosen.piece, entry.chosen.name)
                assert (entry.chosen.name is None) or not entry.chosen.piece
            sent, told = "", b""  # what is told of is never ahead of its text
            for delta in found:
                sent, told = sent + delta.text, told + pieces(delta.logprobs)
                assert sent.startswith(told.decode("utf-8", "ignore").split("\ufffd")[0]) or "\ufffd" in sent


def test_a_word_keeps_its_space_but_at_the_start() -> None:
    tokenizer = sentencepiece_like()
    true, other = tokenizer.convert_tokens_to_ids(["▁true", "true"])
    for prompt, begin in (([], b""), ([true], b" "), ([tokenizer.bos_token_id], b"")):
        found = [entry for delta in deltas(tokenizer, prompt, [true, true, other]) for entry in delta.logprobs]
        assert [entry.chosen.piece for entry in found] == [begin + b"true", b" true", b"true"]


def answers(kind: Any, found: list[Delta]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same deltas, whole and in chunks."""
    whole, streamed = (ResponseBuilder(kind, "id", "bank", 0, 1, n=1, logprobs=True) for _ in range(2))
    chunks = []
    for delta in found:
        progress = JobProgress(1, ((0, delta),))
        whole.add(progress)
        chunks += [chunk["choices"][0] for chunk in streamed.make_chunks(progress)]
    return json.loads("".join(whole.iter_body()))["choices"][0], chunks


def test_completions_tell_where_each_token_is(tokenizer: PreTrainedTokenizerBase) -> None:
    silent = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    for tokens in draws(tokenizer):
        whole, chunks = answers("text", deltas(tokenizer, tokens[:3], tokens))
        told, text = whole["logprobs"], whole["text"]
        for key in told:
            assert [each for chunk in chunks for each in chunk["logprobs"][key]] == told[key]
        assert text == "".join(chunk["text"] for chunk in chunks)
        assert [len(top) for top in told["top_logprobs"]] == [5] * len(tokens)
        last = 0
        for token, name, at, top in zip(tokens, told["tokens"], told["text_offset"], told["top_logprobs"], strict=True):
            assert last <= at <= len(text)
            assert top[name] == -1.0
            if token in silent:
                assert name == tokenizer.convert_ids_to_tokens(token)
            elif "\ufffd" not in name:
                assert text[at:].startswith(name)
            last = at


def test_a_chats_bytes_are_its_content(tokenizer: PreTrainedTokenizerBase) -> None:
    for tokens in draws(tokenizer):
        whole, chunks = answers("chat", deltas(tokenizer, tokens[:3], tokens))
        told = whole["logprobs"]["content"]
        assert (
            b"".join(map(bytes, (each["bytes"] for each in told))).decode("utf-8", "replace")
            == whole["message"]["content"]
        )
        assert [each for chunk in chunks for each in chunk["logprobs"]["content"]] == told
        assert all(len(each["top_logprobs"]) == 5 for each in told)


def test_nothing_is_told_of_a_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer("the card true card", add_special_tokens=False).input_ids
    for stop in ("true", "rd t", "d", "the", "e c", "e card true c"):
        found = deltas(tokenizer, tokens[:2], tokens, [stop])
        entries = [entry for delta in found for entry in delta.logprobs]
        text = "".join(delta.text for delta in found)
        assert stop not in text
        assert found[-1].finish == "stop"
        assert pieces(entries).decode() == text
        assert len(entries) <= sum(len(delta.tokens) for delta in found)


def test_nothing_is_told_of_a_stop_string_amid_bytes_that_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stopped = 0
    for tokens in draws(tokenizer):
        for stop in (["e"], ["a", " "], ["r", "\x11"], ["\ufffd"], ["\ufffd\ufffd", "t"]):
            found = deltas(tokenizer, tokens[:2], tokens, stop)
            text = "".join(delta.text for delta in found)
            entries = [entry for delta in found for entry in delta.logprobs]
            assert pieces(entries).decode("utf-8", "replace") == text
            told, _ = answers("text", found)
            assert max(told["logprobs"]["text_offset"], default=0) <= len(text)
            stopped += sum(len(delta.tokens) for delta in found) < len(tokens)
    assert stopped > 50


def test_stop_strings_are_found_as_one_by_one() -> None:
    chance = random.Random(0)
    for _ in range(500):
        stops = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(chance.randint(1, 4))]
        text, automaton, state = "".join(chance.choices("abc", k=20)), Stops(stops), 0
        for at in range(1, len(text) + 1):
            state = automaton.step(state, text[at - 1])
            seen = text[:at]
            assert automaton.reached[state] == max((len(stop) for stop in stops if seen.endswith(stop)), default=0)
            begun = [n for stop in stops for n in range(1, len(stop) + 1) if seen.endswith(stop[:n])]
            assert automaton.depth[state] == max(begun, default=0)
