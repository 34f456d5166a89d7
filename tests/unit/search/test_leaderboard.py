"""The board: what a journal says of the trials, who is best, who is scored, results.parquet; and how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rankloom.cli import study_view
from rankloom.config import StudyConfig, TrialConfig, parse
from rankloom.config.study import SearchConfig
from rankloom.errors import ConfigError
from rankloom.events import HostStatus, TrialEnded, TrialEvaluated, TrialStarted, TrialStatus, to_line
from rankloom.registry import Registry
from rankloom.registry.scorecard import Measures, Proportion, Scorecard
from rankloom.search.leaderboard import Leaderboard, format_settings, write_results
from rankloom.search.publish_best import choose_names, is_better
from rankloom.search.results import ScoredTrial, StudyResult
from rankloom.search.study import resolve_study_paths, tune

ACCURACY = SearchConfig(metric="accuracy")
SPACE = [
    {"method": {"type": "lora", "rank": {"choice": [2, 4]}}},
    {"method": {"type": "dora"}, "quantization": "nf4"},
]


def board(metric: str = "accuracy", **changed: Any) -> Leaderboard:
    search = {"num_trials": 6, "metric": metric}
    return Leaderboard(
        parse(StudyConfig, {"name": "s", "space": SPACE, "search": search, "final": {"top_k": 2}} | changed)
    )


def begin(number: int, point: dict[str, Any]) -> TrialStarted:
    return TrialStarted(trial=f"t{number}", point={"number": number, "refused": number, **point})


def report(number: int, n: int, loss: float, accuracy: float | None) -> TrialEvaluated:
    values: dict[str, Any] = {
        "step": 10 * n,
        "percent": 25.0 * n,
        "loss": loss,
        "accuracy": accuracy,
        "train_loss": 1.0,
    }
    return TrialEvaluated(trial=f"t{number}", n=n, **values, tokens=100 * n, train_s=0.5 * n)


def end(number: int, status: TrialStatus, error: str | None = None) -> TrialEnded:
    return TrialEnded(trial=f"t{number}", name=f"s-000{number}", method="lora", status=status, error=error)


LORA, DORA = {"branch": 0, "method.rank": 4}, {"branch": 1}
LINES = [
    begin(0, {"warm_start": 0}), begin(1, LORA), begin(2, DORA), begin(3, LORA), begin(4, LORA),
    report(0, 1, 2.0, 0.5), report(1, 1, 1.5, 0.7), report(1, 2, 1.4, 0.7), report(2, 1, 1.9, 0.6),
    report(3, 1, 1.3, 0.7), report(1, 3, 1.6, 0.7), report(3, 2, 1.2, 0.65), end(0, "stopped"),
    end(1, "done"), end(4, "failed", "diverged"),
]  # fmt: skip


def filled(metric: str = "accuracy") -> Leaderboard:
    found = board(metric)
    for line in LINES:
        found.add(line)
    return found


def test_ranking_is_by_each_trials_best_report_and_ties_by_loss() -> None:
    found = filled()
    assert [trial.number for trial in found.rank_trials()] == [3, 1, 2, 0]
    assert found.trials["t1"].find_best(ACCURACY) == found.trials["t1"].curve[2]
    assert [trial.number for trial in filled("loss").rank_trials()] == [3, 1, 2, 0]
    assert found.trials["t3"].find_best(SearchConfig()).step == 20  # type: ignore[union-attr]


def test_finalists_are_the_top_k_each_methods_best_and_the_baseline() -> None:
    found = filled()
    assert [(trial.number, trial.method) for trial in found.choose_finalists()] == [
        (3, "lora"), (1, "lora"), (2, "qdora"), (0, "lora"),
    ]  # fmt: skip
    assert [choose_names(trial, found) for trial in found.choose_finalists()] == [["s", "s-lora"], [], ["s-qdora"], []]


def test_the_front_is_what_nothing_beats_in_all() -> None:
    search = {"num_trials": 9, "metric": "accuracy", "objectives": ["memory_bytes", "latency_ms"]}
    found = board(search=search, final={"top_k": 1})
    costs = {0: (9, 9), 1: (5, 5), 2: (3, 9), 3: (9, 5), 4: (1, 1), 5: (5, 5)}
    accuracy = {0: 0.9, 1: 0.8, 2: 0.8, 3: 0.8, 4: 0.1, 5: 0.8, 6: 1.0}
    for number, share in accuracy.items():
        found.add(begin(number, LORA))
        found.add(report(number, 1, 1.0, share))
        if number in costs:
            memory, latency = costs[number]
            found.add(replace(report(number, 2, 1.0, 0.0), memory_bytes=memory, latency_ms=latency))
    # 3 is beaten by 1; 5 is as good as 1; of 6 the costs are not known
    assert [trial.number for trial in found.find_front()] == [0, 1, 2, 5, 4]
    assert {trial.number for trial in found.choose_finalists()} == {0, 1, 2, 4, 5, 6}
    assert choose_names(found.find_front()[0], found) == ["s-front"]
    assert filled().find_front() == []


def test_a_journal_is_read_back_though_its_last_line_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    again = [report(3, 2, 1.2, 0.65), end(3, "done")]  # a report may come twice
    path.write_text("".join(to_line(line) + "\n" for line in [*LINES, *again]) + '{"event": "rep')
    found = Leaderboard.read(board().study, path)
    assert found.count_by_status() == {"running": 1, "done": 2, "stopped": 1, "failed": 1}
    assert [point.step for point in found.trials["t3"].reports] == [10, 20]
    assert found.num_refused == 4
    assert found.tokens == 100 + 300 + 100 + 200
    assert Leaderboard.read(board().study, tmp_path / "none").trials == {}


def test_a_trial_that_took_anothers_place_keeps_its_number() -> None:
    found = filled()
    found.add(TrialStarted(trial="t3", point={"number": 1, "refused": 0, "branch": 0, "method.rank": 2}))
    assert found.trials["t3"].number == 3
    assert found.trials["t3"].config.name == "s-0003"
    assert found.trials["t3"].config.method.rank == 2  # type: ignore[union-attr]
    assert len(found.trials["t3"].reports) == 2


def test_a_report_that_is_made_again_counts_once() -> None:
    found = filled()
    found.add(report(1, 3, 1.5, 0.7))  # as after a driver that was killed
    found.add(
        replace(report(1, 4, 1.5, 0.7), step=30, percent=100.0)
    )  # as a run of its own that was resumed at its end
    assert [(point.step, point.n, point.loss) for point in found.trials["t1"].reports] == [
        (10, 1, 1.5), (20, 2, 1.4), (30, 4, 1.5),
    ]  # fmt: skip


def test_results_parquet_has_every_config_and_curve(tmp_path: Path) -> None:
    write_results(filled(), tmp_path / "results.parquet")
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(row["number"], row["status"], row["best_accuracy"], row["steps"]) for row in rows] == [
        (0, "stopped", 0.5, 10), (1, "done", 0.7, 30), (2, "running", 0.6, 10), (3, "running", 0.7, 20),
        (4, "failed", None, 0),
    ]  # fmt: skip
    assert rows[4]["error"] == "diverged"
    assert [point["loss"] for point in rows[1]["curve"]] == [1.5, 1.4, 1.6]
    assert parse(TrialConfig, json.loads(rows[2]["config"])).quantization.type == "nf4"
    assert list(tmp_path.iterdir()) == [tmp_path / "results.parquet"]


def test_the_winner_is_compared_with_the_baseline_on_the_test_rows() -> None:
    def row(trial: str, accuracy: float | None, loss: float) -> ScoredTrial:
        share = None if accuracy is None else Proportion(value=accuracy, low=0, high=1)
        measures = Measures(num_rows=9, perplexity=1.0, accuracy=share, loss=loss)
        return ScoredTrial.model_construct(trial=trial, scorecard=Scorecard.model_construct(result=measures))

    assert is_better(row("a", 0.8, 2), row("b", 0.7, 1), ACCURACY) is True
    assert is_better(row("a", 0.7, 1), row("b", 0.7, 2), ACCURACY) is False  # as good is not better
    assert is_better(row("a", None, 1), row("b", None, 2), SearchConfig()) is True
    assert is_better(row("a", 0.8, 2), row("a", 0.8, 2), ACCURACY) is None
    assert is_better(row("a", 0.8, 2), None, ACCURACY) is None


def test_paths_are_absolute_and_the_rest_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    study = parse(
        StudyConfig,
        {
            "name": "s",
            "trial": {"data": {"train": "rows.csv"}, "model": {"id": "builtin:smollm2"}, "output": {"root": "out"}},
            "space": [{"data": {"test": {"path": "rows.csv"}}, "optim": {"learning_rate": {"uniform": [0.1, 0.2]}}}],
        },
    )
    trial = resolve_study_paths(study).resolve({"branch": 0, "optim.learning_rate": 0.15})
    assert trial.data.train.path == str(tmp_path / "rows.csv")
    assert trial.data.test is not None
    assert trial.data.test.path == str(tmp_path / "rows.csv")
    assert trial.model.id == "builtin:smollm2"
    assert trial.output.root == str(tmp_path / "out")
    assert trial.output.registry_root == str(tmp_path / "out" / "registry")
    assert resolve_study_paths(resolve_study_paths(study)) == resolve_study_paths(study)


@pytest.mark.parametrize(("given", "meant"), [("s3://bucket/registry", "s3://bucket/registry"), ("mine", "{}/mine")])
def test_a_study_publishes_where_it_is_told(
    given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = parse(StudyConfig, {"name": "s", "trial": {"output": {"registry": given}}, "space": SPACE})
    assert resolve_study_paths(study).baseline.output.registry_root == meant.format(tmp_path)


def test_a_study_on_an_object_store_is_told_what_to_do_instead() -> None:
    study = parse(StudyConfig, {"name": "s", "trial": {"output": {"root": "s3://bucket/x/"}}, "space": SPACE})
    with pytest.raises(ConfigError, match=r"not a URL; give one, .* trial\.output\.registry=s3://bucket/x/registry$"):
        tune(study)


HOST = HostStatus(
    label="host-1", members=4, training=3, num_slots=4, waiting=1, tokens=5000, train_s=2.0, occupancy=0.93
)


def test_the_status_in_one_line_and_as_a_table() -> None:
    from rich.console import Console

    status = replace(filled().build_status(), hosts=[HOST], elapsed_s=65, eta_s=130.0)
    assert study_view.format_status(status) == (
        "3/6 trials (2 running, 1 stopped early, 1 failed); best 70.0 % by s-0003 (lora); "
        "host-1 3/4 slots, 2,500 tokens/s; 1m05s, eta 2m10s"
    )
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(study_view.build_status_table(status))
    text = console.export_text()
    assert "3/6 trials   2 running   1 done   1 stopped early   1 failed   4 refused" in text
    assert "s-0003  lora    rank 4    50 %" in text
    assert "host-1 3/4 slots, 2,500 tokens/s, 1 waiting, 93 % full" in text
    assert "rungs   10 %: 4   30 %: 2   90 %: 0" in text
    fresh = replace(board().build_status(), elapsed_s=0.1)
    assert study_view.format_status(fresh) == "0/6 trials (0 running, 0 stopped early, 0 failed); 0s"
    console.print(study_view.build_status_table(fresh))


def test_plain_lines_tell_each_end_and_now_and_then_the_status() -> None:
    written: list[str] = []
    view = study_view.PlainStudyView(written.append)
    status = replace(filled().build_status(), hosts=[HOST], elapsed_s=65)
    view.show(status)
    view.show(status)
    view.show(end(4, "failed", "diverged"))
    assert len(written) == 2
    assert written[1] == "s-0004  lora     failed: diverged"


def test_the_result_names_what_to_do_next_and_is_honest_about_the_baseline() -> None:
    share = {"value": 0.8, "low": 0.7, "high": 0.9}
    measures = {"num_rows": 9, "accuracy": share, "loss": 0.5, "perplexity": 1.6}
    costs = dict.fromkeys(
        (
            "trainable_parameters",
            "adapter_bytes",
            "peak_memory_bytes",
            "steps",
            "train_tokens",
            "train_s",
            "tokens_per_s",
        ),
        1,
    )
    scorecard = {"result": measures, "base": measures | {"loss": 9.0}, "device": "cpu"} | costs
    validation = {"accuracy": 0.75, "loss": 0.6, "step": 3}
    winner = {"trial": "t3", "number": 3, "name": "s-0003", "method": "lora", "validation": validation, "error": None}
    winner |= {"scorecard": scorecard, "published": ["s@1", "s-lora@1"], "point": {}, "costs": {}, "on_front": False}
    broken = winner | {"trial": "t0", "number": 0, "name": "s-0000"}
    broken |= {"scorecard": None, "published": [], "error": "gone"}
    begun = {
        "name": "s", "study": "out/studies/s", "results": "r.parquet", "counts": {"done": 2}, "num_refused": 0,
        "priors": {}, "tokens": 1, "hosts": [],
    }  # fmt: skip
    done = begun | {
        "status": "done", "winner": winner, "baseline": winner | {"trial": "t0", "name": "s-0000"},
        "finalists": [winner, broken], "beats_baseline": False, "front": [], "registry": "out/registry",
    }  # fmt: skip
    result = StudyResult.model_validate(done)
    assert study_view.build_result_rows(result)[1:] == [
        ("s-0003", "lora", "75.0 %", "80.0 % [70.0, 90.0]", "0.5000", "s@1, s-lora@1"),
        ("s-0000 (baseline)", "lora", "75.0 %", "gone", "", ""),
        ("base, untuned", "", "", "80.0 % [70.0, 90.0]", "9.0000", ""),
    ]
    measured = {"costs": {"memory_bytes": 2.5e8, "latency_ms": 31.0}, "on_front": True}
    finalists = [winner | measured, broken]
    with_front = StudyResult.model_validate(done | {"finalists": finalists, "front": finalists[:1]})
    header, *rows = study_view.build_result_rows(with_front)
    assert header[5:] == ("front", "memory", "latency", "published")
    assert [row[5:8] for row in rows] == [("yes", "250.0 MB", "31 ms"), ("", "", ""), ("", "", "")]
    text = "\n".join(study_view.format_result(result, "study.yaml"))
    assert "the winner and the baseline s-0000 are tied on the test rows: accuracy 80.0 % against 80.0 %" in text
    assert "rankloom adapters promote s@1 --registry out/registry" in text
    stopped = StudyResult.model_validate(begun | {"status": "interrupted"})
    (line,) = study_view.format_result(stopped, "my study.yaml", ["name=b", "trial.data.train=a b.csv"])
    assert "rankloom tune 'my study.yaml' name=b 'trial.data.train=a b.csv' --resume continues" in line


def test_the_registry_takes_the_names_that_a_study_gives() -> None:
    for trial in filled().choose_finalists():
        for name in choose_names(trial, filled()):
            assert Registry("/nowhere").versions(name) == []


def test_a_named_branch_stands_for_its_method() -> None:
    space = [{"name": "lora-plus", "method": {"type": "lora"}, "optim": {"loraplus_ratio": 16}}, SPACE[1]]
    start = {"name": "first", "seed": 7, "optim": {"learning_rate": 2e-3}}
    found = board(space=space, search={"num_trials": 6, "warm_start": [start]})
    for number, point in enumerate([{"warm_start": 0}, {"branch": 0}, {"branch": 1}]):
        found.add(begin(number, point))
        found.add(report(number, 1, 1.0 + number, None))
    assert [trial.method for trial in found.rank_trials()] == ["first", "lora-plus", "qdora"]
    assert [choose_names(trial, found) for trial in found.rank_trials()] == [
        ["s", "s-first"],
        ["s-lora-plus"],
        ["s-qdora"],
    ]
    assert format_settings(found.rank_trials()[0]) == "learning_rate 0.002, seed 7"
    with pytest.raises(ConfigError, match=r"space\[0\]\.name: expected lower-case letters"):
        board(space=[{"name": "LoRA plus"}])
