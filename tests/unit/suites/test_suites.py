"""Tasks of lm-eval and Inspect on an endpoint over HTTP; each is skipped where its library is not installed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoTokenizer

import rankloom as rl
from endpoint import Endpoint, endpoint, listening
from one_engine import OneEngine
from rankloom.cli import main
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.events import Event
from rankloom.gateway.gateway import Gateway
from rankloom.registry import Registry
from rankloom.registry.scorecard import SuiteScore
from rankloom.suites import libraries
from served import load, plain, publish, write_adapter

RIGHT, WRONG = "bank@1|user=hi;|", "bank@2|user=hi;|"
INSPECT_TASK = f"""
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import exact
from inspect_ai.solver import generate

@task
def greeting():
    rows = [Sample(input="hi", target={RIGHT!r}), Sample(input="hi", target={WRONG!r})]
    return Task(dataset=rows, solver=generate(), scorer=exact())
"""


def write_lm_eval_task(folder: Path, kind: str = "generate_until") -> Path:
    """Write a task of four rows, of which the first adapter version answers three as they want it."""
    rows = [("one", "bank@1|one|"), ("two", "bank@1|two|"), ("three", "bank@1|three|"), ("four", "bank@2|four|")]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    task = {
        "task": "echo",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
    }
    if kind == "generate_until":
        task |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 40}}
        task["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    else:
        task |= {"metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]}
    (folder / "echo.yaml").write_text(yaml.safe_dump(task))
    return folder / "echo.yaml"


def evaluate(made: Endpoint, suite: str, model: str = "bank", limit: int | None = None) -> rl.SuiteEvaluation:
    return rl.evaluate(model, suites=[suite], url=f"{made.url}/v1", registry=made.registry.root, limit=limit)


@pytest.mark.slow
def test_a_task_of_lm_eval_is_scored_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("OPENAI_API_KEY", "rl-secret")
    caplog.set_level("INFO")
    suite = f"lm-eval:{write_lm_eval_task(tmp_path)}"
    with endpoint(tmp_path) as made:
        result = evaluate(made, suite)
        (score,) = result.suites[0].scores
        assert (result.adapter, score.task, score.metric, score.value) == ("bank@1", "echo", "exact_match", 0.75)
        assert score.stderr == pytest.approx(0.25)
        assert result.suites[0].num_rows == 4
        assert "rl-secret" not in caplog.text
        assert made.registry.suites("bank@1") == result.suites
        assert made.registry.suites("bank@2") == ()
        limited = evaluate(made, suite, limit=2)
        assert (limited.suites[0].scores[0].value, limited.suites[0].num_rows) == (1.0, 2)
        assert made.registry.suites("bank@1") == limited.suites  # in place of the first
        assert evaluate(made, suite, "bank@2").suites[0].scores[0].value == 0.25
        assert made.registry.suites("bank@1") == limited.suites
        with pytest.raises(rl.ConfigError, match="needs the model's tokenizer"):
            evaluate(made, f"lm-eval:{write_lm_eval_task(tmp_path, 'loglikelihood')}")


@pytest.mark.slow
def test_likelihoods_of_lm_eval_are_those_of_peft(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_adapter(tiny_llama, tmp_path / "first", "lora")
    publish(tmp_path / "registry", tiny_llama, "first", tmp_path / "first")
    model = peft.PeftModel.from_pretrained(plain(tiny_llama), tmp_path / "first").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def score(question: object, choice: str) -> float:
        ids = tokenizer(f"{question} {choice}", add_special_tokens=False).input_ids
        begin = len(tokenizer(question, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids)))

    questions = ["my card was lost", "send money to", "what is", "the sun shines on", "change the pin of"]
    choices = [["yes", "maybe"], ["a card", "a pin"], ["money", "weather"], ["lost", "friend"], ["the sun", "no one"]]
    rows: list[Any] = [
        {"q": question, "choices": pair, "a": 0} for question, pair in zip(questions, choices, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "likelier",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "likelier.yaml").write_text(yaml.safe_dump(task))
    registry = Registry(tmp_path / "registry")
    replicas = OneEngine(load(tiny_llama), registry)
    gateway = Gateway(parse(ServeConfig, {"base": str(tiny_llama)}), registry, replicas)
    with listening(gateway) as url:
        suite = f"lm-eval:{tmp_path}/likelier.yaml"
        result = rl.evaluate("first", suites=[suite], url=f"{url}/v1", registry=registry.root)
    asyncio.run(replicas.engine.close())
    right = [score(row["q"], row["choices"][0]) > score(row["q"], row["choices"][1]) for row in rows]
    assert 0 < sum(right) < len(right)
    assert result.suites[0].scores[0].value == pytest.approx(sum(right) / len(right))


@pytest.mark.slow
def test_a_task_of_inspect_is_scored_and_stored(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    (tmp_path / "tasks.py").write_text(INSPECT_TASK)
    with endpoint(tmp_path) as made:
        result = evaluate(made, f"inspect:{tmp_path}/tasks.py@greeting")
        assert {score.metric: score.value for score in result.suites[0].scores} == {"mean (exact)": 0.5}
        assert (result.suites[0].num_rows, result.suites[0].scores[0].task) == (2, "greeting")
        assert made.registry.suites("bank") == result.suites
        made.replicas.engine.broken.add("bank@1")
        with pytest.raises(rl.TrialError, match=r"suite inspect:.*does nothing"):
            evaluate(made, f"inspect:{tmp_path}/tasks.py@greeting")


def test_the_base_has_no_place_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = libraries.Outcome((), 1)
    monkeypatch.setitem(libraries.LIBRARIES, "own", libraries.Library("json", "pytest", lambda *_: outcome))
    events: list[Event] = []
    with endpoint(tmp_path) as made:
        url = f"{made.url}/v1/"
        result = rl.evaluate("base", suites=["own:x"], url=url, registry=made.registry.root, on_event=events.append)
    assert (result.model, result.adapter) == ("base", None)
    assert any(isinstance(event, rl.WarningRaised) and "only returned" in event.message for event in events)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suites": ["mmlu"]}, "suite 'mmlu': give lm-eval:TASK or inspect:TASK"),
        ({"suites": ["lm-eval:"]}, "give lm-eval:TASK"),
        ({"suites": []}, "suites: name at least one"),
        ({"suites": ["absent:x"]}, "suite 'absent:x' needs absent: pip install not-there"),
        ({"suites": ["own:nowhere.yaml"]}, "no file 'nowhere.yaml'"),
        ({"suites": ["own:x"], "data": []}, "a suite has its own"),
        ({"suites": ["own:x"], "url": "http://127.0.0.1:1/v1", "overrides": ["a=1"]}, "a=1: an endpoint that runs"),
        ({"suites": ["own:x"], "url": "http://127.0.0.1:1/v1"}, "http://127.0.0.1:1/v1 does not answer"),
        ({"suites": ["own:x"], "subject": "trial.yaml"}, "suites run on an adapter of the registry"),
        ({"limit": 3}, "limit: only with suites"),
        ({"suites": ["own:x"], "limit": 0}, "limit=0: give at least 1"),
        ({"url": "http://127.0.0.1:1/v1"}, "url: only with suites"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], message: str
) -> None:
    run = lambda *_: libraries.Outcome((), 0)  # noqa: E731
    monkeypatch.setitem(libraries.LIBRARIES, "own", libraries.Library("json", "pytest", run))
    monkeypatch.setitem(libraries.LIBRARIES, "absent", libraries.Library("not_there", "not-there", run))
    with pytest.raises(rl.ConfigError, match=message):
        rl.evaluate(given.pop("subject", "bank"), **given)  # type: ignore[call-overload]


def test_an_endpoint_without_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        libraries.LIBRARIES, "own", libraries.Library("json", "pytest", lambda *_: libraries.Outcome((), 0))
    )
    with endpoint(tmp_path) as made, pytest.raises(rl.ConfigError, match=r"does not serve 'bnk': .*model_not_found"):
        evaluate(made, "own:x", "bnk")


def run(*command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(command))
    assert ended.value.code == 0


def test_scores_are_shown_beside_the_scorecard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = SuiteScore(task="own", metric="points", value=0.25, stderr=0.125)
    library = libraries.Library("json", "pytest", lambda *_: libraries.Outcome((score,), 8))
    monkeypatch.setitem(libraries.LIBRARIES, "own", library)
    with endpoint(tmp_path) as made:
        command = ["evaluate", "bank@2", "--suite", "own:x", "--url", f"{made.url}/v1", "--limit", "8"]
        run(*command, "--registry", made.registry.root)
    assert "own: points  0.25 ± 0.12" in capsys.readouterr().out
    assert made.registry.suites("bank@2")[0].limit == 8
    run("adapters", "show", "bank@2", "--registry", made.registry.root)
    assert f"own: points  0.25 ± 0.12  pytest {pytest.__version__}, 8 rows" in capsys.readouterr().out
    run("adapters", "show", "bank@1", "--registry", made.registry.root)
    assert "points" not in capsys.readouterr().out
