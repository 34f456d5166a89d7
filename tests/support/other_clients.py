"""Calls the endpoint at argv[1] and prints the answers as JSON; for an interpreter with litellm and langchain-openai.

argv[2] is a key, argv[3] a key that has reached its limit.
"""

import json
import sys

import litellm
from langchain_openai import ChatOpenAI

url, good, used_up = f"{sys.argv[1]}/v1", sys.argv[2], sys.argv[3]
hi = [{"role": "user", "content": "hi"}]


def lite(model, key=good, **more):
    return litellm.completion(
        model=f"openai/{model}", messages=hi, api_base=url, api_key=key, num_retries=0, max_retries=0, **more
    )


found = {
    "litellm": lite("bank@2").choices[0].message.content,
    "litellm in a stream": "".join(part.choices[0].delta.content or "" for part in lite("bank", stream=True)),
    "langchain": ChatOpenAI(model="bank@2", base_url=url, api_key=good).invoke("hi").content,
    "langchain in a stream": "".join(
        part.content for part in ChatOpenAI(model="bank", base_url=url, api_key=good).stream("hi")
    ),
}
wrong = (("missing", "bnk", "hi", good), ("overload", "bank", "overload", good), ("used up", "bank", "hi", used_up))
for name, model, text, key in wrong:
    try:
        hi[0]["content"] = text
        lite(model, key)
    except Exception as error:
        found[name] = [type(error).__name__, error.status_code, str(error)]
print(json.dumps(found))
