"""The examples of pydantic-ai: an agent with typed output by tools and natively, with a tool, and in a stream.

https://ai.pydantic.dev/output/
"""

import asyncio
import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel("base", provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
settings = {"timeout": 300}


class CityLocation(BaseModel):
    city: str = Field(max_length=30)
    country: str = Field(max_length=30)


for output in (CityLocation, ToolOutput(CityLocation), NativeOutput(CityLocation)):
    agent = Agent(model, output_type=output, model_settings=settings)
    result = agent.run_sync("Where were the olympics held in 2012?")
    assert isinstance(result.output, CityLocation), (output, result)
    assert result.usage.output_tokens > 0

roulette = Agent(
    model,
    deps_type=int,
    output_type=bool,
    instructions="Use the `roulette_wheel` function to see if the customer has won based on the number they provide.",
    model_settings=settings,
)


@roulette.tool
def roulette_wheel(ctx: RunContext[int], square: int) -> str:
    """Check if the square is a winner."""
    return "winner" if square == ctx.deps else "loser"


assert isinstance(roulette.run_sync("Put my money on square eighteen", deps=18).output, bool)


async def stream() -> None:
    agent = Agent(model, output_type=CityLocation, model_settings=settings)
    async with agent.run_stream("Where were the olympics held in 2012?") as streamed:
        outputs = [output async for output in streamed.stream_output()]
    assert isinstance(outputs[-1], CityLocation)


asyncio.run(stream())
