"""lm-eval scores an endpoint's base and adapters as transformers and PEFT do, by token ids and by texts.

It needs an environment that lm-eval is installed in, which pins other versions than rankloom:
RANKLOOM_LM_EVAL_PYTHON=lm-eval-env/bin/python names its interpreter (pip install "lm-eval[api]" transformers).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoTokenizer

from endpoint import listening
from one_engine import OneEngine
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from served import load, plain, publish, write_adapter

PYTHON = "RANKLOOM_LM_EVAL_PYTHON"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no environment with lm-eval"),
]
DOCS = [
    {
        "question": f"my {thing} was lost, please",
        "choices": [" send a new one", " do wait", " friend!"],
        "answer": at % 3,
    }
    for at, thing in enumerate(["card", "account", "transfer", "weather", "größe", "balance of my account"])
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: {output}
{rest}
"""
CHOICE = """\
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]"""
ROLLING = 'doc_to_text: ""\ndoc_to_target: question\nmetric_list: [{metric: word_perplexity}]'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[tuple[str, Path]]:
    """Where an endpoint with `lora@1` listens, and a folder with tasks and the adapter."""
    folder = tmp_path_factory.mktemp("lm-eval")
    write_adapter(tiny_llama, folder / "lora", "lora")
    publish(folder / "registry", tiny_llama, "lora", folder / "lora")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, output, rest in (("picks", "multiple_choice", CHOICE), ("texts", "loglikelihood_rolling", ROLLING)):
        task = TASK.format(name=name, data=folder / "docs.jsonl", output=output, rest=rest)
        (folder / f"{name}.yaml").write_text(task)
    base, registry = load(tiny_llama), Registry(folder / "registry")
    replicas = OneEngine(base, registry)
    with listening(Gateway(parse(ServeConfig, {"base": base.id}), registry, replicas)) as url:
        yield url, folder
    asyncio.run(replicas.engine.close())


def run_lm_eval(url: str, folder: Path, model: str, tokenizer: Path, tokenized: bool) -> dict[str, list[Any]]:
    """Return the samples of each task."""
    given = {
        "model": model, "base_url": f"{url}/v1/completions", "tokenizer_backend": "huggingface", "tokenizer": tokenizer,
        "tokenized_requests": tokenized, "max_length": 256, "num_concurrent": 2,
    }  # fmt: skip
    out = folder / f"out-{model}-{tokenized}"
    command = [
        os.environ[PYTHON], "-m", "lm_eval", "--model", "local-completions", "--tasks", "picks,texts",
        "--include_path", folder, "--batch_size", "4", "--log_samples", "--output_path", out,
        "--model_args", ",".join(f"{name}={value}" for name, value in given.items()),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OPENAI_API_KEY": "none",
    }
    done = subprocess.run(command, env=environment | offline, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.name.split("_")[1]: path for path in out.rglob("samples_*.jsonl")}
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in found.items()}


@pytest.mark.parametrize("tokenized", [True, False], ids=["token ids", "texts"])
@pytest.mark.parametrize("model", ["base", "lora"])
def test_likelihoods_are_those_of_the_model_itself(
    served: tuple[str, Path], tiny_llama: Path, model: str, tokenized: bool
) -> None:
    url, folder = served
    tokenizer, computed = AutoTokenizer.from_pretrained(tiny_llama), plain(tiny_llama)
    if model == "lora":
        computed = peft.PeftModel.from_pretrained(computed, folder / "lora").eval()

    def compute(context: list[int], rest: list[int]) -> tuple[float, bool]:
        with torch.no_grad():
            logprobs = computed(input_ids=torch.tensor([context + rest])).logits[0].log_softmax(-1)
        rows = logprobs[len(context) - 1 : -1]
        return float(rows.gather(1, torch.tensor(rest)[:, None]).sum()), rows.argmax(-1).tolist() == rest

    found = run_lm_eval(url, folder, model, tiny_llama, tokenized)
    assert set(found) == {"picks", "texts"}
    for sample in found["picks"]:
        doc, whole = sample["doc"], []
        for (answer,), choice in zip(sample["resps"], sample["doc"]["choices"], strict=True):
            context = tokenizer(doc["question"], add_special_tokens=False).input_ids
            both = tokenizer(doc["question"] + choice, add_special_tokens=False).input_ids
            expected, is_greedy = compute(context, both[len(context) :])
            assert float(answer[0]) == pytest.approx(expected, abs=1e-3)
            assert str(answer[1]) == str(is_greedy)
            whole.append(expected)
        assert sample["acc"] == (whole.index(max(whole)) == doc["answer"])
    for sample in found["texts"]:
        ids = tokenizer(sample["doc"]["question"], add_special_tokens=False).input_ids
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ((answer,),) = sample["resps"]
        assert float(answer[0] if isinstance(answer, list) else answer) == pytest.approx(
            compute([prefix], ids)[0], abs=1e-3
        )
