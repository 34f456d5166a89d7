"""Every result becomes a folder that PEFT itself loads and that gives the trained model's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankloom.adapters.extract import convert_adalora, extract_adapter
from rankloom.adapters.weights import load_adapter
from rankloom.config.model import ModelConfig, Nf4
from rankloom.errors import ModelError, RegistryError, TrialError
from rankloom.models import load_base

IDS = torch.tensor([[7, 50, 101, 9, 222, 13, 64, 5]])
HIDDEN = 64  # of the tiny models: the rank at which nothing is lost


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def change(model: PreTrainedModel, names: str = "", scale: float = 0.02) -> PreTrainedModel:
    """Stand-in for training: every parameter whose name holds `names` moves, at full rank."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if names in name:
            parameter.add_(scale * noise)
    return model


def with_peft(base: Path, adapter: Path) -> torch.Tensor:
    """What a user of PEFT gets, without any of our code."""
    return logits(peft.PeftModel.from_pretrained(plain(base), adapter))


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_at_full_rank_the_adapter_is_the_trained_model(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    base = tiny_model(architecture)
    trained = change(plain(base))

    energy = extract_adapter(trained, base, HIDDEN, tmp_path / "a", "the/base")

    assert energy == pytest.approx(1, abs=1e-5)
    expected = logits(trained)
    assert (logits(plain(base)) - expected).abs().max() > 0.1
    torch.testing.assert_close(with_peft(base, tmp_path / "a"), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_adapter(plain(base), tmp_path / "a")), expected, atol=2e-4, rtol=1e-4)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "the/base"
    assert config["r"] == config["lora_alpha"]


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_more_rank_keeps_more(tiny_model: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    base = tiny_model(architecture)
    trained = change(plain(base), "weight")
    ranks = [2, 8, 32]

    energies = [extract_adapter(trained, base, rank, tmp_path / str(rank), "b") for rank in ranks]

    assert 0 < energies[0] < energies[1] < energies[2] < 1
    expected = logits(trained)
    errors = [(with_peft(base, tmp_path / str(rank)) - expected).abs().mean() for rank in ranks]
    assert errors[2] < errors[0]


def test_a_tied_embedding_is_one_difference_on_both_ends(tiny_llama: Path, tmp_path: Path) -> None:
    trained = change(plain(tiny_llama), "embed_tokens")

    extract_adapter(trained, tiny_llama, HIDDEN, tmp_path, "b")

    assert {name.rsplit(".lora", 1)[0] for name in load_file(tmp_path / "adapter_model.safetensors")} == {
        "base_model.model.model.embed_tokens",
        "base_model.model.lm_head",
    }
    torch.testing.assert_close(with_peft(tiny_llama, tmp_path), logits(trained), atol=1e-4, rtol=1e-4)


def test_only_what_changed_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    trained = change(plain(tiny_llama), "layers.1.mlp")

    extract_adapter(trained, tiny_llama, 4, tmp_path, "b")

    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert len(names) == 6
    assert all(".layers.1.mlp." in name and ".lora_" in name for name in names)


def test_a_low_rank_difference_needs_only_its_rank(tiny_llama: Path, tmp_path: Path) -> None:
    trained = plain(tiny_llama)
    weight = trained.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1]) * 0.05)

    assert extract_adapter(trained, tiny_llama, 3, tmp_path, "b") == pytest.approx(1, abs=1e-6)

    torch.testing.assert_close(with_peft(tiny_llama, tmp_path), logits(trained), atol=1e-4, rtol=1e-4)


def test_a_bias_is_exact_where_its_weight_stayed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model("gpt2")
    trained = change(plain(base), "c_fc.bias", scale=0.5)

    assert extract_adapter(trained, base, 1, tmp_path, "b") == pytest.approx(1)

    torch.testing.assert_close(with_peft(base, tmp_path), logits(trained), atol=1e-5, rtol=1e-5)


def test_large_matrices_are_sampled(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = change(plain(tiny_llama), "mlp")
    exact = extract_adapter(trained, tiny_llama, 8, tmp_path / "exact", "b")
    monkeypatch.setattr("rankloom.adapters.extract.FULL_SVD_UP_TO", {"cpu": 16})
    state = torch.get_rng_state()

    sampled = extract_adapter(trained, tiny_llama, 8, tmp_path / "sampled", "b")

    assert sampled == pytest.approx(exact, rel=0.01)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("prefixed", [True, False])
def test_reads_sharded_bases_and_those_without_the_prefix(
    tiny_model: Callable[..., Path], tmp_path: Path, prefixed: bool
) -> None:
    source = tiny_model("gpt2")
    trained = change(plain(source), "mlp")
    base = tmp_path / "base"
    if prefixed:
        plain(source).save_pretrained(base, max_shard_size="50KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    else:  # as GPT-2 lies on the hub
        plain(source).transformer.save_pretrained(base)
        assert "h.0.mlp.c_fc.weight" in load_file(base / "model.safetensors")

    assert extract_adapter(trained, base, HIDDEN, tmp_path / "a", "b") == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(with_peft(source, tmp_path / "a"), logits(trained), atol=1e-4, rtol=1e-4)


def test_a_base_held_in_fewer_bits_is_compared_as_it_was_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    untouched = plain(tiny_llama).to(torch.bfloat16)
    with pytest.raises(TrialError, match="changed no weight"):
        extract_adapter(untouched, tiny_llama, 4, tmp_path, "b")


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    diverged = plain(tiny_llama)
    diverged.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TrialError, match=r"layers\.0\.mlp\.up_proj.*diverged"):
        extract_adapter(diverged, tiny_llama, 4, tmp_path / "a", "b")

    stored = load_file(tiny_llama / "model.safetensors")
    del stored["model.norm.weight"]
    (tmp_path / "base").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "base")
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        extract_adapter(change(plain(tiny_llama)), tmp_path / "base", 4, tmp_path / "a", "b")

    (tmp_path / "file").write_text("")
    with pytest.raises(TrialError, match="can't be written"):
        extract_adapter(change(plain(tiny_llama)), tiny_llama, 4, tmp_path / "file" / "a", "b")


