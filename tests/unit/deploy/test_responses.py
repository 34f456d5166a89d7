"""`/v1/responses` through the official client: its wire by the engine without a model, tools and thoughts by others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from endpoint import Endpoint, endpoint
from family_clients import Clients
from rankloom.gateway.keys import KeyFile
from rankloom.gateway.openai.bodies import read
from rankloom.gateway.openai.response_items import make_messages
from rankloom.gateway.openai.response_request import ResponseRequest

ASK: dict[str, Any] = {"model": "bank", "input": "hi"}
TEXT = "bank@1|user=hi;|"
LIFE = ["response.created", "response.in_progress"]
BEGIN = ["response.output_item.added", "response.content_part.added"]
CALL_SCRIPTS = {
    "hermes": 'I look.\n<tool_call>\n{"name": "Pay", "arguments": {"cents": 5}}\n</tool_call>',
    "qwen3": '<think>Hm.</think>\n\nI look.\n<tool_call>\n{"name": "Pay", "arguments": {"cents": 5}}\n</tool_call>',
    "gpt_oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.Pay "
    '<|constrain|>json<|message|>{"cents": 5}',
}


class Ticket(pydantic.BaseModel):
    topic: Literal["card", "parcel"]
    urgent: bool


class Pay(pydantic.BaseModel):
    """Pay an amount."""

    cents: int = pydantic.Field(ge=0, le=500)


TOOLS: list[Any] = [
    {
        "type": "function",
        **openai.pydantic_function_tool(Pay)["function"],
    }
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    routes = {"help": {"to": "faq", "fallback": ["bank"]}}
    made = endpoint(tmp_path_factory.mktemp("endpoint"), broken=["faq@1"], limits={"max_tokens": 200}, routes=routes)
    with made as opened:
        yield opened


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Clients]:
    with ExitStack() as stack:
        yield Clients(tmp_path_factory.mktemp("families"), tiny_llama, stack)


def test_a_text_is_answered(shared: Endpoint) -> None:
    raw = shared.client().responses.with_raw_response.create(
        **ASK, instructions="Be brief.", temperature=0.5, metadata={"a": "b"}, user="ann"
    )
    answer = raw.parse()
    assert answer.output_text == "bank@1|system=Be brief.;user=hi;|"
    (item,) = answer.output
    assert item.type == "message"
    assert (item.role, item.status, item.content[0].type) == ("assistant", "completed", "output_text")
    assert item.id.startswith("msg_")
    assert (answer.object, answer.status, answer.model, answer.error) == ("response", "completed", "bank", None)
    assert answer.id.startswith("resp_")
    assert (answer.instructions, answer.temperature, answer.metadata) == ("Be brief.", 0.5, {"a": "b"})
    assert (answer.tools, answer.tool_choice, answer.parallel_tool_calls) == ([], "auto", True)
    usage = answer.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (25, 33, 58)
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (3, 0)
    assert (raw.headers["x-rankloom-adapter"], raw.headers["x-rankloom-version"]) == ("bank", "1")


def test_logprobs_come_where_they_are_included(shared: Endpoint) -> None:
    asked = ASK | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    content = shared.client().responses.create(**asked).output[0].content[0]  # type: ignore[union-attr]
    assert "".join(token.token for token in content.logprobs) == TEXT  # type: ignore[union-attr]
    assert [(t.logprob, len(t.top_logprobs)) for t in content.logprobs[:2]] == [(-0.5, 2)] * 2  # type: ignore[union-attr, index]
    deltas = [
        e for e in shared.client().responses.create(**asked, stream=True) if e.type == "response.output_text.delta"
    ]
    assert "".join(token.token for event in deltas for token in event.logprobs) == TEXT
    plain = shared.client().responses.create(**ASK).output[0].content[0]  # type: ignore[union-attr]
    assert plain.logprobs == []  # type: ignore[union-attr]


def check_order(events: list[ResponseStreamEvent]) -> Response:
    """Check that events are numbered, that their parts are their wholes, and return the response of the last one."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == LIFE
    assert events[0].response.status == events[1].response.status == "in_progress"  # type: ignore[union-attr]
    said: dict[int, str] = {}
    for event in events:
        if event.type in (
            "response.output_text.delta",
            "response.reasoning_text.delta",
            "response.function_call_arguments.delta",
        ):
            said[event.output_index] = said.get(event.output_index, "") + event.delta
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == said.get(event.output_index, "")
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == said[event.output_index]
    last: Response = events[-1].response  # type: ignore[union-attr]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in last.output]
    assert [e.output_index for e in events if e.type == "response.output_item.added"] == list(range(len(done)))
    return last


