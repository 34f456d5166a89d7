"""Tokens/s of a method: from the table of measured rows, or measured on this device in about ten seconds.

`speeds.csv` has the measured rows, each with the file that it was taken from. A row counts for other models of its
device in proportion to their parameters, which holds roughly, and is reported as scaled.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from importlib.resources import files

import torch
from transformers import PreTrainedModel

from rankloom.models import find_decoder_layers
from rankloom.planning.outline import truncate

CALIBRATION_S = 4.0
"""Seconds for each of the two models that a calibration times."""
CALIBRATION_TOKENS = (4, 128)
"""Rows and tokens of its batch."""


@dataclass(frozen=True)
class Speed:
    """Trained tokens per second, with their source."""

    tokens_per_s: float
    source: str


@dataclass(frozen=True)
class MeasuredRow:
    """One measured row of `speeds.csv`."""

    device: str
    model: str
    parameters: int
    method: str
    tokens_per_s: float
    source: str


def read_measured_rows() -> list[MeasuredRow]:
    """Return the table of measured rows."""
    with (files("rankloom.planning") / "speeds.csv").open(encoding="utf-8") as file:
        return [
            MeasuredRow(
                row["device"], row["model"], int(row["parameters"]), row["method"],
                float(row["tokens_per_s"]), row["source"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def find_speed(device: torch.device, method: str, num_parameters: int) -> Speed | None:
    """Return the speed of a recipe by the table, scaled to the model's size; None without a row of such a device."""
    rows = [row for row in read_measured_rows() if row.device.startswith(device.type) and row.method == method]
    if not rows:
        return None
    row = min(rows, key=lambda each: abs(each.parameters - num_parameters))
    scaled = "" if row.parameters == num_parameters else ", scaled by parameters"
    return Speed(
        row.tokens_per_s * row.parameters / num_parameters, f"{row.source} ({row.model} on {row.device}{scaled})"
    )


def calibrate(model: PreTrainedModel, *, trains_base: bool, device: torch.device, dtype: torch.dtype) -> Speed:
    """Measure one layer and the head with random weights on this device; return the whole model's tokens/s.

    Args:
        model: on the meta device; it loses its layers but one.
    """
    num_layers = len(find_decoder_layers(model))
    truncate(model, 1)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    model.requires_grad_(trains_base)
    if not trains_base:
        model.get_input_embeddings().requires_grad_(True)  # the backward pass must reach the first layer
    one = _time_step(model, device)
    truncate(model, 0)
    none = _time_step(model, device)
    rows, tokens = CALIBRATION_TOKENS
    seconds = none + num_layers * max(one - none, 0.0)
    return Speed(rows * tokens / seconds, f"calibrated: one of {num_layers} layers and the head, on {device}")


def _time_step(model: PreTrainedModel, device: torch.device) -> float:
    """Return the seconds of a forward and backward; the least of those that fit into the time."""
    ids = torch.zeros(CALIBRATION_TOKENS, dtype=torch.long, device=device)
    began, times = time.monotonic(), list[float]()
    while not times or (time.monotonic() - began < CALIBRATION_S and len(times) < 20):
        _synchronize(device)
        start = time.monotonic()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        _synchronize(device)
        times.append(time.monotonic() - start)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
