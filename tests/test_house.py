"""The rules of the house that a linter can't hold: layout, light imports, the COMPATIBLE table, shipped files, docs."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from rankloom.config import COMPATIBLE, CompareConfig, StudyConfig, TrialConfig, load, parse
from rankloom.config.compatible import Compatibility
from rankloom.config.method import Method
from rankloom.config.model import Quantization
from rankloom.config.serve import ServeConfig
from rankloom.errors import IncompatibleError
from rankloom.paths import find_shipped_folder

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "platform" / "rankloom"
HEAVY = ["torch", "ray", "transformers", "peft", "datasets", "bitsandbytes"]
RUN_MAIN = "from rankloom.cli import main\ntry:\n    main({})\nexcept SystemExit as end:\n    assert not end.code"
TYPES = [member.model_fields["type"].default for member in get_args(get_args(Method)[0])]
QUANTIZATIONS = [member.model_fields["type"].default for member in get_args(get_args(Quantization)[0])]
KINDS: dict[str, type[TrialConfig | StudyConfig | CompareConfig | ServeConfig]] = {
    "trials": TrialConfig,
    "migration": TrialConfig,
    "studies": StudyConfig,
    "compare": CompareConfig,
    "serve": ServeConfig,
}
SHIPPED = sorted((REPO / "configs").rglob("*.yaml"))
DOCS = [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").rglob("*.md"))]
TEXTS = sorted(
    path
    for top in ("platform", "jobs", "serve", "configs", "examples", "docs", "tests", "benchmarks", ".ci", "")
    for path in ((REPO / top).rglob("*") if top else REPO.glob("*"))
    if path.is_file()
    and (path.suffix in {".py", ".yaml", ".yml", ".toml", ".md"} or path.name in {"Makefile", "run", ".gitignore"})
)


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter at the repository's root, which is on its path beside the source root."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "platform")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_after(*steps: str, heavy: Sequence[str] = HEAVY) -> dict[str, list[str]]:
    """The heavy packages that a fresh interpreter has after each of these steps, taken in turn, where it has any."""
    code = f"""
import contextlib, io, sys
for step in {steps}:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(step, {{}})
    print(*sorted({{*{heavy}}} & {{*sys.modules}}))
