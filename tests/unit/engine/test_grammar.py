"""Constrained completions: they match, beside free ones that do not notice, and what can't be honoured is named."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from fake_graph import fake_graphs
from rankloom import kernels
from rankloom.engine import device_predictor
from rankloom.engine import grammar as grammar_module
from rankloom.engine.device_predictor import DevicePredictor
from rankloom.engine.engine import ServingEngine
from rankloom.engine.grammar import Grammars
from rankloom.engine.masks import Masker
from rankloom.engine.predictor import PlainPredictor
from rankloom.engine.protocol import Grammar
from rankloom.engine.sampling import upload_masks
from rankloom.errors import RequestError
from rankloom.kernels.graphs import GraphCache
from schemas import make_schema
from served import completed, engine_on, load, serving

NUM_SCHEMAS = {"plain": 200, "device": 60}
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
DRAWN: dict[str, Any] = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 450}
OBJECT = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 999}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    {"temperature": 5.0, "top_p": 0.999},
    {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logprobs": 2},
)


def follow(text: str, kind: Any = "json") -> Grammar:
    return Grammar(kind=kind, text=text)


@pytest.fixture(params=["plain", "device"])
def engine(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServingEngine]:
    """An engine on each predictor."""
    if request.param == "plain":
        yield engine_on(tiny_llama, tmp_path, max_num_seqs=16)
        return
    fake_graphs(monkeypatch)
    monkeypatch.setattr(device_predictor, "GraphCache", lambda _, most: GraphCache(torch.device("cuda"), most))
    monkeypatch.setattr("rankloom.engine.sampling.CANDIDATES", 16)
    monkeypatch.setattr(device_predictor, "CANDIDATES", 16)  # so that some rows look beyond them
    with kernels.everywhere():
        made = engine_on(tiny_llama, tmp_path, max_num_seqs=16)
        assert isinstance(made._core._predictor, DevicePredictor)
        yield made


def complete_all(engine: ServingEngine, jobs: list[dict[str, Any]]) -> list[Any]:
    async def work() -> list[Any]:
        waiting = [completed(engine, [5 + i, 30 + i, 9], id=str(i), **how) for i, how in enumerate(jobs)]
        return await asyncio.gather(*waiting)

    return serving(engine, work, limit_s=300)


def test_random_schemas_are_all_matched(engine: ServingEngine) -> None:
    is_plain = isinstance(engine._core._predictor, PlainPredictor)
    schemas = [make_schema(seed) for seed in range(NUM_SCHEMAS["plain" if is_plain else "device"])]
    jobs = [
        DRAWN | SAMPLINGS[i % len(SAMPLINGS)] | {"seed": i, "grammar": follow(json.dumps(schema))}
        for i, schema in enumerate(schemas)
    ]
    for schema, (text, _, deltas) in zip(schemas, complete_all(engine, jobs), strict=True):
        assert deltas[-1].finish == "stop", (schema, text)
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


def test_free_rows_do_not_notice_constrained_ones(engine: ServingEngine, tiny_llama: Path, tmp_path: Path) -> None:
    free = [{"max_tokens": 60, "seed": i} | SAMPLINGS[i % len(SAMPLINGS)] for i in range(8)]
    held = [DRAWN | {"seed": i, "grammar": follow(OBJECT)} | SAMPLINGS[i % len(SAMPLINGS)] for i in range(6)]
    mixed = complete_all(engine, [*free, *held, {"choices": ("alpha", "beta")}])
    alone = complete_all(engine_on(tiny_llama, tmp_path, max_num_seqs=16), free)
    assert [tokens for _, tokens, _ in mixed[:8]] == [tokens for _, tokens, _ in alone]
    for text, _, deltas in mixed[8:14]:
        jsonschema.validate(json.loads(text), json.loads(OBJECT))
        assert "".join(delta.text for delta in deltas) == text
        assert len(deltas) > 3  # as a stream
    assert mixed[14][0] in ("alpha", "beta")


def test_sequences_that_wait_for_slow_masks_have_the_same_tokens(
    engine: ServingEngine, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [DRAWN | {"seed": i, "grammar": follow(OBJECT)} for i in range(4)] + [{"max_tokens": 30}]
    expected = [tokens for _, tokens, _ in complete_all(engine_on(tiny_llama, tmp_path), jobs)]
    lagged = []
    lags = Masker.lags
    monkeypatch.setattr(grammar_module, "SLOW_S", -1.0)
    monkeypatch.setattr(Masker, "lags", lambda *given: lagged.append(lags(*given)) or lagged[-1])
    assert [tokens for _, tokens, _ in complete_all(engine, jobs)] == expected
    assert any(lagged)


def test_a_tokenizer_that_can_not_be_read_is_told_when_a_grammar_comes() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    grammars = Grammars(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b"), [1], 2)
    grammars.open()
    with pytest.raises(RequestError, match="tokenizer can't be read: can't determine decoder"):
        grammars.compile(follow("a", "regex"))


@pytest.mark.parametrize("vocabulary", [416, 401, 447, 448, 380])
def test_masks_are_as_wide_as_the_logits(tiny_llama: Path, vocabulary: int) -> None:
    tokenizer = load(tiny_llama).tokenizer
    grammars = Grammars(tokenizer, [tokenizer.eos_token_id], vocabulary)
    grammars.open()
    masker = Masker(vocabulary, wake=lambda: None)
    (mask,) = masker.begin([grammars.compile(follow("[0-9]", "regex"))])
    _, (is_excluded,) = upload_masks({0: mask}, torch.zeros(1, vocabulary))
    masker.close()
    assert is_excluded.shape == (vocabulary,)
    allowed = [tokenizer.decode([token]) for token in (~is_excluded).nonzero()[:, 0].tolist()]
    assert sorted(allowed) == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("grammar", "matched"),
    [
        (follow("[a-c]{3,5}-(x|yy)+z", "regex"), "[a-c]{3,5}-(x|yy)+z"),
        (follow('start: "<" word ("," word)* ">"\nword: /[a-z]{2,5}/\n', "grammar"), "<[a-z]{2,5}(,[a-z]{2,5})*>"),
        (follow('root ::= "yes" | "no" [0-9] "!"\n', "grammar"), "yes|no[0-9]!"),
        (follow("true"), r"(?s).+"),
    ],
    ids=["regex", "lark", "gbnf", "any value"],
)
def test_other_grammars(engine: ServingEngine, grammar: Grammar, matched: str) -> None:
    jobs = [DRAWN | {"seed": i, "grammar": grammar} for i in range(5)]
    for text, _, deltas in complete_all(engine, jobs):
        assert deltas[-1].finish == "stop" or grammar.text == "true"
        assert re.fullmatch(matched, text)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "grammar",
    [
        follow('start: "<call>" /[a-z]{1,3}/ "</call>"', "grammar"),
        follow("x?<call>[a-z]{1,3}</call>", "regex"),
        follow(json.dumps({"enum": ["<call>", "<call></call>"]})),
        follow('start: <[400]> "<call>" <[401]>', "lark"),
    ],
    ids=lambda grammar: grammar.kind,
)
def test_the_text_of_an_added_token_is_spelled(
    grammar: Grammar, special: bool, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=special) for text in ("<call>", "</call>")])
    grammars = Grammars(tokenizer, [1], len(tokenizer))
    grammars.open()
    state, tokens, chance = grammars.compile(grammar), list[int](), random.Random(0)
    while tokens[-1:] != [1]:
        allowed = np.flatnonzero(np.unpackbits(state.find_mask().view(np.uint8), bitorder="little"))
        assert state.error is None
        tokens.append(int(chance.choice(allowed)))
        state.advance(tokens[-1])
    text = tokenizer.decode(tokens[:-1])
    assert re.fullmatch(r'x?<call>[a-z]{1,3}</call>|"<call>(</call>)?"|<call><call></call>', text)
    assert {400, 401}.isdisjoint(tokens) == (grammar.kind != "lark")


def test_a_cut_and_a_stop_string_end_a_completion(engine: ServingEngine) -> None:
    grammar = follow("a{100}b{100}", "regex")
    cut, stopped, forever = complete_all(
        engine,
        [
            DRAWN | {"grammar": grammar, "max_tokens": 5},
            DRAWN | {"grammar": grammar, "stop": ("ba", "bb")},
            DRAWN | {"grammar": grammar, "ignore_eos": True},
        ],
    )
    assert (len(cut[1]), cut[2][-1].finish) == (5, "length")
    assert set(cut[0]) == {"a"}
    assert (stopped[0], stopped[2][-1].finish) == ("a" * 100, "stop")
    assert (forever[0], forever[2][-1].finish) == ("a" * 100 + "b" * 100, "stop")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (follow('{"type": "array", "uniqueItems": true}'), 'the JSON schema can\'t be honoured: .*"uniqueItems"'),
        (follow('{"not": {"type": "string"}}'), '.*"not"'),
        (follow('{"oneOf": [{"type": "string"}, {"minLength": 2, "type": "string"}]}'), ".*oneOf"),
        (follow('{"x-guidance": {"lenient": true}, "not": {}}'), '.*"not"'),
        (follow('{"$ref": "http://localhost/schema"}'), ".*http://localhost/schema"),
        (follow('{"type": "string", "format": "color"}'), ".*color"),
        (follow("false"), ".*false allows no value"),
        (follow("{"), "the JSON schema can't be honoured: Expecting property name"),
        (follow("[" * 60_000), ".*recursion"),
        (follow("(", "regex"), "the regular expression can't be honoured: .*unclosed group"),
        (follow("start: other", "grammar"), "the grammar can't be honoured: .*other"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_be_honoured_is_named(tiny_llama: Path, tmp_path: Path, grammar: Grammar, message: str) -> None:
    engine = engine_on(tiny_llama, tmp_path)

    async def work() -> None:
        with pytest.raises(RequestError, match=message):
            await completed(engine, [5, 6], grammar=grammar)
        await completed(engine, [5, 6])

    serving(engine, work)


def test_a_grammar_that_becomes_too_complex_fails_its_own_request(engine: ServingEngine) -> None:
    """Each letter doubles the ways to read what is there."""
    ambiguous = follow("start: b\nb: b b | c\nc: c c | d\nd: d d | /[a-z ]/\n", "grammar")

    async def work() -> None:
        failing = completed(engine, [5, 6], grammar=ambiguous, max_tokens=300, id="ambiguous")
        failed, (_, tokens, _) = await asyncio.gather(failing, completed(engine, [7, 8]), return_exceptions=True)  # type: ignore[misc]
        assert isinstance(failed, RequestError)
        assert "can't continue in its grammar: " in str(failed)
        assert len(tokens) == 12

    serving(engine, work)
