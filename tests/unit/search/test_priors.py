"""What a search begins with: the first guess, and the trials of earlier studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankloom.config import StudyConfig, dump, load, parse
from rankloom.errors import ConfigError
from rankloom.events import TrialEnded, TrialEvaluated, TrialStarted
from rankloom.search.leaderboard import Leaderboard, write_results
from rankloom.search.priors import PriorCounts, Priors, guess_first, locate
from rankloom.search.samplers import PriorTrial
from rankloom.search.tune_searcher import StudySearcher

RATES = {"learning_rate": {"loguniform": [1e-5, 1e-2]}}
LORA = {
    "method": {"type": "lora", "rank": {"choice": [4, 8, 16]}, "alpha_over_rank": {"choice": [1, 2, 4]}},
    "optim": RATES | {"loraplus_ratio": {"choice": [16, 1]}},
}
DORA = {"method": {"type": "dora", "rank": {"randint": [2, 64]}}, "optim": RATES}
FULL = {"method": {"type": "full"}, "optim": {"learning_rate": {"loguniform": [1e-6, 1e-3]}}}
SHIPPED = sorted((Path(__file__).resolve().parents[3] / "configs" / "studies").glob("*.yaml"))


def study(*space: dict[str, Any], **changed: Any) -> StudyConfig:
    return parse(StudyConfig, {"name": "s", "space": list(space)} | changed)


def test_the_guess_is_the_guidance_and_the_baselines_values_elsewhere() -> None:
    guess = {"branch": 1, "method.rank": 16, "method.alpha_over_rank": 2, "optim.learning_rate": 5e-4}
    assert guess_first(study(FULL, LORA)) == guess | {"optim.loraplus_ratio": 1}
    assert guess_first(study(DORA)) == {"branch": 0, "method.rank": 16, "optim.learning_rate": 5e-4}
    rank8 = study(DORA, trial={"method": {"type": "lora", "rank": 8}, "quantization": "nf4"})
    trial = rank8.resolve(guess_first(rank8) or {})
    assert (trial.method.rank, trial.method.alpha, trial.quantization.type) == (8, 32.0, "nf4")  # type: ignore[union-attr]


def test_the_guess_takes_the_rank_at_which_alpha_can_be_32() -> None:
    wide = {"method": LORA["method"] | {"alpha_over_rank": {"choice": [4, 8]}}, "optim": RATES}
    assert guess_first(study(wide)) == {
        "branch": 0, "method.rank": 8, "method.alpha_over_rank": 4, "optim.learning_rate": 5e-4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "space",
    [
        FULL,
        {"method": {"type": "lora", "alpha": {"choice": [8, 16]}}, "optim": RATES},
        {"method": {"type": "lora", "rslora": True}, "optim": RATES},
        {"method": {"type": "lora", "target_modules": ["q_proj"]}, "optim": RATES},
        {"method": {"type": "lora"}, "optim": {"learning_rate": {"uniform": [2e-3, 1e-2]}}},
        {"method": {"type": "lora"}, "optim": {"learning_rate": {"choice": [5e-4]}, "loraplus_ratio": 16}},
    ],
)
def test_no_guess_where_no_branch_permits_it(space: dict[str, Any]) -> None:
    assert guess_first(study(space)) is None


def test_no_guess_beside_warm_starts_nor_one_that_is_the_baseline() -> None:
    assert guess_first(study(LORA, search={"warm_start": [{}]})) is None
    assert guess_first(study(DORA, trial={"method": {"type": "dora"}, "optim": {"learning_rate": 5e-4}})) is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_studies_permit_it(path: Path) -> None:
    config = load(StudyConfig, path)
    guess = guess_first(config)
    assert guess is not None
    assert guess["optim.learning_rate"] == 5e-4


@pytest.mark.parametrize("algorithm", ["random", "optuna", "hyperopt", "nevergrad"])
def test_the_guess_is_tried_after_the_baseline_and_the_searcher_is_told(algorithm: str) -> None:
    config = study(LORA, DORA, search={"algorithm": algorithm, "num_trials": 3})
    guess = guess_first(config)
    assert guess is not None
    searcher = StudySearcher(config, Priors(guess, [], {}).points)
    assert searcher.suggest("t0")["warm_start"] == 0
    found = searcher.suggest("t1")
    assert {name: found[name] for name in guess if name != "optim.learning_rate"} == {
        name: value for name, value in guess.items() if name != "optim.learning_rate"
    }
    assert found["optim.learning_rate"] == pytest.approx(5e-4)
    searcher.on_trial_complete("t1", {"best_value": 0.5})
    assert searcher.suggest("t2") != found


def test_a_trial_is_found_in_the_space_by_its_settings() -> None:
    choice = {
        "method": {"choice": [{"type": "lora", "rank": 4}, {"type": "dora"}]},
        "quantization": {"choice": ["none", "nf4"]},
    }
    config = study(FULL, LORA, choice)
    for point in (
        {"branch": 0, "optim.learning_rate": 3.3e-5},
        {
            "branch": 1,
            "method.rank": 4,
            "method.alpha_over_rank": 4,
            "optim.learning_rate": 1e-3,
            "optim.loraplus_ratio": 16,
        },
        {"branch": 2, "method": {"type": "dora"}, "quantization": "nf4"},
    ):
        assert locate(config, dump(config.resolve(point, 7))) == point
    outside = dump(config.resolve({"branch": 0, "optim.learning_rate": 1e-4}))
    assert locate(config, outside | {"optim": outside["optim"] | {"learning_rate": 1e-2}}) is None
    assert locate(config, outside | {"budget": {"steps": 7}}) is None
    assert locate(config, outside | {"seed": 1}) is None
    assert locate(config, outside | {"compute": {"num_workers": 4}, "name": "other"}) is not None
    assert locate(config, {"name": "from the future", "what": 1}) is None


def write_study(folder: Path, config: StudyConfig, points: list[dict[str, Any]], **costs: float) -> None:
    """results.parquet of a study whose trials had losses 0.9, 0.8, ...; the last one failed."""
    leaderboard = Leaderboard(config)
    for number, point in enumerate(points):
        trial = f"t{number}"
        leaderboard.add(TrialStarted(trial=trial, point={"number": number, "refused": 0, **point}))
        values: dict[str, Any] = {
            "step": 10,
            "percent": 100.0,
            "loss": 0.9 - number / 10,
            "accuracy": None,
            "train_loss": 1.0,
        }
        leaderboard.add(TrialEvaluated(trial=trial, n=1, **values, tokens=10, train_s=1.0, **costs))
        last = number == len(points) - 1
        leaderboard.add(TrialEnded(trial=trial, status="failed" if last else "stopped"))
    folder.mkdir()
    write_results(leaderboard, folder / "results.parquet")


EARLIER = [
    {"warm_start": 0},
    {"branch": 0, "method.rank": 4, "optim.learning_rate": 1e-3},
    {"branch": 0, "method.rank": 60, "optim.learning_rate": 2e-3},
    {"branch": 1, "optim.learning_rate": 1e-4},
    {"branch": 0, "method.rank": 4, "optim.learning_rate": 1e-2},
]


@pytest.mark.parametrize("algorithm", ["optuna", "hyperopt", "nevergrad"])
def test_earlier_trials_of_this_space_are_told_and_others_counted(algorithm: str, tmp_path: Path) -> None:
    write_study(tmp_path / "earlier", study(DORA, FULL), EARLIER)
    narrow = DORA | {"method": {"type": "dora", "rank": {"randint": [2, 32]}}}
    priors = [str(tmp_path / "earlier"), str(tmp_path / "earlier" / "results.parquet")]
    config = study(narrow, LORA, search={"algorithm": algorithm, "priors": priors, "num_trials": 4})
    priors = Priors.gather(config)
    skipped = {"not a trial of this space": 4, "failed, or measured otherwise": 2}
    assert priors.counts == PriorCounts(told=4, skipped=skipped)
    baseline = {"method.rank": 16, "method.alpha_over_rank": 2, "optim.learning_rate": 3e-4, "optim.loraplus_ratio": 1}
    assert priors.priors[:2] == [
        PriorTrial({"branch": 1} | baseline, [0.9]),  # a warm start may lie in the space too
        PriorTrial({"branch": 0, "method.rank": 4, "optim.learning_rate": 1e-3}, [0.8]),
    ]
    priors.write(tmp_path / "known.json")
    assert Priors.read(tmp_path / "known.json") == priors
    assert Priors.read(tmp_path / "none").points == []

    searcher = StudySearcher(config, priors.points)
    assert searcher._worst == [0.9]
    if algorithm == "optuna":
        told = searcher._sampler._optuna.trials  # type: ignore[attr-defined]
        assert [trial.value for trial in told] == [0.9, 0.8, 0.9, 0.8, None]  # the last is to be tried
    assert searcher.suggest("t0")["warm_start"] == 0
    guess = searcher.suggest("t1")
    assert guess["branch"] == 0  # what is only to be tried comes first
    assert guess["optim.learning_rate"] == pytest.approx(5e-4)


def test_what_was_told_moves_the_search() -> None:
    config = study({"optim": RATES}, search={"algorithm": "optuna", "num_trials": 12})
    known = [PriorTrial({"branch": 0, "optim.learning_rate": 10 ** (-5 + i / 10)}, [abs(i - 25)]) for i in range(30)]
    found = []
    searcher = StudySearcher(config, known)
    for i in range(12):
        found.append(searcher.suggest(f"t{i}").get("optim.learning_rate"))
    assert sum(1e-3 < rate < 1e-2 for rate in found[1:]) >= 8  # of 11; without it a third


def test_priors_with_objectives_need_the_costs(tmp_path: Path) -> None:
    write_study(tmp_path / "bare", study(DORA, FULL), EARLIER)
    write_study(tmp_path / "measured", study(DORA, FULL), EARLIER, memory_bytes=5.0, latency_ms=2.0)
    search = {"algorithm": "optuna", "objectives": ["latency_ms"]}
    priors = Priors.gather(
        study(DORA, search=search | {"priors": [str(tmp_path / "bare"), str(tmp_path / "measured")]})
    )
    assert [known.values for known in priors.priors] == [[pytest.approx(0.8), 2.0], [pytest.approx(0.7), 2.0]]
    assert priors.skipped["its costs were not measured"] == 4


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    search = {"algorithm": "optuna", "priors": [str(tmp_path / "nothing")]}
    with pytest.raises(ConfigError, match=r"search\.priors: .*nothing is not a study"):
        Priors.gather(study(DORA, search=search))
    (tmp_path / "results.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"search\.priors: .* is not a study"):
        Priors.gather(study(DORA, search=search | {"priors": [str(tmp_path)]}))
    with pytest.raises(ConfigError, match=r"priors: algorithm=random learns nothing"):
        study(DORA, search={"priors": ["x"]})


@pytest.mark.parametrize("rates", ["[1e-4, 5e-3]", "[.1e-3, 5E-3]", "['0.0001', '0.005']"])
def test_a_choice_of_rates_is_found_again_however_the_numbers_are_written(rates: str) -> None:
    space = yaml.safe_load(f"{{optim: {{learning_rate: {{choice: {rates}}}, betas: {{choice: [[9e-1, 0.99]]}}}}}}")
    config = study(space, trial={"method": {"type": "lora"}})
    point = {"branch": 0} | {name: knob.ends()[0] for name, knob in config.knobs[0].items()}
    trial = config.resolve(point)
    assert (trial.optim.learning_rate, trial.optim.betas) == (1e-4, (0.9, 0.99))
    assert locate(config, dump(trial)) == point
