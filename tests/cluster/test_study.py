"""Studies on a real local Ray: ASHA with more trials than slots, processes killed, a study that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rankloom.cli.study_view import build_result_rows
from rankloom.config import StudyConfig, parse
from rankloom.errors import ConfigError, RankloomError
from rankloom.events import Event, PhaseStarted, TrialEnded, TrialEvaluated, TrialStarted
from rankloom.registry import Registry
from rankloom.registry.checks import WEIGHTS
from rankloom.reporting.write import report
from rankloom.search.priors import PriorCounts
from rankloom.search.study import tune

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Make = Callable[..., dict[str, Any]]
PER_RANK = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
"""Values that LoRA has for each rank on the tiny Llama: A and B of q, k, v, o, gate, up and down in two layers."""
MAGNITUDES = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
"""And DoRA beside them."""
SOURCE = str(Path(__file__).resolve().parents[2] / "platform")


def reports_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Trial -> its reports in the journal."""
    found: dict[str, list[dict[str, Any]]] = {}
    for text in (folder / "journal.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["event"] == "report":
            found.setdefault(line["trial"], []).append(line)
    return found


@pytest.mark.usefixtures("local_ray")
def test_asha_from_the_config_to_the_registry(tiny_study: Make) -> None:
    events: list[Event] = []
    result = tune(parse(StudyConfig, tiny_study()), on_event=events.append)

    assert {"phase", "trial", "report", "end", "status"} <= {event.kind for event in events}
    counts = result.counts
    assert result.status == "done"
    assert sum(counts.values()) == 12
    assert counts["stopped"] >= 4
    assert counts["done"] >= 1
    assert counts["failed"] == counts["running"] == 0
    [host] = result.hosts
    assert result.tokens <= host.tokens < 1.5 * result.tokens  # what was trained ahead in vain is bounded
    assert len({seat.trial for seat in host.seats}) == 12
    assert {seat.slot for seat in host.seats} <= set(range(host.num_slots))

    table = pq.read_table(result.results).to_pylist()
    assert [row["number"] for row in table] == list(range(12))
    for row in table:
        steps = [point["step"] for point in row["curve"]]
        assert steps == [3 * (i + 1) for i in range(len(steps))]
        assert row["best_loss"] == min(point["loss"] for point in row["curve"])
        assert json.loads(row["config"])["method"]["type"] == row["method"]
        assert row["status"] == ("done" if steps[-1] == 27 else "stopped")

    best = min(table, key=lambda row: row["best_loss"])
    winner = result.winner
    assert (winner.trial, winner.published[0]) == (best["trial"], "tiny@1")
    assert {row.method for row in result.finalists} == {"lora", "dora"}
    assert 0 in {row.number for row in result.finalists}
    assert result.beats_baseline in (True, False) or winner.number == 0
    registry = Registry(result.registry)
    for row in result.finalists:
        for ref in row.published:
            record = registry.verify(ref)
            assert (record.lineage.study, record.lineage.run) == ("tiny", row.name)
            assert record.scorecard is not None
    assert set(registry.names()) == {"tiny", "tiny-lora", "tiny-dora"}
    curves = EventAccumulator(str(Path(result.folder) / "tensorboard" / winner.name)).Reload()
    assert [point.step for point in curves.Scalars("eval/loss")] == [point["step"] for point in best["curve"]]
    assert curves.Scalars("result/loss")[0].value == pytest.approx(winner.scorecard.result.loss)

    storage = JournalStorage(JournalFileBackend(str(Path(result.folder) / "optuna.log")))
    stored = optuna.load_study(study_name="tiny", storage=storage)
    assert [trial.value for trial in stored.trials] == [row["best_loss"] for row in table]
    assert {trial.state.name for trial in stored.trials} == {"COMPLETE", "PRUNED"}
    page = report(result.folder).read_text()
    assert winner.name in page
    assert "host-1 slot 0" in page

    config = parse(StudyConfig, tiny_study())
    assert tune(config, resume=True) == result
    with pytest.raises(ConfigError, match=r"study 'tiny' exists at .*--resume continues it"):
        tune(config)
    with pytest.raises(ConfigError, match=r"search\.num_trials: 12 -> 13"):
        tune(parse(StudyConfig, tiny_study(search={"num_trials": 13})), resume=True)


@pytest.mark.usefixtures("local_ray")
def test_a_killed_host_and_a_killed_trial_cost_no_trial(
    tiny_study: Make, processes_named: Callable[[str], list[int]]
) -> None:
    settings = tiny_study(scheduler={"type": "fifo"}, search={"num_trials": 6})
    settings["trial"]["budget"] = {"steps": 60}
    killed: list[str] = []

    def watch(event: Event) -> None:
        if not isinstance(event, TrialEvaluated):
            return
        for name, after in (("ray::HostActor", 3), ("ray::SharedTrialActor", 8)):
            if event.n >= after and name not in killed:
                killed.append(name)
                os.kill(processes_named(name)[0], signal.SIGKILL)

    result = tune(parse(StudyConfig, settings), on_event=watch)

    assert killed == ["ray::HostActor", "ray::SharedTrialActor"]
    assert result.counts == {"running": 0, "done": 6, "stopped": 0, "failed": 0}
    for row in pq.read_table(result.results).to_pylist():
        assert [point["step"] for point in row["curve"]] == list(range(3, 61, 3))


@pytest.mark.usefixtures("local_ray")
def test_what_fails_alone_and_what_fails_for_all(tiny_study: Make, tmp_path: Path) -> None:
    diverging = {
        "method": {"type": "lora", "rank": 2},
        "optim": {"learning_rate": 1.0, "clip_norm": None, "eps": 1e-30},
    }
    too_wide = {"method": {"type": "lora", "rank": {"choice": [8]}}}
    settings = tiny_study(
        space=[diverging, too_wide], search={"num_trials": 6}, scheduler={"type": "fifo"},
        hosts={"num_slots": 4, "max_rank": 4},
    )  # fmt: skip
    settings["trial"]["method"] = {"type": "lora", "rank": 4}
    settings["trial"]["budget"] = {"steps": 6}
    result = tune(parse(StudyConfig, settings))
    rows = pq.read_table(result.results).to_pylist()
    assert rows[0]["status"] == "done"
    wide = [row for row in rows[1:] if json.loads(row["point"])["branch"] == 1]
    assert wide
    assert all(row["status"] == "failed" and "rank=8" in row["error"] for row in wide)

    (tmp_path / "empty.csv").write_text("text,label\n")
    settings = tiny_study(name="empty")
    settings["trial"]["data"]["train"] = str(tmp_path / "empty.csv")
    with pytest.raises(RankloomError, match=r"empty\.csv"):
        tune(parse(StudyConfig, settings))
    settings["trial"]["data"]["train"] = str(tmp_path / "rows.csv")  # mended: nothing was trained, so it may start
    settings["search"]["num_trials"] = 1
    assert tune(parse(StudyConfig, settings)).counts["done"] == 1


@pytest.mark.usefixtures("local_ray")
def test_methods_that_share_no_base_are_searched_beside_those_that_do(tiny_study: Make) -> None:
    settings = tiny_study(
        space=[
            {"method": {"type": "full", "extract_rank": 8}, "optim": {"learning_rate": 1e-3}, "seed": {"choice": [1]}},
            {"method": {"type": "dora", "rank": 4}, "optim": {"learning_rate": 1e-2}},
        ],
        search={"algorithm": "grid", "num_trials": 3, "objectives": ["memory_bytes", "latency_ms"]},
        scheduler={"type": "fifo"},
    )
    settings["trial"]["budget"] = {"steps": 6}
    result = tune(parse(StudyConfig, settings))
    assert result.counts == {"running": 0, "done": 3, "stopped": 0, "failed": 0}
    rows = {row["method"]: row for row in pq.read_table(result.results).to_pylist()}
    assert set(rows) == {"lora", "full", "dora"}
    adapters = {row.trial: load_file(Path(result.folder, "adapters", row.trial, WEIGHTS)) for row in result.finalists}
    bases = {
        row.costs["memory_bytes"] - sum(tensor.nbytes for tensor in adapters[row.trial].values())
        for row in result.finalists
    }
    assert len(bases) == 1  # measured in a host or at a run's end, it is the same base under each method's adapter
    for row in rows.values():
        assert row["latency_ms"] > 0
        assert [point["step"] for point in row["curve"]][:2] == [3, 6]
    registry = Registry(result.registry)
    assert registry.verify("tiny-full@1").servable == "extracted"
    assert registry.verify("tiny-dora@1").servable == "itself"


@pytest.mark.usefixtures("local_ray")
def test_a_population_copies_weights_and_rates_from_its_best(tiny_study: Make) -> None:
    settings = tiny_study(
        space=[{"method": {"type": "lora", "rank": 4}, "optim": {"learning_rate": {"loguniform": [1e-6, 1e-2]}}}],
        search={"num_trials": 4, "seed": 3},
        scheduler={"type": "pbt", "interval": 0.33, "quantile": 0.5, "resample": 0.0},
        hosts={"num_slots": 2, "max_rank": 16},
    )
    events: list[Event] = []
    result = tune(parse(StudyConfig, settings), on_event=events.append)
    assert result.counts == {"running": 0, "done": 4, "stopped": 0, "failed": 0}
    begun = [event.trial for event in events if isinstance(event, TrialStarted)]
    assert len(begun) > len(set(begun)) == 4  # some trial went on with another's settings
    for row in pq.read_table(result.results).to_pylist():
        assert row["curve"][-1]["step"] == 27


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "scheduler", [{"type": "hyperband"}, {"type": "median", "grace": 0.2, "min_trials": 2}], ids=lambda s: s["type"]
)
def test_hyperband_and_median_stopping_end_what_is_behind(tiny_study: Make, scheduler: dict[str, Any]) -> None:
    # HyperBand's first bracket of five runs to its end, the second halves once: it needs more trials than have a slot
    settings = tiny_study(scheduler=scheduler, search={"num_trials": 12, "seed": 1})
    # far too low a rate for half of the trials: whoever compares them stops some
    settings["space"] = [
        {"method": {"type": "lora", "rank": 4}, "optim": {"learning_rate": {"choice": [1e-8, 1e-2]}}},
    ]
    result = tune(parse(StudyConfig, settings))
    counts = result.counts
    assert counts["done"] + counts["stopped"] == 12
    assert counts["done"] >= 3
    assert counts["stopped"] >= 3
    rows = pq.read_table(result.results).to_pylist()
    done, stopped = ([row["best_loss"] for row in rows if row["status"] == each] for each in ("done", "stopped"))
    assert min(done) < min(stopped)


