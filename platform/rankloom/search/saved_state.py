"""Read a searcher's state from a study's folder, also with the class names of the previous version."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

MOVED = {"rankloom.search.proposers": "rankloom.search.samplers", "rankloom.search.space": "rankloom.search.flat_space"}
RENAMED = {
    "Known": "PriorTrial",
    "TuneSearcher": "TuneSearcherSpec",
    **{f"{kind}Proposer": f"{kind}Sampler" for kind in ("Random", "Grid", "Optuna", "Tune")},
}
"""Old -> new names of classes in the modules of `MOVED`."""


def load_state(file: Path) -> Any:
    """Unpickle a file from a study's own folder, which Ray Tune also unpickles files from."""
    with file.open("rb") as opened:
        return _Unpickler(opened).load()


def check_trials(folder: Path) -> None:
    """Read Ray Tune's trials in its folder, if there are any, as Tune will; raise what Tune would only log."""
    from ray.tune.experiment import Trial
    from ray.tune.utils.serialization import TuneFunctionDecoder

    states = sorted(folder.glob("experiment_state-*.json"))
    if states:
        state = json.loads(states[-1].read_text(), cls=TuneFunctionDecoder, allow_cloudpickle=True)
        for trial, _ in state["trial_data"]:
            Trial.from_json_state(trial, stub=True)


def alias_moved_module() -> None:
    """Let Ray Tune unpickle a population's points, whose class is in a module that has moved."""
    here = importlib.import_module("rankloom.search.tune_searcher")
    sys.modules.setdefault("rankloom.search.searchers", here)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in MOVED:
            module, name = MOVED[module], RENAMED.get(name, name)
        return super().find_class(module, name)
