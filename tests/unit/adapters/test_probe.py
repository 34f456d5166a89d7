"""A probe tells a working adapter from one that is broken, silent or on another base; a merge is the same function."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankloom.adapters.export import merge_adapter
from rankloom.adapters.extract import extract_adapter
from rankloom.adapters.probe import check_probe, load_recorded_base, record_probe, verify_probe, write_probe
from rankloom.adapters.weights import load_adapter
from rankloom.errors import RegistryError
from rankloom.models import fingerprint
from rankloom.registry.record import BaseModelRef, Record, Versions

IDS = [7, 50, 101, 9, 222]


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([IDS])).logits


def record_of(base: Path, quantization: str = "none", **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "method": "lora",
        "base": BaseModelRef(id=str(base), fingerprint=fingerprint(base), quantization=quantization),  # type: ignore[arg-type]
        "servable": "itself",
        "trial": {"name": "t", "model": {"id": str(base)}, "quantization": {"type": quantization}},
        "data_fingerprint": None,
        "scorecard": None,
        "versions": Versions(rankloom="0", torch="0", transformers="0", peft="0"),
        "name": "t",
        "version": 1,
        "created": datetime.datetime.now(datetime.UTC),
        "files": {},
    }
    return Record(**fields | changes)


def published(base: Path, folder: Path, quantization: str = "none", scale: float = 0.1, **settings: Any) -> Record:
    """A LoRA folder with its probe, as it is when it has just been trained."""
    record = record_of(base, quantization)
    targets = settings.pop("target_modules", ["q_proj", "down_proj"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)
    trained = peft.get_peft_model(load_recorded_base(record, torch.float32).model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=scale, generator=generator)
    trained.save_pretrained(folder, save_embedding_layers=False)
    record_probe(load_adapter(load_recorded_base(record, torch.float32).model, folder), IDS, folder)
    return record


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_good_adapter_is_verified(tiny_llama: Path, tmp_path: Path, quantization: str) -> None:
    record = published(tiny_llama, tmp_path, quantization)

    report = verify_probe(tmp_path, record)

    assert report.max_difference < 1e-4
    assert report.distance_from_base > 0.01


def test_an_adapter_from_elsewhere_has_no_trial(tiny_llama: Path, tmp_path: Path) -> None:
    published(tiny_llama, tmp_path)
    assert verify_probe(tmp_path, record_of(tiny_llama, trial={})).max_difference < 1e-4


def test_a_probe_in_bf16_allows_for_its_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    record = published(tiny_llama, tmp_path)
    probe = load_file(tmp_path / "probe.safetensors")
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in probe.items()}
    save_file(rounded, tmp_path / "probe.safetensors")

    report = check_probe(load_adapter(plain(tiny_llama), tmp_path), tmp_path, quantization="none")
    assert report.max_difference > 1e-3  # what would be refused of an fp32 probe
    verify_probe(tmp_path, record)


def test_an_adapter_that_does_nothing_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    record = published(tiny_llama, tmp_path, scale=0.0)
    with pytest.raises(RegistryError, match="does nothing"):
        verify_probe(tmp_path, record)


def test_a_changed_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    record = published(tiny_llama, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t * 1.2 for name, t in load_file(file).items()}, file)
    with pytest.raises(RegistryError, match="differ by"):
        verify_probe(tmp_path, record)


def test_another_base_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model("llama")
    record = published(base, tmp_path / "a")
    other = plain(base)
    other.model.norm.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    moved = record.model_copy(update={"trial": {"model": {"id": str(tmp_path / "other")}}})
    with pytest.raises(RegistryError, match="fingerprint"):
        verify_probe(tmp_path / "a", moved)


def test_a_broken_probe_is_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    record = published(tiny_llama, tmp_path)
    file = tmp_path / "probe.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(RegistryError, match=r"probe\.safetensors: corrupt or truncated"):
        verify_probe(tmp_path, record)
    file.unlink()
    with pytest.raises(RegistryError, match=r"probe\.safetensors: missing"):
        verify_probe(tmp_path, record)
    for ids, size, reason in (([10**6], 400, "input_ids"), ([], 400, "input_ids"), ([1], 3, "logits")):
        write_probe(tmp_path, ids, torch.zeros(size), torch.zeros(size))
        with pytest.raises(RegistryError, match=reason):
            verify_probe(tmp_path, record)
    recorded = load_probe_logits(whole, tmp_path)
    for name, tensor in (
        ("input_ids", torch.ones(3, dtype=torch.bool)),
        ("adapter_logits", recorded.to(torch.float8_e4m3fn)),
        ("base_logits", recorded.to(torch.complex64)),
    ):
        save_file(
            {"input_ids": torch.tensor(IDS), "adapter_logits": recorded, "base_logits": recorded + 1, name: tensor},
            file,
        )
        with pytest.raises(RegistryError, match=rf"{name} is missing or not a vector of numbers \(allowed: "):
            verify_probe(tmp_path, record)
    write_probe(tmp_path, IDS, torch.full_like(load_probe_logits(whole, tmp_path), float("nan")), torch.zeros(3))
    with pytest.raises(RegistryError, match="differ by nan"):
        verify_probe(tmp_path, record)


def load_probe_logits(whole: bytes, folder: Path) -> torch.Tensor:
    (folder / "whole.safetensors").write_bytes(whole)
    return load_file(folder / "whole.safetensors")["adapter_logits"]


# merging


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("qwen", {"use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),  # one end of a tied pair
        ("llama", {"target_modules": ["lm_head"]}),
    ],
)
def test_merged_is_base_plus_adapter(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    base = tiny_model(architecture)
    record = published(base, tmp_path / "a", **settings)

    merge_adapter(tmp_path / "a", record, tmp_path / "merged")

    expected = logits(peft.PeftModel.from_pretrained(plain(base), tmp_path / "a"))
    assert (logits(plain(base)) - expected).abs().max() > 0.01
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), expected, atol=2e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|end|>"
    assert {file.name for file in tmp_path.iterdir()} == {"a", "merged"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_extracted_tied_pair_is_merged_once(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    base = tiny_model(architecture)
    trained = plain(base)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    extract_adapter(trained, base, 64, tmp_path / "a", str(base))

    merge_adapter(tmp_path / "a", record_of(base), tmp_path / "merged")

    merged = plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trained), atol=3e-4, rtol=1e-4)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_nf4_is_merged_onto_what_it_was_tuned_on(tiny_llama: Path, tmp_path: Path) -> None:
    record = published(tiny_llama, tmp_path / "a", "nf4")

    merge_adapter(tmp_path / "a", record, tmp_path / "merged")

    expected = logits(load_adapter(load_recorded_base(record, torch.float32).model, tmp_path / "a"))
    merged = logits(plain(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    on_fp32 = logits(load_adapter(plain(tiny_llama), tmp_path / "a"))
    assert (on_fp32 - expected).abs().max() > 100 * (merged - expected).abs().max()


def test_merging_keeps_the_type_the_base_is_stored_in(tiny_llama: Path, tmp_path: Path) -> None:
    plain(tiny_llama).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    record = published(tmp_path / "base", tmp_path / "a")
    merge_adapter(tmp_path / "a", record, tmp_path / "merged")
    types = {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert types == {torch.bfloat16}


def test_merging_overwrites_nothing_and_leaves_nothing_half_written(tiny_llama: Path, tmp_path: Path) -> None:
    record = published(tiny_llama, tmp_path / "a")
    (tmp_path / "there").mkdir()
    with pytest.raises(RegistryError, match="exists already"):
        merge_adapter(tmp_path / "a", record, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="can't be written"):
        merge_adapter(tmp_path / "a", record, tmp_path / "file" / "merged")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "there", "file"}
