"""All measures together on data read as users do; validation adds up over workers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankloom.config.data import DataConfig, Source
from rankloom.config.trial import EvalConfig
from rankloom.data import TaskData, load_data
from rankloom.data.batching import collate
from rankloom.errors import ConfigError
from rankloom.evals.loss import compute_labelled_loss, compute_token_loss
from rankloom.evals.own_metric import Prediction
from rankloom.evals.score import measure, measure_rows, validate

LABELLED = [
    {"text": f"{text} {n}", "label": label}
    for n in range(5)
    for text, label in [("my card was lost", "card_lost"), ("send money", "transfer"), ("it is fine", "card_change")]
]
PAIRS = [{"prompt": f"say {n}", "completion": f"yes {n}"} for n in range(12)]
TEXTS = [{"text": f"the weather is fine today {n}"} for n in range(12)]


def write(folder: Path, name: str, rows: list[dict[str, str]]) -> Source:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(file))


def load(folder: Path) -> tuple[torch.nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def task(folder: Path, tokenizer: object, rows: list[dict[str, str]], retention: bool = False) -> TaskData:
    source = write(folder, "rows", rows)
    config = DataConfig(train=source, validation=source, test=source)
    return load_data(config, tokenizer, retention=write(folder, "retention", TEXTS) if retention else None)


def memorise(model: torch.nn.Module, data: TaskData) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = collate(list(data.test), 0)
    for _ in range(60):
        loss, weight = compute_labelled_loss(model, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_classification(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    data = task(tmp_path, tokenizer, LABELLED, retention=True)
    config = EvalConfig(batch_size=4)
    before = measure(model, tokenizer, data, config)
    memorise(model, data)
    after = measure(model, tokenizer, data, config)
    assert before.num_rows == after.num_rows == len(LABELLED)
    assert after.accuracy is not None
    assert before.accuracy is not None
    assert after.accuracy.value == after.macro_f1 == 1
    assert before.accuracy.low <= before.accuracy.value <= before.accuracy.high < 1
    assert after.loss < 0.1 < before.loss
    assert after.perplexity == pytest.approx(math.exp(after.loss))
    assert data.retention is not None
    assert after.retention_loss == compute_token_loss(model, data.retention, pad_id=0, batch_size=4).mean
    assert after.exact_match is None  # constrained accuracy stands in for it
    assert after.latency_ms is not None
    assert after.generated_tokens_per_s is not None


def test_completions(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    data = task(tmp_path, tokenizer, PAIRS)
    config = EvalConfig(batch_size=5, latency=False)
    assert measure(model, tokenizer, data, config).exact_match.value == 0
    memorise(model, data)
    found = measure(model, tokenizer, data, config)
    assert found.exact_match.value > 0.9
    assert found.accuracy is found.macro_f1 is found.retention_loss is found.latency_ms is None


def test_plain_text_has_a_loss_alone(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 1)]
    )
    data = task(tmp_path, tokenizer, TEXTS)
    assert data.test[0].prompt_length == 1  # a token that begins every text is no prompt to complete
    found = measure(model, tokenizer, data, EvalConfig())
    assert found.loss > 0
    assert found.accuracy is found.exact_match is None
    assert found.latency_ms is not None


def test_a_limit_takes_the_same_rows_each_time(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    data = task(tmp_path, tokenizer, LABELLED)
    config = EvalConfig(max_test_rows=6, latency=False)
    found = measure(model, tokenizer, data, config)
    assert found.num_rows == 6
    assert measure(model, tokenizer, data, config) == found


@pytest.mark.parametrize("world", [2, 4, 20])
def test_validation_adds_up_over_workers_in_lockstep(tiny_llama: Path, tmp_path: Path, world: int) -> None:
    model, tokenizer = load(tiny_llama)
    data = task(tmp_path, tokenizer, LABELLED)
    config = EvalConfig(metric="accuracy", batch_size=2)
    whole = validate(model, data.validation, data, config, tokenizer, (0, 1))
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    shares, counts = [], []
    for rank in range(world):
        forwards.clear()
        shares.append(validate(model, data.validation, data, config, tokenizer, (rank, world)))
        counts.append(len(forwards))
    assert len(set(counts)) == 1
    assert sum(s.loss_sum for s in shares) == pytest.approx(whole.loss_sum, rel=1e-5)
    assert sum(s.weight_sum for s in shares) == whole.weight_sum
    assert sum(s.correct for s in shares) == whole.correct
    assert sum(s.num_rows for s in shares) == whole.num_rows == len(LABELLED)


def test_validation_equals_the_measures(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    data = task(tmp_path, tokenizer, LABELLED)
    config = EvalConfig(metric="accuracy", latency=False)
    found, expected = (
        validate(model, data.validation, data, config, tokenizer, (0, 1)),
        measure(model, tokenizer, data, config),
    )
    assert found.loss_sum / found.weight_sum == pytest.approx(expected.loss)
    assert found.correct / found.num_rows == expected.accuracy.value


def test_accuracy_without_labels_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    data = replace(task(tmp_path, tokenizer, LABELLED), labels=None)
    with pytest.raises(ConfigError, match="accuracy needs classification data"):
        validate(model, data.validation, data, EvalConfig(metric="accuracy"), 0, (0, 1))


def test_the_results_of_the_rows_make_the_measures(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama)
    data = task(tmp_path, tokenizer, LABELLED)
    memorise(model, data)

    def count_hits(rows: Sequence[Prediction]) -> list[float]:
        return [float(row.reference == row.prediction) for row in rows]

    config = EvalConfig(latency=False, metric="own:metric", batch_size=4)
    measures, rows = measure_rows(model, tokenizer, data, config, count_hits)
    assert len(rows) == measures.num_rows
    assert [row.reference for row in rows] == [row.completion for row in data.test]  # in the rows' order
    hits = [row.reference == row.prediction for row in rows]
    assert measures.accuracy.value == sum(hits) / len(rows)
    assert [row.metric for row in rows] == [float(hit) for hit in hits]
    assert measures.loss == pytest.approx(sum(r.loss * r.weight for r in rows) / sum(r.weight for r in rows), rel=1e-5)
    alone = [compute_token_loss(model, [row], pad_id=0, batch_size=1).mean for row in data.test]
    assert [row.loss for row in rows] == pytest.approx(alone, rel=1e-3)
    config = EvalConfig(latency=False, metric="own:metric")
    _, rows = measure_rows(model, tokenizer, data, config, lambda _: 0.5)
    assert {row.metric for row in rows} == {None}
