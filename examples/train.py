"""Train one adapter, and score it beside its untuned base.

python examples/train.py [TRIAL.yaml]
"""

import sys

import rankloom as rl


def main(config: str = "shipped:trials/lora.yaml") -> rl.TrialResult:
    result = rl.train(config, on_event=print)
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
