"""Trials under Ray Train: events, a killed worker, a stop and a resume, a killed driver, an error of the user."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankloom.config import TrialConfig, parse
from rankloom.errors import ConfigError, DataError
from rankloom.events import Evaluated, Event, PhaseStarted, RunResumed, StepFinished
from rankloom.launch.orphans import remove_orphaned_groups
from rankloom.launch.trainer import train_trial
from rankloom.registry import Registry
from rankloom.training.preflight import HEAD_ROWS

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

Make = Callable[..., dict[str, Any]]


def test_a_killed_worker_costs_one_interval(tiny_trial: Make, processes_named: Callable[[str], list[int]]) -> None:
    trial = parse(
        TrialConfig,
        tiny_trial(
            budget={"steps": 100},
            eval={"every": 20, "latency": False, "max_rows": 8, "max_test_rows": 8},
            compute={"num_workers": 2, "device": "cpu", "cpus_per_worker": 1, "max_failures": 1},
        ),
    )
    events: list[Event] = []
    killed: list[int] = []

    def watch(event: Event) -> None:
        events.append(event)
        # Ray registers a checkpoint at its next poll, and takes the next only then: that of step 20 is registered here
        if isinstance(event, StepFinished) and event.step > 60 and not killed:
            killed.extend(processes_named("RayTrainWorker")[:1])
            os.kill(killed[0], signal.SIGKILL)

    result = train_trial(trial, on_event=watch)

    assert killed
    assert result.status == "done"
    assert result.steps == 100
    [resumed] = [event.step for event in events if isinstance(event, RunResumed)]
    assert resumed >= 20
    kinds = {event.kind for event in events}
    assert {"phase", "data", "step", "eval", "done"} <= kinds
    assert {event.step for event in events if isinstance(event, StepFinished)} == set(range(1, 101))
    run = Path(result.run)
    assert (run / "events.jsonl").read_text().count('"event": "eval"') == len(
        [e for e in events if isinstance(e, Evaluated)]
    )
    assert list((run / "tensorboard").iterdir())
    assert sum(path.is_dir() and path.name.startswith("checkpoint") for path in run.iterdir()) <= 3
    record = Registry(result.registry).verify("tiny@1")
    assert record.scorecard is not None
    assert record.scorecard.steps == 100


def test_stop_resume_and_finish(tiny_trial: Make) -> None:
    eval_ = {"every": 20, "latency": False, "max_rows": 8, "max_test_rows": 8}
    settings = tiny_trial(budget={"steps": 400}, eval=eval_)
    trial = parse(TrialConfig, settings)
    stop = threading.Event()

    def stop_at_30(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step >= 30:
            stop.set()

    stopped = train_trial(trial, on_event=stop_at_30, stop=stop)
    assert stopped.status == "interrupted"
    assert 30 <= stopped.steps < 400

    with pytest.raises(ConfigError, match=r"run 'tiny' exists at .*--resume continues it"):
        train_trial(trial)
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.0003 -> 0\.001"):
        train_trial(parse(TrialConfig, settings | {"optim": {"batch_size": 4, "learning_rate": 1e-3}}), resume=True)
    with pytest.raises(ConfigError, match="keep their checkpoints differently"):
        train_trial(parse(TrialConfig, settings | {"compute": {"num_workers": 0}}), resume=True)

    events: list[Event] = []
    finished = train_trial(
        parse(TrialConfig, settings | {"budget": {"steps": stopped.steps + 5}}), resume=True, on_event=events.append
    )
    assert finished.status == "done"
    assert [event.step for event in events if isinstance(event, RunResumed)] == [stopped.steps]
    assert min(event.step for event in events if isinstance(event, StepFinished)) == stopped.steps + 1

    again = train_trial(parse(TrialConfig, settings | {"budget": {"steps": stopped.steps + 5}}), resume=True)
    assert again == finished


def test_what_a_killed_process_reserved_is_free_again() -> None:
    import ray
    from ray.util import placement_group, placement_group_table, remove_placement_group

    class Reserver:
        def reserve(self, cpus: float) -> str:
            group = placement_group([{"CPU": cpus}])
            group.wait(1)
            return str(group.id.hex())

    def start_reserver(cpus: float) -> tuple[Any, str]:
        actor = ray.remote(Reserver).options(num_cpus=0).remote()
        return actor, ray.get(actor.reserve.remote(cpus))

    def list_states(*groups: str) -> list[str]:
        table = placement_group_table()
        return [table[group]["state"] for group in groups]

    ours = placement_group([{"CPU": 0.1}])
    (alive, kept), (reserving, reserved), (waiting, awaited) = map(start_reserver, (0.1, 1.8, 1.8))
    assert list_states(kept, reserved, awaited) == ["CREATED", "CREATED", "PENDING"]
    ray.kill(reserving)
    ray.kill(waiting)
    deadline = time.monotonic() + 60
    while list_states(reserved, awaited) != ["REMOVED", "REMOVED"]:
        assert time.monotonic() < deadline
        remove_orphaned_groups()
        time.sleep(0.1)
    assert list_states(ours.id.hex(), kept) == ["CREATED", "CREATED"]
    remove_placement_group(ours)
    ray.kill(alive)  # the next run frees what it reserved


def test_an_error_of_the_users_is_told_once_and_not_retried(
    tiny_trial: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankloom.training.preflight.READ_BYTES", -1)  # as where only the workers read all rows
    rows = [f"my card was lost {i},lost" for i in range(HEAD_ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, "one,field,too many"]))
    settings = tiny_trial(
        data={"train": str(tmp_path / "rows.csv")},
        compute={"num_workers": 2, "device": "cpu", "cpus_per_worker": 1, "max_failures": 3},
    )
    events: list[Event] = []
    with pytest.raises(DataError, match=r"rows\.csv can't be read as csv"):
        train_trial(parse(TrialConfig, settings), on_event=events.append)
    # each rank fails by itself; should rank 1 be first, rank 0 does not even begin
    assert [event.phase for event in events if isinstance(event, PhaseStarted)].count("data") <= 1
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [".tiny.lock"]
