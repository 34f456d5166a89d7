"""Fused members = their dedicated runs: losses, weights, evaluation; whoever joins, leaves, diverges or is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rankloom.adapters.weights import load_adapter
from rankloom.config import TrialConfig, parse
from rankloom.data import TaskData, load_data
from rankloom.errors import IncompatibleError, TrialError
from rankloom.evals.own_metric import Prediction
from rankloom.evals.score import predict, select_validation_rows, validate
from rankloom.events import Event, StepFinished
from rankloom.models import Base, load_base, load_tokenizer
from rankloom.training.fused.attention import compute_logits
from rankloom.training.fused.host import StepReport, TrialHost
from rankloom.training.fused.plan import StepPlan
from rankloom.training.loop import TrainingLoop
from rankloom.training.session import LocalSession

CPU = torch.device("cpu")
STEPS = 30
MEMBERS: dict[str, dict[str, Any]] = {
    "plain": {"method": {"type": "lora", "rank": 4, "alpha": 8}, "optim": {"learning_rate": 2e-3}},
    "plus": {
        "method": {"type": "lora", "rank": 8, "alpha": 32, "rslora": True},
        "optim": {"learning_rate": 5e-4, "loraplus_ratio": 16, "batch_size": 4, "schedule": "cosine"},
    },
    "dora": {
        "method": {"type": "dora", "rank": 3, "alpha": 6},
        "optim": {"learning_rate": 1e-3, "batch_size": 6, "accumulation": 3, "weight_decay": 0.1, "loraplus_ratio": 4},
        "seed": 7,
    },
    "narrow": {
        "method": {"type": "lora", "rank": 16, "init": "gaussian", "target_modules": ["q_proj", "v_proj"]},
        "optim": {"clip_norm": 0.05, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.5, "batch_size": 1,
                  "group_by_length": False},
        "seed": 3,
    },
    "dora-q": {
        "method": {"type": "dora", "rank": 8, "target_modules": ["q_proj", "down_proj"]},
        "optim": {"learning_rate": 4e-3, "schedule": "constant", "clip_norm": None, "accumulation": 2, "batch_size": 5},
    },
}  # fmt: skip


def trial_of(folder: Path, member: dict[str, Any], *, quantization: str = "none", **sections: Any) -> TrialConfig:
    tree: dict[str, Any] = {
        "name": "parity",
        "model": {"id": str(folder)},
        "quantization": quantization,
        "data": {"max_train_rows": 64},
        "budget": {"steps": STEPS},
        "eval": {"every": 10, "max_rows": 16},
        "optim": {"batch_size": 8},
    }
    for section, values in [*member.items(), *sections.items()]:
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return parse(TrialConfig, tree)


def trials_of(model: Path, names: list[str] | None = None, **sections: Any) -> dict[str, TrialConfig]:
    return {name: trial_of(model, MEMBERS[name], **sections) for name in names or MEMBERS}


def opened(trial: TrialConfig) -> tuple[Base, TaskData]:
    return (
        load_base(trial.model, trial.quantization, device=CPU),
        load_data(trial.data, load_tokenizer(trial.model)),
    )


def host_of(
    trial: TrialConfig, *, num_slots: int = 6, token_budget: int = 100_000, kind: type[TrialHost] = TrialHost
) -> TrialHost:
    base, data = opened(trial)
    return kind(base, data, num_slots=num_slots, max_rank=16, token_budget=token_budget, with_magnitudes=True)


def losses_of(host: TrialHost, steps: int = 10_000) -> dict[str, list[float]]:
    """Run until every member is done, or for some steps; each member's losses."""
    found: dict[str, list[float]] = {}
    for _ in range(steps):
        if host.last_plan is not None and all(m.done for m in host.members.values()):
            break
        for report in host.step():
            assert report.error is None, report
            found.setdefault(report.name, []).append(report.loss)
    return found


