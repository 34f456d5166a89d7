"""Read a searcher's state from a study's folder, also as the last version wrote it, with its names of classes."""

from __future__ import annotations

import importlib
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
"""Names of classes in the modules of `MOVED`."""


def load_state(file: Path) -> Any:
    """Unpickle a file of a study's own folder, which Ray Tune unpickles files of too."""
    with file.open("rb") as opened:
        return _Unpickler(opened).load()


def alias_moved_module() -> None:
    """Let Ray Tune unpickle a population's points, which it keeps itself, of a class in a module that has moved."""
    here = importlib.import_module("rankloom.search.tune_searcher")
    sys.modules.setdefault("rankloom.search.searchers", here)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in MOVED:
            module, name = MOVED[module], RENAMED.get(name, name)
        return super().find_class(module, name)
