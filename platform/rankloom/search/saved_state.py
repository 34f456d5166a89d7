"""Ray Tune's state in a study's folder: read it, also with the class names of the previous version; keep it whole."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

TRIALS = "experiment_state-*.json"
KEPT = "tune-kept"
"""Folder beside Ray Tune's with the copy of its state."""
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

    states = sorted(folder.glob(TRIALS))
    if states:
        state = json.loads(states[-1].read_text(), cls=TuneFunctionDecoder, allow_cloudpickle=True)
        for trial, _ in state["trial_data"]:
            Trial.from_json_state(trial, stub=True)


def keep_state(folder: Path) -> None:
    """Copy the newest state of Ray Tune, if it is whole, for `mend_state`.

    Tune overwrites its files in place, so that a disk that fills up at that moment cuts them short.
    """
    kept = folder.with_name(KEPT)
    staged = kept.with_suffix(".staged")
    with suppress(OSError):  # the disk is full: what was kept before stays
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        copies = [Path(shutil.copyfile(file, staged / file.name)) for file in _find_newest(folder)]
        if copies and all(map(_is_whole, copies)):
            shutil.rmtree(kept, ignore_errors=True)
            staged.rename(kept)


def mend_state(folder: Path) -> None:
    """Put back the state that `keep_state` kept, if the newest one was cut short."""
    kept = folder.with_name(KEPT)
    if kept.is_dir() and not all(map(_is_whole, newest := _find_newest(folder))):
        for file in newest:
            file.unlink()
        shutil.copytree(kept, folder, dirs_exist_ok=True)


def _find_newest(folder: Path) -> list[Path]:
    """Return the newest file of each kind; a file's name ends with the time of its run."""
    return list({file.name.partition("state-")[0]: file for file in sorted(folder.glob("*state-*"))}.values())


def _is_whole(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        else:
            load_state(file)
    except (ValueError, EOFError, pickle.UnpicklingError, OSError):
        return False
    return True


def alias_moved_module() -> None:
    """Let Ray Tune unpickle a population's points, whose class is in a module that has moved."""
    here = importlib.import_module("rankloom.search.tune_searcher")
    sys.modules.setdefault("rankloom.search.searchers", here)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in MOVED:
            module, name = MOVED[module], RENAMED.get(name, name)
        return super().find_class(module, name)
