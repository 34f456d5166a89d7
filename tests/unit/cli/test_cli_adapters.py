"""`rankloom adapters ...`, each verb run as a user would, on a real registry in a folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from rankloom.cli import main
from rankloom.cli.adapters import app
from rankloom.errors import AdapterNotFoundError, ConfigError, RegistryError
from rankloom.paths import get_registry_root
from rankloom.registry import Draft, Registry
from rankloom.registry.scorecard import Measures, Proportion, Scorecard

MEASURES = Measures(num_rows=40, loss=0.25, perplexity=1.28, accuracy=Proportion(value=0.9, low=0.8, high=0.95))
SCORECARD = Scorecard(
    result=MEASURES, base=MEASURES.model_copy(update={"loss": 2.5}), trainable_parameters=1000, adapter_bytes=4096,
    peak_memory_bytes=2**30, steps=10, train_tokens=5000, train_s=12.5, tokens_per_s=400.0, device="cpu",
)  # fmt: skip


def run(*arguments: str | Path) -> Result:
    """Invoke a verb; what the CLI's main would turn into a message and an exit code is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({"layer.lora_A.weight": np.ones((4, 8), np.float32)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def registry(folder: Path) -> Registry:
    """The registry that the CLI reads by itself, with bank@1 (champion), bank@2 and other@1."""
    registry = Registry(get_registry_root())
    fields: dict[str, Any] = {
        "method": "dora",
        "base": {"id": "org/tiny", "fingerprint": "sha256:0", "quantization": "nf4"},
        "servable": "itself",
        "trial": {},
        "data_fingerprint": "sha256:1",
        "scorecard": SCORECARD,
        "lineage": {"run": "run-7"},
        "versions": {"rankloom": "0.1", "torch": "2", "transformers": "5", "peft": "0"},
    }
    for name in ("bank", "bank", "other"):
        registry.publish(name, folder, Draft.model_validate(fields))
    registry.promote("bank@1")
    return registry


@pytest.mark.usefixtures("registry")
def test_list_is_aligned_text_when_piped_and_json_on_request() -> None:
    lines = run("list").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["adapter", "aliases", "method"], ["bank@1", "champion", "dora"], ["bank@2", "-", "dora"],
        ["other@1", "-", "dora"],
    ]  # fmt: skip
    assert lines[1].index("dora") == lines[3].index("dora")
    assert "90.0 %" in lines[1]
    assert "org/tiny nf4" in lines[1]
    found = json.loads(run("list", "bank", "--json").stdout)
    assert [(r["name"], r["version"], r["aliases"]) for r in found] == [("bank", 1, ["champion"]), ("bank", 2, [])]
    assert found[0]["scorecard"]["result"]["accuracy"]["value"] == 0.9


def test_list_of_an_empty_registry() -> None:
    assert run("list").stdout == f"no adapters in {get_registry_root()}\n"
    assert json.loads(run("list", "--json").stdout) == []


@pytest.mark.usefixtures("registry")
def test_show() -> None:
    text = run("show", "bank").stdout
    for expected in ("bank@1", "champion -> 1", "run-7", "org/tiny, quantization nf4", "peft 0", "2.5000", "1,000"):
        assert expected in text
    assert json.loads(run("show", "bank", "--json").stdout)["aliases"] == ["champion"]
    assert json.loads(run("show", "bank@2", "--json").stdout)["aliases"] == []


@pytest.mark.parametrize("terminal", [False, True])
def test_a_records_text_is_not_obeyed(
    registry: Registry,
    folder: Path,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = "org/\x1b]0;owned\x07\x1b[2J\u202etxt|`\r\nnext"
    draft = registry.get("bank@1").draft()
    base = draft.base.model_copy(update={"id": hostile})
    card = SCORECARD.model_copy(update={"device": hostile})
    registry.publish("odd", folder, draft.model_copy(update={"base": base, "scorecard": card, "method": hostile}))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    for command in (["list"], ["show", "odd"]):
        app([*command, "--registry", registry.root], standalone_mode=False)
    shown = capsys.readouterr().out
    assert r"\x1b]0;owned\x07" in shown
    written = (Path(registry.root) / "odd" / "1" / "README.md").read_text()
    for text in (shown, written):
        assert not set(re.sub(r"\x1b\[\d*m", "", text)) & {"\x1b", "\x07", "\u202e", "\r"}  # but rich's own bold
    [row] = [line for line in written.splitlines() if line.startswith("| training time")]
    assert row.replace(r"\|", "").count("|") == 4


def test_a_damaged_records_text_is_not_obeyed(registry: Registry, capfd: pytest.CaptureFixture[str]) -> None:
    file = Path(registry.root) / "bank" / "1" / "record.json"
    record = json.loads(file.read_text())
    record["versions"]["odd\x1b]0;owned\x07\u202e"] = "1"
    file.write_text(json.dumps(record))
    command = [sys.executable, "-m", "rankloom.cli", "adapters", "list", "--registry", registry.root]
    subprocess.run(command, check=True)
    shown = capfd.readouterr().err
    assert r"versions.odd\x1b]0;owned\x07\u202e: Extra inputs" in shown
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}


