"""`import rankloom as rl` on a Ray and a Serve that run already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rankloom as rl

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_serve")]


def test_an_endpoint_that_does_not_start_leaves_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    from ray import serve

    base = tmp_path / "broken"
    shutil.copytree(tiny_llama, base)
    (base / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(rl.RankloomError, match="the endpoint did not start: "):
        rl.serve({"base": str(base), "registry": str(tmp_path), "port": 0})
    assert not serve.status().applications


def test_an_endpoint_with_keys_asks_for_one(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context

    from rankloom.gateway.keys import KeyFile

    # what Serve keeps where a process started a Ray, served, ended both, and starts the next Ray
    monkeypatch.setattr(context, "_global_client", object())
    key, _ = KeyFile(tmp_path / "keys.json").create("ann", "user")
    config = rl.ServeConfig(
        base=str(tiny_llama), registry=str(tmp_path), port=0, auth=rl.AuthConfig(keys=str(tmp_path / "keys.json"))
    )
    with rl.serve(config) as endpoint:
        assert [model.id for model in endpoint.client(api_key=key).models.list()] == ["base"]
        with pytest.raises(rl.ConfigError, match=r"give it as client\(api_key="):
            endpoint.client()
        assert "closed" not in repr(endpoint)
    assert repr(endpoint) == f"Endpoint({endpoint.url}, closed)"
    endpoint.close()  # once more does nothing


def test_an_adapter_is_served_while_a_suite_runs(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openai import OpenAI

    from rankloom.registry.scorecard import SuiteScore
    from rankloom.suites import libraries
    from served import publish, write_adapter

    write_adapter(tiny_llama, tmp_path / "first", "lora")
    publish(tmp_path / "registry", tiny_llama, "first", tmp_path / "first")
    seen: list[libraries.ServedModel] = []

    def count_tokens(task: str, target: libraries.ServedModel, limit: int | None) -> libraries.Outcome:
        seen.append(target)
        client = OpenAI(base_url=target.url, api_key=target.key)
        answer = client.completions.create(model=target.model, prompt=task, max_tokens=limit)
        assert answer.usage is not None
        score = SuiteScore(task=task, metric="tokens", value=answer.usage.completion_tokens)
        return libraries.Outcome((score,), num_rows=1)

    monkeypatch.setitem(libraries.LIBRARIES, "own", libraries.Library("json", "pytest", count_tokens))
    root = str(tmp_path / "registry")
    result = rl.evaluate("first", suites=["own:hello"], overrides=["limits.context=99"], limit=3, registry=root)
    assert (result.adapter, seen[0].model, seen[0].context) == ("first@1", "first@1", 99)
    assert seen[0].tokenizer == str(tiny_llama)
    assert result.suites[0].scores[0].value <= 3
    assert rl.Registry(root).suites("first") == result.suites
    with pytest.raises(rl.ConfigError, match="does not serve"):  # it has ended
        rl.evaluate("first@1", suites=["own:hello"], url=seen[0].url, registry=root)
