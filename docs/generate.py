"""The reference pages, made from the code at each build: `mkdocs.yml` names this file as a hook.

`pages` has them all, path by path; `tests/test_docs.py` holds them to the code. What is written by hand is in the other
files of this folder; the texts at the repository's root (architecture, changelog and the like) are taken as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from rankloom import events
from rankloom.config import CompareConfig, StudyConfig, TrialConfig
from rankloom.config.serve import ServeConfig
from rankloom.config.space import Knob

REPO = Path(__file__).resolve().parents[1]
ROOT_TEXTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
CONFIGS: dict[str, type[BaseModel]] = {
    "trial": TrialConfig,
    "study": StudyConfig,
    "compare": CompareConfig,
    "serve": ServeConfig,
}
COLUMNS = {
    "number": "Counts the study's trials from 0.",
    "trial": "Ray Tune's id of the trial.",
    "name": "The trial's name, `<study>-<number>`.",
    "method": "`lora`, `qlora`, `dora`, ...: the method with its base's quantisation; or the name of its branch.",
    "status": "`done`, `stopped` (by the scheduler), `failed`, or `running` where the study was interrupted.",
    "error": "Why it failed.",
    "best_loss": "Validation loss of its best report, in nats a token.",
    "best_accuracy": "Validation accuracy of that report, 0 to 1; null without labels.",
    "best_metric": "The study's own metric at that report; null where it is loss or accuracy.",
    "best_step": "The step of that report.",
    "steps": "Steps that it made.",
    "tokens": "Tokens that it was trained on.",
    "train_s": "Seconds of training that are its own.",
    "memory_bytes": "Bytes of the base and the adapter; where `search.objectives` asks for it.",
    "latency_ms": "Milliseconds of one decode step; where `search.objectives` asks for it.",
    "on_front": "Whether it is on the Pareto front.",
    "point": "JSON: the branch, and the value of each knob.",
    "config": "JSON: the trial's whole config.",
    "curve": "A list of its reports: step, percent of the budget, losses, accuracy, tokens, seconds.",
}
"""What results.parquet's columns mean."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' files."""
    from mkdocs.structure.files import File, InclusionLevel

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for figures in sorted((REPO / "benchmarks" / "results").iterdir()):
        name = str(figures.relative_to(REPO))
        files.append(File.generated(config, name, abs_src_path=str(figures), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to the figures, which lie beside docs/ in the repository, lead to their pages."""
    return markdown.replace("](../../benchmarks/", "](../benchmarks/")


def pages() -> dict[str, str]:
    """Each generated page: its path below docs/, and its Markdown."""
    reference = {
        "config": config_page,
        "cli": cli_page,
        "http": http_page,
        "metrics": metrics_page,
        "files": files_page,
    }
    roots = {f"{name.removesuffix('.md').lower()}.md": root_text(REPO / name) for name in ROOT_TEXTS}
    return {f"reference/{name}.md": "\n".join(page()) + "\n" for name, page in reference.items()} | roots


def root_text(path: Path) -> str:
    """A text at the repository's root, its links as they are from docs/."""
    text = path.read_text(encoding="utf-8").replace("](docs/", "](")
    for name in ROOT_TEXTS:
        text = text.replace(f"]({name}", f"]({name.lower()}")
    return text


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    header = list(header)
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"
    yield ""


# configs


def config_page() -> Iterator[str]:
    """Every key of the four kinds of config, with its type, default and help."""
    yield "# Settings\n"
    yield "Every key of the four kinds of YAML file, made from the config classes. `rankloom schema trial` prints the"
    yield "same as a JSON Schema, for an editor. In Python each section is the class whose name its heading has.\n"
    seen: set[str] = set()
    for kind, model in CONFIGS.items():
        yield f"## {kind.capitalize()}\n"
        schema = model.model_json_schema()
        classes = schema.pop("$defs") | {model.__name__: schema}
        places = dict(_places(model.__name__, "", classes))
        for name in sorted(places, key=lambda name: list(places).index(name)):
            if name not in seen:
                yield from _section(name, places[name], classes[name], classes)
        seen |= places.keys()
        if model is StudyConfig:
            yield "### Knobs\n"
            yield "A leaf of `space` may be one of these instead of a value.\n"
            for knob in get_args(Knob):
                yield from _section(knob.__name__, [], knob.model_json_schema())


