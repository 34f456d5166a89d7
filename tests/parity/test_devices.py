"""On a GPU, whatever was stored or made on the CPU is moved before it meets what is there. No GPU is needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_gpu import OnGpu, one_gpu
from rankloom.adapters.export import merge_adapter
from rankloom.adapters.extract import _truncate
from rankloom.adapters.weights import load_adapter
from rankloom.config import TrialConfig, parse
from rankloom.config.model import ModelConfig, NoQuantization
from rankloom.data import Row, collate, load_data
from rankloom.evals.loss import compute_labelled_loss
from rankloom.events import Event, StepFinished
from rankloom.models import load_base
from rankloom.registry import Registry
from rankloom.training.fused.host import TrialHost
from rankloom.training.run import run_trial
from rankloom.training.session import LocalSession
from served import GREEDY, completed, engine_on, serving

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"method": {"type": "lora", "init": "pissa", "dropout": 0.1}},
    "dora": {"method": {"type": "dora"}},
    "adalora": {"method": {"type": "adalora", "interval": 1}},
    "full": {"method": {"type": "full"}},
    "galore": {"method": {"type": "galore", "rank": 8}},
    "lisa": {"method": {"type": "lisa", "num_layers": 1, "interval": 2}},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with one_gpu(monkeypatch) as device:
        yield device


def trial_of(model: Path, root: Path, recipe: dict[str, Any]) -> TrialConfig:
    tree = {
        "name": "gpu",
        "model": {"id": str(model)},
        "data": {"max_train_rows": 32, "test": "builtin:bank-intents"},
        "budget": {"steps": 4},
        "eval": {"every": 2, "max_rows": 4, "max_test_rows": 4, "metric": "accuracy", "latency": False},
        "compute": {"num_workers": 0, "precision": "fp32"},
        "output": {"root": str(root)},
    }
    optim = {"learning_rate": 1e-2, "batch_size": 4} | recipe.get("optim", {})
    return parse(TrialConfig, tree | recipe | {"optim": optim})


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_method_trains_resumes_and_is_served(
    recipe: dict[str, Any], gpu: torch.device, tiny_llama: Path, tmp_path: Path
) -> None:
    trial = trial_of(tiny_llama, tmp_path, recipe)
    stop = threading.Event()

    def stop_amid(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 3:
            stop.set()

    first = LocalSession(tmp_path / "run", device=gpu, on_event=stop_amid, stop=stop)
    assert run_trial(trial, first)["status"] == "interrupted"
    assert run_trial(trial, LocalSession(tmp_path / "run", device=gpu))["status"] == "done"
    registry = Registry(tmp_path / "registry")
    record = registry.verify("gpu@1")
    merge_adapter(registry.fetch("gpu@1", tmp_path / "fetched"), record, tmp_path / "merged")
    base = load_base(trial.model, trial.quantization, device=gpu, dtype=torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    engine = engine_on(base, tmp_path / "registry")
    drawn = {"temperature": 0.7, "seed": 1, "top_p": 0.9, "logprobs": 2, "frequency_penalty": 0.5}

    async def work() -> None:
        answers = [completed(engine, [7, 50, 101, 9], ref, id=str(ref), **drawn) for ref in ("gpu@1", None)]
        for _, tokens, _ in await asyncio.gather(*answers):
            assert len(tokens) == GREEDY.max_tokens

    serving(engine, work, limit_s=600)


def test_a_host_trains_saves_and_takes_members_back(gpu: torch.device, tiny_llama: Path, tmp_path: Path) -> None:
    trials = {
        "one": trial_of(tiny_llama, tmp_path, {"method": {"type": "lora", "rank": 4, "dropout": 0.1}}),
        "two": trial_of(tiny_llama, tmp_path, {"method": {"type": "dora", "rank": 8}, "optim": {"batch_size": 2}}),
        "three": trial_of(tiny_llama, tmp_path, {"method": {"type": "dora", "rank": 8}}),
    }
    base = load_base(trials["one"].model, NoQuantization(), device=gpu, dtype=torch.float32)
    data = load_data(trials["one"].data, base.tokenizer)
    host = TrialHost(base, data, num_slots=4, max_rank=8, token_budget=2048, with_magnitudes=True)
    for name, trial in trials.items():
        host.admit(name, trial)
    assert {report.error for report in host.step()} == {None}
    assert all(parameter.parameter.device == gpu for parameter in host.optimizer.parameters)
    host.evaluate()
    for name, trial in trials.items():
        (tmp_path / name).mkdir()
        host.save(name, tmp_path / name)
        host.evict(name)
        host.admit(name, trial, tmp_path / name)
    host.copy("two", "three")
    assert {report.error for report in host.step()} == {None}
    host.export("two", tmp_path / "folder")
    tokens = torch.tensor([[7, 50, 101, 9]], device=gpu)
    slot = host.members["two"].slot
    with (
        torch.no_grad(),
        host.bank.apply_route(torch.full((4,), slot, device=gpu), [4 * (k == slot) for k in range(4)]),
    ):
        trained = base.model(tokens).logits
    host.bank.read(slot, tmp_path / "folder")
    host.bank.remove()
    with torch.no_grad():
        exported = load_adapter(base.model, tmp_path / "folder")(tokens).logits
    assert torch.allclose(trained, exported, atol=1e-4)


class Searches(TorchDispatchMode):
    """Counts the searches on the device, whose result's size the CPU has to wait for."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func._opname == "nonzero" and isinstance(args[0], OnGpu)
        return func(*args, **kwargs or {})


