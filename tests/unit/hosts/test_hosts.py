"""How a study shares out a cluster: groups of trials, hosts a device, room for dedicated runs."""

from __future__ import annotations

from typing import Any

import pytest

from rankloom.config import StudyConfig, parse
from rankloom.errors import ConfigError
from rankloom.hosts.hosts import BankShape, group_trials, share_out, size_bank

LORA = {"method": {"type": "lora", "rank": {"choice": [4, 32]}}}
QUANTISED = LORA | {"quantization": {"choice": ["none", "nf4"]}}
DORA = {"method": {"type": "dora", "rank": 8}}
FULL = {"method": {"type": "full"}}


def study(*space: dict[str, Any], **changed: Any) -> StudyConfig:
    return parse(StudyConfig, {"name": "s", "space": list(space)} | changed)


def test_a_group_is_a_base_and_the_bank_holds_any_trial() -> None:
    assert len(group_trials(study(LORA))) == 1
    assert [trial.quantization.type for trial in group_trials(study(QUANTISED, DORA, FULL)).values()] == ["none", "nf4"]
    crossed = QUANTISED | {"data": {"max_length": {"choice": [64, 128, 256]}}}
    assert len(group_trials(study(crossed))) == 7  # and the baseline's
    assert size_bank(study(LORA), 8) == BankShape((4, 16, 32), with_magnitudes=False, num_slots=8)  # and the baseline's
    assert size_bank(study(QUANTISED, DORA), 2) == BankShape((4, 8, 16, 32), with_magnitudes=True, num_slots=2)
    assert size_bank(study(LORA, hosts={"max_rank": 8}), 8).ranks == (4, 8)
    assert size_bank(study(LORA, hosts={"max_rank": 64}), 8).ranks == (4, 16, 32, 64)


def test_hosts_leave_room_for_the_trials_and_for_dedicated_runs() -> None:
    cores = [{"CPU": 8.0, "memory": 8e9}]
    one = share_out(study(LORA), cores)
    assert (one.hosts_per_group, one.device.threads, one.device.gpus) == (1, 8, 0.0)
    assert 7 < one.device.cpus < 8
    two = share_out(study(QUANTISED), cores)
    assert two.device.threads == 4
    assert 2 * two.device.cpus < 8
    mixed = share_out(study(QUANTISED, FULL), cores)
    assert 2 * mixed.device.cpus + mixed.dedicated_cpus < 8
    assert (one.device.memory_bytes, two.device.memory_bytes) == (8e9, 4e9)
    assert share_out(study(LORA, FULL), [{"CPU": 1.0}]).dedicated_cpus == 1
    several = share_out(study(LORA, hosts={"max_hosts": 4}), cores)
    assert (several.hosts_per_group, several.device.threads) == (4, 2)


def test_one_host_a_node_of_cores() -> None:
    head, worker = {"memory": 1e9}, {"CPU": 8.0, "memory": 8e9}
    plan = share_out(study(LORA), [head, worker, worker])
    assert (plan.hosts_per_group, plan.device.threads, plan.device.memory_bytes) == (2, 8, 8e9)
    assert 7 < plan.device.cpus < 8
    plan = share_out(study(QUANTISED, FULL), [head, worker, worker])
    assert (plan.hosts_per_group, plan.device.threads, plan.dedicated_cpus) == (2, 2, 2)
    assert share_out(study(LORA), [{"CPU": 2.0}, {"CPU": 64.0}]).device.threads == 64  # one large node is worth more
    four = share_out(study(LORA, hosts={"max_hosts": 4}), [worker, worker])
    assert (four.hosts_per_group, four.device.threads, four.device.memory_bytes) == (4, 4, 4e9)


def test_one_host_a_gpu_which_groups_share() -> None:
    gpus = [{"CPU": 8.0, "GPU": 2.0}] * 2
    plan = share_out(study(LORA), gpus)
    assert (plan.hosts_per_group, plan.device.gpus) == (4, 1.0)
    assert plan.device.cpus <= 1
    plan = share_out(study(QUANTISED), gpus)
    assert (plan.hosts_per_group, plan.device.gpus) == (4, 0.5)
    assert share_out(study(LORA, trial={"compute": {"device": "cpu"}}), gpus).device.gpus == 0
    with pytest.raises(ConfigError, match="no GPU"):
        share_out(study(LORA, trial={"compute": {"device": "cuda"}}), [{"CPU": 2.0}])


@pytest.mark.parametrize(
    ("node", "trials", "hosts", "slots"),
    [
        ({"CPU": 8.0}, 64, {}, 8),
        ({"CPU": 8.0}, 3, {}, 3),
        ({"CPU": 8.0, "GPU": 1.0}, 16, {}, 16),
        ({"CPU": 8.0, "GPU": 1.0}, 64, {}, 32),
        ({"CPU": 8.0, "GPU": 4.0}, 16, {}, 4),  # no GPU stands idle
        ({"CPU": 8.0, "GPU": 4.0}, 16, {"max_hosts": 1}, 16),
        ({"CPU": 8.0, "GPU": 1.0}, 3, {"num_slots": 5}, 5),
    ],
)
def test_slots_by_device_and_trials(node: dict[str, float], trials: int, hosts: dict[str, int], slots: int) -> None:
    config = study(LORA, search={"num_trials": trials}, hosts=hosts)
    assert share_out(config, [node]).num_slots == slots
    on_gpu = "GPU" in node
    assert config.hosts.count_tokens(on_gpu=on_gpu) == (32_768 if on_gpu else 8192)