def weights_of(host: TrialHost, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in host.bank.get_state(host.members[name].slot).items()}


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The dedicated run of a trial, once each: its losses, its exported adapter's folder and its last evaluation."""
    made: dict[str, tuple[list[float], Path, Any]] = {}

    def run(trial: TrialConfig) -> tuple[list[float], Path, Any]:
        key = trial.model_dump_json()
        if key not in made:
            base, data = opened(trial)
            events: list[Event] = []
            session = LocalSession(tmp_path_factory.mktemp("solo"), device=CPU, on_event=events.append)
            loop = TrainingLoop(trial, base, data, session)
            for _ in range(loop.num_steps):
                loop.step()
            folder = tmp_path_factory.mktemp("adapter")
            loop.method.export(loop.module, base, folder)
            part = validate(loop.module, loop.validation, data, trial.eval, base.tokenizer, (0, 1))
            made[key] = [e.loss for e in events if isinstance(e, StepFinished)], folder, part
        return made[key]

    return run


def assert_same_function(trial: TrialConfig, one: Path, other: Path) -> None:
    """Two adapter folders give the same logits."""
    base, data = opened(trial)
    ids = torch.tensor([data.test[0].input_ids])
    found = []
    for folder in (one, other):
        model = load_adapter(base.model, folder)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
        model.unload()
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_members_equal_their_dedicated_runs(quantization: str, tiny_llama: Path, solo: Any, tmp_path: Path) -> None:
    trials = trials_of(tiny_llama, quantization=quantization)
    host = host_of(trials["plain"])
    for name, trial in trials.items():
        host.admit(name, trial)
    found = losses_of(host)
    evaluations = host.evaluate()
    for name, trial in trials.items():
        expected, folder, part = solo(trial)
        assert found[name] == pytest.approx(expected, rel=1e-4), name
        assert evaluations[name].loss == pytest.approx(part.loss_sum / part.weight_sum, rel=1e-4)
        (tmp_path / name).mkdir()
        host.export(name, tmp_path / name)
        assert_same_function(trial, folder, tmp_path / name)


@pytest.mark.parametrize("architecture", ["qwen", "gpt2"])
def test_other_architectures_too(architecture: str, tiny_model: Any, solo: Any) -> None:
    trials = trials_of(tiny_model(architecture), ["plain", "plus"], budget={"steps": 12})
    host = host_of(trials["plain"])
    for name, trial in trials.items():
        host.admit(name, trial)
    for name, losses in losses_of(host).items():
        assert losses == pytest.approx(solo(trials[name])[0], rel=1e-4)


@pytest.mark.parametrize("budget", [150, 500])
def test_the_token_budget_does_not_change_the_result(budget: int, tiny_llama: Path, solo: Any) -> None:
    trials = trials_of(tiny_llama, ["plain", "dora", "narrow"])
    host = host_of(trials["plain"], token_budget=budget)
    for name, trial in trials.items():
        host.admit(name, trial)
    found: dict[str, list[float]] = {}
    while not all(m.done for m in host.members.values()):
        for report in host.step():
            found.setdefault(report.name, []).append(report.loss)
        assert host.last_plan is not None
        assert host.last_plan.num_tokens <= budget
    for name, trial in trials.items():
        assert found[name] == pytest.approx(solo(trial)[0], rel=1e-4), name


def test_padded_rows_give_the_same(tiny_llama: Path, solo: Any) -> None:
    trials = trials_of(tiny_llama, ["plus", "dora"])
    base, data = opened(trials["plus"])
    base.model.set_attn_implementation("eager")  # which can't be packed
    host = TrialHost(base, data, num_slots=2, max_rank=8, token_budget=10_000, with_magnitudes=True)
    assert host.forward.padded
    for name, trial in trials.items():
        host.admit(name, trial)
    for name, losses in losses_of(host).items():
        assert losses == pytest.approx(solo(trials[name])[0], rel=1e-4)