def test_a_stream_has_the_documented_events(shared: Endpoint) -> None:
    events = list(shared.client().responses.create(**ASK, stream=True))
    last = check_order(events)
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        *LIFE, *BEGIN, "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    whole = shared.client().responses.create(**ASK)
    assert (last.output_text, last.usage) == (whole.output_text, whole.usage)
    with shared.client().responses.stream(**ASK) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == TEXT
        assert stream.get_final_response().output_text == TEXT


def test_a_large_answer_comes_in_parts(shared: Endpoint) -> None:
    asked = ASK | {"input": "forever", "include": ["message.output_text.logprobs"], "top_logprobs": 20}
    whole = shared.client().responses.create(**asked)
    last = check_order(list(shared.client().responses.create(**asked, stream=True)))
    assert last.output_text == whole.output_text
    assert [t.to_dict() for t in last.output[0].content[0].logprobs] == [  # type: ignore[union-attr]
        t.to_dict()
        for t in whole.output[0].content[0].logprobs  # type: ignore[union-attr]
    ]


def test_an_answer_that_is_cut_is_incomplete(shared: Endpoint) -> None:
    for stream in (False, True):
        if stream:
            answer = check_order(list(shared.client().responses.create(**ASK, max_output_tokens=3, stream=True)))
        else:
            answer = shared.client().responses.create(**ASK, max_output_tokens=3)
        assert (answer.output_text, answer.status, answer.max_output_tokens) == ("ban", "incomplete", 3)
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_a_schema_is_parsed(shared: Endpoint) -> None:
    answer = shared.client().responses.parse(**ASK, text_format=Ticket)
    assert answer.output_parsed == Ticket(topic="card", urgent=True)
    form: Any = answer.text.format  # type: ignore[union-attr]
    assert (form.type, form.schema_["title"]) == ("json_schema", "Ticket")
    with shared.client().responses.stream(**ASK, text_format=Ticket) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == Ticket(topic="card", urgent=True)


def test_items_become_messages() -> None:
    call = {
        "type": "function_call",
        "call_id": "1",
        "name": "f",
        "arguments": '{"a": 1}',
        "id": "fc_1",
        "status": "completed",
    }
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}] * 2},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "id": "m", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        call, call | {"call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        call | {"call_id": "3"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Oh."}]},
    ]  # fmt: skip
    body = read(ResponseRequest, json.dumps({"model": "bank", "input": items}).encode())
    assert isinstance(body.input, list)
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}} for id in "123"]
    assert make_messages(body.input) == [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "aa"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": None, "tool_calls": calls[2:]},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "", "reasoning_content": "Oh."},
    ]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"input": []}, "input", "input: at least 1"),
        ({"input": 5}, "input", "input: expected a text or a list of items"),
        ({"input": [{"type": "web_search_call"}]}, "input", "input.0: expected an item of one of the types message"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input", "input.0: expected an item of one of"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input", "input.0.role: only 'system', 'developer'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input",
            "input.0.content.0.type: only 'input_text', 'output_text'",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]},
            "input",
            "input.0.arguments: expected the text of a JSON object",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no answer is kept here; give the conversation"),
        ({"store": True}, "store", "store: only false (given true); no answer is kept here"),
        ({"background": True}, "background", "background: only false (given true); no answer is kept here"),
        ({"top_logprobs": 2}, "top_logprobs", "needs include: message.output_text.logprobs"),
        ({"max_output_tokens": 201}, "max_output_tokens", "max_output_tokens: 201 is above 200"),
        ({"tool_choice": "required"}, "tool_choice", "give the tools to choose from in tools"),
        ({"tools": TOOLS * 2}, "tools", "two of them have the same name"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"n": 2}, "n", "n: unknown key"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "reasoning.effort: not supported; leave it out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(shared: Endpoint, change: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shared.client().responses.create(**ASK, extra_body=change)
    error: Any = caught.value.body
    assert (error["param"], error["type"], message in error["message"]) == (param, "invalid_request_error", True), error


def test_a_conversation_may_have_as_many_items_as_a_chat_has_messages(shared: Endpoint) -> None:
    items = [{"role": "user", "content": "a"}] * 4095
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256"):
        shared.client().responses.create(model="bank", input=items, instructions="b")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="input: at most 4095"):
        shared.client().responses.create(model="bank", input=items + items[:1])  # type: ignore[arg-type]


