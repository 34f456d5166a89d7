"""What a run would be refused for later is told before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from rankloom.config import StudyConfig, TrialConfig, parse
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.data import load_data
from rankloom.errors import ConfigError, DataError, IncompatibleError, ModelError, RankloomError
from rankloom.events import Event, WarningRaised
from rankloom.launch import cluster
from rankloom.launch.trainer import train_trial
from rankloom.methods import build_method
from rankloom.methods.base import list_peft_targets
from rankloom.models import find_target_linears, load_base
from rankloom.models.checkpoints import INDEX, WHOLE
from rankloom.models.linears import FUSED_BY_KERNELS
from rankloom.search.study import tune
from rankloom.suites.evaluate import evaluate
from rankloom.training.fused.host import TrialHost
from rankloom.training.preflight import preflight

SIZE = dict(vocab_size=400, hidden_size=64, num_hidden_layers=2, pad_token_id=0, eos_token_id=1, bos_token_id=1)


@pytest.fixture
def saved(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    def save(kind: str, **settings: Any) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZE, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        make_tokenizer().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def trial_of(model: Path, root: Path, **sections: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {"model": {"id": str(model)}, "output": {"root": str(root)}}
    return tree | sections


CASES: dict[str, tuple[dict[str, Any], type[RankloomError], str]] = {
    "file": ({"data": {"train": "missing.csv"}}, DataError, r"missing\.csv"),
    "test file": ({"data": {"test": "missing.jsonl"}}, DataError, r"data\.test.*missing\.jsonl"),
    "columns": ({"data": {"train": "rows.csv"}}, DataError, "no format fits the columns"),
    "rows": ({"data": {"train": "rows.csv", "columns": {"text": "q", "label": "a"}}}, DataError, "can't be split"),
    "targets": ({"method": {"type": "lora", "target_modules": ["nothing"]}}, ConfigError, "nothing"),
    "model": ({"model": {"id": "models/none"}}, ModelError, "models/none' is not a local folder, and the hub"),
    "folder": ({"model": {"id": "./none"}}, ModelError, r"no folder or file '.*none'"),
    "layers": ({"method": {"type": "lisa", "num_layers": 9}}, ConfigError, r"num_layers: 9.*2 layers"),
}


@pytest.mark.parametrize("case", CASES)
def test_train_and_tune_and_evaluate_refuse_before_ray(
    case: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ray_started(*_: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", ray_started)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("q,a\nhello,b\n")
    sections, kind, message = CASES[case]
    tree = trial_of(tiny_llama, tmp_path / "out") | sections
    with pytest.raises(kind, match=message):
        train_trial(parse(TrialConfig, tree | {"name": "t"}))
    study = {"name": "s", "trial": tree, "space": [{"optim": {"learning_rate": {"choice": [1e-4, 1e-3]}}}]}
    with pytest.raises(kind, match=message):
        tune(parse(StudyConfig, study | {"search": {"num_trials": 2}}))
    with pytest.raises(kind, match=message):
        evaluate(parse(TrialConfig, tree | {"name": "t"}), registry=str(tmp_path))
    assert not list(tmp_path.glob("out/*/*"))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_an_encoder_is_no_causal_language_model(saved: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    folder = saved(kind, intermediate_size=128, num_attention_heads=4, max_position_embeddings=514)
    with pytest.raises(ModelError, match="is not a causal language model"):
        preflight([parse(TrialConfig, trial_of(folder, tmp_path, name="t"))])
    with pytest.raises(ModelError, match="is not a causal language model"):
        load_base(ModelConfig(id=str(folder)), NoQuantization(), device=torch.device("cpu"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"is_decoder": True}))
    load_base(ModelConfig(id=str(folder)), NoQuantization(), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification.*is not a language model",
        ),
        ({"is_encoder_decoder": True}, "is an encoder and a decoder"),
        ({"model_type": "vit"}, "of the type vit, for which transformers has no causal language model"),
        ({"model_type": "xlnet"}, "each token sees those after it"),
        ({"model_type": "xlm"}, "each token sees those after it"),
    ],
)
def test_what_config_json_calls_something_else(
    settings: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    known = {} if "model_type" in settings else json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | settings))
    with pytest.raises(ModelError, match=message):
        preflight([parse(TrialConfig, trial_of(folder, tmp_path, name="t"))])
    with pytest.raises(ModelError, match=message):
        load_base(ModelConfig(id=str(folder)), NoQuantization(), device=torch.device("cpu"))


def test_a_base_whose_logits_see_ahead_is_refused_whatever_its_config_says(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(self: Any, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.embed_tokens(input_ids).flip(1))  # type: ignore[arg-type]

    monkeypatch.setattr(transformers.LlamaModel, "forward", backwards)
    with pytest.raises(ModelError, match="each token sees those after it"):
        load_base(ModelConfig(id=str(tiny_llama)), NoQuantization(), device=torch.device("cpu"))


def test_a_decoder_whose_config_does_not_say_so_is_one(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("GPTNeoX", intermediate_size=128, num_attention_heads=4)
    preflight([parse(TrialConfig, trial_of(folder, tmp_path, name="t"))])


def test_quantised_checkpoints_are_refused_by_their_config(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "gptq"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="gptq"):
        preflight([parse(TrialConfig, trial_of(folder, tmp_path, name="t"))])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda at: (at / INDEX).write_text('{"weight_map": {"a": "b"}}'), "No such file"),
    "an index of no files": (lambda at: (at / INDEX).write_text('{"weight_map": [1]}'), "missing, corrupt or"),
    "no index": (lambda at: (at / WHOLE).rename(at / "model-00001-of-00002.safetensors"), f"neither {WHOLE} nor"),
    "cut off": (lambda at: (at / WHOLE).write_bytes((at / WHOLE).read_bytes()[:-9]), "corrupt or truncated"),
    "no tokenizer": (lambda at: [file.unlink() for file in at.glob("tokenizer*")], "no usable tokenizer"),
    "an adapter": (lambda at: (at / "adapter_config.json").write_text("{}"), "holds a model and, by its adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_told_before_anything_starts(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    damage, message = BROKEN[case]
    damage(folder)
    if (folder / INDEX).exists():
        (folder / WHOLE).unlink()
    with pytest.raises(ModelError, match=message):
        preflight([parse(TrialConfig, trial_of(folder, tmp_path, name="t"))])


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_mamba_is_adapted_where_an_adapter_does_something(
    saved: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    heads = {"num_heads": 8, "head_dim": 16, "n_groups": 1} if kind == "Mamba2" else {}
    base = load_base(
        ModelConfig(id=str(saved(kind, state_size=8, **heads))), NoQuantization(), device=torch.device("cpu")
    )
    names = find_target_linears(base.model, "all-linear")
    assert {name.rsplit(".", 1)[-1] for name in names} == ({"in_proj"} if kind == "Mamba2" else {"in_proj", "x_proj"})
    with pytest.raises(ConfigError, match=r"out_proj.*does nothing"):
        find_target_linears(base.model, ["out_proj"])
    trial = parse(TrialConfig, trial_of(tmp_path / kind, tmp_path, name="t"))
    model = peft.get_peft_model(base.model, peft.LoraConfig(target_modules=list_peft_targets(base, trial.method)))  # type: ignore[arg-type]
    model(input_ids=torch.arange(5, 25)[None]).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", FUSED_BY_KERNELS)
def test_what_peft_refuses_is_known(kind: str) -> None:
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    model = torch.nn.Module()
    model.config = transformers.PretrainedConfig()  # type: ignore[assignment]
    model.config.model_type = kind
    for name in FUSED_BY_KERNELS[kind]:
        with pytest.raises(ValueError, match="incompatible"):
            _check_lora_target_modules_mamba(peft.LoraConfig(), model, name)


@pytest.fixture
def mixtral(saved: Callable[..., Path]) -> Path:
    return saved("Mixtral", intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"type": "lora"}, True), ({"type": "dora"}, True), ({"type": "adalora"}, True),
        ({"type": "lora", "target_modules": ["q_proj"]}, False), ({"type": "dora", "experts": False}, False),
        ({"type": "lora", "experts": True}, False),
    ],
)  # fmt: skip
def test_experts_that_all_linear_leaves_out_are_told_with_the_choice(
    mixtral: Path, tmp_path: Path, method: dict[str, Any], told: bool
) -> None:
    base = load_base(ModelConfig(id=str(mixtral)), NoQuantization(), device=torch.device("cpu"))
    trial = parse(TrialConfig, trial_of(mixtral, tmp_path, name="t", method=method))
    built = build_method(trial, num_steps=10)
    built.attach(base)
    for notes in (built.notes, preflight([trial, trial])):
        choices = [note for note in notes if "experts" in note and "stay unchanged" in note]
        assert len(choices) == told
        assert all("gate_up_proj" in note and "method.experts=true" in note for note in choices)


def test_a_study_tells_of_experts_before_ray(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ray_started(*_: Any) -> None:
        raise DataError("Ray was started")

    monkeypatch.setattr(cluster, "connect", ray_started)
    space = [{"optim": {"learning_rate": {"choice": [1e-4, 1e-3]}}}]
    study = {"name": "s", "trial": trial_of(mixtral, tmp_path / "out"), "space": space}
    events: list[Event] = []
    with pytest.raises(DataError, match="Ray was started"):
        tune(parse(StudyConfig, study), on_event=events.append)
    told = [event.message for event in events if isinstance(event, WarningRaised) and "experts" in event.message]
    assert len(told) == 1
    assert "method.experts=true" in told[0]


def test_experts_that_a_model_has_not_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    trial = parse(TrialConfig, trial_of(tiny_llama, tmp_path, name="t", method={"type": "lora", "experts": True}))
    with pytest.raises(ConfigError, match=r"method\.experts: this model has no experts"):
        preflight([trial])


def test_a_host_has_no_place_for_experts(mixtral: Path, tmp_path: Path) -> None:
    trial = parse(TrialConfig, trial_of(mixtral, tmp_path, name="t", method={"type": "lora", "experts": True}))
    base = load_base(trial.model, trial.quantization, device=torch.device("cpu"))
    data = load_data(trial.data, base.tokenizer)
    host = TrialHost(base, data, num_slots=1, max_rank=16, token_budget=4096, with_magnitudes=False)
    with pytest.raises(IncompatibleError, match=r"method\.experts=true does not fit this host"):
        host.admit("t", trial)