def test_a_loss_finds_its_tokens_on_the_cpu(gpu: torch.device, tiny_llama: Path) -> None:
    base = load_base(ModelConfig(id=str(tiny_llama)), NoQuantization(), device=gpu, dtype=torch.float32)
    batch = collate([Row([7, 50, 101, 9], [0.0, 0.0, 1.0, 0.5], 2, ""), Row([7, 9], [0.0, 1.0], 1, "")], 0)
    with Searches() as searches, torch.no_grad():
        loss, weight = compute_labelled_loss(base.model, batch)
        assert searches.num == 0
        torch.ones(3, device=gpu).nonzero()
        assert searches.num == 1
    assert (loss.device, weight.device) == (gpu, gpu)
    assert weight.item() == 2.5


def test_a_gpu_computes_the_wanted_singular_vectors_alone(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(600, 600, generator=generator))[0] for _ in range(2))
    delta = u @ torch.diag(0.9 ** torch.arange(600)) @ v
    left, right, energy = _truncate(delta, 16)
    full = torch.linalg.svd

    def small(matrix: torch.Tensor, **settings: Any) -> Any:
        assert min(matrix.shape) < 64
        return full(matrix, **settings)

    monkeypatch.setattr(torch.linalg, "svd", small)
    near_left, near_right, near_energy = _truncate(delta.to(gpu), 16)
    assert near_left.device == gpu
    assert near_energy == pytest.approx(energy, rel=1e-5)
    torch.testing.assert_close((near_left @ near_right).cpu(), left @ right, atol=1e-4, rtol=0)


def test_what_is_on_two_devices_does_not_meet(gpu: torch.device) -> None:
    there, here = torch.ones(3, 3, device="cuda").requires_grad_(), torch.ones(3, 3)
    assert isinstance(there, OnGpu)
    assert there.device == gpu
    meetings = [
        lambda: there @ here,
        lambda: there + here,
        lambda: torch.stack([here, there]),
        lambda: torch.equal(there, here),
        lambda: here[there.detach().long()],
        lambda: torch.nn.functional.cross_entropy(there, here[0].long()),
    ]
    for meeting in meetings:
        with pytest.raises(RuntimeError, match="same device"):
            meeting()
    with pytest.raises(TypeError, match="cuda:0"):
        there.detach().numpy()
    (there[torch.tensor([0, 2])] * torch.tensor(2.0)).sum().backward()
    assert there.grad is not None
    assert there.grad.device == gpu
    assert there.grad.cpu().sum(1).tolist() == [6, 0, 6]
    assert here.to("cuda").copy_(here).cpu().device == torch.device("cpu")
