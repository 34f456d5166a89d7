"""Snapshot: a member's complete state in the host's memory, which a thread may write while the device works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankloom.errors import TrialError
from rankloom.training.checkpoint import read_state
from rankloom.training.fused.member import MemberState

WEIGHTS, STATE = "weights.safetensors", "state.pt"


class SnapshotState(TypedDict):
    """What a snapshot has beside the weights."""

    member: MemberState
    moments: dict[str, Tensor]
    """As `SlotAdamW.get_state`."""


@dataclass(frozen=True)
class Snapshot:
    """A member amid its training; the files of `write` outlive the process."""

    name: str
    weights: Mapping[str, Tensor]
    """As `AdapterBank.get_state`."""
    state: SnapshotState

    def write(self, folder: Path) -> None:
        """Write it into an existing folder.

        Raises:
            TrialError: the folder can't be written.
        """
        try:
            save_file({name: values.contiguous() for name, values in self.weights.items()}, folder / WEIGHTS)
            torch.save(self.state, folder / STATE)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrialError(f"could not write a checkpoint of {self.name} to {folder}: {error}") from None

    @classmethod
    def read(cls, name: str, folder: Path) -> Snapshot:
        """Read what `write` wrote.

        Raises:
            TrialError: the checkpoint is damaged.
        """
        state = cast(SnapshotState, read_state(folder))
        try:
            return cls(name, load_file(folder / WEIGHTS), state)
        except (OSError, SafetensorError) as error:
            raise TrialError(f"the checkpoint {folder} is damaged: {error}") from None