def _places(name: str, path: str, classes: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each class below one, with the dotted keys at which it may stand."""
    found: dict[str, list[str]] = {}

    def walk(name: str, path: str) -> None:
        found.setdefault(name, []).append(path)
        for key, field in classes[name].get("properties", {}).items():
            for below in dict.fromkeys(_named_in(field)):
                if below != name:
                    walk(below, f"{path}.{key}".strip("."))

    walk(name, path)
    yield from found.items()


def _named_in(field: Any) -> Iterator[str]:
    """The classes that a JSON Schema refers to."""
    if isinstance(field, Mapping):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for key, value in field.items():
            if key != "discriminator":
                yield from _named_in(value)
    elif isinstance(field, list):
        for each in field:
            yield from _named_in(each)


def _section(
    name: str, places: list[str], schema: Mapping[str, Any], classes: Mapping[str, Any] | None = None
) -> Iterator[str]:
    where = ", ".join(f"`{place}`" for place in places if place)
    yield f"### {name} {{ #{name.lower()} }}\n"
    if where:
        yield f"At {where}. {' '.join(schema.get('description', '').split())}\n"
    else:
        yield f"{' '.join(schema.get('description', '').split())}\n"
    required = set(schema.get("required", ()))
    rows = [
        (
            f"`{key}`",
            _type(field),
            "required" if key in required else _default(field),
            field.get("description") or _of_its_class(field, classes or {}),
        )
        for key, field in schema.get("properties", {}).items()
    ]
    yield from table(("key", "value", "default", ""), rows)


def _of_its_class(field: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    """What a section without a help of its own is, where it is of one class."""
    named = list(dict.fromkeys(_named_in(field)))
    return str(classes.get(named[0], {}).get("description", "")) if len(named) == 1 else ""


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, Mapping):
        return f"`{value['type']}`" if "type" in value else "its own"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _type(field: Mapping[str, Any]) -> str:
    """What a key may hold, for a person."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(dict.fromkeys(_type(each) for each in field[union]))
    kind = field.get("type", "anything")
    if kind == "array":
        items = field.get("prefixItems") or ([field["items"]] if field.get("items") else [])
        return f"list of {' and '.join(dict.fromkeys(_type(item) for item in items))}" if items else "list"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_type(values)}" if isinstance(values, Mapping) and values else "mapping"
    return {"integer": "whole number", "string": "text", "boolean": "true, false"}.get(kind, kind) + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return f" {', '.join(found)}" if found else ""


# the command line