"""
    lines = run_python(code).splitlines()
    return {step: line.split() for step, line in zip(steps, lines, strict=True) if line}


def test_platform_is_the_standard_librarys() -> None:
    assert not (REPO / "platform" / "__init__.py").exists()
    import_both = "import platform, rankloom; platform.node(); print(platform.__file__); print(rankloom.__file__)"
    standard, ours = run_python(import_both).split()
    assert Path(standard).name == "platform.py"
    assert Path(ours) == PACKAGE / "__init__.py"


def test_modules_import_light() -> None:
    modules = ("", ".config", ".registry", ".paths", ".registry.scorecard", ".engine.protocol")
    steps = [f"import rankloom{module}" for module in modules]
    assert heavy_after(*steps) == {}


def test_the_cli_answers_without_heavy_imports() -> None:
    commands = (
        *("", "train", "tune", "compare", "serve", "evaluate", "submit train", "plan", "data", "report", "doctor"),
        *("schema", "adapters", "keys"),
    )
    steps = [RUN_MAIN.format(arguments.split()) for arguments in (*(f"{c} --help" for c in commands), "schema study")]
    assert heavy_after(*steps, heavy=[*HEAVY, "pyarrow"]) == {}


def test_a_trial_waits_without_torch_and_a_host_trains_without_the_methods_libraries() -> None:
    waits = "import rankloom.search.trainable, rankloom.hosts.hosts, rankloom.hosts.host_actor"
    trains = "import rankloom.training.fused.host"
    found = heavy_after(waits, trains)
    assert "torch" not in found[waits]
    assert "torch" in found[trains]  # what is heavy would be seen
    assert not {"peft", "bitsandbytes"} & {*found[trains]}


def test_a_plan_imports_no_library_of_data_methods_or_clusters(tmp_path: Path) -> None:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}
    (tmp_path / "config.json").write_text(json.dumps(model | size))
    config = tmp_path / "trial.yaml"
    config.write_text(f"name: t\nmodel: {tmp_path}\n")
    call = f"import rankloom as rl\nrl.plan({str(config)!r})"
    command = RUN_MAIN.format(["plan", str(config)])
    heavy = [*HEAVY, "pandas", "pyarrow", "sklearn"]
    assert heavy_after(call, command, heavy=heavy) == {each: ["torch", "transformers"] for each in (call, command)}


def test_compatible_covers_the_methods() -> None:
    from rankloom.methods import METHODS

    assert list(COMPATIBLE) == TYPES
    assert {config.model_fields["type"].default for config in METHODS} == set(TYPES)
    assert all(row.quantization <= set(QUANTIZATIONS) for row in COMPATIBLE.values())


@pytest.mark.parametrize(("method", "quantization"), itertools.product(TYPES, QUANTIZATIONS))
@pytest.mark.parametrize("ratio", [1, 16])
def test_validation_agrees_with_compatible(method: str, quantization: str, ratio: int) -> None:
    row: Compatibility = COMPATIBLE[method]
    tree = {
        "name": "t",
        "method": {"type": method},
        "quantization": quantization,
        "optim": {"loraplus_ratio": ratio},
    }
    if quantization in row.quantization and (ratio == 1 or row.loraplus):
        assert parse(TrialConfig, tree).method.type == method
    else:
        with pytest.raises(IncompatibleError, match=method):
            parse(TrialConfig, tree)


@pytest.mark.parametrize("method", TYPES)
def test_every_method_says_what_it_keeps_in_memory(method: str) -> None:
    class Shape:
        linears, targets, num_layers, num_other, num_weights = ((8, 8), (8, 32)), ((8, 8),), 2, 100, 420
        num_stacked = 0

        def count_adapter_numbers(self, rank: int, *, dora: bool) -> int:
            return sum(rank * (wide + high) + dora * high for wide, high in self.targets)

    kept = parse(TrialConfig, {"name": "t", "method": {"type": method}}).method.count_trained(Shape())
    trains_base = COMPATIBLE[method].servable == "extracted"
    assert kept.on_frozen == (not trains_base) == (kept.rank > 0)
    assert (kept.weights == Shape.num_weights) == trains_base
    assert 0 < kept.gradients <= kept.weights
    assert kept.moments > 0


@pytest.mark.parametrize("method", TYPES)
def test_capabilities_of_the_class_agree_with_compatible(method: str) -> None:
    from rankloom.methods import METHODS

    row = COMPATIBLE[method]
    built = next(cls for config, cls in METHODS.items() if config.model_fields["type"].default == method)
    assert built.trains_base == (row.servable == "extracted")
    assert built.trains_base == (row.quantization == {"none"})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_config_loads_and_says_what_it_is_for(path: Path) -> None:
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert re.match(r"# \w.{20,}\.", first)
    assert load(KINDS[path.parent.name], path).name


def test_every_method_and_knob_has_a_shipped_config() -> None:
    trials = [load(TrialConfig, path) for path in SHIPPED if path.parent.name == "trials"]
    shown = {(t.method.type, t.quantization.type, t.optim.loraplus_ratio > 1) for t in trials}
    assert shown >= {(method, "none", False) for method in TYPES}
    assert shown >= {("lora", "nf4", False), ("dora", "nf4", False), ("lora", "none", True), ("lora", "nf4", True)}
    assert len({t.name for t in trials}) == len(trials)


@pytest.mark.parametrize("kind", ["configs", "jobs", "serve"])
def test_shipped_falls_back_to_the_source_tree(kind: str) -> None:
    assert find_shipped_folder(kind) == REPO / kind  # type: ignore[arg-type]
    assert any(find_shipped_folder(kind).rglob("*.*"))  # type: ignore[arg-type]


def test_import_contracts_hold() -> None:
    report = run_python("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert "0 broken" in report


@pytest.mark.parametrize("path", [p for p in TEXTS if p.suffix == ".py"], ids=lambda p: str(p.relative_to(REPO)))
def test_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_file_names_a_machines_own_path() -> None:
    own_path = re.compile(r"(?<![\w.}])/(?:work|opt|home|root|Users|mnt)/\w+")
    found = [
        f"{p.relative_to(REPO)}: {m.group()}" for p in TEXTS for m in own_path.finditer(p.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_a_public_class_name_is_defined_once() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_unit_tests_mirror_the_package() -> None:
    unit = REPO / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (PACKAGE / folder).is_dir()] == []


def test_test_files_have_names_of_their_own() -> None:
    names = Counter(path.name for path in (REPO / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest would collect none of the suite


def test_readme_tree_lists_the_top_level() -> None:
    tree = (REPO / "README.md").read_text(encoding="utf-8")
    folders = {p.name for p in REPO.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))}
    ignored = {line.strip("/") for line in (REPO / ".gitignore").read_text().split()}
    assert [name for name in sorted(folders - ignored) if f"\n{name}/" not in tree] == []


def test_architecture_names_every_module() -> None:
    text = (REPO / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = {p.name if p.suffix else f"{p.name}/" for p in PACKAGE.iterdir() if not p.name.startswith("_")}
    assert [name for name in sorted(modules) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: str(p.relative_to(REPO)))
def test_docs_name_commands_and_files_that_exist(doc: Path) -> None:
    from typer.main import get_group

    from rankloom.cli import app

    text = doc.read_text(encoding="utf-8")
    commands = get_group(app).commands
    named = set(re.findall(r"(?:^|`|bin/)rankloom ([a-z]+)", text, flags=re.MULTILINE))
    assert named <= set(commands)
    adapters = commands["adapters"].commands  # type: ignore[attr-defined]
    assert set(re.findall(r"rankloom adapters ([a-z]+)", text)) <= set(adapters)
    folders = "configs|jobs|serve|examples|docs|tests|benchmarks|platform"
    files = set(re.findall(rf"(?<!shipped:)\b((?:{folders})/[\w./-]+\.(?:yaml|py|md))\b", text))
    assert [name for name in sorted(files) if not (REPO / name).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) & {"test", "lint", "demo"} <= targets
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