@pytest.mark.usefixtures("local_ray")
def test_several_objectives_and_then_that_study_as_a_prior(tiny_study: Make) -> None:
    rates = {"learning_rate": {"loguniform": [1e-4, 1e-2]}}
    space = [
        {"method": {"type": "lora", "rank": {"choice": [2, 4, 16]}}, "optim": rates},
        {"method": {"type": "dora", "rank": 4}, "optim": rates},
    ]
    search = {"algorithm": "optuna", "num_trials": 8, "objectives": ["memory_bytes", "latency_ms"]}
    settings = tiny_study(space=space, search=search, scheduler={"type": "fifo"}, final={"top_k": 1})
    settings["trial"]["budget"] = {"steps": 6}
    result = tune(parse(StudyConfig, settings))

    rows = {row["trial"]: row for row in pq.read_table(result.results).to_pylist()}
    assert result.counts["done"] == 8
    assert {row["method"] for row in rows.values()} == {"lora", "dora"}
    base = {row["memory_bytes"] - 4 * json.loads(row["config"])["method"]["rank"] * PER_RANK for row in rows.values()}
    assert max(base) - min(base) == 4 * MAGNITUDES
    assert len(base) == 2  # with DoRA's magnitudes, and without
    assert all(row["latency_ms"] > 0 for row in rows.values())
    front = {row.trial for row in result.front}
    assert front == {trial for trial, row in rows.items() if row["on_front"]}
    best = min(rows.values(), key=lambda row: row["best_loss"])
    assert best["trial"] in front
    assert result.winner.trial == best["trial"]
    registry = Registry(result.registry)
    assert len(registry.versions("tiny-front")) == len(front)
    table = build_result_rows(result)
    assert table[0][5:8] == ("front", "memory", "latency")
    assert sum(row[5] == "yes" for row in table) == len(front)

    events: list[Event] = []
    settings |= {"name": "again", "search": search | {"num_trials": 2, "priors": [result.folder]}}
    again = tune(parse(StudyConfig, settings), on_event=events.append)
    # the baseline, LoRA of rank 16, lies in the space as well
    assert again.priors == PriorCounts(told=8, skipped={})
    told = [event.message for event in events if isinstance(event, PhaseStarted) and event.phase == "priors"]
    assert told == ["the searcher knows 8 earlier trials"]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("algorithm", ["optuna", "hyperopt", "nevergrad"])
