"""`import rankloom as rl`: its names, its errors, and that it is light."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

import pytest

import rankloom as rl


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(inspect.getsourcefile(rl) or "").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == rl.__all__
    assert set(rl.__all__) <= set(dir(rl))
    for name in rl.__all__:
        assert getattr(rl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        rl.tunes  # noqa: B018


def test_a_wrong_value_in_a_constructor_is_told_as_in_yaml() -> None:
    with pytest.raises(rl.ConfigError, match=r"^LoraConfig: rnk: unknown key; did you mean 'rank'\?$"):
        rl.LoraConfig(rnk=3)
    with pytest.raises(rl.ConfigError, match=r"^TrialConfig: method\.rnk: unknown key; did you mean 'rank'\?$"):
        rl.TrialConfig(name="t", method={"type": "lora", "rnk": 3})
    with pytest.raises(rl.ConfigError, match=r"^TrialConfig: method\.type: unknown type 'qlora'; QLoRA is"):
        rl.TrialConfig(name="t", method={"type": "qlora"})
    with pytest.raises(rl.ConfigError, match=r"^TrialConfig: data\.train\.pth: unknown key; did you mean 'path'\?"):
        rl.TrialConfig(name="t", data={"train": {"path": "x.csv", "pth": "x.csv"}})
    with pytest.raises(rl.IncompatibleError, match=r"^TrialConfig: method\.type=full changes the base's weights"):
        rl.TrialConfig(name="t", method=rl.FullConfig(), quantization="nf4")
    with pytest.raises(rl.ConfigError, match=r"^StudyConfig: space\[0\]: method\.rnk: unknown key"):
        rl.StudyConfig(name="s", space=[{"method": {"rnk": 3}}])
    with pytest.raises(rl.ConfigError, match=r"^ServeConfig: engine\.max_num_seqs: .*\(given 'many'\)"):
        rl.ServeConfig(base="builtin:smollm2", engine={"max_num_seqs": "many"})


def test_several_wrong_values_are_all_told() -> None:
    with pytest.raises(rl.ConfigError) as told:
        rl.OptimConfig(learning_rate=3, batch_size=0)
    assert [line.split(": ")[-2:][0] for line in str(told.value).splitlines()] == ["learning_rate", "batch_size"]


def test_a_model_may_be_given_by_its_id_alone() -> None:
    trial = rl.TrialConfig(name="t", model="Qwen/Qwen3-0.6B", method=rl.LoraConfig(rank=4))
    assert trial.model == rl.ModelConfig(id="Qwen/Qwen3-0.6B")
    assert trial == rl.TrialConfig(**rl.dump(trial)) == pickle.loads(pickle.dumps(trial))
    space = [{"model": {"dtype": "bf16"}, "method": {"rank": {"choice": [4, 8]}}}]
    study = rl.StudyConfig(name="s", trial={"model": "Qwen/Qwen3-0.6B"}, space=space)
    assert study.resolve({"branch": 0, "method.rank": 8}).model == rl.ModelConfig(id="Qwen/Qwen3-0.6B", dtype="bf16")


def test_a_function_takes_a_config_a_dict_or_a_file(tmp_path: Path) -> None:
    from rankloom.config import coerce

    (tmp_path / "trial.yaml").write_text("name: t\nmodel: Qwen/Qwen3-0.6B\n", encoding="utf-8")
    trial = rl.TrialConfig(name="t", model="Qwen/Qwen3-0.6B")
    assert coerce(rl.TrialConfig, trial) is trial
    assert coerce(rl.TrialConfig, {"name": "t", "model": "Qwen/Qwen3-0.6B"}) == trial
    assert coerce(rl.TrialConfig, tmp_path / "trial.yaml") == trial
    assert rl.load(rl.TrialConfig, tmp_path / "trial.yaml", ["model.dtype=fp32"]).model.dtype == "fp32"
    with pytest.raises(rl.ConfigError, match="expected a TrialConfig, the path of a YAML file or a dict"):
        rl.train(rl.LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(rl.ConfigError, match="no such file"):
        rl.tune("nowhere.yaml")


@pytest.mark.parametrize("name", ["train", "tune", "evaluate", "serve"])
def test_a_verb_is_documented_whole(name: str) -> None:
    verb = getattr(rl, name)
    text = inspect.getdoc(verb) or ""
    assert [part for part in ("Args:", "Returns:", "Raises:", "Examples:") if f"\n{part}\n" not in text] == []
    assert [argument for argument in inspect.signature(verb).parameters if f"\n    {argument}: " not in text] == []
