"""The examples of LangChain: `bind_tools`, `with_structured_output` by each method, agents with a response format.

https://python.langchain.com/docs/integrations/chat/openai/
"""

import sys
from typing import Literal

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

model = ChatOpenAI(model="base", base_url=sys.argv[1], api_key="none", max_retries=0, timeout=300)


class GetWeather(BaseModel):
    """Get the current weather in a given location"""

    location: Literal["San Francisco, CA", "New York, NY"] = Field(description="The city and state")


class Joke(BaseModel):
    """Joke to tell user."""

    setup: str = Field(description="The setup of the joke", max_length=80)
    punchline: str = Field(description="The punchline to the joke", max_length=80)
    rating: int | None = Field(description="How funny the joke is, from 1 to 10", ge=1, le=10)


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


messages = [HumanMessage("What is the weather in San Francisco?")]
called = model.bind_tools([GetWeather, multiply], tool_choice="any").invoke(messages)
assert called.tool_calls
assert not called.invalid_tool_calls
messages += [called, *(ToolMessage("sunny", tool_call_id=call["id"]) for call in called.tool_calls)]
assert model.bind_tools([GetWeather, multiply], strict=True).bind(max_tokens=48).invoke(messages).usage_metadata

called = model.bind_tools([multiply], tool_choice="multiply").invoke("What is 3 * 12?")
assert isinstance(multiply.invoke(called.tool_calls[0]["args"]), int)
parts = None
for part in model.bind_tools([multiply], tool_choice="multiply").stream("What is 3 * 12?"):
    parts = part if parts is None else parts + part
assert parts.tool_calls[0]["name"] == "multiply"

for method in ("json_schema", "function_calling"):
    joke = model.with_structured_output(Joke, method=method).invoke("Tell me a joke about cats")
    assert isinstance(joke, Joke), (method, joke)
as_dict = model.with_structured_output(Joke.model_json_schema(), strict=True).invoke("Tell me a joke about cats")
assert Joke.model_validate(as_dict)

for strategy in (ToolStrategy, ProviderStrategy):
    agent = create_agent(model, tools=[], response_format=strategy(Joke))
    state = agent.invoke({"messages": [{"role": "user", "content": "Tell me a joke about cats"}]})
    assert isinstance(state["structured_response"], Joke), (strategy, state)
