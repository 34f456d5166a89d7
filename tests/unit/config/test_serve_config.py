"""The config of a deployment: what is refused, and how it says so; and the CLI's keys."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankloom.cli import main
from rankloom.config import load, parse
from rankloom.config.engine import EngineConfig, VllmConfig
from rankloom.config.serve import ReplicasConfig, ServeConfig
from rankloom.deploy.run import explain_gpus
from rankloom.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": "all"}, "adapters: all needs a base"),
        ({"adapters": []}, "adapters: without any, give a base"),
        ({"adapters": ["../bank"]}, "adapters"),
        ({"adapters": ["bank@1@2"]}, "adapters"),
        ({"host": "0.0.0.0"}, "rankloom keys create"),
        ({"host": "0.0.0.0", "auth": {"keys": "k", "anonymous": True}}, "exclude each other"),
        ({"auth": {"share_prefixes": True}}, "share_prefixes needs auth.keys"),
        ({"port": 70000}, "port: "),
        ({"replicas": {"min": 3, "max": 2}}, "max=2 is below min=3"),
        ({"routes": {"r": {}}}, "one of to, split and canary, not none"),
        ({"routes": {"r": {"to": "a", "split": {"a": 1, "b": 1}}}}, "not to and split"),
        ({"routes": {"r": {"to": "a", "sticky": True}}}, "sticky needs a split or a canary"),
        ({"routes": {"r": {"split": {"a": 1}}}}, "split"),
        ({"routes": {"r": {"split": {"a": 1, "b": 0}}}}, "split.b"),
        ({"routes": {"r": {"split": {"a": 1, "b": float("inf")}}}}, "split.b"),
        ({"routes": {"r": {"canary": {"adapter": "a", "candidate": "champion"}}}}, "give two aliases"),
        ({"routes": {"r": {"canary": {"adapter": "a", "share": 1.5}}}}, "canary.share"),
        ({"routes": {"R!": {"to": "a"}}}, "routes"),
        ({"adaptors": ["a"]}, "did you mean 'adapters'"),
        ({"engine": "sglang"}, "engine.type: unknown type 'sglang'; allowed: 'bank', 'vllm', 'auto'"),
        ({"engine": {"type": "auto", "vllm": {"max_cpu_loras": 4}}}, "engine.vllm: max_loras (16) is above"),
        ({"engine": {"type": "vllm", "kv_cache_tokens": 512}}, "engine.kv_cache_tokens: unknown key"),
        ({"engine": {"rows": 4}}, "engine.rows: unknown key; it is called 'max_num_seqs' now"),
        (
            {"engine": {"type": "vllm", "start_s": 4}},
            "engine.start_s: unknown key; it is called 'startup_timeout_s' now",
        ),
        ({"engine": {"type": "vllm", "max_lora_rank": 12}}, "engine.max_lora_rank"),
        ({"engine": {"type": "vllm", "max_cpu_loras": 4}}, "max_loras (16) is above max_cpu_loras (4)"),
        ({"engine": {"type": "vllm", "args": ["--max_loras=3"]}}, "args: rankloom sets --max-loras itself"),
        (
            {"engine": "vllm", "pooling": "last"},
            "pooling=last is a setting of engine.type=bank; for vLLM add --pooler-config",
        ),
        ({"engine": "vllm", "quantization": "nf4"}, "use engine.type=bank"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(ServeConfig, {"adapters": ["bank"]} | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("replicas", "idle", "engine", "gpus"),
    [
        ({}, 0, "bank", 0),
        ({}, 3, "bank", 1),
        ({"max": 2}, 3, "bank", 1),
        ({"max": 3}, 2, "bank", 0.5),
        ({"max": 3}, 1, "vllm", 0.3333),
        ({"gpus": 0}, 3, "bank", 0),
        ({"gpus": 2}, 0, "bank", 2),
        ({}, 4, {"type": "vllm", "args": ["--tensor-parallel-size=2", "-pp", "2"]}, 4),
        ({}, 3, {"type": "vllm", "args": ["--tensor_parallel_size", "2", "-pp=2"]}, 0),
        ({"max": 2}, 1, "auto", 0.5),
        ({}, 2, {"type": "auto", "vllm": {"args": ["-tp=2"]}}, 2),
    ],
)
def test_replicas_have_idle_gpus_unless_told(replicas: dict[str, Any], idle: int, engine: Any, gpus: float) -> None:
    config = parse(ServeConfig, {"base": "org/base", "replicas": replicas, "engine": engine})
    assert config.replicas.count_gpus(idle, config.engine) == gpus


@pytest.mark.parametrize(
    ("replicas", "idle", "num_gpus", "given", "lines"),
    [
        ({"gpus": 0}, 0, 0, False, ["replicas.gpus is not set: 0 for each replica; there is no GPU"]),
        ({"gpus": 0}, 0, 2, False, ["replicas.gpus is not set: 0 for each replica; 0 of 2 GPUs are idle"]),
        (
            {"gpus": 0.5, "max": 2},
            1,
            1,
            False,
            ["replicas.gpus is not set: 0.5 for each replica; 1 of 1 GPUs are idle"],
        ),
        ({"gpus": 1}, 3, 4, True, ["2 GPU(s) stand idle; raise replicas.max to use them"]),
        ({"gpus": 0}, 1, 1, True, ["1 GPU(s) stand idle; set replicas.gpus=1 to use them"]),
        ({"gpus": 1}, 1, 1, True, []),
    ],
)
def test_what_replicas_have_and_what_stands_idle_is_told(
    replicas: dict[str, Any], idle: int, num_gpus: int, given: bool, lines: list[str]
) -> None:
    assert list(explain_gpus(ReplicasConfig(**replicas), idle, num_gpus, given=given)) == lines


def test_rows_go_by_the_device_unless_told() -> None:
    for engine, on_cpu, on_gpu in (
        (EngineConfig(), 16, 64), (EngineConfig(max_num_seqs=5), 5, 5), (EngineConfig(max_num_batched_tokens=8), 8, 8),
        (VllmConfig(), 16, 256), (VllmConfig(max_num_seqs=5), 5, 5),
    ):  # fmt: skip
        assert (engine.resolve_num_seqs(on_gpu=False), engine.resolve_num_seqs(on_gpu=True)) == (on_cpu, on_gpu)


def test_short_forms_on_a_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("base: org/base\n")
    config = load(ServeConfig, file, ["adapters=bank@champion, faq", "base.revision=main", "quantization=nf4"])
    assert config.adapters == ["bank@champion", "faq"]
    assert config.base is not None
    assert (config.base.id, config.base.revision) == ("org/base", "main")
    assert config.quantization is not None
    assert load(ServeConfig, file).adapters == "all"
    assert load(ServeConfig, file, ["engine.max_num_seqs=4"]).engine == EngineConfig(max_num_seqs=4)
    assert load(ServeConfig, file, ["engine=vllm", "engine.max_num_seqs=4"]).engine == VllmConfig(max_num_seqs=4)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert load(ServeConfig, file, [f'host="{host}"']).host == host


def test_keys_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["keys", *arguments])
        return int(end.value.code or 0), *capsys.readouterr()

    file = tmp_path / "keys.json"
    monkeypatch.setenv("RANKLOOM_KEYS", str(file))
    code, _, error = run("list")
    assert (code, "make one with rankloom keys create" in error) == (2, True)
    code, key, error = run("create", "ann", "--admin", "--requests-per-minute", "5")
    assert code == 0
    assert key.startswith("rl-")
    assert f"auth.keys={file}" in error
    _, listed, _ = run("list", "--json")
    (kept,) = json.loads(listed)
    assert (kept["name"], kept["role"], kept["requests_per_minute"]) == ("ann", "admin", 5)
    assert "sha256" not in kept
    assert key.strip() not in listed
    assert run("create", "Ann!")[0] == 2
    assert run("create", "ann", "--tokens-per-minute", "0")[0] == 2
    assert run("revoke", "nope")[0] == 2
    assert run("revoke", kept["id"])[:2] == (0, f"revoked {kept['id']} of ann\n")


def test_serve_refuses_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["serve", *arguments])
        return int(end.value.code or 0), capsys.readouterr().err

    file = tmp_path / "serve.yaml"
    file.write_text("base: org/base\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, code, message in (
            ([str(tmp_path / "nope.yaml")], 2, "no such file"),
            ([str(file), "host=0.0.0.0"], 2, "rankloom keys create"),
            ([str(file), f"auth.keys={tmp_path / 'none.json'}"], 2, "make one with rankloom keys create"),
            ([str(file), "--detach"], 2, "set RAY_ADDRESS"),
            ([str(file), f"port={port}"], 2, "choose another port"),
            ([str(file), f"port={port}", "engine=auto", "replicas.gpus=0"], 2, "engine  bank, as there is no GPU\n"),
            ([str(file), "adapters=nope"], 1, "no adapter 'nope'"),
        ):
            ended, told = run(*arguments)
            assert (ended, message in told) == (code, True), told


def test_the_shipped_deploy_file_has_a_configs_keys() -> None:
    [application] = yaml.safe_load((Path(__file__).parents[3] / "serve" / "deploy.yaml").read_text())["applications"]
    [ingress] = application["deployments"]
    assert ingress["name"] == "Ingress"
    for tree in (application["args"], ingress["user_config"]):
        assert parse(ServeConfig, tree).base is not None
