"""Serve a deployment for as long as it takes to ask each of its models one question, through the openai client.

    python examples/ask.py configs/serve/quickstart.yaml "My card has not arrived yet." [key=value ...]

An adapter is asked by its name, as any client of OpenAI's would. The question ends with a newline, which is what the
template `plain` puts between a message and its answer.
"""

import json
import signal
import subprocess
import sys

from openai import APIStatusError, OpenAI

from rankloom.cli.tables import print_table

MOST_TOKENS = 16


def main(config: str, question: str, *overrides: str) -> None:
    command = [sys.executable, "-m", "rankloom.cli", "serve", config, "--json", *overrides]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = next((line for line in server.stdout if line.startswith("{")), None)  # Ray may print lines of its own
        if ready is None:
            sys.exit(server.wait())  # it said why
        client = OpenAI(base_url=f"{json.loads(ready)['url']}/v1", api_key="none")
        rows = []
        for model in client.models.list():
            try:
                found = client.completions.create(
                    model=model.id, prompt=f"{question}\n", max_tokens=MOST_TOKENS, temperature=0
                )
                rows.append([model.id, found.choices[0].text.strip().partition("\n")[0]])
            except APIStatusError as error:  # as of DoRA on vLLM
                rows.append([model.id, error.message])
        print(f"\nWhat each model answers to: {question}\n")
        print_table(["model", "answer"], rows)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {__doc__}")
    main(*sys.argv[1:])
