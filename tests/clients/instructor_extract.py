"""The examples of instructor: an object, several, one that arrives in parts, in each mode for OpenAI's API.

https://python.useinstructor.com
"""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

openai_client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=300)


class User(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)


messages = [{"role": "user", "content": "Jason is 25 years old"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai_client, mode=mode)
    user = client.chat.completions.create(model="base", response_model=User, messages=messages)
    assert isinstance(user, User), (mode, user)

client = instructor.from_openai(openai_client)
*_, last = client.chat.completions.create_partial(model="base", response_model=User, messages=messages)
assert last.name, last
user, completion = client.chat.completions.create_with_completion(model="base", response_model=User, messages=messages)
assert completion.usage.completion_tokens > 0
assert isinstance(user, User)
