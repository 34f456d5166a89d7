"""`rl.check_data` and `rankloom data`: what a run would read, and which tokens it would train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rankloom as rl
from rankloom.cli import main


@pytest.fixture
def trial(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    texts = {"card_lost": "my card was lost", "transfer": "transfer money to a friend"}
    rows = [f"{text} {i},{label}" for i in range(20) for label, text in texts.items()]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, rows[0]]) + "\n")
    return {
        "name": "tiny",
        "model": {"id": str(tiny_llama)},
        "data": {"train": str(tmp_path / "rows.csv"), "max_length": 64},
    }


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_rows_are_shown_as_the_model_sees_them(trial: dict[str, Any]) -> None:
    (check,) = rl.check_data(trial, num_examples=2)
    assert (check.name, check.template, check.report.format) == ("tiny", "chat template", "classification")
    assert {name: len(rows) for name, rows in check.examples.items()} == {"train": 2, "validation": 2, "test": 2}
    for rows in check.examples.values():
        for row in rows:
            asked, answered = row.segments
            assert (asked.weight, answered.weight) == (0, 1)
            assert asked.text.startswith("<|user|>")
            assert asked.text.endswith("<|end|>\n<|assistant|>")
            assert answered.text.removesuffix("\n") in ("card_lost<|end|>", "transfer<|end|>")
            assert row.trained_tokens == answered.tokens
    assert sum(each.rows for each in check.lengths["train"]) == check.report.splits["train"].rows
    assert check.report.splits["train"].duplicates == 1
    assert rl.DataCheck.model_validate(check.to_dict()) == check


def test_it_trains_on_what_the_settings_say(trial: dict[str, Any]) -> None:
    trial["data"] |= {"train_on": "all"}
    (check,) = rl.check_data(trial, num_examples=1)
    (row,) = check.examples["train"]
    assert [segment.weight for segment in row.segments] in ([1], [0, 1])
    assert row.trained_tokens >= row.tokens - 1


def test_a_study_has_a_check_for_each_data_set(trial: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text((tmp_path / "rows.csv").read_text().replace("lost", "gone"))
    paths = [str(tmp_path / "rows.csv"), str(tmp_path / "more.csv")]
    space = [{"data": {"train": {"choice": paths}}, "method": {"type": "lora", "rank": {"choice": [2, 4]}}}]
    study = {"name": "two", "trial": {"model": trial["model"]}, "space": space}
    checks = rl.check_data(study, num_examples=0)
    assert {str(tmp_path / "rows.csv"), str(tmp_path / "more.csv")} <= {check.sources["train"] for check in checks}
    assert len({check.digest for check in checks}) == len(checks)
    with pytest.raises(rl.ConfigError, match="give the rows in its config"):
        rl.check_data(study, data=[{"text": "a", "label": "b"}])


def test_rows_from_python_are_checked(trial: dict[str, Any], tmp_path: Path) -> None:
    trial["output"] = {"root": str(tmp_path / "out")}
    rows = [{"text": f"hello {i}", "label": "yes" if i % 2 else "no"} for i in range(20)]
    (check,) = rl.check_data(trial, data=rows)
    assert set(check.report.splits["train"].labels or {}) == {"yes", "no"}


def test_the_command_marks_trained_tokens_and_tells_by_its_exit_code(
    trial: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(trial))
    assert run("data", str(file), "--rows", "1") == 0
    text = capsys.readouterr().out
    assert "⟦card_lost<|end|>" in text
    assert "warning: train: 1 row(s) repeat an earlier row word for word" in text
    assert "\x1b" not in text

    assert run("data", str(file), "data.max_length=80", "--json") == 0
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check["max_length"] == 80
    assert check["examples"]["train"][0]["segments"][1]["weight"] == 1

    assert run("data", str(file), "--html", str(tmp_path / "pages" / "data.html")) == 0
    page = (tmp_path / "pages" / "data.html").read_text()
    assert "<mark>card_lost&lt;|end|&gt;" in page

    assert run("data", str(file), f"data.train={tmp_path / 'none.csv'}") == 1
    assert run("data", str(file), "data.max_lenght=3") == 2
    assert "did you mean 'max_length'" in capsys.readouterr().err
    assert run("data", str(file), "--rows", "-1") == 2


def test_a_rows_text_can_not_command_the_terminal(
    trial: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"\x1b[2J <b>{i}</b> </script>", "label": "yes" if i % 2 else "no"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(trial | {"data": {"train": str(tmp_path / "rows.jsonl")}}))
    assert run("data", str(file)) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert run("data", str(file), "--html", str(tmp_path / "data.html")) == 0
    page = (tmp_path / "data.html").read_text()
    assert "<b>1" not in page
    assert page.count("</script") == 3


def test_no_weights_and_no_ray_are_needed(trial: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    trial["model"] = {"id": str(bare)}
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(trial))
    check = f"print(rl.check_data({str(tmp_path / 'trial.yaml')!r}))"
    code = f"import sys, rankloom as rl; {check}; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
