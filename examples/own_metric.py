"""Judge an adapter by a metric of your own.

    python examples/own_metric.py [TRIAL.yaml]

In YAML the same function is `eval.metric: own_metric:family`, with this file in the working directory.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rankloom as rl


def family(rows: Sequence[rl.Prediction]) -> list[float]:
    """Return 1 for a right label, 0.5 for one of its family (card_lost, card_arrival), else 0; one number a row."""
    return [score(row.reference, row.prediction) for row in rows]


def score(reference: str, prediction: str) -> float:
    if reference == prediction:
        return 1.0
    return 0.5 if reference.split("_")[0] == prediction.split("_")[0] else 0.0


def main(config: str | Mapping[str, Any] = "shipped:trials/lora.yaml") -> rl.TrialResult:
    result = rl.train(config, metric=family)
    if result.scorecard is not None:
        print(result.scorecard.result.metric)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
