"""`rankloom keys`: who may use an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rankloom.cli.options import Json, print_json
from rankloom.paths import keys_file

app = typer.Typer(
    name="keys", no_args_is_help=True, help="Make, list and revoke an endpoint's API keys (auth.keys in its config)."
)

File = Annotated[
    Path,
    typer.Option(
        "--file", default_factory=keys_file, envvar="RANKLOOM_KEYS", show_default="~/rankloom/keys.json",
        help="Where the keys' hashes are.",
    ),
]  # fmt: skip


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    file: File,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may also load and unload adapters, and see /metrics.")
    ] = False,
    requests: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    tokens: Annotated[int | None, typer.Option("--tokens-per-minute", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once; only its hash is kept. A running endpoint knows it at once.

    Example: rankloom keys create ann --requests-per-minute 60
    """
    from rankloom.gateway.keys import KeyFile

    key, kept = KeyFile(file).create(
        name, "admin" if admin else "user", requests_per_minute=requests, tokens_per_minute=tokens
    )
    if as_json:
        typer.echo(json.dumps({"key": key} | kept.model_dump(mode="json", exclude={"sha256"})))
        return
    typer.echo(f"key {kept.id} of {name} is in {file}; serve with auth.keys={file}", err=True)
    typer.echo(key)


@app.command("list")
def list_keys(file: File, as_json: Json = False) -> None:
    """List the keys: whose they are and what they may use, not the keys themselves.

    Example: rankloom keys list
    """
    from rankloom.cli.tables import print_table
    from rankloom.gateway.keys import KeyFile

    keys = [key.model_dump(mode="json", exclude={"sha256"}) for key in KeyFile(file).list()]
    if as_json:
        print_json(keys)
        return
    header = ("id", "name", "role", "requests_per_minute", "tokens_per_minute", "created")
    print_table(header, [[str(key[column] if key[column] is not None else "-") for column in header] for key in keys])


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="As `keys list` tells it.", metavar="ID")], file: File) -> None:
    """Take a key away. A running endpoint refuses it from then on.

    Example: rankloom keys revoke 0123456789ab
    """
    from rankloom.gateway.keys import KeyFile

    key = KeyFile(file).revoke(key_id)
    typer.echo(f"revoked {key.id} of {key.name}")
