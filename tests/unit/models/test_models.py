"""Base models: where they come from, how they are held, what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankloom.config.model import Int8, ModelConfig, Nf4, NoQuantization
from rankloom.errors import ConfigError, ModelError
from rankloom.models import find_target_linears, fingerprint, load_base, load_tokenizer, locate_folder

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_base_is_frozen_whole_and_padded(tiny_llama: Path) -> None:
    base = load_base(ModelConfig(id=str(tiny_llama)), NoQuantization(), device=CPU)
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(IDS).logits
    assert torch.equal(base.model(IDS).logits, expected)
    assert base.pad_id == base.tokenizer.pad_token_id


def test_the_fingerprint_is_of_the_stored_weights(tiny_llama: Path, tmp_path: Path) -> None:
    config = ModelConfig(id=str(tiny_llama))
    plain = load_base(config, NoQuantization(), device=CPU)
    assert plain.fingerprint == load_base(config, Nf4(), device=CPU).fingerprint
    assert plain.fingerprint == load_base(config, NoQuantization(), device=CPU, dtype=torch.bfloat16).fingerprint
    other = copy_of(tiny_llama, tmp_path)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name] + 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(other) != plain.fingerprint


@pytest.mark.parametrize(("quantization", "close"), [(Int8(), 0.15), (Nf4(), 0.8), (Nf4(double=False), 0.8)])
def test_quantised_bases_are_near_the_plain_one(
    quantization: Int8 | Nf4, close: float, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model("qwen")
    plain = load_base(ModelConfig(id=str(folder)), NoQuantization(), device=CPU).model(IDS).logits
    quantised = load_base(ModelConfig(id=str(folder)), quantization, device=CPU)
    kinds = {type(m.weight).__name__ for m in quantised.model.modules() if type(m).__name__.startswith("Linear")}
    assert kinds & {"Int8Params", "Params4bit"}
    difference = (quantised.model(IDS).logits - plain).norm() / plain.norm()
    assert 0 < difference < close


def test_an_nf4_base_passes_gradients_on_after_an_evaluation(tiny_llama: Path) -> None:
    """Some CPU kernels repack the weights on the first forward in eval mode, and then give no gradient to the input."""
    base = load_base(ModelConfig(id=str(tiny_llama)), Nf4(), device=CPU)
    embedded = base.model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    gradients = []
    for _ in range(2):
        base.model.train()
        embedded.grad = None
        base.model(inputs_embeds=embedded).logits.square().mean().backward()
        assert embedded.grad is not None
        gradients.append(embedded.grad.clone())
        base.model.eval()
        with torch.no_grad():
            base.model(IDS)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("architecture", "per_layer", "one"), [("llama", 7, "q_proj"), ("qwen", 7, "down_proj"), ("gpt2", 4, "c_attn")]
)
def test_all_linear_is_every_linear_but_the_head(
    architecture: str, per_layer: int, one: str, tiny_model: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    found = find_target_linears(model, "all-linear")
    assert len(found) == 2 * per_layer
    assert not any("head" in name for name in found)
    assert len(find_target_linears(model, [one])) == 2
    assert find_target_linears(model, rf".*\.1\..*{one}") == [n for n in found if ".1." in n and n.endswith(one)]


@pytest.mark.parametrize("targets", [".*proj", ["q_proj"]])
def test_a_model_without_linear_layers_has_no_targets(targets: str | list[str], tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match=r"method\.target_modules: LlamaForCausalLM has no linear layers"):
        find_target_linears(model, targets)


def test_pickled_weights_are_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.id"):
        load_base(ModelConfig(id=str(folder)), NoQuantization(), device=CPU)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ({"id": "builtin:nothing"}, ConfigError, "builtin:smollm2"),
        ({"id": "/nowhere/at/all"}, ModelError, "no folder or file"),
        ({"id": "~nobody-of-this-name/base"}, ModelError, "no folder or file"),
        ({"id": "x" * 300}, ModelError, "neither a folder nor a valid hub id"),
        ({"id": "nowhere.gguf"}, ModelError, "no file"),
        ({"id": "a/b/c/d"}, ModelError, "hub id"),
    ],
)
def test_a_model_that_is_not_there_is_named(model: dict[str, str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_tokenizer(ModelConfig(**model))


def test_a_revision_means_nothing_for_a_folder(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.revision"):
        load_tokenizer(ModelConfig(id=str(tiny_llama), revision="main"))


def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path / "rankloom-cache"))
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"model\.gguf"):
        locate_folder(ModelConfig(id=str(broken)))
    left = [p for p in (tmp_path / "rankloom-cache" / "models").iterdir() if p.suffix != ".lock"]
    assert left == []