def test_errors_before_and_after_the_first_tokens(shared: Endpoint) -> None:
    client = shared.client()
    for model, kind in (("bnk", openai.NotFoundError), ("faq@1", openai.UnprocessableEntityError)):
        for stream in (False, True):
            with pytest.raises(kind):
                client.responses.create(model=model, input="hi", stream=stream)
    shared.replicas.engine.fails = {"bank@2": ZeroDivisionError}
    events = list(client.responses.create(model="bank@2", input="hi", stream=True))
    shared.replicas.engine.fails = {}
    last = events[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "server_error")  # type: ignore[union-attr]
    assert "Internal error" in last.response.error.message  # type: ignore[union-attr]
    assert shared.post("/v1/responses", {"model": "help", "input": "hi"}).headers["x-rankloom-adapter"] == "bank"


def test_a_client_that_leaves_ends_its_request(shared: Endpoint) -> None:
    stream = shared.client().responses.create(model="bank", input="forever slow", stream=True)
    assert next(iter(stream)).type == "response.created"
    stream.close()
    shared.settled()


def test_keys_and_limits_are_those_of_chats(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret, _ = keys.create("ann", requests_per_minute=1)
    with endpoint(tmp_path, auth={"keys": str(keys.path)}) as made:
        with pytest.raises(openai.AuthenticationError):
            made.client("none").responses.create(**ASK)
        assert made.client(secret).responses.create(**ASK).output_text == TEXT
        with pytest.raises(openai.RateLimitError):
            made.client(secret).responses.create(**ASK)


@pytest.mark.parametrize("family", ["hermes", "gpt_oss"])
def test_forced_calls_come_in_a_loop_until_they_are_answered(clients: Clients, family: str) -> None:
    client, items = clients[family].responses, list[Any]([{"role": "user", "content": "Pay!"}])
    tokens = 0
    for seed in range(2):
        asked: dict[str, Any] = {"model": "base", "input": items, "tools": TOOLS, "extra_body": {"seed": seed}}
        answer = client.parse(**asked, tool_choice={"type": "function", "name": "Pay"})
        (call,) = [item for item in answer.output if item.type == "function_call"]
        assert (call.name, call.status) == ("Pay", "completed")
        assert Pay.model_validate_json(call.arguments)
        assert answer.usage is not None
        assert answer.usage.input_tokens > tokens
        tokens = answer.usage.input_tokens
        items += [item.to_dict() for item in answer.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "done"})
    events = list(client.create(**asked, tool_choice="required", stream=True))
    streamed = [item for item in check_order(events).output if item.type == "function_call"]
    assert Pay.model_validate_json(streamed[0].arguments)
    with client.stream(**asked, tool_choice="required") as stream:
        for _ in stream:
            pass
        final = stream.get_final_response().output
    assert [json.loads(item.arguments) for item in final if item.type == "function_call"] == [
        json.loads(item.arguments) for item in streamed
    ]


@pytest.mark.parametrize("family", list(CALL_SCRIPTS))
@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_texts_and_calls_are_items_of_their_own(clients: Clients, family: str, stream: bool) -> None:
    client = clients[family].responses
    body = {"structured_outputs": {"grammar": clients.write_script(family, CALL_SCRIPTS[family])}}
    asked: dict[str, Any] = {"model": "base", "input": "Pay!", "tools": TOOLS, "extra_body": body}
    answer = check_order(list(client.create(**asked, stream=True))) if stream else client.create(**asked)
    found: dict[str, Any] = {item.type: item for item in answer.output}
    thinks, speaks = family != "hermes", family != "gpt_oss"
    assert list(found) == ["reasoning"] * thinks + ["message"] * speaks + ["function_call"]
    assert (found["function_call"].name, json.loads(found["function_call"].arguments)) == ("Pay", {"cents": 5})
    assert answer.output_text == ("I look." if speaks else "")
    assert answer.usage is not None
    if thinks:
        assert found["reasoning"].content[0].text == "Hm."
        assert found["reasoning"].summary == []
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens
    # what came can be put back
    items = [{"role": "user", "content": "Pay!"}, *(item.to_dict() for item in answer.output)]
    items.append({"type": "function_call_output", "call_id": found["function_call"].call_id, "output": "paid"})
    again = client.create(model="base", input=items, tools=TOOLS, max_output_tokens=3)  # type: ignore[call-overload]
    assert again.usage.input_tokens > answer.usage.input_tokens
