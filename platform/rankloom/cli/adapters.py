"""`rankloom adapters`: list, publish, promote, verify and export the registry's adapters.

Each command is a thin shell over `rankloom.registry.Registry`; only `verify`, `export --format merged` and the
`publish` of a foreign folder load a model, and import torch when they do.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankloom.cli.options import Json, Ref, Root, complete_ref, print_json
from rankloom.config.printable import escape_unprintable

if TYPE_CHECKING:
    from rankloom.registry import Record, Registry

app = typer.Typer(
    name="adapters", no_args_is_help=True, help="List, show, publish, promote, verify and export trained adapters."
)


Alias = Annotated[str, typer.Option("--alias", help="The alias to move.")]


class Format(enum.StrEnum):
    peft = "peft"
    merged = "merged"


@app.command("list")
def list_adapters(
    root: Root,
    name: Annotated[str | None, typer.Argument(help="Only this adapter.", autocompletion=complete_ref)] = None,
    as_json: Json = False,
) -> None:
    """List every version of every adapter, or of one.

    Example: rankloom adapters list bank-intents
    """
    from rankloom.cli.tables import print_table

    registry = _open(root)
    records = registry.list(name)
    aliases = {each: registry.aliases(each) for each in {record.name for record in records}}
    pointing = {r.ref: [alias for alias, to in aliases[r.name].items() if to == r.version] for r in records}
    if as_json:
        print_json([_to_plain(record) | {"aliases": pointing[record.ref]} for record in records])
    elif not records:
        typer.echo(f"no adapters in {registry.root}")
    else:
        header = ("adapter", "aliases", "method", "base", "accuracy", "loss", "size", "created")
        print_table(header, [(r.ref, " ".join(pointing[r.ref]) or "-", *_format_row(r)) for r in records])


@app.command()
def show(ref: Ref, root: Root, as_json: Json = False) -> None:
    """Show one version: its origin, measures and files.

    Example: rankloom adapters show bank-intents@champion
    """
    from rankloom.cli.tables import print_table
    from rankloom.registry.card import list_scorecard_rows, list_suite_rows

    registry = _open(root)
    record = registry.get(ref)
    aliases, suites = registry.aliases(record.name), registry.suites(record.ref)
    if as_json:
        pointing = [alias for alias, to in aliases.items() if to == record.version]
        print_json(
            _to_plain(record) | {"aliases": pointing, "suites": [each.model_dump(mode="json") for each in suites]}
        )
        return
    facts = [
        ("adapter", record.ref),
        ("aliases", ", ".join(f"{alias} -> {to}" for alias, to in aliases.items()) or "-"),
        ("created", f"{record.created:%Y-%m-%d %H:%M:%S} UTC"),
        ("method", f"{record.method} ({record.servable})"),
        ("base", f"{record.base.id}, quantization {record.base.quantization}"),
        ("base fingerprint", record.base.fingerprint),
        ("data fingerprint", record.data_fingerprint or "-"),
        *((key, value) for key, value in record.lineage.model_dump().items() if value),
        ("made with", ", ".join(f"{library} {number}" for library, number in record.versions.model_dump().items())),
        *((f"file {name}", f"{file.bytes:,} bytes") for name, file in sorted(record.files.items())),
    ]
    print_table(("", ""), facts)
    if record.scorecard:
        typer.echo()
        print_table(("measure", "adapter", "base"), list_scorecard_rows(record.scorecard))
    if suites:
        typer.echo()
        print_table(("suite", "score", ""), list_suite_rows(suites))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A folder with adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str, typer.Option("--name", help="The adapter's name; the folder becomes its next version.")],
    root: Root,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base, where the folder has no record.json and adapter_config.json names none or another."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a folder as the next version of an adapter.

    A folder that `rankloom adapters export` wrote keeps its record.

    Any other LoRA or DoRA folder from PEFT is first loaded on its base, in the base's stored precision, to record a
    probe. Only its adapter_config.json and adapter_model.safetensors are read and published.

    Example: rankloom adapters publish ./my-adapter --name bank-intents
    """
    from rankloom.adapters.publish import publish_folder

    record = publish_folder(folder, _open(root), name, base, on_note=_tell)
    _report(as_json, record, f"published {record.ref}; to make it the champion: rankloom adapters promote {record.ref}")


