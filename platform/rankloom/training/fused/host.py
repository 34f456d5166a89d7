"""TrialHost: one frozen base, and as many trials training on it as its bank has slots.

    host.admit(name, trial)               put the member's adapter into a free slot
    host.step(), repeatedly:
        plan     the next micro-batch of every member with work, within the token budget (plan.py)
        compute  one forward and backward of the sum of the members' own mean losses
        apply    per-member clipping, AdamW and schedule, for all members whose step is complete (optim.py)
    host.evaluate, save, export, evict    between steps, for one member or for all

Members share no trainable parameter and rows do not mix. So each member's gradient equals the one it would have alone,
and its weights equal those of its dedicated run (`loop.py`), to rounding. This module knows neither Ray nor
scheduling: `rankloom.hosts` decides when members are admitted and evicted.

The base's own dropout (GPT-2 has some) is off, as in a dedicated run: all members would share its noise.

Shapes: K slots, N tokens of all rows, M predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from rankloom.banks.bank import AdapterBank, SlotSpec
from rankloom.config.method import DoraConfig, LoraConfig, Targets
from rankloom.config.trial import TrialConfig
from rankloom.data import Row, TaskData
from rankloom.errors import IncompatibleError, TrialError
from rankloom.evals.own_metric import MetricFunction, compute
from rankloom.evals.score import predict, select_validation_rows
from rankloom.models import Base, find_target_linears
from rankloom.training.fused.device_step import DeviceStep
from rankloom.training.fused.evaluation import ROW_TOO_LONG, FusedEvaluator
from rankloom.training.fused.forward import FusedForward
from rankloom.training.fused.member import Member
from rankloom.training.fused.optim import SlotAdamW, list_parameters
from rankloom.training.fused.packing import Arranged, Example
from rankloom.training.fused.plan import StepPlan, plan_step
from rankloom.training.fused.snapshot import Snapshot
from rankloom.training.fused.validation import Evaluation
from rankloom.training.precision import autocast
from rankloom.training.schedule import DIVERGED

TRIED_AGAIN_AFTER = 500
"""Plans that fit into memory before the token budget is doubled again: the memory may be free by then."""
KEPT_EXAMPLES = 65_536
"""Training rows kept as arrays; every member reads the same rows, each in its own order."""


@dataclass(frozen=True)
class StepReport:
    """One optimiser step of one member, or its failure."""

    name: str
    step: int
    """Steps done so far, this one included."""
    loss: float
    """Mean over the step's trained tokens."""
    tokens: int
    """Real tokens read so far."""
    done: bool
    """Whether its budget is used up; it then stays, without work, until it is evicted."""
    error: str | None = None
    """Why the host evicted it; None: it did not."""


