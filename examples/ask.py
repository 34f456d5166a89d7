"""Serve a deployment for as long as it takes to ask each of its models one question.

    python examples/ask.py configs/serve/quickstart.yaml "My card has not arrived yet." [key=value ...]

The question ends with a newline, which is what the template `plain` puts between a message and its answer.
"""

import sys

from openai import APIStatusError

import rankloom as rl


def main(config: str, question: str, *overrides: str) -> dict[str, str]:
    answers: dict[str, str] = {}
    with rl.serve(rl.load(rl.ServeConfig, config, overrides)) as endpoint:
        client = endpoint.client()
        for model in client.models.list():
            try:
                found = client.completions.create(model=model.id, prompt=f"{question}\n", max_tokens=16, temperature=0)
                answers[model.id] = found.choices[0].text.strip().partition("\n")[0]
            except APIStatusError as error:  # such as an extracted adapter on vLLM
                answers[model.id] = error.message
    print(f"What each model answers to: {question}\n")
    for name, answer in answers.items():
        print(f"{name:<24} {answer}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
