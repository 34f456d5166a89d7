"""The end of a study: its best adapters on the test rows, and into the registry. It runs in a host's process.

The test rows are read here for the first time: the search saw the validation rows alone, and the winner is the trial
that was best there. The test rows only say how good it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rankloom.adapters.probe import last_logits, write_probe
from rankloom.adapters.weights import load_adapter
from rankloom.config import TrialConfig, parse
from rankloom.config.study import host_key
from rankloom.data import TaskData, load_data
from rankloom.errors import TrialError
from rankloom.evals.score import measure
from rankloom.models import Base, load_tokenizer
from rankloom.models.device import local_device
from rankloom.registry import Registry
from rankloom.registry.scorecard import Measures, Scorecard
from rankloom.training.resume_check import Origin, hold_study_to
from rankloom.training.run import PROBE_TOKENS, draft_of, load_for

Finalist = dict[str, Any]
"""trial (its config's tree), folder (its adapter), names (to publish under), steps, tokens, train_s, memory_bytes."""


def score_finalists(
    study: str, finalists: list[Finalist], on_event: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Score and publish; for each finalist `scorecard`, or `error`, and `published` (refs).

    Args:
        study: its name, for the lineage.
    """
    results: dict[int, dict[str, Any]] = {}
    keys = [host_key(parse(TrialConfig, finalist["trial"])) for finalist in finalists]
    for key in dict.fromkeys(keys):
        mine = [i for i, other in enumerate(keys) if other == key]
        trial = parse(TrialConfig, finalists[mine[0]]["trial"])
        base = load_for(trial, local_device(trial.compute.device))
        data = load_data(trial.data, load_tokenizer(trial.model), retention=trial.eval.retention)
        hold_study_to(Path(finalists[mine[0]]["folder"]).parents[1], trial, Origin.of(data, base))
        on_event({"event": "phase", "phase": "score", "message": "the base"})
        base_measures = measure(base.model, base.tokenizer, data, trial.eval) if trial.eval.base else None
        for i in mine:
            name = finalists[i]["trial"]["name"]
            on_event({"event": "phase", "phase": "score", "message": f"{name} on the test rows"})
            try:
                results[i] = _score(study, finalists[i], base, base_measures, data)
            except TrialError as error:
                results[i] = {"error": str(error), "published": []}
    return [results[i] for i in range(len(finalists))]


def _score(
    study: str, finalist: Finalist, base: Base, base_measures: Measures | None, data: TaskData
) -> dict[str, Any]:
    trial, folder = parse(TrialConfig, finalist["trial"]), Path(finalist["folder"])
    if not folder.is_dir():
        raise TrialError(f"{trial.name}: no adapter at {folder}; it may have been deleted")
    probe_ids = data.test[0].input_ids[:PROBE_TOKENS]
    base_logits = last_logits(base.model, probe_ids)
    adapted = load_adapter(base.model, folder)
    try:
        adapter_logits = last_logits(adapted, probe_ids)
        if adapter_logits.equal(base_logits):
            raise TrialError(f"{trial.name}: the adapter changes nothing; train longer or raise optim.learning_rate")
        result = measure(adapted, base.tokenizer, data, trial.eval)
    finally:
        adapted.unload()  # the next finalist is put on the same base
    write_probe(folder, probe_ids, adapter_logits, base_logits)
    scorecard = Scorecard(
        result=result,
        base=base_measures,
        trainable_parameters=_num_parameters(folder),
        adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        peak_memory_bytes=finalist["memory_bytes"],
        steps=finalist["steps"],
        train_tokens=finalist["tokens"],
        train_s=finalist["train_s"],
        tokens_per_s=finalist["tokens"] / max(finalist["train_s"], 1e-9),
        device=str(base.device),
    )
    draft = draft_of(trial, base, data, scorecard, study=study)
    registry = Registry(trial.output.registry_root)
    published = [registry.publish_once(name, folder, draft).ref for name in finalist["names"]]
    return {"scorecard": scorecard.model_dump(), "published": published, "error": None}


def _num_parameters(folder: Path) -> int:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in list(opened.keys()))