def test_an_error_is_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["adapters", "show", "bank", "--registry", "nowhere\x1b[2J"])
    assert r"nowhere\x1b[2J" in capsys.readouterr().err


def test_promote_rollback_and_rm(registry: Registry) -> None:
    assert "bank@champion is now version 2" in run("promote", "bank@latest").stdout
    with pytest.raises(RegistryError, match="bank@2 is champion"):
        run("rm", "bank@2")
    assert json.loads(run("rollback", "bank", "--json").stdout)["version"] == 1
    assert registry.aliases("bank") == {"champion": 1}
    assert run("promote", "bank@2", "--alias", "canary").exit_code == 0
    assert registry.aliases("bank") == {"champion": 1, "canary": 2}
    assert run("rm", "bank@2", "--force").stdout == "removed bank@2\n"
    assert registry.versions("bank") == [1]


def test_promote_the_best(registry: Registry, folder: Path) -> None:
    draft = registry.get("bank@1").draft()
    for accuracy, loss in ((0.95, 0.5), (0.95, 0.4), (0.8, 0.1)):
        share = Proportion(value=accuracy, low=0, high=1)
        result = MEASURES.model_copy(update={"accuracy": share, "loss": loss})
        card = SCORECARD.model_copy(update={"result": result})
        registry.publish("bank", folder, draft.model_copy(update={"scorecard": card}))
    registry.publish("bank", folder, draft.model_copy(update={"scorecard": None}))
    assert run("promote", "bank", "--best").stdout == "bank@champion is now version 4, the best by accuracy\n"
    bare = SCORECARD.model_copy(update={"result": MEASURES.model_copy(update={"accuracy": None, "loss": 0.2})})
    registry.publish("bank", folder, draft.model_copy(update={"scorecard": bare}))
    assert json.loads(run("promote", "bank", "--best", "--alias", "canary", "--json").stdout)["version"] == 5
    assert registry.aliases("bank") == {"champion": 4, "canary": 5}

    assert run("promote", "bank@1", "--best").exit_code == 2
    registry.publish("bank", folder, draft.model_copy(update={"data_fingerprint": "sha256:2"}))
    with pytest.raises(RegistryError, match="bank@1 and bank@8 were scored on different rows"):
        run("promote", "bank", "--best")
    registry.publish("unscored", folder, draft.model_copy(update={"scorecard": None}))
    with pytest.raises(RegistryError, match="unscored: none of its versions has a scorecard"):
        run("promote", "unscored", "--best")
    with pytest.raises(AdapterNotFoundError):
        run("promote", "nothing", "--best")
    assert registry.aliases("bank") == {"champion": 4, "canary": 5}


