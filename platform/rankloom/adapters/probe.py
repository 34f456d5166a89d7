"""A probe: a few tokens, and the logits after them with and without the adapter, recorded at publication.

Every later load of the adapter runs the probe again. Different logits mean another base, a changed file or a library
that reads the folder differently; logits equal to the base's mean an adapter that silently does nothing. Both are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankloom.adapters.weights import load_adapter
from rankloom.config.base import Frozen, parse
from rankloom.config.model import ModelConfig, Quantization
from rankloom.errors import RegistryError
from rankloom.models import Base, load_base
from rankloom.registry.record import Record

PROBE = "probe.safetensors"
FP32_TOLERANCE = 1e-3
"""Largest difference of a logit if base and probe are in fp32, unquantised."""
LOOSE_TOLERANCE = 0.05
"""Largest difference of a logit with fewer bits in weights or arithmetic, as a share of the largest logit: other
kernels and other machines round differently."""
SILENT = 1e-6
"""An adapter has no effect if no logit differs from the base's by more than this share of the largest logit."""

_LOGITS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "input_ids": (torch.int64,),
    "adapter_logits": _LOGITS,
    "base_logits": _LOGITS,
}


@dataclass(frozen=True)
class ProbeReport:
    """Result of a probe; each field is the largest difference of a logit."""

    max_difference: float
    """Between the adapter's logits and the recorded ones."""
    distance_from_base: float
    """Between the logits with the adapter and those without it."""


def record_probe(model: peft.PeftModel, input_ids: list[int], folder: Path) -> None:
    """Run the probe on an adapter that `load_adapter` read from `folder`, and write it there.

    A model fresh from training must not be probed: the published adapter may be reduced to a rank.
    """
    adapter, base = _compute_both_logits(model, input_ids)
    write_probe(folder, input_ids, adapter, base)


def write_probe(folder: Path, input_ids: list[int], adapter_logits: Tensor, base_logits: Tensor) -> None:
    """Write `<folder>/probe.safetensors`.

    Args:
        adapter_logits: [V], after the last of `input_ids`, in the type of their computation.
        base_logits: [V], without the adapter.
    """
    tensors = {"input_ids": torch.tensor(input_ids), "adapter_logits": adapter_logits, "base_logits": base_logits}
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / PROBE)
    except (OSError, SafetensorError) as error:
        raise RegistryError(f"{folder / PROBE}: can't be written: {error}") from None


def verify_probe(folder: Path, record: Record) -> ProbeReport:
    """Load the recorded base and the adapter in `folder`, and run its probe.

    Raises:
        RegistryError: the adapter does not give the logits that it was published with.
        ModelError: the base can't be loaded.
    """
    dtype = _read_probe(folder)["adapter_logits"].dtype
    base = load_recorded_base(record, dtype)
    return check_probe(load_adapter(base.model, folder), folder, quantization=base.quantization)


def check_probe(model: peft.PeftModel, folder: Path, *, quantization: str) -> ProbeReport:
    """Run the probe in `folder` on a loaded adapter.

    Raises:
        RegistryError: the logits differ from the recorded ones, or equal the base's.
    """
    input_ids = probe_tokens(folder, model.get_base_model().get_input_embeddings().weight.shape[0])
    adapter, base = _compute_both_logits(model, input_ids)
    return check_logits(folder, adapter, base, quantization=quantization)


def probe_tokens(folder: Path, vocabulary: int) -> list[int]:
    """Return the tokens of the probe in `folder`.

    Raises:
        RegistryError: they are outside a vocabulary of this size.
    """
    input_ids: list[int] = _read_probe(folder)["input_ids"].tolist()
    if not input_ids or min(input_ids) < 0 or max(input_ids) >= vocabulary:
        raise RegistryError(f"{folder / PROBE}: input_ids are empty or beyond the base's vocabulary of {vocabulary}")
    return input_ids


def check_logits(folder: Path, adapter: Tensor, base: Tensor, *, quantization: str) -> ProbeReport:
    """Compare logits [V] after the probe's tokens, with and without the adapter, to those recorded in `folder`.

    Raises:
        RegistryError: the logits differ from the recorded ones, or equal the base's.
    """
    recorded = _read_probe(folder)["adapter_logits"]
    if recorded.shape != adapter.shape:
        raise RegistryError(
            f"{folder / PROBE}: {list(recorded.shape)} logits, but the base gives {list(adapter.shape)}"
        )
    report = ProbeReport(find_largest_difference(adapter, recorded), find_largest_difference(adapter, base))
    _judge(folder, report, recorded, compute_tolerance(recorded, adapter.dtype, quantization=quantization))
    return report


