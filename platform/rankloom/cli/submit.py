"""`rankloom submit`: run train, tune, compare or evaluate on a cluster, as a Ray job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.options import CompareFile, Overrides, ResumeComparison, ResumeRun, ResumeStudy, StudyFile, TrialFile
from rankloom.config.files import find_config, is_config_file
from rankloom.errors import ConfigError

if TYPE_CHECKING:
    from rankloom.launch.submit import Job

app = typer.Typer(
    name="submit", no_args_is_help=True, help="Run train, tune, compare or evaluate on a Ray cluster, as a Ray job."
)

Address = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://head:8265.")
]
Follow = Annotated[bool, typer.Option("--follow", help="Print the job's log, and exit with its exit code.")]
WorkingDir = Annotated[
    Path | None,
    typer.Option(
        "--working-dir", exists=True, file_okay=False, metavar="DIR",
        help="Upload this folder (100 MB at most) and run in it; it must hold the config.",
    ),
]  # fmt: skip
_NOTE = "For a cluster with token authentication, set RAY_AUTH_TOKEN or write ~/.ray/auth_token."


@app.command("train", epilog=_NOTE)
def submit_train(
    config: TrialFile,
    address: Address,
    overrides: Overrides = None,
    resume: ResumeRun = False,
    follow: Follow = False,
    working_dir: WorkingDir = None,
) -> None:
    """Train one trial on a cluster.

    Examples:

    rankloom submit train shipped:trials/lora.yaml output.root=s3://bucket/rankloom --address http://head:8265 --follow

    rankloom submit train trial.yaml --working-dir . --address http://head:8265
    """
    _submit("train", config, overrides, address, follow, working_dir, resume=resume)


@app.command("tune", epilog=_NOTE)
def submit_tune(
    config: StudyFile,
    address: Address,
    overrides: Overrides = None,
    resume: ResumeStudy = False,
    follow: Follow = False,
    working_dir: WorkingDir = None,
) -> None:
    """Search for the best trial on a cluster; trial.output.root must be a folder that all its nodes share.

    It publishes there too, unless trial.output.registry names another folder or a URL.

    Example: rankloom submit tune study.yaml trial.output.root=/shared/rankloom --address http://head:8265 --follow
    """
    _submit("tune", config, overrides, address, follow, working_dir, resume=resume)


@app.command("compare", epilog=_NOTE)
def submit_compare(
    config: CompareFile,
    address: Address,
    overrides: Overrides = None,
    resume: ResumeComparison = False,
    follow: Follow = False,
    working_dir: WorkingDir = None,
) -> None:
    """Compare methods on a cluster; trial.output.root must be a folder that all its nodes share.

    Example: rankloom submit compare compare.yaml trial.output.root=/shared/rankloom --address http://head:8265 --follow
    """
    _submit("compare", config, overrides, address, follow, working_dir, resume=resume)


@app.command("evaluate", epilog=_NOTE)
def submit_evaluate(
    subject: Annotated[
        str, typer.Argument(help="An adapter in the cluster's registry, or a trial.", metavar="ADAPTER|TRIAL.yaml")
    ],
    address: Address,
    overrides: Overrides = None,
    follow: Follow = False,
    working_dir: WorkingDir = None,
    registry: Annotated[str | None, typer.Option("--registry", help="The registry, as the cluster sees it.")] = None,
) -> None:
    """Score an adapter, or a trial's untuned base, on a cluster.

    Example: rankloom submit evaluate bank-intents-lora --registry s3://bucket/rankloom/registry --address
    http://head:8265 --follow
    """
    _submit("evaluate", subject, overrides, address, follow, working_dir, registry=registry)


def _submit(
    verb: str,
    subject: str,
    overrides: list[str] | None,
    address: str,
    follow: bool,
    working_dir: Path | None,
    *,
    resume: bool = False,
    registry: str | None = None,
) -> None:
    from rankloom.config import CompareConfig, StudyConfig, TrialConfig, load
    from rankloom.config.paths import list_local_inputs
    from rankloom.launch.submit import CONFIG_FILE, is_open, submit

    overrides, shipped = overrides or [], None
    options = [*(["--resume"] if resume else []), *(["--registry", registry] if registry else [])]
    if verb != "evaluate" or is_config_file(subject):
        path = find_config(subject)
        kinds: dict[str, type[CompareConfig | StudyConfig | TrialConfig]] = {
            "tune": StudyConfig,
            "compare": CompareConfig,
        }
        config = load(kinds.get(verb, TrialConfig), path, overrides)
        if working_dir is None:
            for setting, place in list_local_inputs(config):
                typer.secho(
                    f"warning: {setting}={place} is on this machine, and the cluster looks for it on its own; give a "
                    f"URL, or --working-dir", fg=typer.colors.YELLOW, err=True,
                )  # fmt: skip
            shipped, arguments = config, [CONFIG_FILE]
        else:
            arguments = [_locate_inside(path, working_dir, subject), *overrides]
    else:
        arguments = [subject, *overrides]
    job = submit([verb, *arguments, *options], address=address, config=shipped, working_dir=working_dir)
    typer.echo(f"submitted {job.id} to {address}", err=True)
    if is_open(address):
        typer.secho(
            f"warning: {address} runs the code of anyone who can reach it; start the cluster with RAY_AUTH_MODE=token, "
            f"or keep its network private", fg=typer.colors.YELLOW, err=True,
        )  # fmt: skip
    if not follow:
        typer.echo(job.hints, err=True)
        typer.echo(job.id)
        return
    raise typer.Exit(_follow_to_end(job))


def _locate_inside(path: Path, working_dir: Path, subject: str) -> str:
    """Return the config's path as the job sees it."""
    try:
        return str(path.resolve().relative_to(working_dir.resolve()))
    except ValueError:
        raise ConfigError(f"{subject} is not in --working-dir {working_dir}; move it there") from None


def _follow_to_end(job: Job) -> int:
    from rankloom.launch.submit import follow

    try:
        return follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\ndetached; {job.id} continues\n{job.hints}", err=True)
        return 130
