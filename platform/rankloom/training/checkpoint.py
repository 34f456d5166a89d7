"""A checkpoint: all that a run needs to continue bit for bit (on a GPU, to rounding), in one folder.

    weights.safetensors   the trainable parameters, by name
    state.pt              optimiser, method, random state, data cursor and progress; read with weights_only=True
    origin.json           the data and the base of the training (`resume_check.py`)

The published adapter is separate: `Method.export` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from rankloom.errors import TrialError
from rankloom.training.parallel import shard_like, unshard, unshard_tree

if TYPE_CHECKING:  # the methods' libraries take seconds to import, and a host needs none of them
    from rankloom.methods import Method


def save(
    folder: Path, model: nn.Module, method: Method[Any], optimizer: Optimizer, progress: dict[str, Any], *, write: bool
) -> None:
    """Write a checkpoint; every worker calls, because sharded tensors are gathered.

    Args:
        folder: an existing folder.
        write: whether this worker writes the files.

    Raises:
        TrialError: the folder can't be written.
    """
    weights = {name: unshard(p.detach()).contiguous() for name, p in method.get_trained(model).items()}
    state = {
        "optimizer": unshard_tree(method.get_optimizer_state(optimizer)),
        "method": method.get_state(),
        "progress": progress,
        "rng": get_random_state(),
    }
    if not write:
        return
    try:
        save_file(weights, folder / "weights.safetensors")
        torch.save(state, folder / "state.pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrialError(f"could not write a checkpoint to {folder}: {error}") from None


def load_weights(folder: Path, model: nn.Module, method: Method[Any]) -> None:
    """Load a checkpoint's weights and the method's own state into the model.

    Raises:
        TrialError: the checkpoint is damaged.
    """
    weights = _read_weights(folder)
    with torch.no_grad():
        for name, parameter in method.get_trained(model).items():
            parameter.copy_(shard_like(parameter, weights[name].to(parameter.device)))
    method.load_state(read_state(folder)["method"])


def load_optimizer(folder: Path, method: Method[Any], optimizer: Optimizer) -> dict[str, Any]:
    """Restore optimiser and random state; return the progress that was saved with them.

    Raises:
        TrialError: the checkpoint is damaged.
    """
    state = read_state(folder)
    method.load_optimizer_state(optimizer, state["optimizer"])
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                values[key] = shard_like(parameter, value)
    set_random_state(state["rng"])
    progress: dict[str, Any] = state["progress"]
    return progress


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's state.pt onto the CPU.

    Raises:
        TrialError: the checkpoint is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file can make torch's readers raise anything
        raise _make_damaged_error(folder, error) from None
    return state


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise _make_damaged_error(folder, error) from None


def _make_damaged_error(folder: Path, error: Exception) -> TrialError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrialError(
        f"the checkpoint {folder} is damaged: {reason}; start another run with name=..., or, in a run without Ray, "
        f"remove that folder: --resume then continues from an earlier one, or from the start"
    )


def get_random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
