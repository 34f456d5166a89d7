"""A trial: one configuration, trained once. `rankloom train` reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rankloom.config.base import Frozen
from rankloom.config.data import AnySource, DataConfig
from rankloom.config.method import AdaLoraConfig, AdapterConfig, GaLoreConfig, LoraConfig, Method
from rankloom.config.metric import Metric, Mode, check_mode, choose_mode, is_own
from rankloom.config.model import AnyModel, Dtype, ModelConfig, NoQuantization, Quantization
from rankloom.config.paths import IsPath
from rankloom.errors import ConfigError, IncompatibleError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
BASE = "base"
"""Name of the base without an adapter, wherever an adapter can be named."""


def _refuse_base(name: str) -> str:
    if name == BASE:
        raise ConfigError(f"{name!r} means the base without an adapter; choose another name")
    return name


AdapterName = Annotated[Name, AfterValidator(_refuse_base)]


class OptimConfig(Frozen):
    """AdamW, its schedule and the batch."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """Peak learning rate; with LoRA+, the rate of A."""
    loraplus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Learning rate of B divided by that of A (LoRA+, arXiv 2402.12354); 1 is plain LoRA, 16 a common start."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at zero."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the steps in which the learning rate rises."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient to this norm; null: no clipping."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimiser step, over all workers and micro-batches."""
    accumulation: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per step, to save memory; it does not change the result."""
    group_by_length: bool = True
    """Batch rows of similar length together; off: batches are uniformly random."""


class BudgetConfig(Frozen):
    """How long to train, in `epochs` or `steps`."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows (3 if neither is given)."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps."""

    @model_validator(mode="after")
    def _check_one_of_two(self) -> BudgetConfig:
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"give epochs ({self.epochs}) or steps ({self.steps}), not both")
        return self


class EvalConfig(Frozen):
    """Measurements during training and at its end."""

    every: Annotated[int, Field(ge=1)] = 50
    """Steps between two evaluations on the validation rows; each also writes a checkpoint."""
    metric: Metric = "loss"
    """What chooses the best checkpoint. accuracy needs classification data. `module:function` is a function of your
    own: it takes the list of predictions, each with prompt, reference and prediction, and returns a number, or one for
    each row. It needs prompts, so not the format text, and decodes the validation rows at every evaluation."""
    mode: Mode | None = None
    """Whether a metric of your own is best at its maximum or its minimum; null: max."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations without an improvement; null: never."""
    max_rows: Annotated[int, Field(ge=1)] | None = 256
    """Validation rows per evaluation; null: all."""
    max_test_rows: Annotated[int, Field(ge=1)] | None = None
    """Test rows of the scorecard; null: all."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows per evaluation batch; it does not change the result."""
    retention: AnySource | None = None
    """A second data set (text or chat), to measure forgetting: the scorecard has the loss on it beside the base's."""
    base: bool = True
    """Score the untuned base beside the result."""
    latency: bool = True
    """Measure generation latency and throughput."""

    @model_validator(mode="after")
    def _check_mode(self) -> EvalConfig:
        check_mode(self.metric, self.mode)
        return self

    @property
    def best(self) -> Mode:
        """Return whether the metric is best at its maximum or its minimum."""
        return choose_mode(self.metric, self.mode)


class ComputeConfig(Frozen):
    """Hardware and precision."""

    num_workers: Annotated[int, Field(ge=0)] = 1
    """Ray Train workers; 0: in this process, without Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: CUDA if the cluster has GPUs."""
    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """CPU cores per worker, and its torch threads; null: an equal share of the cores, on a GPU 1."""
    precision: Dtype = "auto"
    """Type of the arithmetic. auto: bf16 on CUDA, else fp32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes about half as much time again."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts from the last checkpoint after the death of a worker."""
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """Price of one worker's device for an hour, for the cost that a plan reports; null: no cost."""


class OutputConfig(Frozen):
    """Where to write results; `s3://` and other pyarrow filesystems work too."""

    root: Annotated[str, IsPath(is_output=True)] = "~/rankloom"
    """Holds `runs/<name>`, `studies/<name>` and `registry/`."""
    registry: Annotated[str, IsPath(is_output=True)] | None = None
    """Registry to publish to; null: `<root>/registry`."""
    publish: bool = True
    """Publish the result to the registry under the trial's name."""
    keep_model: bool = False
    """Also save the whole tuned model in `runs/<name>/model` (full, galore and lisa; local root only)."""

    @property
    def registry_root(self) -> str:
        """The registry's folder or URL."""
        return self.registry or f"{self.root.rstrip('/')}/registry"


class TrackingConfig(Frozen):
    """Trackers besides TensorBoard, which is always written."""

    mlflow: str | None = None
    """An MLflow tracking URI."""
    wandb_project: str | None = None
    """A Weights & Biases project; the key comes from WANDB_API_KEY."""