def cli_page() -> Iterator[str]:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from rankloom.cli import app

    yield "# Commands\n"
    yield "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted. `--json` prints a result for a"
    yield "machine. `rankloom --install-completion` completes commands, options and adapters' names in your shell.\n"
    for path, command in commands(get_command(app), "rankloom"):
        yield f"## {path}\n"
        usage = command.collect_usage_pieces(command.context_class(command))
        yield f"```text\n{path} {' '.join(usage)}\n```\n"
        yield from _help(command)
        shown = [each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"]
        rows = [(_spelling(each), getattr(each, "help", None) or "") for each in shown]
        if rows:
            yield from table(("", ""), rows)


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The commands below one that are not groups."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from commands(below, f"{path} {name}")


def _help(command: Any) -> Iterator[str]:
    """The help text; the lines that are commands become code."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("rankloom "):
            yield f"```console\n{paragraph}\n```\n"
        else:
            yield f"{paragraph}\n"


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


# what an endpoint answers and measures


def http_page() -> Iterator[str]:
    """Every path of the endpoint, with the keys of its bodies, from its own OpenAPI document."""
    from rankloom.deploy.ingress import build_api
    from rankloom.engine.forward import PATHS

    document = build_api(_no_gateway).openapi()
    components = document["components"]["schemas"]
    yield "# HTTP\n"
    yield "What an endpoint answers, from its own OpenAPI document, which it serves at `/openapi.json`. With"
    yield "`auth.keys`, requests carry `Authorization: Bearer KEY`. The headers `x-rankloom-adapter` and"
    yield "`x-rankloom-version` of an answer name what computed it. Errors have OpenAI's shape: `error.message`,"
    yield "`error.type`, `error.param`, `error.code`.\n"
    forwarded = ", ".join(f"`{path}`" for path in PATHS if path not in document["paths"])
    yield f"With `engine.type=vllm`, {forwarded} [go to vLLM's own server](../guide/vllm.md), as far as it has them."
    yield "Elsewhere they are 404. The console at `/` has paths of its own below `/console`, which may change.\n"
    bodies: dict[str, None] = {}
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            yield f"## {verb.upper()} {path}\n"
            yield f"{' '.join(operation.get('description', operation.get('summary', '')).split())}\n"
            if named := list(_named_in(operation.get("requestBody", {}))):
                bodies |= dict.fromkeys(named)
                yield f"Body: {', '.join(f'[{name}](#{name.lower()})' for name in named)}\n"
    for name in _below(bodies, components):
        yield from _section(name, [], components[name])


def _no_gateway() -> Any:
    raise AssertionError("no request is made")


def _below(names: Iterable[str], components: Mapping[str, Any]) -> list[str]:
    """These schemas and those that they refer to."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting += _named_in(components[name].get("properties", {}))
    return list(found)


def metrics_page() -> Iterator[str]:
    """Every series of `/metrics`."""
    from rankloom.gateway.metrics import MAX_ADAPTERS

    yield "# Metrics\n"
    yield "What `/metrics` has for Prometheus. With `auth.keys` it takes an admin's key. The series of the"
    yield f"{MAX_ADAPTERS} adapters that were asked for last are kept.\n"
    rows = []
    for family in text_string_to_metric_families(_exposition()):
        if family.name.endswith("_created"):
            continue
        names = [sample.labels for sample in family.samples]
        labels = dict.fromkeys(label for each in names for label in each if label != "le")
        suffix = "_total" if family.type == "counter" else ""
        rows.append((f"`{family.name}{suffix}`", family.type, ", ".join(labels), family.documentation))
    yield from table(("series", "type", "labels", ""), rows)


def _exposition() -> str:
    """The text of an endpoint that has answered once, so that its series have labels."""
    from rankloom.engine.protocol import Stats
    from rankloom.gateway.metrics import Metrics

    metrics = Metrics()
    metrics.count_request("bank", "live", "ok", tokens={"completion": 1}, first_s=0.1, token_s=0.1)
    metrics.refused.labels("429").inc()
    metrics.record_replica("r", Stats(**dict.fromkeys(Stats.__dataclass_fields__, 0)), 1)
    return metrics.expose().decode()


# files


def files_page() -> Iterator[str]:
    """The files that users parse."""
    from rankloom.registry.record import Record

    yield (REPO / "docs" / "reference" / "files.in.md").read_text(encoding="utf-8")
    yield "## events.jsonl and journal.jsonl\n"
    yield f"A JSON object a line: `v` (the schema's version, {events.VERSION}), `time` (seconds since 1970), `event`"
    yield "(the kind), and the event's own fields. A run writes its events to events.jsonl; a study writes `trial`,"
    yield "`report` and `end` to journal.jsonl. `rankloom.events.read_events` reads both, and `on_event` gets the same"
    yield "objects.\n"
    yield from table(("event", "class", "", "fields"), map(_event, get_args(events.Event)))
    yield "## record.json\n"
    yield "In a version's folder, beside the PEFT files. It never changes.\n"
    schema = Record.model_json_schema()
    classes = schema.pop("$defs") | {"Record": schema}
    for name, places in _places("Record", "", classes):
        yield from _section(name, places, classes[name], classes)
    yield "## results.parquet\n"
    yield "In a study's folder: a row for each trial.\n"
    yield from table(("column", "type", ""), ((f"`{name}`", kind, COLUMNS[name]) for name, kind in parquet_columns()))


def _event(cls: Any) -> tuple[str, ...]:
    names = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls))
    link = f"[{cls.__name__}](python.md#rankloom.events.{cls.__name__})"
    return f"`{cls.kind}`", link, (cls.__doc__ or "").partition("\n")[0], names


def parquet_columns() -> list[tuple[str, str]]:
    """The columns of results.parquet with their types."""
    from pyarrow import parquet

    from rankloom.search.leaderboard import Leaderboard, write_results

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.parquet"
        write_results(Leaderboard(StudyConfig(name="none", space=[{}])), path)
        schema = parquet.read_schema(path)
    return [(field.name, "list" if field.name == "curve" else str(field.type)) for field in schema]
