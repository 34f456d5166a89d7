"""The training loop: READ THIS FIRST.

    method.attach(base)                    the method chooses what trains
    loop.step(), repeatedly:
        plan     the step's rows, which depend on neither the number of workers nor of micro-batches
        compute  forward and backward of the mean loss over all trained tokens of the step
        apply    clip, step the optimiser, call the method's hook
    every `eval.every` steps: evaluate, write a checkpoint, perhaps stop early

The loop knows no method, no launcher and no file format: see `methods/`, `session.py` and `checkpoint.py`.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rankloom.config.trial import TrialConfig
from rankloom.data import Batch, Cursor, TaskData, collate
from rankloom.errors import TrialError
from rankloom.evals.loss import compute_labelled_loss
from rankloom.evals.own_metric import MetricFunction, compute
from rankloom.evals.score import Validation, select_validation_rows, validate
from rankloom.events import Evaluated, RunResumed, StepFinished, WarningRaised
from rankloom.methods import build_method
from rankloom.models import Base
from rankloom.training import checkpoint
from rankloom.training.memory import read_peak_memory_bytes
from rankloom.training.parallel import Workers, clip, reshard
from rankloom.training.precision import autocast
from rankloom.training.resume_check import Origin
from rankloom.training.schedule import DIVERGED, count_steps, schedule
from rankloom.training.session import Session

UNSCORED = -1e9
"""The score of a checkpoint written between two evaluations; every evaluated checkpoint beats it."""


@dataclass
class LoopProgress:
    """How far a run has come; every checkpoint contains it."""

    step: int = 0
    tokens: int = 0
    """Tokens read so far, with prompts and without padding."""
    train_s: float = 0.0
    """Seconds spent in steps."""
    best_score: float = UNSCORED
    evals_since_best: int = 0


class TrainingLoop:
    """One trial's training on this worker.

    Invariant: the weights after step n depend on the trial's config alone, to rounding (exactly, for one worker on a
    CPU). They depend neither on the number of workers or micro-batches nor on how often the run was resumed.
    """

    def __init__(
        self,
        trial: TrialConfig,
        base: Base,
        data: TaskData,
        session: Session,
        precision: torch.dtype = torch.float32,
        metric: MetricFunction | None = None,
    ) -> None:
        """Attach the method and restore the latest checkpoint, if there is one.

        Args:
            precision: dtype of the arithmetic; below fp32 it runs under autocast.
            metric: the function of `eval.metric`, where that is the user's own.

        Raises:
            IncompatibleError: the method does not fit the base.
            TrialError: the latest checkpoint is damaged.
            DataError, ModelError: the checkpoint was made with other data or another base.
        """
        self.metric = metric
        self.trial, self.base, self.data, self.session, self.precision = trial, base, data, session, precision
        self.validation = select_validation_rows(data, trial.eval.max_rows)
        optim = trial.optim
        self.cursor = Cursor(
            data.train.lengths, optim.batch_size, seed=trial.seed, group_by_length=optim.group_by_length
        )
        self.num_steps = count_steps(trial, self.cursor.batches_per_epoch)
        self.workers = Workers(session.rank, session.world_size, session.device, trial.method.row.parallel, precision)
        torch.manual_seed(trial.seed)
        self.method = build_method(trial, self.num_steps)
        self.module = self.method.attach(base)
        self.trainable_parameters = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        if trial.compute.activation_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = self.workers.wrap(self.module)  # `module`, wrapped for several workers; call forward on this
        self.optimizer = self.method.build_optimizer(self.module, optim)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=precision == torch.float16)
        self.progress = LoopProgress()
        self.saved_step: int | None = None
        self.origin = Origin.collect(data, base)
        self._restore()

    def run(self) -> bool:
        """Train to the end of the budget, to an early stop, or until the session asks to stop.

        Returns:
            True: training is complete and the module holds the best checkpoint's weights. False: the session asked to
            stop; a checkpoint of the current step is written.

        Raises:
            TrialError: the loss or the gradient is not finite; earlier checkpoints are intact.
        """
        if self.progress.step == 0:
            self.evaluate()  # score before training; never counts as the best checkpoint
        while self.progress.step < self.num_steps and not self._is_out_of_patience():
            if self.workers.sum(self.session.should_stop())[0]:
                if self.progress.step != self.saved_step:  # an overwrite would lose the score of this step's checkpoint
                    self.save(UNSCORED)
                return False
            self.step()
            if self.progress.step % self.trial.eval.every == 0 or self.progress.step == self.num_steps:
                self.save(self.evaluate())
        self.load_best()
        return True

    def load_best(self) -> None:
        """Load the best checkpoint's weights."""
        with self.session.open_best_checkpoint() as folder:
            if folder is not None:
                checkpoint.load_weights(folder, self.module, self.method)

    def release(self) -> None:
        """Free model and optimiser, so that export and scoring have their memory."""
        self.peak_memory_bytes = read_peak_memory_bytes(self.session.device)
        del self.model, self.module, self.optimizer, self.base, self.method

    def step(self) -> None:
        """Take one optimiser step: plan, compute, apply."""
        started, step = time.monotonic(), self.progress.step
        if self.method.before_step(self.module, self.optimizer, step):
            self.model = self.workers.wrap(self.module)
        batches, tokens = self._plan()
        loss = self._compute(batches)
        norm = self._apply(loss)
        self.progress.step += 1
        self.progress.tokens += tokens
        seconds = time.monotonic() - started
        self.progress.train_s += seconds
        self.session.emit(
            StepFinished(
                step=self.progress.step,
                total_steps=self.num_steps,
                epoch=self.cursor.epoch,
                loss=loss,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                grad_norm=norm,
                tokens=self.progress.tokens,
                tokens_per_s=tokens / seconds,
                memory_bytes=read_peak_memory_bytes(self.session.device),
                eta_s=self.progress.train_s / self.progress.step * (self.num_steps - self.progress.step),
            )
        )

    def evaluate(self) -> float:
        """Score the validation rows and emit `Evaluated`; every worker calls.

        Returns:
            The score; higher is better.

        Raises:
            TrialError: the loss or the metric is not a finite number.
        """
        config = self.trial.eval
        shard = (self.session.rank, self.session.world_size)
        with autocast(self.session.device, self.precision):
            part = validate(self.module, self.validation, self.data, config, self.base.tokenizer, shard)
        reshard(self.module)
        loss_sum, weight, correct, num_rows = self.workers.sum(
            part.loss_sum, part.weight_sum, part.correct, part.num_rows
        )
        loss = loss_sum / weight
        if not math.isfinite(loss):
            broken = f"check the weights of {self.base.id}, or set compute.precision=fp32"
            why = "lower optim.learning_rate" if self.progress.step else f"before any training: {broken}"
            raise TrialError(f"the validation loss is {loss} at step {self.progress.step}; {why}")
        labelled = config.metric != "loss" and self.data.labels is not None
        accuracy, own = correct / num_rows if labelled else None, self._compute_own_metric(part)
        value = next(each for each in (own, accuracy, loss) if each is not None)
        score = value if config.best == "max" else -value
        best = self.progress.step > 0 and score > self.progress.best_score
        if self.progress.step > 0:
            self.progress.evals_since_best = 0 if best else self.progress.evals_since_best + 1
            self.progress.best_score = max(score, self.progress.best_score)
        self.session.emit(Evaluated(step=self.progress.step, loss=loss, accuracy=accuracy, metric=own, best=best))
        return score

    def _compute_own_metric(self, part: Validation) -> float | None:
        """Return the user's own metric, computed on rank 0 alone; None where there is none."""
        if self.metric is None:
            return None
        function, predictions = self.metric, self.workers.gather(part.predictions)
        return self.workers.from_first(lambda: compute(function, self.trial.eval, predictions).value)

    def save(self, score: float) -> None:
        """Write a checkpoint and hand it to the session; every worker calls.

        Raises:
            TrialError: the checkpoint can't be written.
        """
        progress = {**asdict(self.progress), "cursor": self.cursor.state_dict(), "scaler": self.scaler.state_dict()}
        first = self.session.rank == 0
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            checkpoint.save(folder, self.module, self.method, self.optimizer, progress, write=first)
            if first:
                self.origin.write(folder)
            self.session.save_checkpoint(folder if first else None, {"step": self.progress.step, "score": score})
        self.saved_step = self.progress.step

    def _plan(self) -> tuple[list[Batch], int]:
        """Return this worker's micro-batches of the next step, and the number of tokens over all workers.

        A worker without a row gets one with zero loss weights, so that all workers exchange the same gradients.
        """
        everyone = self.cursor.next()
        mine = everyone[self.workers.rank :: self.workers.world_size]
        cuts = [mine[i :: self.trial.optim.accumulation] for i in range(self.trial.optim.accumulation)]
        batches = []
        for rows in cuts:
            batch = collate([self.data.train[i] for i in rows or everyone[:1]], self.base.pad_id)
            if not rows:
                batch.loss_weights_BT.zero_()
            batches.append(batch)
        return batches, int(self.data.train.lengths[everyone].sum())

    def _compute(self, batches: list[Batch]) -> float:
        """Compute the step's gradient in the parameters; return the mean loss per trained token, over all workers."""
        (weight,) = self.workers.sum(sum(float(batch.loss_weights_BT.sum()) for batch in batches))
        factor = schedule(self.trial.optim, self.progress.step, self.num_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor  # before the backward pass: layerwise methods step within it
        self.module.train()
        device, loss_sum = self.session.device, 0.0
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with self.workers.synchronize_last(self.model, last):
                with autocast(device, self.precision):
                    micro_sum, _ = compute_labelled_loss(self.model, batch)
                    # the workers' gradients are averaged, but `weight` counts the tokens of all of them
                    loss = micro_sum * (self.workers.world_size / weight)
                    if last and (penalty := self.method.compute_penalty(self.module)) is not None:
                        loss = loss + penalty
                self.scaler.scale(loss).backward()
            loss_sum += float(micro_sum.detach())
        return self.workers.sum(loss_sum)[0] / weight

    def _apply(self, loss: float) -> float | None:
        """Clip, step and call the method's hook; return the gradient's norm before clipping."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = clip(self.method.get_trained(self.module).values(), self.trial.optim.clip_norm)
        # GradScaler skips steps whose fp16 gradient overflows
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm) and not self.scaler.is_enabled()):
            step, rate = self.progress.step + 1, self.trial.optim.learning_rate
            raise TrialError(DIVERGED.format(step=step, loss=loss, norm=norm, rate=rate))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(self.module, self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _restore(self) -> None:
        with self.session.open_latest_checkpoint() as folder:
            if folder is not None:
                if changed := self.origin.check(folder, self.trial):
                    self.session.emit(WarningRaised(changed))
                checkpoint.load_weights(folder, self.module, self.method)
                saved = checkpoint.load_optimizer(folder, self.method, self.optimizer)
                self.cursor.load_state_dict(saved.pop("cursor"))
                self.scaler.load_state_dict(saved.pop("scaler"))
                self.progress = LoopProgress(**saved)
                self.saved_step = self.progress.step
                self.session.emit(RunResumed(self.progress.step))
        if self.session.rank:  # the checkpoint holds rank 0's random state, but each worker draws its own dropout
            torch.manual_seed(self.trial.seed + 1_000_003 * self.session.rank + self.progress.step)

    def _is_out_of_patience(self) -> bool:
        patience = self.trial.eval.patience
        return patience is not None and self.progress.evals_since_best >= patience
