"""The Serve application, over real HTTP from a real local Ray: two adapters and the base behind one endpoint."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankloom.errors import AdapterNotFoundError, ConfigError, RegistryError

pytestmark = pytest.mark.cluster

Answer = tuple[int, dict[str, Any]]


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


@pytest.fixture(scope="module")
def endpoint(registry: Path) -> Iterator[str]:
    import ray
    from ray import serve

    from rankloom.deploy.app import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mine = not ray.is_initialized()
    if mine:
        source = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform")}  # where it is not installed
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": source})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"adapters": "first, second", "registry": str(registry), "max_new_tokens": 32}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    if mine:
        ray.shutdown()


def call(url: str, body: dict[str, Any] | None = None) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(base: Path, registry: Path, work: Path, name: str | None, prompt: str, max_tokens: int) -> str:
    """The same generation through PEFT alone."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankloom.registry import Registry

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if name:
        model = peft.PeftModel.from_pretrained(model, Registry(registry).fetch(name, work / name))
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    out = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_models_are_listed(endpoint: str, tiny_model: Callable[..., Path]) -> None:
    assert call(f"{endpoint}/healthz") == (200, {"status": "ok"})
    status, body = call(f"{endpoint}/v1/models")
    assert status == 200
    assert [model["id"] for model in body["data"]] == [str(tiny_model("llama")), "first", "second"]


def test_each_model_answers_as_peft_does(
    endpoint: str, registry: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    base, prompt = tiny_model("llama"), "my card was lost"
    texts = set()
    for name in (str(base), "first", "second", "first"):  # back to the first: nothing of the second is left behind
        status, body = call(f"{endpoint}/v1/completions", {"model": name, "prompt": prompt, "max_tokens": 12})
        assert status == 200
        adapter = None if name == str(base) else name
        assert body["choices"][0]["text"] == expected(base, registry, tmp_path / str(len(texts)), adapter, prompt, 12)
        assert body["choices"][0]["finish_reason"] in ("stop", "length")
        assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
        texts.add(body["choices"][0]["text"])
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("change", "status", "message", "code"),
    [
        ({"model": "nope"}, 404, "model 'nope' is not served; there are: ", "model_not_found"),
        ({"prompt": ""}, 400, "prompt: ", None),
        ({"prompt": None}, 400, "prompt: ", None),
        ({"max_tokens": 0}, 400, "max_tokens: ", None),
        ({"max_tokens": 33}, 400, "max_tokens 33 is above 32", None),
        ({"prompt": "yes " * 600}, 400, "exceed 512", None),
        ({"temperature": 0.7}, 400, "temperature: ", None),
        ({"stream": True}, 400, "stream: ", None),
        ({"best_of": 2}, 400, "best_of: Extra inputs are not permitted", None),
    ],
)
def test_what_is_not_served_is_refused_on_openais_wire(
    endpoint: str, change: dict[str, Any], status: int, message: str, code: str | None
) -> None:
    body = {"model": "first", "prompt": "yes", "max_tokens": 4} | change
    answered, answer = call(f"{endpoint}/v1/completions", body)
    assert answered == status
    assert message in answer["error"]["message"]
    assert (answer["error"]["type"], answer["error"]["code"]) == ("invalid_request_error", code)


def test_unknown_path_is_answered_in_the_same_shape(endpoint: str) -> None:
    status, body = call(f"{endpoint}/v1/nothing")
    assert (status, body["error"]["message"]) == (404, "Not Found")


def test_adapters_share_the_bases_tensors(registry: Path) -> None:
    from rankloom.config.serve import ServeConfig
    from rankloom.deploy.engine import Engine

    base, *adapted = Engine(ServeConfig(adapters=["first", "second"], registry=str(registry))).models.values()
    storages = {p.untyped_storage().data_ptr() for p in base.parameters()}
    for model in adapted:
        frozen = [p for n, p in model.named_parameters() if "lora_" not in n]
        assert {p.untyped_storage().data_ptr() for p in frozen} == storages


def test_adapters_that_cant_be_served_together_are_refused(registry: Path) -> None:
    from rankloom.config.serve import ServeConfig
    from rankloom.deploy.app import build
    from rankloom.deploy.engine import Engine

    with pytest.raises(ConfigError, match=r"other was tuned on .*deploy them apart"):
        Engine(ServeConfig(adapters=["first", "other"], registry=str(registry)))
    with pytest.raises(AdapterNotFoundError, match="no adapter 'frist'"):
        Engine(ServeConfig(adapters=["frist"], registry=str(registry)))
    with pytest.raises(ConfigError, match="adaptors: unknown key; did you mean 'adapters'"):
        build({"adaptors": "first"})


def test_changed_weights_keep_it_from_starting(registry: Path, tmp_path: Path) -> None:
    import shutil

    from rankloom.config.serve import ServeConfig
    from rankloom.deploy.engine import Engine

    copied = tmp_path / "copied"
    shutil.copytree(registry, copied)
    weights = copied / "first" / "1" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    with pytest.raises(RegistryError, match="adapter_model"):
        Engine(ServeConfig(adapters=["first"], registry=str(copied)))
