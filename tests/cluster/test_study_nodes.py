"""Studies on a cluster of several nodes, each with its own raylet: hosts on all, a node lost, no memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rankloom.config import StudyConfig, parse
from rankloom.errors import TrialError
from rankloom.events import Event, StudyStatus, TrialEvaluated
from rankloom.search.study import tune

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Make = Callable[..., dict[str, Any]]
Start = Callable[..., Any]
SOURCE = str(Path(__file__).resolve().parents[2] / "platform")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a cluster whose head has no core, connects to it, and returns it; hosts keep their files in `tmp_path`."""
    import ray
    from ray.cluster_utils import Cluster

    clusters = []

    def started(num_nodes: int, **each: Any) -> Any:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        clusters.append(cluster)
        nodes = [cluster.add_node(num_cpus=1, **each) for _ in range(num_nodes)]
        environment = {"PYTHONPATH": SOURCE, "TMPDIR": str(tmp_path)}
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
        cluster.wait_for_nodes()
        return cluster, nodes

    yield started
    ray.shutdown()
    for cluster in clusters:
        cluster.shutdown()


def test_members_are_spread_over_the_nodes_and_a_lost_node_costs_no_trial(tiny_study: Make, start: Start) -> None:
    cluster, nodes = start(2)
    settings = tiny_study(
        scheduler={"type": "fifo"}, search={"num_trials": 6},
        hosts={"num_slots": 3, "checkpoint_every_s": 0, "max_failures": 3},
    )  # fmt: skip
    settings["trial"]["budget"] = {"steps": 45}
    spread: list[list[int]] = []

    def watch(event: Event) -> None:
        if isinstance(event, StudyStatus):
            members = [host.members for host in event.hosts]
            if not spread and len(members) == 2 and sum(members) == 6:
                spread.append(members)
        if isinstance(event, TrialEvaluated) and event.n >= 3 and spread and len(nodes) == 2:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    result = tune(parse(StudyConfig, settings), on_event=watch)

    assert len(nodes) == 1
    assert spread == [[3, 3]]
    assert result.counts == {"running": 0, "done": 6, "stopped": 0, "failed": 0}
    for row in pq.read_table(result.results).to_pylist():
        assert [point["step"] for point in row["curve"]] == list(range(3, 46, 3))


def test_a_lost_disk_stops_a_study_that_then_goes_on(tiny_study: Make, start: Start, tmp_path: Path) -> None:
    start(1)
    config = parse(
        StudyConfig,
        tiny_study(
            scheduler={"type": "fifo"}, search={"num_trials": 3}, hosts={"num_slots": 2, "checkpoint_every_s": 0}
        ),
    )

    def lose(event: Event) -> None:
        if isinstance(event, TrialEvaluated) and event.n >= 3:
            for folder in tmp_path.glob("rankloom-host-*"):
                with suppress(OSError):  # the host may be writing in it: then at the next report
                    shutil.rmtree(folder)
                    folder.write_text("no folder any more")

    with pytest.raises(
        TrialError, match=r"a host can't write its trials' snapshots: .*; make room there, and --resume continues"
    ):
        tune(config, on_event=lose)
    for file in tmp_path.glob("rankloom-host-*"):
        file.unlink()
    result = tune(config, resume=True)
    assert result.counts == {"running": 0, "done": 3, "stopped": 0, "failed": 0}
    for row in pq.read_table(result.results).to_pylist():
        assert [point["step"] for point in row["curve"]] == list(range(3, 28, 3))


def test_a_study_that_fits_nowhere_says_what_to_lower(tiny_study: Make, start: Start) -> None:
    start(1, memory=200 * 2**20)
    with pytest.raises(TrialError, match=r"every trial of study 'tiny' failed: not even one slot .* are free; lower"):
        tune(parse(StudyConfig, tiny_study(search={"num_trials": 2})))