@app.command()
def promote(
    ref: Ref,
    root: Root,
    alias: Alias = "champion",
    best: Annotated[
        bool, typer.Option("--best", help="Choose the name's version with the best test accuracy, else test loss.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Point an alias to a version; a name alone means its latest version, or with --best its best.

    Example: rankloom adapters promote bank-intents@3 --alias canary

    Example: rankloom adapters promote bank-intents --best
    """
    registry, why = _open(root), ""
    if best:
        from rankloom.registry.best import choose_best

        if "@" in ref:
            raise typer.BadParameter(f"--best chooses the version itself; give the name alone, not {ref}")
        chosen, measure = choose_best(registry.list(ref))
        ref, why = chosen.ref, f", the best by {measure}"
    record = registry.promote(ref, alias)
    _report(as_json, record, f"{record.name}@{alias} is now version {record.version}{why}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The adapter's name.", autocompletion=complete_ref)],
    root: Root,
    alias: Alias = "champion",
    as_json: Json = False,
) -> None:
    """Point an alias back to its version before the last promotion; repeat to go back further.

    Example: rankloom adapters rollback bank-intents
    """
    record = _open(root).rollback(name, alias)
    _report(as_json, record, f"{record.name}@{alias} is version {record.version} again")


@app.command()
def verify(
    ref: Ref,
    root: Root,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Load the base and run the recorded probe.")] = True,
    as_json: Json = False,
) -> None:
    """Check a version's files and checksums, and that it gives its published logits on its base.

    Example: rankloom adapters verify bank-intents --no-probe
    """
    registry = _open(root)
    record = registry.verify(ref)
    shown: dict[str, Any] = {"ref": record.ref, "files": len(record.files), "probe": None}
    text = f"{record.ref}: {len(record.files)} files, all as recorded"
    if probe:
        from rankloom.adapters.probe import verify_probe

        with _fetch(registry, record) as folder:
            report = verify_probe(folder, record)
        shown["probe"] = {
            "max_difference": report.max_difference,
            "distance_from_base": report.distance_from_base,
        }
        text += (
            f"; the probe's logits differ by at most {report.max_difference:.2g} from the recorded ones, "
            f"and by {report.distance_from_base:.2g} from the base's"
        )
    print_json(shown) if as_json else typer.echo(text)


@app.command()
def export(
    ref: Ref,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A folder that does not exist yet.")],
    root: Root,
    form: Annotated[
        Format, typer.Option("--format", help="peft: the adapter's folder; merged: base and adapter as one model.")
    ] = Format.peft,
    as_json: Json = False,
) -> None:
    """Write a version to a folder, as it is or merged into its base.

    Example: rankloom adapters export bank-intents --format merged -o ./bank-model
    """
    registry = _open(root)
    record = registry.get(ref)
    output = output.expanduser()
    if form is Format.peft:
        registry.fetch(record.ref, output)
    else:
        from rankloom.adapters.export import merge_adapter

        with _fetch(registry, record) as folder:
            merge_adapter(folder, record, output)
    done = {"ref": record.ref, "format": form.value, "folder": str(output.absolute())}
    print_json(done) if as_json else typer.echo(f"{record.ref} is in {output} ({form.value})")


@app.command()
def rm(
    ref: Ref,
    root: Root,
    force: Annotated[bool, typer.Option("--force", help="Remove it even if an alias points to it.")] = False,
    as_json: Json = False,
) -> None:
    """Remove one version permanently; its number is never reused.

    Example: rankloom adapters rm bank-intents@2
    """
    record = _open(root).rm(ref, force=force)
    _report(as_json, record, f"removed {record.ref}")


def _open(root: str) -> Registry:
    from rankloom.registry import Registry

    return Registry(root)


@contextmanager
def _fetch(registry: Registry, record: Record) -> Iterator[Path]:
    """Yield a temporary copy of a version's folder; errors name the version instead of the copy."""
    from rankloom.registry.checks import rename_in_errors

    with TemporaryDirectory(prefix="rankloom-") as scratch:
        folder = Path(scratch) / "adapter"
        with rename_in_errors(folder, record.ref):
            yield registry.fetch(record.ref, folder)


def _tell(note: str) -> None:
    typer.echo(escape_unprintable(note), err=True)


def _format_row(record: Record) -> tuple[str, ...]:
    result = record.scorecard.result if record.scorecard else None
    quantization = "" if record.base.quantization == "none" else f" {record.base.quantization}"
    return (
        record.method,
        f"{record.base.id}{quantization}",
        f"{100 * result.accuracy.value:.1f} %" if result and result.accuracy else "-",
        f"{result.loss:.4f}" if result else "-",
        f"{sum(file.bytes for file in record.files.values()) / 1e6:.1f} MB",
        f"{record.created:%Y-%m-%d %H:%M}",
    )


def _to_plain(record: Record) -> dict[str, Any]:
    return record.model_dump(mode="json")


def _report(as_json: bool, record: Record, text: str) -> None:
    print_json(_to_plain(record)) if as_json else typer.echo(text)