def test_what_can_not_be_is_refused_and_counted_and_the_search_goes_on(tiny_study: Make, algorithm: str) -> None:
    space = {
        "method": {"type": "lora", "rank": {"choice": [2, 4]}},
        # a step of one or two rows can't be cut into four
        "optim": {"batch_size": {"choice": [1, 2, 4]}, "accumulation": {"choice": [1, 4]}},
    }
    search = {"algorithm": algorithm, "num_trials": 8, "seed": 1}
    settings = tiny_study(space=[space], search=search, scheduler={"type": "fifo"}, final={"top_k": 1})
    settings["trial"]["budget"] = {"steps": 3}
    result = tune(parse(StudyConfig, settings))
    assert result.counts == {"running": 0, "done": 8, "stopped": 0, "failed": 0}
    assert result.num_refused >= 1
    for row in pq.read_table(result.results).to_pylist():
        optim = json.loads(row["config"])["optim"]
        assert optim["batch_size"] >= optim["accumulation"]


@pytest.mark.usefixtures("local_ray")
def test_a_stopped_study_goes_on_with_its_own_data(tiny_study: Make, tmp_path: Path) -> None:
    # some wait until others have ended: with all under way they would end together
    hosts = {"num_slots": 4, "num_waiting": 0, "checkpoint_every_s": 0}
    settings = tiny_study(scheduler={"type": "fifo"}, search={"num_trials": 8}, hosts=hosts)
    stop = threading.Event()

    def stop_when_some_are_done(event: Event) -> None:
        if isinstance(event, TrialEnded):
            stop.set()

    config = parse(StudyConfig, settings)
    stopped = tune(config, on_event=stop_when_some_are_done, stop=stop)
    assert stopped.status == "interrupted"
    before = reports_of(Path(stopped.folder))
    ended = {trial for trial, reports in before.items() if reports[-1]["step"] == 27}
    assert 1 <= len(ended) < 8

    data = tmp_path / "rows.csv"
    rows = data.read_text()
    swapped = rows.replace("transfer\n", "x\n").replace("card_lost\n", "transfer\n").replace("x\n", "card_lost\n")
    data.write_text(swapped)
    with pytest.raises(RankloomError, match=r"--resume: the rows .* have changed since the start"):
        tune(config, resume=True)
    data.write_text(rows)

    result = tune(config, resume=True)
    assert result.counts == {"running": 0, "done": 8, "stopped": 0, "failed": 0}
    after = reports_of(Path(stopped.folder))
    for trial in ended:
        assert after[trial] == before[trial]


