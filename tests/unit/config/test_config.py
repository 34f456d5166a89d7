"""Configs: what is refused, in which words, with which exit code; what overrides do; what survives a round trip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rankloom.config import StudyConfig, TrialConfig, dump, load, parse
from rankloom.config.base import apply_overrides
from rankloom.errors import ConfigError, IncompatibleError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Saves a text as trial.yaml and returns its path."""

    def save(text: str) -> Path:
        path = tmp_path / "trial.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return save


def trial(*overrides: str) -> TrialConfig:
    return parse(TrialConfig, apply_overrides({"name": "t", "method": {"type": "lora"}}, overrides), "t.yaml")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        trial(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nme=x", "t.yaml: nme: unknown key; did you mean 'name'?"),
        ("method.rnk=4", "t.yaml: method.rnk: unknown key; did you mean 'rank'?"),
        ("optim.learnin_rate=1", "t.yaml: optim.learnin_rate: unknown key; did you mean 'learning_rate'?"),
        ("data.train.splt=x", "t.yaml: data.train.splt: unknown key; did you mean 'split'?"),
        ("eval.retention={path: x, splt: y}", "t.yaml: eval.retention.splt: unknown key; did you mean 'split'?"),
        ("budget.xyzzy=1", "t.yaml: budget.xyzzy: unknown key; known keys: epochs, steps"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, message: str) -> None:
    prepare = ("data.train=a.csv",) if override.startswith("data.train.") else ()
    assert refusal(*prepare, override) == message


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("method.rank=four", "method.rank", "'four'"),
        ("method.rank=0", "method.rank", "0"),
        ("method.dropout=1", "method.dropout", "1"),
        ("optim.learning_rate=fast", "optim.learning_rate", "'fast'"),
        ("optim.learning_rate=.nan", "optim.learning_rate", "nan"),
        ("optim.clip_norm=-1", "optim.clip_norm", "-1"),
        ("optim.betas=[0.9, 2]", "optim.betas.1", "2"),
        ("optim=5", "optim", "5"),
        ("budget=long", "budget", "'long'"),
        ("method=lora", "method", "'lora'"),
        ("method.target_modules=5", "method.target_modules", "5"),
        ("method.target_modules=[q_proj, 1]", "method.target_modules", "['q_proj', 1]"),
        ("method.target_modules=[]", "method.target_modules", "[]"),
        ("data.max_length=1.5", "data.max_length", "1.5"),
        ("data.validation=5", "data.validation", "5"),
        ("data.columns={label: 5}", "data.columns.label", "5"),
        ("eval.metric=f1", "eval.metric", "'f1'"),
        ("seed=-1", "seed", "-1"),
        ("name=Upper Case", "name", "'Upper Case'"),
        ("compute.num_workers=two", "compute.num_workers", "'two'"),
    ],
)
def test_wrong_value_names_key_and_value_in_one_line(override: str, key: str, given: str) -> None:
    message = refusal(override)
    assert message.startswith(f"t.yaml: {key}: ")
    assert message.endswith(f"(given {given})")
    assert "\n" not in message


def test_missing_name_is_required() -> None:
    with pytest.raises(ConfigError, match=r"^t\.yaml: name: required, but not given$"):
        parse(TrialConfig, {}, "t.yaml")


def test_what_means_the_base_is_no_name_of_a_trial_or_study() -> None:
    assert refusal("name=base") == "t.yaml: name: 'base' means the base without an adapter; choose another name"
    with pytest.raises(ConfigError, match="name: 'base' means the base"):
        parse(StudyConfig, {"name": "base", "space": [{"method": {"type": "lora"}}]})