class TrialConfig(Frozen, defer_build=True):
    """One configuration to train once."""

    name: AdapterName
    """Name of the run and of the adapter: lower-case letters, digits, '.', '_' and '-'."""
    model: AnyModel = ModelConfig()
    quantization: Quantization = NoQuantization()
    data: DataConfig = DataConfig()
    method: Method = LoraConfig()
    optim: OptimConfig = OptimConfig()
    budget: BudgetConfig = BudgetConfig()
    eval: EvalConfig = EvalConfig()
    compute: ComputeConfig = ComputeConfig()
    output: OutputConfig = OutputConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, data order and dropout."""

    @model_validator(mode="after")
    def _check_combination(self) -> TrialConfig:
        for reason in find_conflicts(self):
            raise IncompatibleError(reason)
        if isinstance(self.method, AdaLoraConfig) and self.budget.steps is not None:
            self.method.split_steps(self.budget.steps)
        return self


def find_conflicts(trial: TrialConfig) -> list[str]:
    """Return the reasons to refuse this combination; empty if it is fine."""
    method, optim, compute = trial.method, trial.optim, trial.compute
    row = method.row
    reasons = []
    if trial.quantization.type not in row.quantization:
        reasons.append(
            f"method.type={method.type} changes the base's weights, so quantization={trial.quantization.type} is "
            f"refused; use quantization: none, or lora, dora or adalora"
        )
    if optim.loraplus_ratio != 1 and not row.loraplus:
        reasons.append(
            f"optim.loraplus_ratio={optim.loraplus_ratio:g} needs A and B, which {method.type} lacks; set it to 1"
        )
    if isinstance(method, LoraConfig) and method.init == "orthogonal" and method.rank % 2:
        reasons.append(f"method.init=orthogonal needs an even rank, not method.rank={method.rank}")
    if row.servable == "extracted" and trial.model.dtype == "fp16":
        reasons.append(
            f"method.type={method.type} trains the base's own weights, and in fp16 their updates overflow or round to "
            f"nothing; set model.dtype=fp32 or bf16 (compute.precision=fp16 is for the arithmetic alone)"
        )
    if isinstance(method, LoraConfig) and method.init in ("pissa", "olora") and trial.quantization.type != "none":
        reasons.append(
            f"method.init={method.init} rewrites the base's weights, so quantization={trial.quantization.type} is "
            f"refused; use init: default"
        )
    if isinstance(method, LoraConfig) and method.init in ("pissa", "olora") and method.rslora:
        reasons.append(
            f"method.init={method.init} doubles the rank on export, which changes rslora's scaling; set "
            f"method.rslora=false"
        )
    if isinstance(method, AdapterConfig) and method.experts:
        init = getattr(method, "init", "default")
        for setting, is_valid, allowed in (
            (f"method.type={method.type}", method.type == "lora", "lora"),
            (f"method.dropout={method.dropout:g}", method.dropout == 0, "0"),
            (f"method.init={init}", init in ("default", "gaussian"), "default, gaussian"),
        ):
            if not is_valid:
                reasons.append(
                    f"method.experts=true: PEFT can't adapt experts, which are not layers, with {setting} (allowed: "
                    f"{allowed}); change it, or set method.experts=false"
                )
    if isinstance(method, GaLoreConfig) and method.layerwise:
        for setting, is_valid in (
            ("optim.accumulation", optim.accumulation == 1),
            ("optim.clip_norm", optim.clip_norm is None),
            ("compute.num_workers", compute.num_workers <= 1),
            ("compute.precision", compute.precision != "fp16"),
        ):
            if not is_valid:
                reasons.append(
                    f"method.layerwise frees each gradient during the backward pass, before {setting} could act on "
                    f"it; set optim.accumulation=1, optim.clip_norm=null, compute.num_workers<=1, no fp16"
                )
    if trial.eval.metric == "accuracy" and trial.data.format not in ("auto", "classification"):
        reasons.append(
            f"eval.metric: accuracy needs classification data (text, label); use loss, not {trial.data.format}"
        )
    if is_own(trial.eval.metric) and trial.data.format == "text":
        reasons.append(
            f"eval.metric: {trial.eval.metric} needs rows with prompts, which data.format=text does not have; use loss"
        )
    if trial.output.keep_model and (row.servable != "extracted" or "://" in trial.output.root):
        reasons.append(
            f"output.keep_model saves the whole tuned model, for full, galore and lisa under a local output.root; "
            f"with method.type={method.type} and output.root={trial.output.root} leave it off"
        )
    if optim.batch_size < optim.accumulation * max(1, compute.num_workers):
        reasons.append(
            f"optim.batch_size={optim.batch_size} leaves some of {max(1, compute.num_workers)} worker(s) x "
            f"{optim.accumulation} micro-batch(es) without a row; raise it or lower optim.accumulation"
        )
    return reasons
