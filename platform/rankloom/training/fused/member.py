"""Member: the rows and the progress of a trial that trains in a host, without tensors.

Its weights are in the host's bank and its moments in the host's optimiser, both under its slot. See `host.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np

from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.config.trial import TrialConfig
from rankloom.data import Cursor
from rankloom.errors import IncompatibleError, TrialError
from rankloom.training.fused.packing import Example
from rankloom.training.fused.plan import PendingBatch
from rankloom.training.schedule import count_steps, schedule


class MemberState(TypedDict):
    """A member's progress as plain data."""

    step: int
    tokens: int
    cursor: dict[str, int]
    adapter: dict[str, str | int | list[str]]
    """The settings that decide the adapter's shape."""


class Member:
    """One trial's progress in its training.

    Invariant: between two of its optimiser steps, its training depends only on its state, its adapter and its moments.
    Amid a step (its micro-batches may take several of the host's steps), `get_state` returns the one at its start.
    """

    def __init__(self, name: str, trial: TrialConfig, slot: int, lengths: np.ndarray) -> None:
        """
        Args:
            lengths: tokens of each training row.
        """
        assert isinstance(trial.method, (LoraConfig, DoraConfig))
        self.name, self.trial, self.slot = name, trial, slot
        self.method: LoraConfig | DoraConfig = trial.method
        optim = trial.optim
        self.cursor = Cursor(lengths, optim.batch_size, seed=trial.seed, group_by_length=optim.group_by_length)
        self.num_steps = count_steps(trial, self.cursor.batches_per_epoch)
        self.step = 0
        self.tokens = 0
        """Real tokens read in complete steps."""
        self.last_served = -1
        self._micro_batches: list[list[int]] = []
        """Rows of the current step that are not computed yet, by micro-batch."""
        self._num_computed = 0
        self._begun_at = self.cursor.state_dict()
        self._next: tuple[dict[str, int], list[int]] | None = None
        """The next step's rows, where they are drawn already, after the cursor's state before that."""
        self.weight = 0.0
        """Sum of the loss weights of all tokens in the current step."""
        self._step_tokens = 0

    @property
    def done(self) -> bool:
        return self.step >= self.num_steps

    @property
    def amid_step(self) -> bool:
        """Whether the current step has rows that are not computed yet."""
        return bool(self._micro_batches)

    @property
    def accumulating(self) -> bool:
        """Whether the current step has a part of its gradient."""
        return self.amid_step and self._num_computed > 0

    @property
    def factor(self) -> float:
        """The schedule's factor on the learning rate in the current step."""
        return schedule(self.trial.optim, self.step, self.num_steps)

    def draw_batch(self, example_of: Callable[[int], Example]) -> PendingBatch:
        """Return the next micro-batch, drawing the next step's rows where the current step is complete."""
        if not self._micro_batches:
            self._begun_at, rows = self._next or (self.cursor.state_dict(), self.cursor.next())
            self._next, cuts = None, self.trial.optim.accumulation
            self._micro_batches = [cut for i in range(cuts) if (cut := rows[i::cuts])]
            examples = [example_of(row) for row in rows]
            self.weight = sum(example.weight for example in examples)
            self._step_tokens = sum(len(example.ids_T) for example in examples)
            self._num_computed = 0
        lengths = tuple(len(example_of(row).ids_T) for row in self._micro_batches[0])
        return PendingBatch(self.slot, self.last_served, lengths)

    def draw_early(self, example_of: Callable[[int], Example]) -> None:
        """Draw and read the rows of the step after the current one, which a device computes meanwhile."""
        if self._next is None and self.step + 1 < self.num_steps:
            self._next = self.cursor.state_dict(), self.cursor.next()
            for row in self._next[1]:
                example_of(row)

    def completes(self, num_rows: int) -> bool:
        """Return whether the first `num_rows` rows of the next micro-batch are the last ones of the step."""
        return [len(batch) for batch in self._micro_batches] == [num_rows]

    def get_rows(self, start: int, stop: int) -> list[int]:
        """Return the indices of rows `start` to `stop` of the next micro-batch."""
        return self._micro_batches[0][start:stop]

    def make_dropout_seed(self, start: int) -> int:
        """Return a seed for the forward that begins at row `start` of the next micro-batch; a repeat gets the same."""
        key = (self.trial.seed, self.step, self._num_computed + start)
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def count_computed(self, num_rows: int) -> None:
        """Record that the first `num_rows` rows of the next micro-batch are computed."""
        self._num_computed += num_rows
        self._micro_batches[0] = self._micro_batches[0][num_rows:]
        if not self._micro_batches[0]:
            self._micro_batches.pop(0)

    def count_step(self) -> None:
        """Record that an optimiser step was applied."""
        self.step += 1
        self.tokens += self._step_tokens

    def get_state(self) -> MemberState:
        """Return progress, data cursor and the adapter's shape as plain data."""
        drawn = self._begun_at if self.amid_step else self._next and self._next[0]
        return {
            "step": self.step,
            "tokens": self.tokens,
            "cursor": drawn or self.cursor.state_dict(),
            "adapter": self._describe_adapter(),
        }

    def load_state(self, state: MemberState) -> None:
        """Continue from the state of any member; hyperparameters may differ, the adapter's shape may not.

        Raises:
            IncompatibleError: the adapter has another shape. TrialError: it was trained on other rows.
        """
        for key, value in self._describe_adapter().items():
            if state["adapter"][key] != value:
                raise IncompatibleError(
                    f"{self.name}: the checkpoint's adapter has method.{key}={state['adapter'][key]}, the trial "
                    f"{value}; a member can only continue with the same value"
                )
        mine, theirs = self.cursor.state_dict(), state["cursor"]
        for key in ("num_rows", "num_tokens"):
            if mine[key] != theirs[key]:
                raise TrialError(
                    f"{self.name}: the checkpoint was trained on data with {key}={theirs[key]}, this host's has "
                    f"{mine[key]}"
                )
        if (mine["batch_size"], mine["seed"], mine["group_by_length"]) != (
            theirs["batch_size"], theirs["seed"], theirs["group_by_length"],
        ):  # fmt: skip
            # another trial's batches differ: continue at about the same place of the epoch
            per_epoch = -(-theirs["num_rows"] // theirs["batch_size"])
            batch = theirs["batch"] * self.cursor.batches_per_epoch // per_epoch
            theirs = {**mine, "epoch": theirs["epoch"], "batch": batch}
        self.cursor.load_state_dict(theirs)
        self._micro_batches, self._next = [], None
        self.step, self.tokens = state["step"], state["tokens"]

    def _describe_adapter(self) -> dict[str, str | int | list[str]]:
        targets = self.method.target_modules
        return {
            "type": self.method.type,
            "rank": self.method.rank,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
        }