def test_joining_and_leaving_changes_nobody_elses_result(tiny_llama: Path, solo: Any) -> None:
    trials = trials_of(tiny_llama)
    host = host_of(trials["plain"], num_slots=4)
    for name in ("plain", "dora", "dora-q"):
        host.admit(name, trials[name])
    found: dict[str, list[float]] = {}
    steps = dict.fromkeys(trials, 0)
    while not all(m.done for m in host.members.values()):
        for report in host.step():
            found.setdefault(report.name, []).append(report.loss)
            steps[report.name] = report.step
        if steps["plain"] == 10 and "plus" not in host.members:
            host.admit("plus", trials["plus"])
        if steps["plain"] == 20 and "dora-q" in host.members:
            host.evict("dora-q")
            host.admit("narrow", trials["narrow"])  # into the slot that another member has used
    assert len(found["plus"]) == len(found["narrow"]) == STEPS
    for name, losses in found.items():
        assert losses == pytest.approx(solo(trials[name])[0][: len(losses)], rel=1e-4), name


def test_a_diverging_member_leaves_its_neighbours_bit_for_bit(tiny_llama: Path) -> None:
    trials = trials_of(tiny_llama, ["plain", "dora", "plus"])
    results = []
    for diverges in (False, True):
        host = host_of(trials["plain"], num_slots=3)
        for name, trial in trials.items():
            host.admit(name, trial)
        for _ in range(4):
            host.step()
        if diverges:
            slot = host.members["dora"].slot
            with torch.no_grad():
                for site in host.bank.sites.values():
                    site.b_KOR[slot] = math.inf
            reports = {r.name: r for r in host.step()}
            assert "diverged at step" in (reports["dora"].error or "")
            assert not reports["dora"].done
        else:
            host.step()
            host.evict("dora")
        assert sorted(host.members) == ["plain", "plus"]
        assert host.num_slots - len(host.members) == 1
        losses_of(host, 6)
        results.append({name: weights_of(host, name) for name in ("plain", "plus")})
        host.admit("again", trials["dora"])  # the slot is as good as new
        reports = {r.name: r for r in host.step()} | {r.name: r for r in host.step()} | {r.name: r for r in host.step()}
        assert math.isfinite(reports["again"].loss)
    for name in ("plain", "plus"):
        for key, value in results[0][name].items():
            assert torch.equal(value, results[1][name][key]), (name, key)


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    trials = trials_of(tiny_llama, budget={"steps": 14})
    whole = host_of(trials["plain"])
    for name, trial in trials.items():
        whole.admit(name, trial)
    losses_of(whole, 10)  # some members are amid a step of several micro-batches
    for name in trials:
        (tmp_path / name).mkdir()
        whole.save(name, tmp_path / name)
    at = {name: member.step for name, member in whole.members.items()}

    parts = host_of(trials["plain"])
    for name, trial in trials.items():
        parts.admit(name, trial, tmp_path / name)
        assert parts.members[name].step == at[name]
        for key, value in weights_of(whole, name).items():
            assert torch.equal(value, weights_of(parts, name)[key]), key
    rest_of_whole, rest = losses_of(whole), losses_of(parts)
    for name in trials:
        assert rest[name] == pytest.approx(rest_of_whole[name], rel=1e-5)

    # in the same company even bits agree, amid a step and with dropout
    trial = trial_of(tiny_llama, MEMBERS["dora"], method={"dropout": 0.3}, budget={"steps": 8})
    first, second = host_of(trial, token_budget=200), host_of(trial, token_budget=200)
    first.admit("alone", trial)
    losses_of(first, 10)
    assert first.members["alone"].accumulating
    (tmp_path / "alone").mkdir()
    first.save("alone", tmp_path / "alone")
    second.admit("alone", trial, tmp_path / "alone")
    losses_of(first), losses_of(second)
    for key, value in weights_of(first, "alone").items():
        assert torch.equal(value, weights_of(second, "alone")[key]), key


def test_dropout_is_a_members_own(tiny_llama: Path) -> None:
    """Its masks depend neither on its neighbours nor on its slot; evaluation has none."""
    sections: dict[str, Any] = {"optim": {"learning_rate": 2e-2}, "budget": {"steps": 8}}
    dropping = trial_of(tiny_llama, MEMBERS["plain"], method={"dropout": 0.4}, **sections)
    found = []
    for neighbours in (["plus", "dora"], []):
        host = host_of(dropping)
        for name in neighbours:
            host.admit(name, trial_of(tiny_llama, MEMBERS[name], budget={"steps": 8}))
        host.admit("dropping", dropping)
        found.append(losses_of(host)["dropping"])
        evaluations = [host.evaluate(["dropping"])["dropping"].loss for _ in range(2)]
        assert evaluations[0] == evaluations[1]
    host = host_of(dropping)
    host.admit("dropping", trial_of(tiny_llama, MEMBERS["plain"], **sections))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != pytest.approx(losses_of(host)["dropping"], rel=1e-3)


