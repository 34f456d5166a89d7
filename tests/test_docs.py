"""The documentation says what is so: every code block runs or parses, and the generated reference leaves nothing out.

A fenced block is checked by its language: `yaml` against the config class that has its keys, `console` lines against
the command line and the settings that they override.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.main import get_command

from rankloom.cli import app
from rankloom.config import CompareConfig, StudyConfig, TrialConfig, parse
from rankloom.config.base import Frozen, apply_overrides, read_yaml
from rankloom.config.serve import ServeConfig
from rankloom.paths import find_shipped_folder

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "platform" / "rankloom"
TEXTS = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / "examples").rglob("*.md")])
CONFIGS: dict[str, type[Frozen]] = {
    "train": TrialConfig,
    "tune": StudyConfig,
    "compare": CompareConfig,
    "serve": ServeConfig,
}
NEEDED: dict[type[Frozen], dict[str, Any]] = {
    TrialConfig: {"name": "doc"},
    StudyConfig: {"name": "doc", "space": [{}]},
    CompareConfig: {"name": "doc"},
    ServeConfig: {"base": "builtin:smollm2"},
}
"""What a fragment may leave out."""
LANGUAGES = {"yaml", "json", "csv", "python", "console", "bash", "text", ""}
FIGURE = re.compile(r"(?<![\w.-])\d[\d.,]*(?: to \d[\d.]*)?(?:x\b| ?%| (?:ms|s|min|KB|MB|GB|tokens/s|points)\b)")
"""A number with the unit of a measurement."""
SOURCE = re.compile(r"benchmarks/results/[\w.-]+|tests/[\w/]+\.py|https?://\S+")
"""Where a figure may come from: a file of measurements, a test that holds it, or a publication."""
NOT_MEASURED = {
    "95 %": "the level of an interval",
    "5 %": "the level of a test",
    "100 MB": "what Ray lets a job bring along",
}
"""Figures that are conventions or limits."""

sys.path.insert(0, str(REPO / "docs"))
import generate  # noqa: E402


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    path: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPO)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document, those in lists and tabs too."""
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            yield Block(path, token.map[0] + 1, token.info.strip().partition(" ")[0], token.content)


BLOCKS = [block for path in TEXTS for block in blocks(path)]


@dataclass(frozen=True)
class Passage:
    """A paragraph or a row of a table."""

    path: Path
    line: int
    text: str
    context: str
    """What may name the source in its place: the paragraphs beside a table, or the row above one of "the same"."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(REPO)}:{self.line}"

    @property
    def figures(self) -> list[str]:
        """The measured numbers in it, those in code and in the targets of links left out."""
        found = FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", self.text))
        return [figure for figure in found if figure not in NOT_MEASURED]

    @property
    def sources(self) -> list[str]:
        return SOURCE.findall(self.text) or SOURCE.findall(self.context)


def passages(path: Path) -> Iterator[Passage]:
    """Yield the paragraphs and the tables' rows of a document."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tokens = MarkdownIt().enable("table").parse("\n".join(lines))
    kinds = ("paragraph_open", "table_open")
    spans = [(token.type, *token.map) for token in tokens if token.map and token.type in kinds]
    for index, (kind, start, end) in enumerate(spans):
        if kind == "paragraph_open":
            yield Passage(path, start + 1, "\n".join(lines[start:end]), "")
            continue
        beside = [each for each in (*spans[:index][-1:], *spans[index + 1 : index + 2]) if each[0] == "paragraph_open"]
        around = "\n".join("\n".join(lines[first:last]) for _, first, last in beside)
        above = ""
        for number in range(start + 2, end):
            row = lines[number]
            yield Passage(path, number + 1, row, above if row.endswith("the same |") else around)
            above = row if SOURCE.search(row) else above


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_every_block_has_a_language_that_is_checked() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []
    assert {"yaml", "json", "csv", "python", "console"} <= {block.language for block in BLOCKS}


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_a_config(block: Block) -> None:
    tree = yaml.safe_load(block.code)
    fits = [cls for cls in NEEDED if tree.keys() <= cls.model_fields.keys()]
    assert fits, f"{block}: the keys {sorted(tree)} are of no config"
    parse(fits[0], NEEDED[fits[0]] | tree, str(block))


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_rows(block: Block) -> None:
    from rankloom.config.data import COLUMNS

    rows = [yaml.safe_load(line) for line in block.code.splitlines()]
    assert len(rows) == 3
    assert all(any(set(columns) <= row.keys() for columns in COLUMNS.values()) for row in rows)


