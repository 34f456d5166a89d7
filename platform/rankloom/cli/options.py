"""Arguments and options that several commands share."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any

import typer

from rankloom.errors import RankloomError
from rankloom.paths import get_registry_root

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def complete_ref(context: typer.Context, incomplete: str) -> list[str]:
    """Return adapter names; after an @, that name's versions and aliases; nothing where the registry can't be read."""
    from rankloom.registry import Registry

    with suppress(RankloomError, ValueError):
        registry = Registry(context.params.get("registry") or get_registry_root())
        name, at, _ = incomplete.partition("@")
        refs = registry.names()
        if at:
            versions = registry.versions(name)
            selectors = (*registry.aliases(name), *versions, "latest") if versions else ()
            refs = [f"{name}@{selector}" for selector in selectors]
        return [ref for ref in refs if ref.startswith(incomplete)]
    return []


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2))


_REF = "An adapter: name, name@3, name@latest or name@alias. A name alone means its champion, else its latest version."

TrialFile = Annotated[str, typer.Argument(help="A YAML file, or shipped:trials/lora.yaml.", metavar="TRIAL.yaml")]
StudyFile = Annotated[
    str, typer.Argument(help="A YAML file, or shipped:studies/quickstart.yaml.", metavar="STUDY.yaml")
]
CompareFile = Annotated[str, typer.Argument(help="A YAML file, or shipped:compare/quick.yaml.", metavar="COMPARE.yaml")]
ServeFile = Annotated[str, typer.Argument(help="A YAML file, or shipped:serve/banking77.yaml.", metavar="SERVE.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, such as method.rank=8.", metavar="key=value")
]
Ref = Annotated[str, typer.Argument(help=_REF, metavar="REF", autocompletion=complete_ref)]
Root = Annotated[
    str,
    typer.Option(
        "--registry",
        default_factory=get_registry_root,
        envvar="RANKLOOM_REGISTRY",
        show_default="~/rankloom/registry",
        help="The registry: a folder, or a URL such as s3://bucket/registry (AWS_ENDPOINT_URL names another server).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")]
ResumeRun = Annotated[bool, typer.Option("--resume", help="Resume the run of this name.")]
ResumeComparison = Annotated[bool, typer.Option("--resume", help="Resume the comparison of this name.")]
ResumeStudy = Annotated[bool, typer.Option("--resume", help="Resume the study of this name.")]