def test_a_copy_goes_on_from_the_others_state_with_its_own_settings(tiny_llama: Path, tmp_path: Path) -> None:
    trials = trials_of(tiny_llama, ["plain", "plus"])
    host = host_of(trials["plain"])
    host.admit("source", trials["plain"])
    faster = trial_of(tiny_llama, MEMBERS["plain"], optim={"learning_rate": 5e-3, "batch_size": 4}, seed=5)
    host.admit("target", faster)
    host.admit("other", trials["plus"])
    losses_of(host, 10)
    host.copy("source", "target")
    assert host.members["target"].step == 10
    for key, value in weights_of(host, "source").items():
        assert torch.equal(value, weights_of(host, "target")[key])
    with pytest.raises(IncompatibleError, match=r"method\.rank=4, the trial 8"):
        host.copy("source", "other")
    host.save("source", tmp_path)
    host.admit("third", faster, tmp_path)  # the same through a folder
    found = losses_of(host, 3)
    assert found["third"] == pytest.approx(found["target"], rel=1e-5)
    assert found["source"] != pytest.approx(found["target"], rel=1e-3)


class ShortOfMemory(TrialHost):
    """A host whose device holds few positions at a time."""

    room = 200
    splits = 0

    def _forward_backward(self, plan: StepPlan) -> None:
        if plan.num_tokens > self.room:
            self.splits += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        super()._forward_backward(plan)


def test_running_out_of_memory_splits_the_step(tiny_llama: Path, solo: Any) -> None:
    trials = trials_of(tiny_llama, ["plain", "dora", "narrow"])
    host = host_of(trials["plain"], kind=ShortOfMemory)
    assert isinstance(host, ShortOfMemory)
    for name, trial in trials.items():
        host.admit(name, trial)
    found = losses_of(host)
    assert 1 <= host.splits <= 8  # and the lesson is learnt: not in every step
    assert host.token_budget <= 200
    for name, trial in trials.items():
        assert found[name] == pytest.approx(solo(trial)[0], rel=1e-4), name


def test_memory_that_lacked_for_a_while_is_used_again(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankloom.training.fused.host.TRIED_AGAIN_AFTER", 3)
    trials = trials_of(tiny_llama, ["plain", "narrow"])
    host = host_of(trials["plain"], kind=ShortOfMemory, token_budget=1500)
    assert isinstance(host, ShortOfMemory)
    for name, trial in trials.items():
        host.admit(name, trial)
    host.step()
    assert host.token_budget <= 200
    host.room, split = 10**9, host.splits
    losses_of(host)
    assert host.token_budget == 1500
    assert host.splits == split


def test_an_evaluation_that_runs_out_of_memory_is_made_in_parts(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = trials_of(tiny_llama, ["plain", "narrow"])
    host = host_of(trials["plain"])
    for name, trial in trials.items():
        host.admit(name, trial)
    whole, sizes = host.evaluate(), []

    def limited(model: Any, packed: Any) -> torch.Tensor:
        sizes.append(sum(packed.sizes))
        if sizes[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_logits(model, packed)

    monkeypatch.setattr("rankloom.training.fused.forward.compute_logits", limited)
    for name, found in host.evaluate().items():
        assert found.loss == pytest.approx(whole[name].loss, rel=1e-5)
    assert 0 < sum(size > 150 for size in sizes) <= 4
    assert 30 < host.evaluator.token_budget <= 150
    assert host.token_budget == 100_000  # a step's own


@pytest.mark.parametrize("labelled", [True, False])
def test_own_metric_sees_what_each_member_alone_predicts(labelled: bool, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"yes {n % 3}"}) + "\n" for n in range(40)))
    data = {} if labelled else {"data": {"train": str(file)}}
    trials = trials_of(tiny_llama, ["plain", "dora"], budget={"steps": 6}, **data)
    host = host_of(trials["plain"])
    for name, trial in trials.items():
        host.admit(name, trial)
    losses_of(host)
    asked: list[list[Prediction]] = []

    def own(rows: Sequence[Prediction]) -> float:
        asked.append(list(rows))
        return float(len(asked))

    host.metric = own
    found, host.metric = host.evaluate(list(trials)), None
    assert [found[name].metric for name in trials] == [1.0, 2.0]
    assert all(found[name].loss == each.loss for name, each in host.evaluate().items())  # the bank is as it was
    expected = []
    for name, trial in trials.items():
        host.export(name, tmp_path / name)
        base, rows = opened(trial)
        model = load_adapter(base.model, tmp_path / name)
        expected.append(predict(model, base.tokenizer, select_validation_rows(rows, 16), rows, batch_size=32))
    assert asked == expected
    assert asked[0] != asked[1]


