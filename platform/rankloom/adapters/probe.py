"""A probe: a few tokens, and the logits after them with and without the adapter, recorded when it is published.

Whoever loads the adapter later runs the probe again. Other logits mean another base, a changed file or a library that
reads the folder differently; logits like the base's mean an adapter that silently does nothing. Both are refused.
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
"""Largest difference of a logit where base and probe are in fp32, unquantised."""
LOOSE_TOLERANCE = 0.05
"""The same where weights or arithmetic are of fewer bits, as a share of the largest logit: other kernels, and other
machines, round them differently."""
SILENT = 1e-6
"""A largest difference from the base's logits below this share of the largest logit is no effect."""

_LOGITS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "input_ids": (torch.int64,),
    "adapter_logits": _LOGITS,
    "base_logits": _LOGITS,
}


@dataclass(frozen=True)
class ProbeReport:
    """What running a probe showed; both are the largest difference of a logit."""

    max_difference: float
    """From the recorded logits."""
    distance_from_base: float
    """Of the logits with the adapter from those without it."""


def record_probe(model: peft.PeftModel, input_ids: list[int], folder: Path) -> None:
    """Run the probe on an adapter that `load_adapter` read from `folder`, and write it there.

    A model as it came out of training is not the same: what is published may be cut to a rank.
    """
    adapter, base = _both_logits(model, input_ids)
    write_probe(folder, input_ids, adapter, base)


def write_probe(folder: Path, input_ids: list[int], adapter_logits: Tensor, base_logits: Tensor) -> None:
    """Write `<folder>/probe.safetensors`.

    Args:
        adapter_logits: [V], after the last of `input_ids`, in the type they were computed in.
        base_logits: the same without the adapter.
    """
    tensors = {"input_ids": torch.tensor(input_ids), "adapter_logits": adapter_logits, "base_logits": base_logits}
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / PROBE)
    except (OSError, SafetensorError) as error:
        raise RegistryError(f"{folder / PROBE}: can't be written: {error}") from None


def verify_probe(folder: Path, record: Record) -> ProbeReport:
    """Load the recorded base and the adapter in `folder`, and run its probe.

    Raises:
        RegistryError: with the reason, where the adapter does not do what it was published for.
        ModelError: the base can't be loaded.
    """
    dtype = _read_probe(folder)["adapter_logits"].dtype
    base = load_recorded_base(record, dtype)
    return check_probe(load_adapter(base.model, folder), folder, quantization=base.quantization)


def check_probe(model: peft.PeftModel, folder: Path, *, quantization: str) -> ProbeReport:
    """Run the probe in `folder` on an adapter that is loaded already.

    Raises:
        RegistryError: other logits than recorded, or the base's own.
    """
    input_ids = probe_tokens(folder, model.get_base_model().get_input_embeddings().weight.shape[0])
    adapter, base = _both_logits(model, input_ids)
    return check_logits(folder, adapter, base, quantization=quantization)


def probe_tokens(folder: Path, vocabulary: int) -> list[int]:
    """The tokens of the probe in `folder`.

    Raises:
        RegistryError: they are none of a base with such a vocabulary.
    """
    input_ids: list[int] = _read_probe(folder)["input_ids"].tolist()
    if not input_ids or min(input_ids) < 0 or max(input_ids) >= vocabulary:
        raise RegistryError(f"{folder / PROBE}: input_ids are empty or beyond the base's vocabulary of {vocabulary}")
    return input_ids


def check_logits(folder: Path, adapter: Tensor, base: Tensor, *, quantization: str) -> ProbeReport:
    """Compare logits [V] after the probe's tokens, with and without the adapter, to those recorded in `folder`.

    Raises:
        RegistryError: other logits than recorded, or the base's own.
    """
    recorded = _read_probe(folder)["adapter_logits"]
    if recorded.shape != adapter.shape:
        raise RegistryError(
            f"{folder / PROBE}: {list(recorded.shape)} logits, but the base gives {list(adapter.shape)}"
        )
    report = ProbeReport(largest_difference(adapter, recorded), largest_difference(adapter, base))
    _judge(folder, report, recorded, tolerance(recorded, adapter.dtype, quantization=quantization))
    return report


def tolerance(expected: Tensor, dtype: torch.dtype, *, quantization: str) -> float:
    """How far from expected logits those of the same adapter may be; `dtype` is what these are computed in."""
    exact = quantization == "none" and expected.dtype == dtype == torch.float32
    return FP32_TOLERANCE if exact else LOOSE_TOLERANCE * float(expected.float().abs().max())


def check_likeliest(
    folder: Path, adapter: Mapping[int, float], base: Mapping[int, float], *, dtype: torch.dtype
) -> ProbeReport:
    """`check_logits` for an engine that tells only the likeliest tokens, and the logarithms of their probabilities.

    Args:
        adapter, base: by token, after the probe's tokens.
        dtype: of the engine's arithmetic, on a base that is not quantised.

    Raises:
        RegistryError: others than recorded, or the base's own.
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
    _judge(folder, report, recorded, tolerance(recorded, dtype, quantization="none"))
    return report


def _judge(folder: Path, report: ProbeReport, recorded: Tensor, allowed: float) -> None:
    """Raises RegistryError."""
    if not report.max_difference <= allowed:  # so that a NaN is refused too
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
    """The part of a trial that says which base; an adapter from elsewhere has no trial."""

    model: ModelConfig
    quantization: Quantization


def load_recorded_base(record: Record, dtype: torch.dtype) -> Base:
    """The base that a record names, as it was quantised; refused if its weights are not the recorded ones."""
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


def _both_logits(model: peft.PeftModel, input_ids: list[int]) -> tuple[Tensor, Tensor]:
    adapter = last_logits(model.get_base_model(), input_ids)
    with model.disable_adapter():
        base = last_logits(model.get_base_model(), input_ids)
    return adapter, base


@torch.no_grad()
def last_logits(model: nn.Module, input_ids: list[int]) -> Tensor:
    """The logits [V] after the last of `input_ids`, on the CPU."""
    ids_BT = torch.tensor([input_ids], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, -1]
    return logits.cpu()


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Of two vectors' values; stored ones are on the CPU, others where they were computed."""
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
            raise RegistryError(f"{file}: {name} is missing or no vector of numbers (allowed: {allowed})")
    return probe
