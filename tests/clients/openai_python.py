"""The examples of openai's Python library for structured outputs, function calling and streaming helpers.

https://github.com/openai/openai-python/blob/main/helpers.md
"""

import sys

import openai
from openai import OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=300)


class Step(BaseModel):
    explanation: str = Field(max_length=30)
    output: str = Field(max_length=30)


class MathResponse(BaseModel):
    steps: list[Step] = Field(max_length=3)
    final_answer: str = Field(max_length=30)


class GetWeather(BaseModel):
    """Return the weather of a city."""

    city: str = Field(max_length=30)
    country: str = Field(max_length=30)


math = [
    {"role": "system", "content": "You are a helpful math tutor."},
    {"role": "user", "content": "solve 8x + 31 = 2"},
]
weather = [{"role": "user", "content": "What's the weather in Paris and in Edinburgh?"}]
tools = [openai.pydantic_function_tool(GetWeather)]

completion = client.chat.completions.parse(model="base", messages=math, response_format=MathResponse)
assert completion.choices[0].message.parsed.final_answer

completion = client.chat.completions.parse(model="base", messages=weather, tools=tools, tool_choice="required")
assert isinstance(completion.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)

with client.chat.completions.stream(model="base", messages=math, response_format=MathResponse) as stream:
    kinds = {event.type for event in stream}
    assert {"content.delta", "content.done", "chunk"} <= kinds, kinds
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, MathResponse)

with client.chat.completions.stream(model="base", messages=weather, tools=tools, tool_choice="required") as stream:
    kinds = {event.type for event in stream}
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds, kinds
    (call, *_) = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)

# the model decides: what it says of its own is text, or a call by the schema
completion = client.chat.completions.create(model="base", messages=weather, tools=tools, max_tokens=64)
assert completion.choices[0].finish_reason in ("stop", "length", "tool_calls")

allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
    {"type": "function", "function": {"name": "GetWeather"}},
]}}  # fmt: skip
completion = client.chat.completions.create(model="base", messages=weather, tools=tools, tool_choice=allowed)
assert completion.choices[0].message.tool_calls[0].function.name == "GetWeather"