def adalora_on(base: PreTrainedModel, targets: list[str]) -> peft.PeftModel:
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=2, lora_alpha=12, total_step=100, tfinal=10, target_modules=targets
    )
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(m for m in model.modules() if hasattr(m, "lora_E")):
        keep = (0, 6, 1, 4)[number % 4]  # one layer in four loses all its rank
        with torch.no_grad():
            layer.lora_E["default"].normal_(generator=generator)
            layer.lora_E["default"][keep:] = 0
            for factor in (layer.lora_A["default"], layer.lora_B["default"]):
                factor.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_adalora_becomes_lora_exactly(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, targets: list[str]
) -> None:
    base = tiny_model(architecture)
    model = adalora_on(plain(base), targets)

    convert_adalora(model, tmp_path)

    expected = logits(model)
    assert (logits(plain(base)) - expected).abs().max() > 0.1
    torch.testing.assert_close(with_peft(base, tmp_path), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert len(config["target_modules"]) == 3  # the fourth has no rank
    ranks = [len(t) for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in name]
    assert sorted(ranks) == [1, 4, 6]


def test_adalora_on_nf4_becomes_lora_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        return load_base(ModelConfig(id=str(tiny_llama)), Nf4(), device=torch.device("cpu")).model

    model = adalora_on(base(), ["q_proj", "down_proj"])
    convert_adalora(model, tmp_path)

    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), logits(model), atol=1e-5, rtol=1e-5)


def test_adalora_without_any_rank_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = adalora_on(plain(tiny_llama), ["q_proj"])
    for layer in (m for m in model.modules() if hasattr(m, "lora_E")):
        layer.lora_E["default"].data.zero_()
    with pytest.raises(TrialError, match="rank 0"):
        convert_adalora(model, tmp_path)


# loading


@pytest.fixture
def lora(tiny_llama: Path, tmp_path: Path) -> Path:
    extract_adapter(change(plain(tiny_llama), "mlp"), tiny_llama, 4, tmp_path / "lora", "b")
    return tmp_path / "lora"


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "init_lora_weights": "gaussian"}])
def test_loads_what_peft_saved(tiny_llama: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], **settings)
    trained = peft.get_peft_model(plain(tiny_llama), config)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path)

    loaded = load_adapter(plain(tiny_llama), tmp_path)

    torch.testing.assert_close(logits(loaded), logits(trained), atol=1e-6, rtol=1e-6)
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(plain(tiny_llama)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "XLORA"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_co"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": "(a+)+$"}, "target_modules"),
        ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern"),
        ({"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ({"target_modules": ["mlp"]}, "LlamaMLP"),
        ({"r": 10**9}, "above that of every tensor"),
        ({"r": 3}, r"ask for \[3, 64\]"),
        ({"r": -1}, "r: "),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"modules_to_save": ["model.norm"]}, "model.norm.weight is missing"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"target_modules": ["up_proj"]}, "has no place"),
    ],
)
def test_a_wrong_or_hostile_config_is_refused(
    tiny_llama: Path, lora: Path, changes: dict[str, object], reason: str
) -> None:
    edit_config(lora, **changes)
    base = plain(tiny_llama)
    with pytest.raises(RegistryError, match=reason):
        load_adapter(base, lora)
    torch.testing.assert_close(logits(base), logits(plain(tiny_llama)))
    assert not any("lora" in name for name, _ in base.named_modules())


def test_the_base_that_a_config_names_is_not_looked_up(tiny_llama: Path, lora: Path) -> None:
    edit_config(lora, base_model_name_or_path="/no/such/base", revision="x")
    load_adapter(plain(tiny_llama), lora)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_file_is_refused_by_name(tiny_llama: Path, lora: Path, keep: float) -> None:
    file = lora / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep if keep != 0.5 else len(whole) / 2)])
    with pytest.raises(RegistryError, match=r"adapter_model\.safetensors: corrupt or truncated"):
        load_adapter(plain(tiny_llama), lora)


def test_tensors_that_are_missing_or_wrong_are_named(tiny_llama: Path, lora: Path) -> None:
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    for wrong, reason in (
        ({k: v for k, v in tensors.items() if k != name}, "is missing"),
        (tensors | {name: torch.zeros(4, 32)}, r"\[4, 32\]"),
        (tensors | {name: tensors[name] * float("inf")}, "finite"),
        (tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, "lm_head.*no place"),
        # PEFT would take this one for the base's own weight and overwrite it
        (tensors | {name.replace("lora_A", "base_layer"): torch.zeros(128, 64)}, "base_layer.*no place"),
    ):
        save_file(wrong, file)
        with pytest.raises(RegistryError, match=reason):
            load_adapter(plain(tiny_llama), lora)


def test_a_pickle_is_refused(tiny_llama: Path, lora: Path) -> None:
    torch.save({}, lora / "adapter_model.bin")
    with pytest.raises(RegistryError, match="can run code"):
        load_adapter(plain(tiny_llama), lora)
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").unlink()
    with pytest.raises(RegistryError, match="missing"):
        load_adapter(plain(tiny_llama), lora)


def test_another_shape_of_base_is_refused(tiny_model: Callable[..., Path], lora: Path) -> None:
    with pytest.raises(RegistryError, match="no module"):
        load_adapter(plain(tiny_model("gpt2")), lora)
