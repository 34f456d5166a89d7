"""The Serve application on a real local Ray: a tiny model, real adapters, the official client over real HTTP."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI

from rankloom.errors import AdapterNotFoundError, ConfigError

pytestmark = pytest.mark.cluster

PROMPT = "my card was lost"
SOURCE = str(Path(__file__).resolve().parents[2] / "platform")


def publish(root: Path, base: Path, name: str, work: Path, *, seed: int, dora: bool = False) -> None:
    """Puts a random adapter, strong enough to change what is generated, into a registry."""
    import peft
    import torch

    from rankloom.adapters.probe import record_probe
    from rankloom.adapters.weights import load_adapter
    from rankloom.config.model import ModelConfig, NoQuantization
    from rankloom.models import load_base
    from rankloom.registry import BaseModelRef, Draft, Registry, Versions

    def load() -> Any:
        return load_base(ModelConfig(id=str(base)), NoQuantization(), device=torch.device("cpu"))

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], use_dora=dora, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load().model, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_()
    folder = work / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    fresh = load()
    record_probe(load_adapter(fresh.model, folder), [5, 6, 7], folder)
    draft = Draft(
        method="dora" if dora else "lora",
        base=BaseModelRef(id=str(base), fingerprint=fresh.fingerprint, quantization="none"),
        servable="itself",
        trial={"name": name, "model": {"id": str(base)}, "quantization": "none"},
        data_fingerprint=None,
        scorecard=None,
        versions=Versions(rankloom="0", torch="0", transformers="0", peft="0"),
    )
    Registry(root).publish(name, folder, draft)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    root, work = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("adapters")
    publish(root, tiny_model("llama"), "first", work, seed=1)
    publish(root, tiny_model("llama"), "second", work, seed=2, dora=True)
    publish(root, tiny_model("qwen"), "other", work, seed=3)
    return root


@contextmanager
def serve_app(config: dict[str, Any]) -> Iterator[None]:
    """Run the application on the Serve that runs."""
    from ray import serve

    from rankloom.deploy.app import build

    serve.run(build(config))
    try:
        yield
    finally:
        serve.delete("default")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def config(registry: Path, tiny_model: Callable[..., Path]) -> dict[str, Any]:
    return {
        "base": str(tiny_model("llama")),
        "registry": str(registry),
        "refresh_s": 0.5,
        "limits": {"max_tokens": 300},
        "engine": {"max_num_seqs": 4, "kv_cache_tokens": 4096},
    }


@pytest.fixture(scope="module")
def endpoint(config: dict[str, Any], local_serve: str) -> Iterator[str]:
    with serve_app(config):
        yield local_serve


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def replica_figure(url: str, name: str) -> float:
    """The sum of one of the replicas' own figures."""
    text = httpx2.get(f"{url}/metrics").text
    return sum(
        float(value) for value in re.findall(rf"^rankloom_replica_{name}(?:_total)?{{.*?}} (.*)$", text, re.MULTILINE)
    )