@pytest.mark.parametrize("block", of("csv"), ids=str)
def test_csv_is_rows(block: Block) -> None:
    import csv

    assert [set(row) for row in csv.DictReader(block.code.splitlines())] == [{"text", "label"}] * 3


def commands() -> Iterator[Any]:
    """Yield each line of a block that calls rankloom, wherever it stands."""
    for block in BLOCKS:
        if block.language in ("console", "bash", ""):
            for number, line in enumerate(block.code.replace("\\\n", " ").splitlines(), block.line + 1):
                if words := re.match(r"(?:\$ )?(?:\w+=\S+ )*(rankloom .*)", line):
                    yield pytest.param(words[1], id=f"{block.path.relative_to(REPO)}:{number}")


@pytest.mark.parametrize("line", commands())
def test_command_exists_with_its_options_and_settings(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    while hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, words)
    overrides = context.params.get("overrides") or []
    kind = CONFIGS.get(command.name)
    if kind is not None and overrides:
        known = str(context.params["config"]).startswith("shipped:")
        tree = (
            read_yaml(find_shipped_folder("configs") / context.params["config"].removeprefix("shipped:"))
            if known
            else {}
        )
        parse(kind, apply_overrides(NEEDED[kind] | tree, overrides), line)


def test_commands_are_found() -> None:
    assert len(list(commands())) > 20