class TrialHost:
    """A frozen base with members.

    Invariant: a member's weights depend on its own trial alone, to rounding. They depend neither on the other members,
    nor on the token budget, nor on how often the member was saved and admitted again.
    """

    def __init__(
        self,
        base: Base,
        data: TaskData,
        *,
        num_slots: int,
        max_rank: int,
        token_budget: int,
        with_magnitudes: bool,
        targets: Targets = "all-linear",
        precision: torch.dtype = torch.float32,
        metric: MetricFunction | None = None,
    ) -> None:
        """Put an empty bank on the base.

        Args:
            token_budget: most positions per forward and backward; lowered temporarily when memory runs out.
            with_magnitudes: whether members may be DoRA.
            targets: every linear layer that a member may adapt.
            precision: dtype of the arithmetic; bf16 runs under autocast, fp16 raises IncompatibleError.
            metric: the function of the members' `eval.metric`, where that is the user's own.
        """
        if precision == torch.float16:
            raise IncompatibleError(
                "compute.precision=fp16 needs a gradient scale per member, which a host does not keep; use bf16 or fp32"
            )
        self.base, self.data, self.precision, self.metric = base, data, precision, metric
        self.token_budget = self._most_tokens = token_budget
        self._num_sufficient = 0
        """Plans computed since memory ran out or the token budget was doubled."""
        self.max_rank, self.with_magnitudes = max_rank, with_magnitudes
        base.model.eval()
        names = find_target_linears(base.model, targets)
        self.bank = AdapterBank(base.model, names, num_slots, max_rank, with_magnitudes=with_magnitudes)
        self.forward = FusedForward(base, self.bank, precision)
        self.evaluator = FusedEvaluator(self.forward, data, token_budget)
        self.optimizer = SlotAdamW(list_parameters(self.bank), num_slots)
        self.sums = DeviceStep(self.forward, self.optimizer)
        self.num_slots = num_slots
        self.members: dict[str, Member] = {}
        self.last_plan: StepPlan | None = None
        """The plan of the last step."""
        self._by_slot: dict[int, Member] = {}
        self._num_plans = 0
        self._example = lru_cache(KEPT_EXAMPLES)(lambda index: Example.from_row(data.train[index]))

    def admit(self, name: str, trial: TrialConfig, checkpoint: Path | None = None) -> None:
        """Give a trial a slot, with a fresh adapter or from a checkpoint.

        Args:
            checkpoint: a folder that `save` wrote for this member or another one; None: a fresh adapter.

        Raises:
            TrialError: no slot is free, or the checkpoint is damaged. IncompatibleError: the trial can't be fused here.
        """
        if name in self.members:
            raise TrialError(f"{name} is already a member")
        spec = self._check_trial(name, trial)
        slot = next((k for k in range(self.num_slots) if k not in self._by_slot), None)
        if slot is None:
            raise TrialError(f"no free slot for {name}: all {self.num_slots} are taken; evict a member first")
        member = Member(name, trial, slot, self.data.train.lengths)
        member.last_served = self._num_plans - 1
        self.bank.attach(slot, spec)
        self.optimizer.assign(slot, trial.optim, spec.rank)
        self.members[name] = self._by_slot[slot] = member
        if checkpoint is not None:
            try:
                self._load(member, checkpoint)
            except Exception:
                self.evict(name)
                raise

    def evict(self, name: str) -> None:
        """Free a member's slot; an incomplete step is lost."""
        member = self._get_member(name)
        del self.members[name], self._by_slot[member.slot]
        self.sums.clear([member.slot])
        self.optimizer.clear(member.slot)
        self.bank.detach(member.slot)

    def step(self, names: Collection[str] | None = None) -> list[StepReport]:
        """Compute one plan.

        Args:
            names: the members to train (None: all); the others keep their state.

        Returns:
            A report for each member whose optimiser step is complete or that failed, sorted by name.
        """
        plan = self._plan(self.members if names is None else names)
        if plan is None:
            return []
        self.last_plan = plan
        reports = self._step_in_one_go(plan)
        if reports is None:
            reports = self._compute(plan)
            reports += self._apply(plan)
        return sorted(reports, key=lambda report: report.name)

    def evaluate(
        self,
        names: Iterable[str] | None = None,
        rows: Sequence[Row] | None = None,
    ) -> dict[str, Evaluation]:
        """Score members, by name, on `rows`, or (None) on the validation rows that their trials ask for.

        With the user's own metric, the members decode one after another.

        Raises:
            TrialError: a single row, or a batch to decode, does not fit into memory, or the user's metric failed.
        """
        members = [self._get_member(name) for name in (self.members if names is None else names)]
        found: dict[str, Evaluation] = {}
        for limit in {member.trial.eval.max_rows for member in members}:
            group = sorted((m for m in members if m.trial.eval.max_rows == limit), key=lambda m: m.slot)
            evaluations = self.evaluator.evaluate([m.slot for m in group], rows, limit)
            found |= {m.name: evaluation for m, evaluation in zip(group, evaluations, strict=True)}
        if self.metric is not None:
            for member in members:
                found[member.name] = replace(
                    found[member.name], metric=self._compute_own_metric(member, rows, self.metric)
                )
        return found

    def _compute_own_metric(self, member: Member, rows: Sequence[Row] | None, metric: MetricFunction) -> float:
        config = member.trial.eval
        asked = select_validation_rows(self.data, config.max_rows) if rows is None else rows
        try:
            with self.bank.use_slot(member.slot), autocast(self.base.device, self.precision):
                found = predict(self.base.model, self.base.tokenizer, asked, self.data, batch_size=config.batch_size)
        except torch.OutOfMemoryError:
            raise TrialError(
                f"eval.metric: {config.metric}: decoding {config.batch_size} rows at once runs out of memory; lower "
                f"eval.batch_size"
            ) from None
        return compute(metric, config, found).value

    def save(self, name: str, folder: Path) -> None:
        """Write the member's `snapshot` into an existing folder; raises TrialError where it can't be written."""
        self.snapshot(name).write(folder)

    def snapshot(self, name: str) -> Snapshot:
        """Return the member's complete state.

        A member that is admitted from it continues bit for bit; on a GPU, to rounding. Amid a step of several
        micro-batches, it is the state before that step.
        """
        member = self._get_member(name)
        copy = self.optimizer.download_slot(member.slot)
        views = self.bank.get_views(member.slot)
        weights = {part: copy[part][0][tuple(map(slice, view.shape))] for part, view in views.items()}
        moments = self.optimizer.get_state(member.slot, member.method.rank, copy)
        return Snapshot(name, weights, {"member": member.get_state(), "moments": moments})

    def copy(self, source: str, target: str) -> None:
        """Continue a member from another's weights, moments and progress, with its own hyperparameters."""
        theirs, mine = self._get_member(source), self._get_member(target)
        mine.load_state(theirs.get_state())
        self.bank.copy(theirs.slot, mine.slot)
        self.optimizer.copy(theirs.slot, mine.slot)
        self.sums.clear([mine.slot])

    def export(self, name: str, folder: Path, snapshot: Snapshot | None = None) -> None:
        """Write the member's adapter as a PEFT folder, with the values of its snapshot where there is one.

        Raises:
            RegistryError: the folder can't be written.
        """
        weights = None if snapshot is None else snapshot.weights
        self.bank.write(self._get_member(name).slot, folder, self.base.id, weights)

    def _check_trial(self, name: str, trial: TrialConfig) -> SlotSpec:
        """Return the slot's contents; refuse a trial that this host would train unlike its dedicated run."""
        method = trial.method
        if not isinstance(method, (LoraConfig, DoraConfig)) or not method.row.fusable:
            raise IncompatibleError(f"{name}: method.type={method.type} can't be fused; run it dedicated")
        quantization, held = trial.quantization.type, self.base.quantization
        for setting, sound, allowed in (
            (f"method.init={method.init}", method.init in ("default", "gaussian"), "default or gaussian"),
            ("method.experts=true", not method.experts, "false (a run of its own adapts them)"),
            (f"method.rank={method.rank}", method.rank <= self.max_rank, f"at most the bank's {self.max_rank}"),
            (f"method.type={method.type}", self.with_magnitudes or method.type == "lora", "lora (no magnitudes here)"),
            (f"model.id={trial.model.id}", trial.model.id == self.base.id, self.base.id),
            (f"quantization={quantization}", quantization == held, held),
        ):  # fmt: skip
            if not sound:
                raise IncompatibleError(f"{name}: {setting} does not fit this host; allowed: {allowed}")
        spec = SlotSpec.from_method(method, self.base.model, trial.seed)
        if outside := [target for target in spec.targets if target not in self.bank.sites]:
            raise IncompatibleError(
                f"{name}: method.target_modules: the host's bank does not adapt {outside[0]} and {len(outside) - 1} "
                f"others; open a host whose targets cover them"
            )
        return spec

    def _plan(self, names: Collection[str]) -> StepPlan | None:
        working = [member for member in self.members.values() if not member.done and member.name in names]
        return plan_step([m.draw_batch(self._example) for m in working], self.token_budget, padded=self.forward.padded)

    def _compute(self, plan: StepPlan) -> list[StepReport]:
        """Accumulate the plan's gradients, in halves where memory runs out; return reports of members that failed."""
        todo, lost = [plan], []
        self._raise_budget()
        while todo:
            part = todo.pop()
            try:
                self._forward_backward(part)
                continue
            except torch.OutOfMemoryError:
                pass  # the error's traceback holds tensors, which are freed after this block
            if self.base.device.type == "cuda":
                torch.cuda.empty_cache()
            halves = part.split(padded=self.forward.padded)
            if halves is not None:
                self._lower_budget(part.num_tokens)
                todo += reversed(halves)
                continue
            member = self._by_slot[part.shares[0].slot]
            lost.append(self._fail(member, ROW_TOO_LONG.format(part.num_tokens)))
            todo = [half for half in todo if half.shares[0].slot != member.slot]  # drop the member's other rows
        self._record(plan)
        return lost

    def _record(self, plan: StepPlan) -> None:
        """Record that the plan's rows are computed."""
        for share in plan.shares:
            if share.slot in self._by_slot:
                member = self._by_slot[share.slot]
                member.count_computed(len(share.lengths))
                member.last_served = self._num_plans
        self._num_plans += 1

    def _lower_budget(self, num_tokens: int) -> None:
        """Lower the token budget after a forward of `num_tokens` positions ran out of memory."""
        self.token_budget = max(1, min(self.token_budget, num_tokens // 2))
        self._num_sufficient = 0

    def _raise_budget(self) -> None:
        self._num_sufficient += 1
        if self._num_sufficient > TRIED_AGAIN_AFTER:
            self.token_budget = min(2 * self.token_budget, self._most_tokens)
            self._num_sufficient = 0

    def _forward_backward(self, plan: StepPlan) -> None:
        """Add the plan's gradients and losses to the members' sums."""
        self.sums.add(self._arrange(plan), self._make_dropout_seeds(plan))

    def _make_dropout_seeds(self, plan: StepPlan) -> dict[int, int]:
        return {share.slot: self._by_slot[share.slot].make_dropout_seed(share.start) for share in plan.shares}

    def _arrange(self, plan: StepPlan) -> Arranged:
        """Lay the plan's rows out, with each slot's share of the loss (`shares_K`)."""
        examples, slots = [], []
        shares_K = np.zeros(self.num_slots, dtype=np.float32)
        for share in plan.shares:
            member = self._by_slot[share.slot]
            rows = member.get_rows(share.start, share.stop)
            examples += [self._example(row) for row in rows]
            slots += [share.slot] * len(rows)
            shares_K[share.slot] = 1 / member.weight
        arranged = self.forward.arrange(examples, slots)
        arranged.arrays["shares_K"] = shares_K
        if self.forward.is_one_go:
            arranged.arrays.update(self.bank.make_dropout_arrays(self._make_dropout_seeds(plan)))
        return arranged

    def _step_in_one_go(self, plan: StepPlan) -> list[StepReport] | None:
        """Compute and apply a plan; None where this takes parts: where memory ran out."""
        members = {self._by_slot[share.slot]: len(share.lengths) for share in plan.shares}
        if not self.forward.is_one_go:
            return None
        stepping = {member.slot: member.factor for member, num_rows in members.items() if member.completes(num_rows)}
        partial = not self.sums.is_empty or len(stepping) < len(members)

        def draw() -> None:
            for member in members:
                if member.slot in stepping:
                    member.draw_early(self._example)

        try:
            arranged = self._arrange(plan)
            losses, norms = self.sums.add_and_apply(arranged, stepping, partial=partial, meanwhile=draw)
        except torch.OutOfMemoryError:
            pass  # the error's traceback holds tensors, which are freed after this block
        else:
            self._raise_budget()
            self._record(plan)
            return self._report(members, stepping, losses, norms)
        torch.cuda.empty_cache()
        return None

    def _apply(self, plan: StepPlan) -> list[StepReport]:
        """Step the members whose steps are complete."""
        if self.sums.is_empty:
            return []
        served = [self._by_slot[share.slot] for share in plan.shares if share.slot in self._by_slot]
        stepping = {member.slot: member.factor for member in served if not member.amid_step}
        losses, norms = self.sums.apply(stepping)
        self.sums.clear(list(stepping))
        return self._report(served, stepping, losses, norms)

    def _report(
        self, served: Iterable[Member], stepping: Collection[int], losses: list[float], norms: list[float]
    ) -> list[StepReport]:
        """Report the members that stepped; evict those that diverged, whose weights have not changed."""
        reports = []
        for member in served:
            loss, norm = losses[member.slot] / member.weight, norms[member.slot]
            if not math.isfinite(loss) or not math.isfinite(norm):
                rate = member.trial.optim.learning_rate
                reason = DIVERGED.format(step=member.step + 1, loss=loss, norm=norm, rate=rate)
                reports.append(self._fail(member, reason, loss))
            elif member.slot in stepping:
                member.count_step()
                reports.append(StepReport(member.name, member.step, loss, member.tokens, member.done))
        if not any(member.accumulating for member in self.members.values()):
            self.sums.drop()
        return reports

    def _fail(self, member: Member, reason: str, loss: float = math.nan) -> StepReport:
        self.evict(member.name)
        return StepReport(member.name, member.step, loss, member.tokens, done=False, error=reason)

    def _load(self, member: Member, folder: Path) -> None:
        snapshot = Snapshot.read(member.name, folder)
        member.load_state(snapshot.state["member"])
        self.bank.load_state(member.slot, snapshot.weights)
        self.optimizer.load_state(member.slot, member.method.rank, snapshot.state["moments"])

    def _get_member(self, name: str) -> Member:
        if name not in self.members:
            raise TrialError(f"{name} is not a member of this host; it has {', '.join(sorted(self.members)) or 'none'}")
        return self.members[name]
