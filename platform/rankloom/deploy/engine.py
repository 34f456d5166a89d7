"""One base and the adapters on it, loaded and verified; greedy generation, one prompt at a time. Without Ray.

Each adapter wraps module objects of its own, so that any kind that PEFT reads goes beside any other; the base's
tensors are shared by all of them. Read `app.py` next.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rankloom.adapters.probe import check_probe, load_recorded_base
from rankloom.adapters.weights import load_adapter
from rankloom.config.serve import ServeConfig
from rankloom.errors import ConfigError
from rankloom.paths import registry_root
from rankloom.registry import Record, Registry


@dataclass(frozen=True)
class Generation:
    """One answer and its size."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    stopped: bool
    """Whether the model ended it, not the limit."""


class Engine:
    """The models by served name: the base's id and each adapter's ref. Never changes once it is built."""

    def __init__(self, config: ServeConfig) -> None:
        """Load and probe everything.

        Raises:
            AdapterNotFoundError, RegistryError: an adapter is missing, broken or does nothing.
            ConfigError: the adapters were tuned on several bases.
        """
        registry = Registry(config.registry or registry_root())
        records = {ref: registry.get(ref) for ref in config.adapters}
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self._base = load_recorded_base(_one_base(records), dtype)
        self.models: dict[str, PreTrainedModel] = {self._base.id: self._base.model}
        with tempfile.TemporaryDirectory() as scratch:
            for i, (ref, record) in enumerate(records.items()):
                # by version: an alias may have moved since
                folder = registry.fetch(record.ref, Path(scratch) / str(i))
                # what deepcopy finds in its memo it takes as it is
                shared = {id(t): t for t in (*self._base.model.parameters(), *self._base.model.buffers())}
                adapted = load_adapter(copy.deepcopy(self._base.model, shared), folder)
                check_probe(adapted, folder, quantization=self._base.quantization)
                self.models[ref] = adapted.get_base_model()

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and completion together, where the base's config says it."""
        return getattr(self._base.model.config, "max_position_embeddings", None)

    def tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self._base.tokenizer(prompt, add_special_tokens=False).input_ids
        return ids

    @torch.inference_mode()
    def generate(self, name: str, prompt: list[int], max_tokens: int) -> Generation:
        """Greedy decoding to the end of the turn. Not for several threads at once."""
        ends = self._end_ids()
        ids_BT = torch.tensor([prompt], device=self._base.device)
        generated = self.models[name].generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(ends),
            pad_token_id=self._base.pad_id,
        )
        tokens = generated[0, len(prompt) :].tolist()
        text = str(self._base.tokenizer.decode(tokens, skip_special_tokens=True))
        return Generation(text, len(prompt), len(tokens), stopped=tokens[-1] in ends)

    def _end_ids(self) -> set[int]:
        own = getattr(self._base.model.generation_config, "eos_token_id", None)
        ends = {self._base.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return {token for token in ends if token is not None}


def _one_base(records: dict[str, Record]) -> Record:
    first_ref, first = next(iter(records.items()))
    for ref, record in records.items():
        if (record.base.fingerprint, record.base.quantization) != (first.base.fingerprint, first.base.quantization):
            raise ConfigError(
                f"adapters: {ref} was tuned on {record.base.id} ({record.base.quantization}), but {first_ref} on "
                f"{first.base.id} ({first.base.quantization}); deploy them apart"
            )
    return first
