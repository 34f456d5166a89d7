"""A checkpoint is read as its config.json says, or refused by name: never codes as weights, nor a part of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GptOssConfig, OPTConfig

from codes import write_fp8, write_mxfp4
from rankloom.config.data import DataConfig, Source
from rankloom.config.model import Int8, ModelConfig, Nf4, NoQuantization, Quantization
from rankloom.data import load_data
from rankloom.errors import ConfigError, DataError, ModelError
from rankloom.models import Base, load_base, load_outline, load_shell, load_tokenizer
from rankloom.models.checkpoints import fingerprint, list_weight_files
from rankloom.training.precision import check_lengths

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]


def load(folder: Path, quantization: Quantization | None = None, dtype: torch.dtype = torch.float32) -> Base:
    return load_base(ModelConfig(id=str(folder)), quantization or NoQuantization(), device=CPU, dtype=dtype)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def copied(folder: Path, to: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of a model folder with other settings, and other weights."""
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | config).items() if v is not None}))
    if tensors is not None:
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture
def fp8(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_fp8(copied(tiny_llama, tmp_path / "fp8", {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_read_dequantised(fp8: Path, tiny_llama: Path, dtype: torch.dtype) -> None:
    base = load(fp8, dtype=dtype)
    assert {p.dtype for p in base.model.parameters()} == {dtype}
    assert base.quantization == "none"
    original = logits(load(tiny_llama).model)
    assert (logits(base.model) - original).norm() / original.norm() < 0.1


def test_mxfp4_is_read_dequantised(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mxfp4")
    tokenizer.save_pretrained(tmp_path / "mxfp4")
    folder = write_mxfp4(tmp_path / "mxfp4")

    base = load(folder)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    experts = base.model.model.layers[1].mlp.experts.gate_up_proj
    assert experts.std() > 0.01
    assert torch.equal(experts, expected.model.layers[1].mlp.experts.gate_up_proj.float())
    base.model.save_pretrained(tmp_path / "again")  # a plain model now
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(base.model))


@pytest.mark.parametrize(("bits", "same", "other"), [(8, Int8(), Nf4()), (4, Nf4(), Int8())])
def test_bitsandbytes_checkpoints_need_the_same_quantization(
    tiny_llama: Path, tmp_path: Path, bits: int, same: Quantization, other: Quantization
) -> None:
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    quantised.save_pretrained(tmp_path / "bnb")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "bnb")

    base = load(tmp_path / "bnb", same)
    assert base.quantization == same.type
    expected = load(tiny_llama, Nf4(double=False) if bits == 4 else same)
    torch.testing.assert_close(logits(base.model), logits(expected.model))
    for wrong in (NoQuantization(), other):
        with pytest.raises(ConfigError, match=rf"already, by bitsandbytes.*given: {wrong.type}.*quantization: "):
            load(tmp_path / "bnb", wrong)
    stripped = copied(tmp_path / "bnb", tmp_path / "stripped", {"quantization_config": None})
    with pytest.raises(ModelError, match="codes of a quantisation"):
        load(stripped)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "unheard-of"])
def test_other_quantisations_are_refused_by_name(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
    folder = copied(tiny_llama, tmp_path / "copy", settings)
    with pytest.raises(ModelError, match=method):
        load(folder)


def test_fp8_is_not_quantised_again(fp8: Path) -> None:
    with pytest.raises(ConfigError, match=r"FP8.*given: nf4"):
        load(fp8, Nf4())


def test_codes_have_their_scales(fp8: Path, tmp_path: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    del tensors[f"{name}_scale_inv"]
    folder = copied(fp8, tmp_path / "copy", {}, tensors)
    for look in (load, lambda at: load_shell(ModelConfig(id=str(at)), NoQuantization())):
        with pytest.raises(ModelError, match=rf"1 weight\(s\) in FP8 have no scales .*{name}_scale_inv is missing"):
            look(folder)


@pytest.mark.parametrize(("kind", "quantization"), [("8bit", Int8()), ("4bit", Nf4())])
def test_weights_that_config_json_calls_quantised(
    tiny_llama: Path, tmp_path: Path, kind: str, quantization: Quantization
) -> None:
    settings = {"quant_method": "bitsandbytes", f"load_in_{kind}": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(ModelError, match="none of its weights is quantised; remove quantization_config"):
        load(copied(tiny_llama, tmp_path / "copy", {"quantization_config": settings}), quantization)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.norm.bias"]
)
def test_weights_that_config_json_leaves_out_are_named(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(tiny_llama / "model.safetensors") | {name: torch.ones(64)}
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load(copied(tiny_llama, tmp_path / "copy", {}, tensors))


def test_parts_that_a_language_model_leaves_out_are_no_fault(tiny_llama: Path, tmp_path: Path) -> None:
    extra = {
        "score.weight": torch.ones(3, 64),
        "vision_tower.layers.0.q_proj.weight": torch.ones(4, 4),
        "model.layers.2.self_attn.q_proj.weight": torch.ones(64, 64),  # for multi-token prediction
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    tensors = load_file(tiny_llama / "model.safetensors") | extra
    folder = copied(tiny_llama, tmp_path / "copy", {}, tensors)
    assert torch.equal(logits(load(folder).model), logits(load(tiny_llama).model))


@pytest.mark.parametrize(("architecture", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_fewer_layers_than_the_weights_hold_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, key: str
) -> None:
    folder = copied(tiny_model(architecture), tmp_path / "copy", {key: 1})
    model = ModelConfig(id=str(folder))
    told = rf"copy/config\.json has {key}=1, but the weights beside it hold 2 layers.*set {key}=2"
    for read in (
        lambda: load(folder),
        lambda: load_shell(model, NoQuantization()),
        lambda: load_outline(model, dtype=torch.float32),
    ):
        with pytest.raises(ModelError, match=told):
            read()


def test_a_bare_models_upper_layers_are_its_own_too(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = {n.removeprefix("model."): w for n, w in load_file(tiny_llama / "model.safetensors").items()}
    load(copied(tiny_llama, tmp_path / "bare", {}, tensors))
    with pytest.raises(ModelError, match=r"num_hidden_layers=1.*hold 2 layers"):
        load(copied(tiny_llama, tmp_path / "less", {"num_hidden_layers": 1}, tensors))


def test_blocks_for_multi_token_prediction_are_no_layers(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    above = {n.replace(".1.", ".2."): w.clone() for n, w in tensors.items() if n.startswith("model.layers.1.")}
    extra = {"model.layers.2.eh_proj.weight": torch.ones(64, 128)}
    load_shell(ModelConfig(id=str(copied(tiny_llama, tmp_path / "mtp", {}, tensors | above | extra))), NoQuantization())
    with pytest.raises(ModelError, match="hold 3 layers"):
        load_shell(ModelConfig(id=str(copied(tiny_llama, tmp_path / "more", {}, tensors | above))), NoQuantization())


def test_the_files_that_transformers_reads_are_the_models(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama, tmp_path / "copy", {})
    save_file({"tok_embeddings.weight": torch.ones(4, 4)}, folder / "consolidated.safetensors")
    assert list_weight_files(folder) == [folder / "model.safetensors"]
    assert fingerprint(folder) == fingerprint(tiny_llama)
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    save_file({"tok_embeddings.weight": torch.ones(4, 4)}, tmp_path / "shards" / "consolidated.safetensors")
    assert fingerprint(tmp_path / "shards") == fingerprint(tiny_llama)


def test_a_sentencepiece_tokenizer_is_read_or_its_package_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("transfer money to a friend\nmy card was lost\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=290, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = copied(tiny_llama, tmp_path / "copy", {})
    for file in folder.glob("tokenizer*"):
        file.unlink()
    shutil.copy(tmp_path / "tokenizer.model", folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    tokenizer = load_tokenizer(ModelConfig(id=str(folder)))
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = "transfer my card"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)

    monkeypatch.setattr("rankloom.models.load.find_spec", lambda _: None)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"tokenizer\.model.*pip install sentencepiece"):
        load_tokenizer(ModelConfig(id=str(folder)))


def test_special_tokens_beyond_the_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama, tmp_path / "copy", {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<a new pad>"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(ModelConfig(id=str(folder))).pad_token == "<|end|>"
    tokenizer.add_special_tokens({"eos_token": "<a new end>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"<a new end>.*resize"):
        load_tokenizer(ModelConfig(id=str(folder)))


def test_tokens_beyond_the_embedding_are_told_before_training(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama, tmp_path / "copy", {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = "<image>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(20)))
    config = DataConfig(train=Source(path=str(tmp_path / "rows.csv")))
    base = load(folder)
    with pytest.raises(DataError, match=r"'<image>'.*embeds only"):
        check_lengths(load_data(config, base.tokenizer), base)


def test_the_bases_own_dropout_is_off_in_every_run(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2").model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    opt = OPTConfig(
        vocab_size=400, hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, dropout=0.5,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(opt).save_pretrained(tmp_path / "opt")  # which calls functions for it
    make_tokenizer().save_pretrained(tmp_path / "opt")
    model = load(tmp_path / "opt").model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