def test_every_complaint_is_told_at_once() -> None:
    lines = refusal("seed=-1", "optim.eps=0", "method.rnk=3").splitlines()
    assert [line.removeprefix("t.yaml: ").split(":")[0] for line in lines] == ["method.rnk", "optim.eps", "seed"]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("method={type: qlora}", "unknown type 'qlora'; QLoRA is `method: {type: lora}` with `quantization: nf4`"),
        ("method={type: qdora}", "unknown type 'qdora'; QDoRA is `method: {type: dora}` with `quantization: nf4`"),
        ("method={type: lora+}", "LoRA+ is `method: {type: lora}` with `optim.loraplus_ratio: 16`"),
        ("method={type: loha}", "allowed: 'full', 'lora', 'dora', 'adalora', 'galore', 'lisa'"),
        ("quantization=nf5", "quantization.type: unknown type 'nf5'; allowed: 'none', 'int8', 'nf4'"),
        ("quantization.double=false", "quantization.type: required, but not given; allowed: 'none', 'int8', 'nf4'"),
        ("data.columns={lable: category}", "data: unknown column 'lable'; allowed: completion, instruction, label"),
    ],
)
def test_wrong_choice_says_what_is_allowed(override: str, hint: str) -> None:
    assert hint in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("method={type: full}", "quantization=nf4"), "method.type=full changes the base's weights"),
        (("method={type: galore}", "quantization=int8"), "method.type=galore changes the base's weights"),
        (("method={type: lisa}", "quantization=nf4"), "use quantization: none, or lora, dora or adalora"),
        (("method={type: adalora}", "optim.loraplus_ratio=16"), "optim.loraplus_ratio=16 needs A and B"),
        (("method={type: full}", "optim.loraplus_ratio=2"), "which full lacks; set it to 1"),
        (("method.init=pissa", "quantization=nf4"), "method.init=pissa rewrites the base's weights"),
        (("method.init=olora", "method.rslora=true"), "which changes rslora's scaling"),
        (("method={type: galore, layerwise: true}",), "before optim.clip_norm could act on it"),
        (
            ("method={type: galore, layerwise: true}", "optim.clip_norm=null", "optim.accumulation=2"),
            "before optim.accumulation could act on it",
        ),
        (
            ("method={type: galore, layerwise: true}", "optim.clip_norm=null", "compute.num_workers=2"),
            "before compute.num_workers could act on it",
        ),
        (("method={type: dora, experts: true}",), "with method.type=dora (allowed: lora)"),
        (("method={type: adalora, experts: true}",), "with method.type=adalora (allowed: lora)"),
        (("method.experts=true", "method.dropout=0.1"), "with method.dropout=0.1 (allowed: 0)"),
        (("method.experts=true", "method.init=pissa"), "with method.init=pissa (allowed: default, gaussian)"),
        (("optim.batch_size=4", "optim.accumulation=8"), "optim.batch_size=4 leaves some of 1 worker(s) x 8"),
        (("optim.batch_size=3", "compute.num_workers=4"), "optim.batch_size=3 leaves some of 4 worker(s)"),
    ],
)
def test_knobs_that_exclude_each_other_are_refused_with_the_reason(overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        trial(*overrides)
    assert reason in str(caught.value)
    assert caught.value.exit_code == 2


def test_layerwise_galore_holds_where_nothing_needs_the_whole_gradient() -> None:
    assert trial("method={type: galore, layerwise: true}", "optim.clip_norm=null").method.type == "galore"


@pytest.mark.parametrize("setting", ["optim.batch_size", "optim.learning_rate", "optim.clip_norm", "budget.steps"])
def test_true_is_no_number(setting: str) -> None:
    section, _, key = setting.partition(".")
    assert refusal(f"{setting}=true") == f"t.yaml: {section}: {key}: expected a number (given True)"


def test_settings_that_contradict_each_other_inside_one_section() -> None:
    assert refusal("budget={epochs: 1, steps: 2}") == "t.yaml: budget: give epochs (1.0) or steps (2), not both"
    assert "target_rank 20" in refusal("method={type: adalora, target_rank: 20}")
    assert "no step is left to adapt in" in refusal("method={type: adalora, warmup_fraction: 0.6, final_fraction: 0.4}")


@pytest.mark.parametrize(
    ("overrides", "read", "expected"),
    [
        (("method.rank=4",), lambda t: t.method.rank, 4),
        (("optim.learning_rate=3e-4",), lambda t: t.optim.learning_rate, 3e-4),
        (("optim.betas=[0.8, 0.95]",), lambda t: t.optim.betas, (0.8, 0.95)),
        (("optim.clip_norm=null",), lambda t: t.optim.clip_norm, None),
        (("method.target_modules=[q_proj, v_proj]",), lambda t: t.method.target_modules, ["q_proj", "v_proj"]),
        (("method.target_modules=.*_proj",), lambda t: t.method.target_modules, ".*_proj"),
        (("data.columns={label: category}",), lambda t: t.data.columns, {"label": "category"}),
        (("data.columns.label=category",), lambda t: t.data.columns, {"label": "category"}),
        (("quantization=nf4",), lambda t: (t.quantization.type, t.quantization.double), ("nf4", True)),
        (("quantization=nf4", "quantization.double=false"), lambda t: t.quantization.double, False),
        (
            ("data.train=a.csv", "data.train.split=dev"),
            lambda t: (t.data.train.path, t.data.train.split),
            ("a.csv", "dev"),
        ),
        (("output.root=s3://bucket/a=b",), lambda t: t.output.root, "s3://bucket/a=b"),
        (("method.rank=4", "method.rank=8"), lambda t: t.method.rank, 8),
    ],
)  # fmt: skip
def test_overrides(overrides: tuple[str, ...], read: Callable[[Any], Any], expected: object) -> None:
    assert read(trial(*overrides)) == expected


@pytest.mark.parametrize("override", ["method.rank", "=4", ""])
def test_override_without_key_or_value_says_how(override: str) -> None:
    assert "expected key=value, for example optim.learning_rate=1e-4" in refusal(override)


def test_override_that_is_no_yaml_is_named() -> None:
    assert refusal("data.columns={label: ").startswith("override 'data.columns={label: ':")


def test_overrides_leave_the_tree_they_were_given_alone() -> None:
    tree = {"name": "t", "method": {"type": "lora", "rank": 4}}
    apply_overrides(tree, ["method.rank=8", "name=other"])
    assert tree == {"name": "t", "method": {"type": "lora", "rank": 4}}


def test_file_is_read_and_overridden(write: Write) -> None:
    config = load(TrialConfig, write("name: a\nquantization: nf4\n"), ["quantization.double=false", "seed=3"])
    assert (config.name, config.quantization.type, config.seed) == ("a", "nf4", 3)
    assert dump(config)["quantization"]["double"] is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\n", "not valid YAML: while parsing a flow sequence"),
        ("name: a\nname: b\n", "key 'name' is given twice"),
        ("name: a\noptim:\n  eps: 1.0\n  eps: 2.0\n", "key 'eps' is given twice"),
        ("- name\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine a constructor"),
    ],
)
def test_file_that_is_no_config(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load(TrialConfig, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(TrialConfig, path)


def test_missing_file_names_its_neighbour(write: Write) -> None:
    path = write("name: a\n")
    with pytest.raises(ConfigError, match=r"tral\.yaml: no such file; did you mean .*/trial\.yaml\?"):
        load(TrialConfig, path.with_name("tral.yaml"))
    with pytest.raises(ConfigError, match=r"no such file$"):
        load(TrialConfig, path.parent / "nowhere" / "x.yaml")


def test_configs_are_frozen() -> None:
    config = trial()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.learning_rate = 1.0  # type: ignore[misc]


def test_dump_is_plain_data_that_parses_back() -> None:
    config = trial("quantization=nf4", "data.validation=a.csv", "optim.betas=[0.8, 0.9]", "method.target_modules=[q]")
    assert parse(TrialConfig, json.loads(json.dumps(dump(config)))) == config


def test_schema_explains_every_setting() -> None:
    schema = TrialConfig.model_json_schema()
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            if name != "type":
                assert field.get("description"), f"{definition['title']}.{name} has no docstring"
    assert set(schema["$defs"]["LoraConfig"]["properties"]) >= {"rank", "alpha", "rslora", "target_modules"}
    assert schema["properties"]["method"]["discriminator"]["propertyName"] == "type"


def test_a_method_without_a_type_is_lora() -> None:
    trial = parse(TrialConfig, {"name": "t", "method": {"rank": 4}})
    assert (trial.method.type, trial.method.rank) == ("lora", 4)
