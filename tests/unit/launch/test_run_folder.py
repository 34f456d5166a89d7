"""Whether a run may start, go on, or is finished; nothing here starts Ray or imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankloom.config import TrialConfig, parse
from rankloom.config.paths import resolve_paths
from rankloom.errors import ConfigError, TrialError
from rankloom.launch.run_folder import ERROR, RESULT, RunFolder, lock_folder


def trial_at(root: Path, **settings: Any) -> TrialConfig:
    return resolve_paths(parse(TrialConfig, {"name": "run", "output": {"root": str(root)}} | settings))


def begun(trial: TrialConfig) -> RunFolder:
    run = RunFolder(trial)
    assert run.decide_run(trial, resume=False) == "start"
    run.begin(trial)
    return run


def test_an_existing_run_is_not_started_again(tmp_path: Path) -> None:
    trial = trial_at(tmp_path)
    run = begun(trial)
    with pytest.raises(ConfigError, match=rf"run 'run' exists at {run.path}; --resume continues it, or choose another"):
        run.decide_run(trial, resume=False)
    assert run.decide_run(trial, resume=True) == "resume"


def test_resume_of_nothing(tmp_path: Path) -> None:
    trial = trial_at(tmp_path)
    with pytest.raises(ConfigError, match="no run 'run' at"):
        RunFolder(trial).decide_run(trial, resume=True)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "thesis.txt").write_text("mine")
    trial = trial_at(tmp_path)
    with pytest.raises(ConfigError, match="does not hold a rankloom run"):
        RunFolder(trial).decide_run(trial, resume=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optim": {"learning_rate": 1e-3}}, "optim.learning_rate: 0.0003 -> 0.001"),
        ({"method": {"type": "dora"}}, "method.type: 'lora' -> 'dora'"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"eval": {"metric": "accuracy"}}, "eval.metric: 'loss' -> 'accuracy'"),
        ({"quantization": "nf4"}, "quantization.type: 'none' -> 'nf4'"),
        ({"data": {"validation": "rows.csv"}}, "data.validation"),
    ],
)
def test_resume_refuses_what_would_make_another_run(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    run = begun(trial_at(tmp_path))
    with pytest.raises(ConfigError) as caught:
        run.decide_run(trial_at(tmp_path, **settings), resume=True)
    assert named in str(caught.value)


def test_resume_takes_what_does_not_touch_the_weights(tmp_path: Path) -> None:
    run = begun(trial_at(tmp_path))
    changed = trial_at(
        tmp_path, budget={"steps": 9}, compute={"num_workers": 2}, eval={"every": 7, "latency": False},
        tracking={"mlflow": "http://mlflow"},
    )  # fmt: skip
    assert run.decide_run(changed, resume=True) == "resume"


def test_resume_cannot_change_between_ray_and_none(tmp_path: Path) -> None:
    run = begun(trial_at(tmp_path))
    with pytest.raises(ConfigError, match="num_workers=0"):
        run.decide_run(trial_at(tmp_path, compute={"num_workers": 0}), resume=True)


def test_a_finished_run_is_only_gone_on_with_for_a_larger_budget(tmp_path: Path) -> None:
    trial = trial_at(tmp_path)
    run = begun(trial)
    result = {"status": "done", "name": "run", "steps": 3, "run": run.path}
    run.write(RESULT, json.dumps(result))
    assert run.decide_run(trial, resume=True) == "finished"
    assert run.read_result().to_dict() == result
    assert run.decide_run(trial_at(tmp_path, budget={"epochs": 9}), resume=True) == "resume"


def test_the_id_stays(tmp_path: Path) -> None:
    trial = trial_at(tmp_path)
    run = begun(trial)
    first = run.id
    run.begin(trial)
    assert run.id == first


def test_a_run_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(trial_at(tmp_path))
    with run.lock():
        with pytest.raises(ConfigError, match=rf"run 'run' at {run.path} is running in another process; wait for it"):
            lock_folder(Path(run.path), "run").__enter__()
        other = RunFolder(resolve_paths(parse(TrialConfig, {"name": "other", "output": {"root": str(tmp_path)}})))
        with other.lock():
            pass
    with run.lock():
        pass


def test_a_refused_run_leaves_nothing_but_its_trace(tmp_path: Path) -> None:
    trial = trial_at(tmp_path)
    run = begun(trial)
    run.abandon()
    assert not Path(run.path).exists()
    run = begun(trial)
    run.write(ERROR, "Traceback")
    run.abandon()
    assert [path.name for path in Path(run.path).iterdir()] == [ERROR]
    assert run.decide_run(trial, resume=False) == "start"
    run.begin(trial)
    (Path(run.path) / "checkpoints" / "3").mkdir(parents=True)
    run.abandon()
    assert run.decide_run(trial, resume=True) == "resume"


def test_an_unusable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    trial = trial_at(tmp_path / "file")
    with pytest.raises(TrialError, match=r"output\.root: .*file/runs/run can't be used"):
        RunFolder(trial).begin(trial)
    with pytest.raises(TrialError, match=r"output\.root: .*file/studies/s can't be used: .*Not a directory"):
        lock_folder(tmp_path / "file" / "studies" / "s", "study").__enter__()


def test_local_paths_become_absolute_and_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\n")
    settings = {"name": "run", "output": {"root": "out"}, "data": {"train": "rows.csv", "test": "builtin:bank-intents"}}
    trial = resolve_paths(parse(TrialConfig, settings | {"model": {"id": "org/model"}}))
    assert trial.output.root == str(tmp_path / "out")
    assert trial.data.train.path == str(tmp_path / "rows.csv")
    assert trial.data.test is not None
    assert (trial.data.test.path, trial.model.id) == ("builtin:bank-intents", "org/model")
    remote = parse(TrialConfig, {"name": "run", "output": {"root": "s3://bucket/x"}})
    assert resolve_paths(remote).output.root == "s3://bucket/x"
