"""Tiny random models and a small tokenizer, made at run time: no network, no real weights.

Every model is a saved folder (safetensors and tokenizer), so that tests load it as users do.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # only for the Rays that this run starts and ends
os.environ["RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT"] = "1"  # a replica that can't start is started once, not thrice
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less for each run: nothing takes a node away
os.environ["RAY_memory_usage_threshold"] = "0.99"  # noqa: SIM112  # other work on this machine must not kill a test's workers
if "RANKLOOM_VLLM_PYTHON" not in os.environ:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # only vLLM compiles; bitsandbytes' import would load the compiler
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run without a GPU

import pytest

CORPUS = [
    "my card was lost, please send a new one", "what is the balance of my account", "transfer money to a friend",
    "the weather is fine today and the sun shines", "how do i change the pin of my card", "yes no maybe",
    "card_lost check_balance transfer change_pin weather", "The quick brown fox jumps over the lazy dog. 0123456789",
    "user assistant system", "label: intent? answer! (ok) [x] {y} - + * / = < > | \\ ' \" \n\t",
]  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


LONG = {"test_benchmarks.py", "test_tools.py", "test_wrong_inputs.py"}
"""Files of more than half a minute, which start early: what is left in the end is short, and no core waits for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Spare the collector what is imported by now: runs collect at their end, and would go through all libraries."""
    gc.collect()
    gc.freeze()


_unfreeze, _unfrozen = gc.unfreeze, threading.Event()


def _note_unfreeze() -> None:
    _unfreeze()
    _unfrozen.set()


gc.unfreeze = _note_unfreeze  # an engine that closes gives all objects back; to count the frozen ones takes 50 ms


def pytest_runtest_setup() -> None:
    """Spare it again what an engine of the last test gave back."""
    if _unfrozen.is_set():
        gc.freeze()
        _unfrozen.clear()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., object]:
    """Return a function that builds a small byte-level BPE tokenizer; `chat=False`: without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(chat: bool = True) -> object:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        raw.train_from_iterator(CORPUS, trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
        tokenizer.chat_template = CHAT_TEMPLATE if chat else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., object]) -> Callable[..., Path]:
    """Return a function that saves (once each) a 2-layer random model of an architecture and returns its folder."""
    made: dict[tuple[str, bool], Path] = {}

    def make(architecture: str = "llama", chat: bool = True) -> Path:
        if (architecture, chat) in made:
            return made[architecture, chat]
        import torch
        from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

        tokenizer = make_tokenizer(chat)
        size = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)  # type: ignore[arg-type]
        heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
        ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
        config = {
            "llama": lambda: LlamaConfig(**size, **heads, **ids, tie_word_embeddings=True),
            "qwen": lambda: Qwen2Config(**size, **heads, **ids, tie_word_embeddings=False),
            "mixture": lambda: Qwen3MoeConfig(
                **size, **heads, **ids, head_dim=16, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=32
            ),
            "gpt2": lambda: GPT2Config(
                vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=512,  # type: ignore[arg-type]
                attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **ids,
            ),
        }[architecture]()  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # larger than the default initialisation, so that logits and gradients differ
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        folder = tmp_path_factory.mktemp(f"{architecture}{'-chat' if chat else ''}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        made[architecture, chat] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Path]) -> Path:
    """Return the folder of a 2-layer random Llama with a chat template and tied embeddings."""
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test away from the user's cache and registry; rows that one test has rendered, the next one finds."""
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path_factory.getbasetemp() / "rankloom-cache"))
    monkeypatch.setenv("RANKLOOM_REGISTRY", str(tmp_path / "registry"))


@pytest.fixture
def last_version(tmp_path: Path) -> Path:
    """A copy of the runs, studies and registry in tests/data/last_version, as if they were written where it is."""
    folder = tmp_path / "last-version"
    shutil.copytree(Path(__file__).parent / "data" / "last_version", folder)
    for file in folder.rglob("*"):
        written = file.suffix in (".yaml", ".json", ".jsonl")
        if written and not {"tune", "registry", "adapters"} & set(
            file.parts
        ):  # Ray Tune moves its own; others are hashed
            file.write_text(file.read_text().replace("/tmp/rankloom-last-version", str(folder)))
    return folder
