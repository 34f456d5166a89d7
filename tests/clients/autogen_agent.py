"""The examples of AutoGen: its client for OpenAI's API with tools and structured output, and an agent.

https://microsoft.github.io/autogen/stable/user-guide/core-user-guide/components/model-clients.html
"""

import asyncio
import json
import sys
from typing import Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken
from autogen_core.models import AssistantMessage, FunctionExecutionResult, FunctionExecutionResultMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel, Field

info = {
    "vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "unknown",
    "multiple_system_messages": True,
}  # fmt: skip


class AgentResponse(BaseModel):
    thoughts: str = Field(max_length=60)
    response: Literal["happy", "sad", "neutral"]


async def get_stock_price(ticker: Literal["AAPL", "MSFT"], date: Literal["2024/06/01", "2024/06/02"]) -> float:
    """Get the stock price."""
    return len(ticker) + len(date) / 10


async def main() -> None:
    client = OpenAIChatCompletionClient(
        model="base", base_url=sys.argv[1], api_key="none", model_info=info, max_retries=0, timeout=300
    )
    tool = FunctionTool(get_stock_price, description="Fetch the stock price for a given ticker.")
    asked = [UserMessage(content="What is the stock price of AAPL on 2024/06/01?", source="user")]
    called = await client.create(messages=asked, tools=[tool], tool_choice="required")
    assert called.finish_reason == "function_calls", called
    results = []
    for call in called.content:
        price = await tool.run_json(json.loads(call.arguments), CancellationToken())
        results.append(FunctionExecutionResult(call_id=call.id, content=str(price), is_error=False, name=tool.name))
    asked += [AssistantMessage(content=called.content, source="a"), FunctionExecutionResultMessage(content=results)]
    answer = await client.create(messages=asked, tools=[tool], extra_create_args={"max_tokens": 48})
    assert isinstance(answer.content, str | list)

    said = await client.create([UserMessage(content="I am happy.", source="user")], json_output=AgentResponse)
    assert AgentResponse.model_validate_json(said.content)
    chunks = [
        each async for each in client.create_stream(asked, include_usage=True, extra_create_args={"max_tokens": 16})
    ]
    assert chunks[-1].usage.completion_tokens > 0

    agent = AssistantAgent("assistant", client, output_content_type=AgentResponse)
    result = await agent.run(task="I am happy.")
    assert isinstance(result.messages[-1].content, AgentResponse), result
    await client.close()


asyncio.run(main())
