"""Serve an adapter beside its base, ask both the same question, and stop.

python examples/serve.py tickets@1 "Where is my parcel?"
"""

import sys

import rankloom as rl


def main(adapter: str, question: str) -> dict[str, str]:
    answers: dict[str, str] = {}
    with rl.serve(adapter) as endpoint:
        client = endpoint.client()
        for model in (adapter, "base"):
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
            )
            answers[model] = reply.choices[0].message.content or ""
            print(f"{model}: {answers[model]}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
