"""Bases whose chat templates have tools, as families of models write them: `templates/` has the parts that matter."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Family:
    """What a chat template needs of its tokenizer."""

    end: str
    """The token that ends a turn."""
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    """Tokens of their own that a text shows."""
    ends: tuple[str, ...] = ()
    """Further tokens that end a completion."""
    several: bool = True
    """Whether a turn may have several calls."""
    template: str | None = None
    """The template's name, where it is another family's."""


_CALLS, _THINKS = ("<tool_call>", "</tool_call>"), ("<think>", "</think>")
FAMILIES = {
    "hermes": Family("<|im_end|>", ("<|im_start|>",), _CALLS),
    "hermes_spelt": Family("<|im_end|>", ("<|im_start|>",), template="hermes"),  # as SmolLM2
    "qwen3": Family("<|im_end|>", ("<|im_start|>",), _CALLS + _THINKS),
    "qwen3_coder": Family("<|im_end|>", ("<|im_start|>",), _CALLS),
    "llama3": Family("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"), several=False),
    "mistral": Family("</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]")),
    "mistral_named": Family("</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    "gpt_oss": Family(
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
        ends=("<|call|>",),
        several=False,
    ),
    "thinking_spelt": Family("<|im_end|>", ("<|im_start|>",), template="thinking"),
    "thinking": Family("<|im_end|>", ("<|im_start|>",), _CALLS + _THINKS),
}


def write_base(tiny: Path, folder: Path, family: str) -> Path:
    """Write a tiny random Llama with a family's chat template, on the tokenizer of another folder."""
    of = FAMILIES[family]
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json", "chat_template*"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [AddedToken(word, special=True, normalized=False) for word in ("<s>", of.end, *of.special, *of.ends)]
    tokenizer.add_tokens([*special, *(AddedToken(word, special=False, normalized=False) for word in of.plain)])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", of.end
    tokenizer.chat_template = (Path(__file__).parent / "templates" / f"{of.template or family}.jinja").read_text()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ends = [tokenizer.convert_tokens_to_ids(word) for word in (of.end, *of.ends)]
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.save_pretrained(folder)
    return folder