@pytest.mark.usefixtures("local_ray")
def test_a_study_of_dedicated_runs_goes_on_with_its_own_data(tiny_study: Make, tmp_path: Path) -> None:
    full = {"method": {"type": "full", "extract_rank": 4}, "optim": {"learning_rate": {"choice": [1e-3, 1e-4]}}}
    hosts = {"num_slots": 1, "num_waiting": 0}
    settings = tiny_study(space=[full], search={"algorithm": "grid"}, scheduler={"type": "fifo"}, hosts=hosts)
    settings["trial"] |= {"budget": {"steps": 3}, "method": {"type": "full", "extract_rank": 4}}
    config, stop = parse(StudyConfig, settings), threading.Event()
    stopped = tune(config, on_event=lambda event: stop.set() if isinstance(event, TrialEnded) else None, stop=stop)
    assert stopped.status == "interrupted"

    data = tmp_path / "rows.csv"
    rows = data.read_text()
    data.write_text(rows.replace("transfer\n", "moved\n"))
    with pytest.raises(RankloomError, match=r"--resume: the rows .* have changed since the start"):
        tune(config, resume=True)  # its next trial, which begins only now
    data.write_text(rows)
    assert tune(config, resume=True).counts["done"] == 3


def test_a_killed_driver_costs_no_finished_trial(tiny_study: Make, tmp_path: Path) -> None:
    hosts = {"num_slots": 4, "num_waiting": 0, "checkpoint_every_s": 0}
    settings = tiny_study(scheduler={"type": "fifo"}, search={"num_trials": 8}, hosts=hosts)
    settings["trial"]["budget"] = {"steps": 45}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "rankloom.cli", "tune", str(tmp_path / "study.yaml")]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    journal = tmp_path / "out" / "studies" / "tiny" / "journal.jsonl"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not journal.is_file() or '"event": "end"' not in journal.read_text():
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        time.sleep(4)  # Ray Tune's state is saved every three seconds
        driver.kill()
        driver.wait()
    before = journal.read_text()
    ended = [json.loads(line)["trial"] for line in before.splitlines() if '"event": "end"' in line]
    assert ended

    done = subprocess.run(
        [*command, "--resume", "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["counts"] == {"running": 0, "done": 8, "stopped": 0, "failed": 0}
    assert len(pq.read_table(result["results"])) == 8
    later = journal.read_text()[len(before) :]
    assert not [trial for trial in ended if f'"trial": "{trial}"' in later]
