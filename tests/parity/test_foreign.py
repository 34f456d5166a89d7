"""PEFT's folders as they come: published, verified, and served with PEFT's tokens; or refused by tensor."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    MixtralConfig,
    PreTrainedModel,
)
from typer.testing import CliRunner

from rankloom.adapters.foreign import write_plain
from rankloom.adapters.patterns import resolve_patterns
from rankloom.adapters.weights import load_adapter
from rankloom.cli.adapters import app
from rankloom.errors import RegistryError
from rankloom.paths import get_registry_root
from served import completed, engine_on, plain, serving, with_peft

PROMPT = (7, 50, 101, 9)
QV = ["q_proj", "v_proj"]
Q1 = "model.layers.1.self_attn.q_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Edit = Callable[[dict[str, Any]], Any]


def saved(base: Path, folder: Path, edit: Edit | None = None, *, drawn: bool = True, **config: Any) -> Path:
    """What PEFT's save_pretrained writes for a LoRA with random weights, its config then edited."""
    settings = {"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(plain(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.data.mul_(1 if drawn else 0.9).add_(0.15 * torch.randn(parameter.shape, generator=generator))
        elif "modules_to_save" in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if edit:
        change_config(folder, edit)
    return folder


def change_config(folder: Path, edit: Edit) -> None:
    file = folder / CONFIG
    tree = json.loads(file.read_text())
    edit(tree)
    file.write_text(json.dumps(tree))


def change_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def cli(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def sets(**values: Any) -> Edit:
    return lambda tree: tree.update(values)


SERVED: dict[str, dict[str, Any]] = {
    "no task_type": dict(task_type=None),
    "another task_type": dict(edit=sets(task_type="SEQ_2_SEQ_LM")),
    "auto_mapping": dict(edit=sets(auto_mapping={"base_model_class": "X", "parent_library": "os", "fixed": True})),
    "head": dict(on="qwen", target_modules=[*QV, "lm_head"]),
    "tied head": dict(target_modules=[*QV, "lm_head"]),
    "embeddings": dict(target_modules=[*QV, "embed_tokens"]),
    "both, tied": dict(target_modules=[*QV, "embed_tokens"], ensure_weight_tying=True),
    "embeddings kept, tied": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "embeddings kept alone": dict(modules_to_save=["embed_tokens"]),
    "head kept": dict(on="qwen", modules_to_save=["lm_head"]),
    "norms kept": dict(modules_to_save=["norm"]),
    "one layer": dict(layers_to_transform=[1]),
    "one layer by pattern": dict(layers_to_transform=1, layers_pattern="layers"),
    "excluded": dict(exclude_modules=["layers.0.self_attn.q_proj"]),
    "excluded by expression": dict(exclude_modules=r".*\.0\..*"),
    "targets by expression": dict(target_modules=r".*self_attn\.(q_proj|v_proj)"),
    "all-linear": dict(target_modules="all-linear"),
    "target parameters": dict(target_parameters=["k_proj.weight"], target_modules=QV),
    "no target_modules": dict(edit=lambda tree: tree.pop("target_modules")),
    "a target that the base has not": dict(edit=lambda tree: tree["target_modules"].append("query_key_value")),
    "patterns": dict(
        rank_pattern={f"^{Q1}": 8, "v_proj": 3}, alpha_pattern={r".*\.0\.self_attn\.q_proj": 5, "q_proj": 20}
    ),
    "rsLoRA with patterns": dict(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 2.5}),
    "eva": dict(edit=sets(init_lora_weights="eva", eva_config={"rho": 2.0})),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "pissa": dict(init_lora_weights="pissa", drawn=False),
    "pissa above a width": dict(init_lora_weights="pissa", r=48, rank_pattern={"q_proj": 6}, drawn=False),
    "olora with rsLoRA": dict(init_lora_weights="olora", use_rslora=True, drawn=False),
    "pissa with DoRA": dict(init_lora_weights="pissa", use_dora=True, drawn=False),
    "DoRA": dict(use_dora=True),
    "biases": dict(lora_bias=True),
    "bias all": dict(bias="all"),
    "gpt2": dict(on="gpt2", target_modules=["c_attn", "c_fc", "wte"]),
    "gpt2, its default targets": dict(on="gpt2", target_modules=None),
    "settings of the future": dict(edit=sets(shiny=True, peft_version="9.9")),
    "settings that old versions have not": dict(
        edit=lambda tree: [tree.pop(key) for key in (*sorted(tree),) if tree[key] in (None, False, {}, [])]
    ),
}


@pytest.mark.parametrize("kind", SERVED)
def test_the_tokens_are_pefts(kind: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = dict(SERVED[kind])
    base = tiny_model(config.pop("on", "llama"))
    folder = saved(base, tmp_path / "a", **config)
    cli("publish", folder, "--name", "a", "--base", base)
    cli("verify", "a")
    cli("export", "a", "--output", tmp_path / "out")
    (tmp_path / "out" / "record.json").unlink()

    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(plain(base), folder).eval()(ids).logits
        exported = peft.PeftModel.from_pretrained(plain(base), tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(exported, expected, atol=5e-4, rtol=1e-4)
    assert (expected - plain(base)(ids).logits).abs().max() > 0.01

    engine = engine_on(base, Path(get_registry_root()))
    _, tokens, _ = serving(engine, lambda: completed(engine, PROMPT, "a@1"))
    assert tokens == with_peft(base, folder, PROMPT, len(tokens))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA on an embedding": (
        dict(target_modules=[*QV, "embed_tokens"], use_dora=True),
        r"tensor \S+embed_tokens.lora_magnitude_vector is a DoRA on an embedding.*train without it in target_modules",
    ),
    "single tokens": (dict(trainable_token_indices=[1, 2]), r"tensor \S+trainable_tokens_delta trains single tokens"),
    "an activation sequence": (dict(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens: \[1, 2\].*merge it"),
    "a replicated layer": (dict(edit=sets(layer_replication=[[0, 2], [0, 2]])), "layer_replication"),
    "Megatron": (dict(edit=sets(megatron_config={"a": 1}, megatron_core="os")), "megatron_config"),
    "CorDA, not converted": (
        dict(edit=sets(init_lora_weights="corda")),
        r"init_lora_weights: 'corda'.*for_weight_conv",
    ),
    "an unknown beginning": (dict(edit=sets(init_lora_weights={"a": 1})), r"init_lora_weights: .*\(given \{'a': 1\}\)"),
    "a config of other layers": (
        dict(edit=sets(layers_to_transform=[0])),
        r"layers\.1\S+ is none that PEFT would load",
    ),
    "a config of other targets": (
        dict(edit=sets(target_modules="k_.*")),
        r"lora_A.weight is none that PEFT would load",
    ),
    "another rank": (dict(edit=sets(r=8)), r"lora_A.weight has shape \[4, 64\].*\[8, 64\]"),
    "magnitudes without DoRA": (
        dict(use_dora=True, edit=sets(use_dora=False)),
        r"lora_magnitude_vector is none that PEFT",
    ),
    "DoRA without magnitudes": (dict(edit=sets(use_dora=True)), r"lora_magnitude_vector is missing or empty"),
    "kept modules that are not there": (
        dict(edit=sets(modules_to_save=["norm"])),
        r"norm.weight is missing.*modules_to",
    ),
    "a slow expression": (
        dict(edit=sets(target_modules=r"(.|[a-z])*[A-Z]")),
        r"target_modules: .*takes longer than",
    ),
    "a slow key": (dict(edit=sets(alpha_pattern={r"(.|[a-z])*[A-Z]": 3})), r"alpha_pattern: .* takes longer than 1 s"),
    "no expression": (dict(edit=sets(rank_pattern={"(": 3})), r"rank_pattern: '\(\.\*.* is not a regular expression"),
    "many expressions": (
        dict(edit=sets(rank_pattern={f"q.*{i}": 3 for i in range(2000)})),
        r"2000 keys.*allowed: 1000",
    ),
    "an endless rank": (dict(edit=sets(r=10**12)), r"has shape \[4, 64\]"),
    "an endless rank of PiSSA": (dict(edit=sets(r=10**12, init_lora_weights="pissa")), r"has shape \[4, 64\]"),
    "no number": (dict(edit=sets(lora_alpha=float("nan"))), "lora_alpha: .*finite"),
    "a text": (dict(edit=sets(r="8")), r"r: .*valid integer \(given '8'\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_names_what_it_is_and_what_to_do(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    config, told = REFUSED[kind]
    folder = saved(tiny_llama, tmp_path / "a", **config)
    with pytest.raises(RegistryError, match=rf"(?s)^{re.escape(str(folder))}/.*{told}"):
        cli("publish", folder, "--name", "a", "--base", tiny_llama)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        peft.AdaLoraConfig(target_modules=QV, total_step=10, task_type="CAUSAL_LM"),
        peft.LoHaConfig(target_modules=QV, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_of_peft_are_refused(config: peft.PeftConfig, tiny_llama: Path, tmp_path: Path) -> None:
    peft.get_peft_model(plain(tiny_llama), config).save_pretrained(tmp_path / "a")
    kind = config.peft_type.value  # type: ignore[union-attr]
    with pytest.raises(RegistryError, match=rf"tensor \S+ belongs to {kind}, and only LoRA and DoRA.*merge it"):
        cli("publish", tmp_path / "a", "--name", "a", "--base", tiny_llama)


class _WithConvolution(nn.Module):
    """What a base may hold beside linear layers."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base, self.conv, self.config = base, nn.Conv1d(4, 4, 1), base.config


def test_a_convolution_is_refused_by_its_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    model: Any = _WithConvolution(plain(tiny_llama))
    config = peft.LoraConfig(r=2, target_modules=["conv", "q_proj"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a", save_embedding_layers=False)
    with pytest.raises(RegistryError, match=r"tensor \S+conv.lora_A.weight belongs on conv, a Conv1d.*target_modules"):
        write_plain(model, tmp_path / "a", tmp_path / "plain", "base")


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_as_peft_has_them(tmp_path: Path, kind: str, targets: list[str]) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    lora = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=targets, rank_pattern={"layers.1.mlp.experts.down_proj": 5},
        alpha_pattern={"layers.0.mlp.experts.down_proj": 3}, use_rslora=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), lora)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    theirs.save_pretrained(tmp_path / "a")
    write_plain(model, tmp_path / "a", tmp_path / "plain", "base")
    ids = torch.arange(5, 20)[None]
    expected, before = theirs(input_ids=ids).logits, model(input_ids=ids).logits
    ours = load_adapter(copy.deepcopy(model), tmp_path / "plain")
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in list(tensors)[:2]:
        fewer = {key: value for key, value in tensors.items() if key != name}
        save_file(fewer, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(RegistryError, match="is missing or empty"):
            write_plain(model, tmp_path / "a", tmp_path / "other", "base")


def test_experts_that_no_setting_names_are_refused_by_their_tensor(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    settings |= {"target_parameters": None, "target_modules": ["q_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        RegistryError, match=r"lora_A.weight belongs on \S+experts\S*, a MixtralExperts, and only linear"
    ):
        write_plain(model, tmp_path / "a", tmp_path / "plain", "base")


def test_weights_of_the_base_beside_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    """Equal ones are left out, also where they are of another type; no other is left out or served in silence."""
    head, name = plain(tiny_llama).get_input_embeddings().weight.detach(), "base_model.model.lm_head.weight"
    for number, (tensor, told) in enumerate((
        (head, None),
        (head.half(), None),
        (head.half().float(), None),  # as where a quantised base is prepared for training
        (head.bfloat16().float(), None),
        (head + 0.01, "lm_head.weight is not the base's weight.*modules_to_save.*--base"),
        (head[:-1], r"lm_head.weight has shape.*another vocabulary.*--base"),
    )):  # fmt: skip
        folder = saved(tiny_llama, tmp_path / str(number))
        change_tensors(folder, lambda tensors, tensor=tensor: tensors.update({name: tensor.contiguous().clone()}))
        if told is None:
            cli("publish", folder, "--name", "a")
            continue
        with pytest.raises(RegistryError, match=rf"(?s){told}"):
            cli("publish", folder, "--name", "a")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return saved(tiny_llama, tmp_path / "a")


def published(version: int = 1) -> Path:
    return Path(get_registry_root()) / "a" / str(version)


def test_out_of_a_hub_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    cli("publish", snapshot, "--name", "a")
    assert not any(file.is_symlink() for file in published().iterdir())
    with pytest.raises(RegistryError, match=rf"there is one in snapshots/{'0' * 40}: give that folder"):
        cli("publish", cache, "--name", "a")
    (tmp_path / "shortcut").symlink_to(snapshot)
    cli("publish", tmp_path / "shortcut", "--name", "a")


def test_out_of_a_clone_or_a_trainers_output(folder: Path) -> None:
    """What lies beside is never read."""
    (folder / ".git").mkdir()
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (folder / "checkpoint-10").mkdir()
    shutil.copy(folder / CONFIG, folder / "checkpoint-10")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "adapter_model.bin"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    (folder / "tokenizer.json").symlink_to("/nowhere")
    (folder / "a\x1b[31mname").touch()
    os.mkfifo(folder / "pipe.json")
    told = cli("publish", folder, "--name", "a")
    assert "not read, and not published: .git, .gitattributes, a\\x1b[31mname, adapter_model.bin, checkpoint-10" in told
    assert {file.name for file in published().iterdir()} == {
        "README.md", "probe.safetensors", "record.json", CONFIG, WEIGHTS
    }  # fmt: skip
    (folder / CONFIG).unlink()
    with pytest.raises(RegistryError, match="there is one in checkpoint-10: give that folder"):
        cli("publish", folder, "--name", "a")


def _replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"elsewhere-{name}")
        make(folder / name)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_replace(WEIGHTS, lambda f: (f.parent / "adapter_model.bin").touch()), "is a pickle.*safe_serialization=True"),
        (_replace(WEIGHTS, lambda f: f.symlink_to(f"../elsewhere-{WEIGHTS}")), "is a link out of the folder"),
        (_replace(CONFIG, lambda f: f.symlink_to("/etc/passwd")), "is a link out of the folder"),
        (_replace(CONFIG, lambda f: f.symlink_to(f)), "is not a regular file"),
        (_replace(CONFIG, lambda f: f.symlink_to(f.parent / "nothing")), "is not a regular file"),
        (_replace(CONFIG, os.mkfifo), "is not a regular file"),
        (_replace(WEIGHTS, Path.mkdir), "is not a regular file"),
        (_replace(CONFIG, lambda f: f.write_bytes(b" " * (2**24 + 1))), "larger than"),
        (_replace(CONFIG, lambda f: f.write_text("[" * 100_000)), "not JSON"),
        (_replace(CONFIG, lambda f: f.write_text('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}")), "not JSON"),
        (_replace(WEIGHTS, lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1")), "corrupt or trunc"),
    ],
)
def test_files_that_are_none(change: Callable[[Path], None], told: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(RegistryError, match=rf"^{re.escape(str(folder))} .*{told}") as caught:
        cli("publish", folder, "--name", "a")
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.update({k: v * float("nan") for k, v in t.items()}), "not finite numbers"),
        (lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), "not finite numbers"),
        (lambda t: t.pop(f"base_model.model.{Q1}.lora_A.weight"), rf"{Q1}.lora_A.weight is missing"),
        (lambda t: t.update({f"base_model.model.{Q1}.lora_A.weight": torch.empty(0)}), "missing or empty.*save"),
        (lambda t: t.update(other=torch.ones(1)), "tensor other does not begin with base_model.model"),
        (lambda t: t.update({f"base_model.model.{Q1}.lora_C.weight": torch.ones(1)}), "not a part of a LoRA or DoRA"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(1)}), "score.weight has no place in the base"),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}), "belongs on x, which the"),
        (lambda t: [t.pop(key) for key in (*t,)] and t.update(
            {"base_model.model.model.norm.weight": torch.ones(64)}), "holds no LoRA"),
    ],
)  # fmt: skip
def test_tensors_that_have_no_place(edit: Edit, told: str, folder: Path) -> None:
    change_tensors(folder, edit)
    with pytest.raises(RegistryError, match=rf"(?s)^{re.escape(str(folder))}/{WEIGHTS}: .*{told}"):
        cli("publish", folder, "--name", "a")


def test_factors_in_eight_bits_are_read(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}))
    cli("publish", folder, "--name", "a")
    cli("verify", "a")


def test_an_adapter_that_does_nothing_is_told_by_its_own_folder(tiny_llama: Path, tmp_path: Path) -> None:
    peft.get_peft_model(plain(tiny_llama), peft.LoraConfig(target_modules=QV)).save_pretrained(tmp_path / "a")
    with pytest.raises(RegistryError, match=rf"^{re.escape(str(tmp_path / 'a'))}: .*does nothing"):
        cli("publish", tmp_path / "a", "--name", "a", "--base", tiny_llama)


def test_sampled_pissa_is_published_and_told(tiny_llama: Path, tmp_path: Path) -> None:
    folder = saved(tiny_llama, tmp_path / "a", init_lora_weights="pissa_niter_4", drawn=False)
    assert "gives other logits on each loading" in cli("publish", folder, "--name", "a")
    assert len(load_file(published() / WEIGHTS)[f"base_model.model.{Q1}.lora_A.weight"]) == 8


def test_names_of_an_earlier_transformers_are_those_of_this_one(tmp_path: Path) -> None:
    """As `PeftModel.from_pretrained` renames them."""
    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=64,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=63, boi_token_index=62, eoi_token_index=61,
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config).eval()
    target = r".*language_model.*q_proj"
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=target)).save_pretrained(tmp_path / "a")
    now, before = "base_model.model.model.language_model.", "base_model.model.language_model.model."

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(now, before)] = tensors.pop(name)

    change_tensors(tmp_path / "a", rename)
    write_plain(model, tmp_path / "a", tmp_path / "plain", "base")
    assert all(name.startswith(now) for name in load_file(tmp_path / "plain" / WEIGHTS))


NAMES = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.11.q_proj", "model.layers.1.v_proj", "q_proj"]


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1, "layers.1.q_proj": 2},
        {"layers.1.q_proj": 2, "q_proj": 1},
        {"^q_proj": 1, "^model.layers.1.q_proj": 2},
        {r".*\.1\..*": 1, "q_proj": 2},
        {"v_proj": 1, r"layers\.\d\d\.q_proj": 2, "(q|v)_proj": 3},
        {"proj": 1, "1.q_proj": 2},
        {},
    ],
)
def test_patterns_match_as_pefts_do(patterns: dict[str, int]) -> None:
    expected = [patterns.get(get_pattern_key(list(patterns), name), 0) for name in NAMES]
    found = resolve_patterns(patterns, NAMES)
    assert [found.get(name, 0) for name in NAMES] == expected
    assert [found.get(get_pattern_key(found.keys(), name), 0) for name in NAMES] == expected  # as PEFT asks it


def test_no_layer_is_tried_against_each_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 20,000 keys PEFT takes a second for each layer."""
    tried = []
    monkeypatch.setattr("peft.tuners.lora.model.get_pattern_key", lambda keys, name: tried.extend(keys) or name)
    keys = {f"model.layers.{number}.other": 4 for number in range(20_000)}
    change_config(folder, sets(rank_pattern=keys | {"^x": 4}, alpha_pattern=keys))
    cli("publish", folder, "--name", "a")
    change_config(published(), sets(rank_pattern=keys, alpha_pattern=keys))
    load_adapter(plain(Path(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"])), published())
    assert not tried
