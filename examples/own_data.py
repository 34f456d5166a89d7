"""Train on rows that Python has: a list of dicts, a pandas DataFrame or a `datasets.Dataset`.

python examples/own_data.py [TRIAL.yaml]
"""

import sys
from collections.abc import Mapping
from typing import Any

import rankloom as rl

TOPICS = {"parcel": "where is", "refund": "how do i get", "password": "i forgot"}
ROWS = [
    {"text": f"{opening} my {topic}, order {number}", "label": topic}
    for number in range(40)
    for topic, opening in TOPICS.items()
]


def main(config: str | Mapping[str, Any] = "shipped:trials/lora.yaml") -> rl.TrialResult:
    result = rl.train(config, data={"train": ROWS[:90], "test": ROWS[90:]})
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