def compute_tolerance(expected: Tensor, dtype: torch.dtype, *, quantization: str) -> float:
    """Return the largest allowed difference from expected logits.

    Args:
        expected: the recorded logits [V].
        dtype: type of the arithmetic that gives the new ones.
    """
    exact = quantization == "none" and expected.dtype == dtype == torch.float32
    return FP32_TOLERANCE if exact else LOOSE_TOLERANCE * float(expected.float().abs().max())


def check_top_logprobs(
    folder: Path, adapter: Mapping[int, float], base: Mapping[int, float], *, dtype: torch.dtype
) -> ProbeReport:
    """Run `check_logits` for an engine that returns only the likeliest tokens with their log-probabilities.

    Args:
        adapter, base: token -> log-probability after the probe's tokens.
        dtype: type of the engine's arithmetic, on a base that is not quantised.

    Raises:
        RegistryError: the values differ from the recorded ones, or equal the base's.
    """
    recorded = _read_probe(folder)["adapter_logits"]
    largest = float(recorded.float().abs().max())
    expected = recorded.float().log_softmax(-1).tolist()
    if not adapter or max(adapter) >= len(expected):
        raise RegistryError(f"{folder / PROBE}: {len(expected)} logits, but the base has more")
    report = ProbeReport(
        max(abs(expected[token] - logprob) for token, logprob in adapter.items()),
        max((abs(base[token] - logprob) for token, logprob in adapter.items() if token in base), default=largest),
    )
    _judge(folder, report, recorded, compute_tolerance(recorded, dtype, quantization="none"))
    return report


def _judge(folder: Path, report: ProbeReport, recorded: Tensor, allowed: float) -> None:
    """Raise RegistryError if the report shows another adapter than recorded, or one without effect."""
    if not report.max_difference <= allowed:  # refuses a NaN too
        raise RegistryError(
            f"{folder}: the probe's logits differ by {report.max_difference:.3g} from the recorded ones (allowed: "
            f"{allowed:.3g}); the base, the adapter or a library is not the one it was published with"
        )
    if not report.distance_from_base > SILENT * float(recorded.float().abs().max()):
        raise RegistryError(
            f"{folder}: with the adapter the base gives the same logits as without: it does nothing; "
            f"train it longer, or publish the right folder"
        )


class _RecordedBase(Frozen):
    """The part of a trial that defines the base; an adapter from elsewhere has only this part."""

    model: ModelConfig
    quantization: Quantization


def load_recorded_base(record: Record, dtype: torch.dtype) -> Base:
    """Load the base that a record names, with its quantisation.

    Raises:
        RegistryError: its weights are not the recorded ones.
        ModelError: it can't be loaded.
    """
    default = {"model": {"id": record.base.id}, "quantization": record.base.quantization}
    config = parse(_RecordedBase, {key: record.trial.get(key, default[key]) for key in default}, "record.trial")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(config.model, config.quantization, device=device, dtype=dtype, compute_dtype=dtype)
    if base.fingerprint != record.base.fingerprint:
        raise RegistryError(
            f"base {record.base.id!r} has the fingerprint {base.fingerprint}, but the adapter was trained on "
            f"{record.base.fingerprint}; use the same weights (model.revision for a hub id)"
        )
    return base


def _compute_both_logits(model: peft.PeftModel, input_ids: list[int]) -> tuple[Tensor, Tensor]:
    adapter = compute_last_logits(model.get_base_model(), input_ids)
    with model.disable_adapter():
        base = compute_last_logits(model.get_base_model(), input_ids)
    return adapter, base


@torch.no_grad()
def compute_last_logits(model: nn.Module, input_ids: list[int]) -> Tensor:
    """Return the logits [V] after the last of `input_ids`, on the CPU."""
    ids_BT = torch.tensor([input_ids], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, -1]
    return logits.cpu()


def find_largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two vectors' values, wherever they are."""
    return float((a.cpu().float() - b.cpu().float()).abs().max())


def _read_probe(folder: Path) -> dict[str, Tensor]:
    file = folder / PROBE
    if not file.is_file():
        raise RegistryError(f"{file}: missing; without its probe an adapter can't be verified, so publish it again")
    try:
        with safe_open(file, framework="pt") as opened:
            probe = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (SafetensorError, OSError) as error:
        raise RegistryError(f"{file}: corrupt or truncated: {error}; fetch or publish the adapter again") from None
    for name, kinds in _KINDS.items():
        if name not in probe or probe[name].dim() != 1 or probe[name].dtype not in kinds:
            allowed = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise RegistryError(f"{file}: {name} is missing or not a vector of numbers (allowed: {allowed})")
    return probe
