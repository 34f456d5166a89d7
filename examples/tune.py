"""Search for the best adapter: many trials train at once on one shared base.

python examples/tune.py [STUDY.yaml]
"""

import sys

import rankloom as rl
from rankloom.events import Event


def show(event: Event) -> None:
    """Print each trial as it ends."""
    match event:
        case rl.TrialEnded(name=name, method=method, status=status):
            print(f"{name}  {method}  {status}")


def main(config: str = "shipped:studies/quickstart.yaml") -> rl.StudyResult:
    study = rl.tune(config, on_event=show)
    print(study)
    print(study.trials[["name", "method", "status", "best_loss", "steps"]])
    return study


if __name__ == "__main__":
    main(*sys.argv[1:])