def test_verify_without_a_probe(registry: Registry) -> None:
    assert run("verify", "bank", "--no-probe").stdout == "bank@1: 3 files, all as recorded\n"
    assert json.loads(run("verify", "bank", "--no-probe", "--json").stdout) == {
        "ref": "bank@1", "files": 3, "probe": None,
    }  # fmt: skip
    (Path(registry.root) / "bank" / "1" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(RegistryError, match="has 1 bytes"):
        run("verify", "bank", "--no-probe")


def test_an_exported_folder_can_be_published_elsewhere(registry: Registry, tmp_path: Path) -> None:
    assert run("export", "bank", "-o", tmp_path / "out").stdout.startswith("bank@1 is in ")
    second = tmp_path / "second"
    assert "published copy@1" in run("publish", tmp_path / "out", "--name", "copy", "--registry", second).stdout
    record = Registry(second).get("copy")
    assert record.lineage.parent == "bank@1"
    assert record.lineage.run == "run-7"
    assert record.scorecard == SCORECARD
    assert record.files["adapter_model.safetensors"] == registry.get("bank").files["adapter_model.safetensors"]


@pytest.mark.usefixtures("registry")
def test_an_exported_folder_that_was_changed_does_not_keep_its_scorecard(tmp_path: Path) -> None:
    run("export", "bank", "-o", tmp_path / "out")
    save_file({"layer.lora_A.weight": np.zeros((4, 8), np.float32)}, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(RegistryError, match=r"does not describe this folder.*another checksum.*delete it"):
        run("publish", tmp_path / "out", "--name", "copy")
    with pytest.raises(RegistryError, match="leave --base out"):
        run("publish", tmp_path / "out", "--name", "copy", "--base", "org/tiny")


@pytest.mark.usefixtures("registry")
def test_an_exported_folder_keeps_its_record_through_a_hub_cache_and_git(tmp_path: Path) -> None:
    run("export", "bank", "-o", tmp_path / "out")
    snapshot = tmp_path / "models--org--bank" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "out").rename(snapshot.parents[1] / "blobs")
    for file in (snapshot.parents[1] / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / ".gitattributes").touch()
    (snapshot / ".git").mkdir()
    told = run("publish", snapshot, "--name", "copy").output
    assert "not published: .git, .gitattributes" in told
    assert Registry(get_registry_root()).get("copy").scorecard == SCORECARD
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(RegistryError, match=r"README\.md is a link out of the folder"):
        run("publish", snapshot, "--name", "copy")


def test_a_foreign_folder_must_name_its_base(folder: Path) -> None:
    with pytest.raises(RegistryError, match="give --base"):
        run("publish", folder, "--name", "copy")


def test_a_foreign_folder_of_peft_is_published_verified_and_merged(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = tiny_model("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    tuned.save_pretrained(tmp_path / "peft")
    before = {path.name for path in (tmp_path / "peft").iterdir()}
    run("publish", tmp_path / "peft", "--name", "foreign")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == before  # the user's folder is not touched
    shown = json.loads(run("verify", "foreign", "--json").stdout)
    assert shown["probe"]["max_difference"] < 1e-3 < shown["probe"]["distance_from_base"]
    assert "the probe's logits differ by at most" in run("verify", "foreign").stdout

    run("export", "foreign", "--format", "merged", "-o", tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        torch.testing.assert_close(merged, tuned(ids).logits, atol=1e-4, rtol=1e-4)

    silent = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")  # B is zero: it does nothing
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), silent).save_pretrained(tmp_path / "silent")
    with pytest.raises(RegistryError, match=f"{re.escape(str(tmp_path / 'silent'))}: .*does nothing"):
        run("publish", tmp_path / "silent", "--name", "foreign")
    assert Registry(get_registry_root()).versions("foreign") == [1]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_foreign_folder_on_a_quantised_base_is_published_verified_and_merged(
    tiny_model: Callable[..., Path], make_tokenizer: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    reading = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4", bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), quantization_config=reading)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "peft")
    run("publish", tmp_path / "peft", "--name", "foreign", "--base", str(tmp_path / "base"))
    assert Registry(get_registry_root()).get("foreign@1").base.quantization == kind
    assert json.loads(run("verify", "foreign", "--json").stdout)["probe"]["distance_from_base"] > 0.01
    run("export", "foreign", "--format", "merged", "-o", tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_errors_reach_the_caller(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'base': it means the base"):
        run("publish", folder, "--name", "base", "--base", "no/such-base")  # before anything is loaded
    with pytest.raises(AdapterNotFoundError, match="no adapter 'nothing'"):
        run("show", "nothing")
    with pytest.raises(ConfigError, match="allowed are"):
        run("verify", "../etc")
    with pytest.raises(ConfigError, match="registry: it is empty"):
        run("list", "--registry", "")
    assert run("export", "bank", "--format", "gguf", "-o", "x").exit_code == 2
    assert run("export", "bank").exit_code == 2


@pytest.mark.parametrize("verb", ["list", "show", "publish", "promote", "rollback", "verify", "export", "rm"])
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    text = run(verb, "--help").stdout
    assert f"Example: rankloom adapters {verb}" in " ".join(text.split())
    assert "RANKLOOM_REGISTRY" in text
    assert "--json" in text


def _python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("incomplete", "expected"),
    [
        ("", {"bank", "other"}),
        ("ba", {"bank"}),
        ("bank@", {"bank@1", "bank@2", "bank@champion", "bank@latest"}),
        ("bank@c", {"bank@champion"}),
        ("zzz@", set()),
        ("../@", set()),
    ],
)
def test_the_shell_completes_refs(incomplete: str, expected: set[str]) -> None:
    """As bash asks for it."""
    script = "from rankloom.cli.adapters import app; app(prog_name='adapters')"
    done = _python(script, _ADAPTERS_COMPLETE="complete_bash", COMP_WORDS=f"adapters show {incomplete}", COMP_CWORD="2")
    assert set(done.stdout.split()) == expected, done.stderr


def test_completion_is_silent_without_a_registry(tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("no folder")
    script = "from rankloom.cli.adapters import app; app(prog_name='adapters')"
    done = _python(script, _ADAPTERS_COMPLETE="complete_bash", COMP_WORDS="adapters show b", COMP_CWORD="2")
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.usefixtures("registry")
def test_a_terminal_gets_a_table() -> None:
    import pty

    master, slave = pty.openpty()
    script = "from rankloom.cli.adapters import app; app(['list'])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=slave, env=environment)
    os.close(slave)
    assert process.wait(timeout=60) == 0
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "\x1b[1madapter" in shown  # bold header
    assert "bank@1" in shown


def test_reading_the_registry_imports_no_torch(registry: Registry) -> None:
    script = (
        "import sys; from rankloom.cli.adapters import app\n"
        f"try: app(['verify', 'bank', '--no-probe', '--registry', {registry.root!r}])\n"
        "finally: print({'torch', 'transformers', 'ray', 'peft'} & set(sys.modules))"
    )
    done = _python(script)
    assert "all as recorded\nset()" in done.stdout, done.stderr