def test_a_row_that_never_fits_ends_its_member_alone(tiny_llama: Path) -> None:
    trials = trials_of(tiny_llama, ["plain", "narrow"])
    host = host_of(trials["plain"], kind=ShortOfMemory)
    assert isinstance(host, ShortOfMemory)
    for name, trial in trials.items():
        host.admit(name, trial)
    host.room = int(host.data.train.lengths.max()) - 1
    ended: dict[str, StepReport] = {}
    for _ in range(500):
        ended |= {r.name: r for r in host.step() if r.error}
        if not host.members:
            break
    assert ended
    assert all("does not fit into memory" in (r.error or "") for r in ended.values())


def test_fused_accuracy_is_that_of_constrained_decoding(tiny_llama: Path, solo: Any) -> None:
    sections = {"eval": {"metric": "accuracy", "max_rows": 40}, "budget": {"steps": 25}}
    trials = {
        "fast": trial_of(tiny_llama, MEMBERS["plain"], **sections, optim={"learning_rate": 1e-2}),
        "dora": trial_of(tiny_llama, MEMBERS["dora"], **sections),
    }
    host = host_of(trials["fast"], token_budget=900)
    for name, trial in trials.items():
        host.admit(name, trial)
    losses_of(host)
    for name, found in host.evaluate().items():
        part = solo(trials[name])[2]
        assert found.num_rows == part.num_rows == 40
        assert found.loss == pytest.approx(part.loss_sum / part.weight_sum, rel=1e-4)
        assert found.accuracy == part.correct / part.num_rows
    assert host.evaluate(["fast"])["fast"].accuracy > 0.0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"type": "full"}}, r"method\.type=full can't be fused"),
        ({"method": {"type": "lora", "rank": 17}}, r"method\.rank=17 .*at most the bank's 16"),
        ({"method": {"type": "lora", "rank": 4, "init": "pissa"}}, r"method\.init=pissa .*default or gaussian"),
        ({"quantization": "nf4"}, r"quantization=nf4 .*allowed: none"),
        ({"model": {"id": "builtin:smollm2"}}, r"model\.id=builtin:smollm2"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, tiny_llama: Path) -> None:
    host = host_of(trial_of(tiny_llama, {}))
    with pytest.raises(IncompatibleError, match=message):
        host.admit("a", trial_of(tiny_llama, {}, **change))
    assert host.num_slots - len(host.members) == 6


def test_seats_and_damage(tiny_llama: Path, tmp_path: Path) -> None:
    trial = trial_of(tiny_llama, MEMBERS["plain"])
    host = host_of(trial, num_slots=1)
    assert host.step() == []
    host.admit("a", trial)
    with pytest.raises(TrialError, match="no free slot for b: all 1 are taken"):
        host.admit("b", trial)
    with pytest.raises(TrialError, match="a is already a member"):
        host.admit("a", trial)
    with pytest.raises(TrialError, match="z is not a member of this host; it has a"):
        host.evict("z")
    host.evict("a")
    (tmp_path / "state.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrialError, match="damaged"):
        host.admit("c", trial, tmp_path)
    assert host.num_slots - len(host.members) == 1