def generate_by_peft(base: Path, registry: Path, work: Path, name: str | None, max_tokens: int) -> str:
    """The same generation through PEFT alone."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankloom.registry import Registry

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if name:
        model = peft.PeftModel.from_pretrained(model, Registry(registry).fetch(name, work / name))
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False).input_ids])
    out = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_mixed_adapters_answer_as_peft_does(
    endpoint: str, registry: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    base = tiny_model("llama")
    texts = {name: generate_by_peft(base, registry, tmp_path, name, 12) for name in (None, "first", "second")}
    assert len(set(texts.values())) == 3

    def ask(name: str | None) -> tuple[str | None, str]:
        raw = client(endpoint).completions.with_raw_response.create(
            model=name or str(base), prompt=PROMPT, max_tokens=12, temperature=0
        )
        assert raw.headers["x-rankloom-adapter"] == (name or "base")
        assert raw.headers["x-request-id"]
        return name, raw.parse().choices[0].text

    with ThreadPoolExecutor(6) as pool:  # at once, so that rows of one batch are on different adapters
        for name, text in pool.map(ask, [None, "first", "second"] * 4):
            assert text == texts[name]


def test_chat_whole_and_in_a_stream(endpoint: str) -> None:
    body: dict[str, Any] = {"model": "first", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    whole = client(endpoint).chat.completions.create(**body, max_tokens=12, logprobs=True, top_logprobs=2)
    stream = client(endpoint).chat.completions.create(
        **body, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert (last.usage.total_tokens, last.choices) == (whole.usage.total_tokens, [])
    logprobs = whole.choices[0].logprobs.content
    assert len(logprobs) == whole.usage.completion_tokens
    assert all(token.logprob <= 0 and token.top_logprobs[0].logprob == token.logprob for token in logprobs)  # greedy


def test_prompts_are_read_and_embedded_and_responses_written(endpoint: str) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return httpx2.post(f"{endpoint}{path}", json=body, timeout=60).raise_for_status().json()

    tokens = post("/tokenize", {"model": "first", "prompt": PROMPT})["tokens"]
    assert post("/detokenize", {"tokens": tokens}) == {"prompt": PROMPT}
    scored = client(endpoint).completions.create(model="first", prompt=[tokens], max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.token_logprobs or ()) == len(tokens)
    given = {name: client(endpoint).embeddings.create(model=name, input=[PROMPT] * 40) for name in ("first", "second")}
    first, second = (each.data[0].embedding for each in given.values())
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
    assert first != second
    assert len(given["first"].data) == 40
    asked: dict[str, Any] = {"model": "first", "input": PROMPT, "temperature": 0, "max_output_tokens": 12}
    whole = client(endpoint).responses.create(**asked)
    *_, last = client(endpoint).responses.create(**asked, stream=True)
    assert last.response.output_text == whole.output_text  # type: ignore[union-attr]


def test_sampling_is_reproducible_with_a_seed(endpoint: str) -> None:
    def ask(seed: int) -> list[str]:
        answer = client(endpoint).completions.create(
            model="second", prompt=PROMPT, max_tokens=12, temperature=1.0, seed=seed, n=2
        )
        return [choice.text for choice in answer.choices]

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_a_choice_is_constrained(endpoint: str) -> None:
    labels = ["card_lost", "transfer"]
    answer = client(endpoint).chat.completions.create(
        model="first",
        messages=[{"role": "user", "content": PROMPT}],
        extra_body={"structured_outputs": {"choice": labels}},
    )
    assert answer.choices[0].message.content in labels


def test_what_cant_be_served_is_refused(endpoint: str) -> None:
    with pytest.raises(openai.NotFoundError, match="`first`"):
        client(endpoint).completions.create(model="frist", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError):  # it was tuned on another base
        client(endpoint).completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as caught:
        client(endpoint).completions.create(model="first", prompt="yes " * 600)
    assert caught.value.code == "context_length_exceeded"
    status = httpx2.post(f"{endpoint}/v1/completions", content=b"\xff{", headers={"content-type": "application/json"})
    assert status.status_code == 400


def test_a_client_that_goes_frees_its_row(endpoint: str) -> None:
    asked: dict[str, Any] = {"model": "first", "prompt": PROMPT, "max_tokens": 300, "stream": True}
    with client(endpoint).completions.create(**asked, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 20
    while 'outcome="cancelled"' not in httpx2.get(f"{endpoint}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2.5)  # a replica tells how it is every two seconds
    assert replica_figure(endpoint, "running") == 0
    assert 0 < replica_figure(endpoint, "generated_tokens") < replica_figure(endpoint, "steps") * 4


def test_health_and_metrics(endpoint: str) -> None:
    assert httpx2.get(f"{endpoint}/healthz").json() == {"status": "ok"}
    assert httpx2.get(f"{endpoint}/readyz").json() == {"status": "ready"}
    client(endpoint).completions.create(model="first", prompt=PROMPT, max_tokens=2)
    text = httpx2.get(f"{endpoint}/metrics").text
    assert 'rankloom_requests_total{adapter="first@1",outcome="ok",traffic="live"}' in text


def test_adapters_are_loaded_named_and_verified(endpoint: str) -> None:
    def post(path: str, **body: str) -> httpx2.Response:
        return httpx2.post(f"{endpoint}/v1/{path}", json=body, timeout=60)

    assert post("load_lora_adapter", lora_name="mine", lora_path="second").json()["adapter"] == "second@1"
    assert client(endpoint).completions.create(model="mine", prompt=PROMPT, max_tokens=2).choices
    refused = post("load_lora_adapter", lora_name="odd", lora_path="other").json()["error"]
    assert refused["code"] == "adapter_refused"
    assert post("load_lora_adapter", lora_name="odd", lora_path="../../etc").json()["error"]
    assert post("unload_lora_adapter", lora_name="mine").status_code == 200


def test_new_routes_end_no_stream(endpoint: str, config: dict[str, Any]) -> None:
    from ray import serve

    from rankloom.deploy.app import build

    asked: dict[str, Any] = {"model": "first", "prompt": PROMPT, "max_tokens": 300, "stream": True}
    stream = client(endpoint).completions.create(**asked, extra_body={"ignore_eos": True})
    next(iter(stream))
    before = serve.status().applications["default"].deployments["Replica"].replica_states
    serve.run(build(config | {"routes": {"front": {"to": "first"}}}))
    assert serve.status().applications["default"].deployments["Replica"].replica_states == before
    assert client(endpoint).completions.create(model="front", prompt=PROMPT, max_tokens=2).choices
    *_, last = list(stream)
    assert last.choices[0].finish_reason == "length"


def test_adapters_that_cant_be_served_together_are_refused(registry: Path) -> None:
    from rankloom.deploy.app import build

    with pytest.raises(ConfigError, match=r"other was tuned on .*deploy them apart"):
        build({"adapters": "first, other", "registry": str(registry)})
    with pytest.raises(AdapterNotFoundError, match="no adapter 'frist'"):
        build({"adapters": "frist", "registry": str(registry)})
    with pytest.raises(ConfigError, match="adaptors: unknown key; did you mean 'adapters'"):
        build({"adaptors": "first"})


def test_serve_build_takes_the_import_path(registry: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"adapters: [first@1]\nregistry: {registry}\n")
    environment = os.environ | {"PYTHONPATH": SOURCE, "RANKLOOM_SERVE": str(file)}
    command = [sys.executable, "-m", "ray.serve.scripts", "build", "serve.app:app", "-o", str(tmp_path / "out.yaml")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "import_path: serve.app:app" in (tmp_path / "out.yaml").read_text()


def test_a_killed_replica_fails_no_request_that_had_not_begun(
    endpoint: str, config: dict[str, Any], processes_named: Callable[[str], list[int]]
) -> None:
    from ray import serve

    from rankloom.deploy.app import build

    serve.run(build(config | {"replicas": {"min": 2, "max": 2}}))
    started = threading.Semaphore(0)

    def ask(number: int) -> str:
        model = ("first", "second", str(config["base"]))[number % 3]
        answer = client(endpoint).completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
        return answer.choices[0].text

    def stream(model: str) -> str | None:
        """The code of the error that it ended with, if it did."""
        asked: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 300, "stream": True}
        begun = client(endpoint).completions.create(**asked, extra_body={"ignore_eos": True})
        next(iter(begun))
        started.release()
        try:
            return None if list(begun)[-1].choices[0].finish_reason == "length" else "cut off"
        except openai.APIError as error:
            return error.code

    with ThreadPoolExecutor(10) as pool:
        streams = []
        for _ in range(4):  # one after the other: the base's go to both replicas by what is under way
            streams.append(pool.submit(stream, str(config["base"])))
            assert started.acquire(timeout=60)
        asked = [pool.submit(ask, number) for number in range(60)]
        replicas = processes_named("ServeReplica:default:Replica")
        assert len(replicas) == 2
        os.kill(replicas[0], signal.SIGKILL)
        ends = [each.result() for each in streams]
        texts = [each.result() for each in asked]
    assert set(ends) == {None, "replica_lost"}
    assert len(set(texts)) == 3


def test_a_replica_runs_nothing_of_who_has_no_token(
    endpoint: str, processes_named: Callable[[str], list[int]], tmp_path: Path
) -> None:
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    assert httpx2.get(f"{endpoint}/readyz").status_code == 200
    marker = tmp_path / "marker"
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Payload(str(marker))))
    codes = []
    for port in {port for pid in processes_named("ServeReplica") for port in listening(pid)}:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=20)
        codes.append(caught.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in codes
    assert not marker.exists()


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._folder,)


def listening(pid: int) -> set[int]:
    """The TCP ports that a process listens on."""
    sockets = set()
    for opened in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            sockets.add(os.readlink(opened))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def test_the_command_serves_until_it_is_interrupted(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"base: {config['base']}\nregistry: {config['registry']}\nport: 0\n")
    environment = os.environ | {"PYTHONPATH": SOURCE}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "rankloom.cli", "serve", str(file), "engine.max_num_seqs=4"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127.0.0.1:\d+", line)
            assert found, line
            assert client(found[0]).completions.create(model="first", prompt=PROMPT, max_tokens=2).choices
            for name in (b"mine", "é".encode(), b"\xff"):
                answer = httpx2.get(f"{found[0]}/v1/models", headers={"x-request-id": name}, timeout=60)  # type: ignore[arg-type]
                assert answer.status_code == 200, answer.text
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