def test_config_reference_has_every_setting() -> None:
    page = generate.pages()["reference/config.md"]
    sections = dict(re.findall(r"^### (\w+) \{.*?\}\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    classes = {cls for cls in _subclasses(Frozen) if cls.__module__.startswith("rankloom.config.")}
    reachable = {cls for cls in classes if cls.__name__ in sections}
    roots_and_leaves = {cls for cls in classes if not cls.__subclasses__() and not cls.__name__.startswith("_")}
    assert {cls.__name__ for cls in roots_and_leaves} <= sections.keys()
    missing = [f"{c.__name__}.{f}" for c in reachable for f in c.model_fields if f"`{f}`" not in sections[c.__name__]]
    assert missing == []


def _subclasses(cls: type[Frozen]) -> set[type[Frozen]]:
    return {each for below in cls.__subclasses__() for each in ({below} | _subclasses(below))}


def test_config_reference_explains_every_setting() -> None:
    page = generate.pages()["reference/config.md"]
    sections = {"quantization", "method", "scheduler", "type"}  # one of several classes, each with its own help
    knobs = {"choice", "uniform", "loguniform", "randint"}
    silent = set(re.findall(r"^\| `(\w+)` \|[^|]*(?:\\\|[^|]*)*\|[^|]*\|  \|$", page, flags=re.MULTILINE))
    assert silent <= sections | knobs


def test_python_reference_has_every_public_name() -> None:
    import rankloom
    from rankloom import errors, events

    page = (REPO / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    named = {each.rpartition(".")[2] for each in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    assert {"errors", "events"} <= named  # whole modules
    pages = generate.pages()
    sections = {
        name for path in ("config", "files") for name in re.findall(r"^### (\w+) ", pages[f"reference/{path}.md"], re.M)
    }
    assert sorted({*rankloom.__all__} - named - sections - vars(errors).keys() - vars(events).keys()) == []


def test_cli_reference_has_every_command_and_option() -> None:
    page = generate.pages()["reference/cli.md"]
    found = list(generate.commands(get_command(app), "rankloom"))
    assert [path for path, _ in found if f"\n## {path}\n" not in page] == []
    options = {name for _, command in found for each in command.params for name in each.opts if name.startswith("--")}
    assert [name for name in sorted(options) if f"`{name}`" not in page and name != "--help"] == []


def test_http_reference_has_every_path() -> None:
    from rankloom.deploy.ingress import build_api
    from rankloom.engine.forward import PATHS

    page = generate.pages()["reference/http.md"]
    paths = build_api(lambda: pytest.fail("no request")).openapi()["paths"]
    assert [path for path in paths if f" {path}\n" not in page] == []
    assert [path for path in PATHS if f" {path}\n" not in page and f"`{path}`" not in page] == []


def test_metrics_reference_has_every_series() -> None:
    source = (PACKAGE / "gateway" / "metrics.py").read_text(encoding="utf-8")
    names = set(re.findall(r'"rankloom_(\w+)"', source)) | set(re.findall(r'counter\("(\w+)"', source))
    page = generate.pages()["reference/metrics.md"]
    assert names
    assert [name for name in sorted(names) if f"`rankloom_{name}" not in page] == []


def test_environment_reference_has_every_variable() -> None:
    named = {
        name
        for top in ("platform", "serve", "jobs", "configs")
        for path in (REPO / top).rglob("*")
        if path.suffix in {".py", ".yaml"}
        for name in re.findall(r"\bRANKLOOM_[A-Z_]+", path.read_text(encoding="utf-8"))
    }
    page = (REPO / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    assert named
    assert [name for name in sorted(named) if f"`{name}`" not in page] == []


def test_troubleshooting_quotes_errors_that_exist() -> None:
    text = (REPO / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines
    quoted = re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)
    assert len(quoted) > 15
    assert [each for each in quoted if each not in joined] == []


def test_files_reference_has_every_event() -> None:
    from typing import get_args

    from rankloom.events import Event

    page = generate.pages()["reference/files.md"]
    assert [each.__name__ for each in get_args(Event) if f"| `{each.kind}` | [{each.__name__}]" not in page] == []


PASSAGES = [each for path in TEXTS if path.name != "CHANGELOG.md" for each in passages(path) if each.figures]


@pytest.mark.parametrize("passage", PASSAGES, ids=str)
def test_a_figure_names_the_file_that_holds_its_measurement(passage: Passage) -> None:
    sources = passage.sources
    assert sources, f"{passage}: {passage.figures} stand there without a file of benchmarks/results"
    files = [source for source in sources if not source.startswith("http")]
    assert [file for file in files if not (REPO / file).is_file()] == []


def test_figures_are_found(tmp_path: Path) -> None:
    text = "It is 2.8x faster.\n\n| a | b |\n|---|---|\n| 87 % | `5 %` |\n| x | [2 GB](benchmarks/results/none.md) |\n"
    (tmp_path / "page.md").write_text(f"{text}| 6 min | the same |\n\nRank 8, 16 steps, a 95 % interval.\n")
    found = [(each.figures, each.sources) for each in passages(tmp_path / "page.md") if each.figures]
    file = ["benchmarks/results/none.md"]
    assert found == [(["2.8x"], []), (["87 %"], []), (["2 GB"], file), (["6 min"], file)]
    texts = "".join(each.text for path in TEXTS for each in passages(path))
    assert [figure for figure in NOT_MEASURED if figure not in texts] == []  # an exception that is of no use
    assert len(PASSAGES) > 30


def test_the_migration_path_changes_one_line_at_a_time() -> None:
    folder = REPO / "configs" / "migration"
    lines = {path.stem: _read_settings(path) for path in folder.glob("*.yaml")}
    path = ["1-lora", "2-qlora", "3-qlora-lora-plus", "4-dora"]
    steps = [*itertools.pairwise(path), ("1-lora", "4-galore")]
    assert {name for step in steps for name in step} == lines.keys()
    page = (REPO / "docs" / "guide" / "methods.md").read_text(encoding="utf-8")
    for before, after in steps:
        changed = [new for old, new in zip(lines[before], lines[after], strict=True) if old != new]
        assert len(changed) == 1, f"{before} -> {after}"
        assert re.search(rf"configs/migration/{after}\.yaml`[^|]*\| `{re.escape(changed[0])}` \|", page)


def _read_settings(path: Path) -> list[str]:
    """The lines of a config that are neither a comment nor its name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(("#", "name:"))]
