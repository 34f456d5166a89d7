"""`rankloom keys`: create, list and revoke an endpoint's API keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rankloom.cli.options import Json, print_json
from rankloom.paths import get_keys_file

app = typer.Typer(
    name="keys", no_args_is_help=True, help="Create, list and revoke an endpoint's API keys (auth.keys in its config)."
)

File = Annotated[
    Path,
    typer.Option(
        "--file", default_factory=get_keys_file, envvar="RANKLOOM_KEYS", show_default="~/rankloom/keys.json",
        help="The file with the keys' hashes.",
    ),
]  # fmt: skip


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The key's owner.")],
    file: File,
    admin: Annotated[
        bool, typer.Option("--admin", help="Let the key also load, unload and promote adapters, and read /metrics.")
    ] = False,
    requests: Annotated[int | None, typer.Option("--requests-per-minute", min=1, help="Unlimited by default.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens-per-minute", min=1, help="Unlimited by default.")] = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it once; only its hash is stored. A running endpoint accepts it immediately.

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
    """List the keys' ids, owners, roles and limits; the keys themselves are not stored.

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
def revoke(key_id: Annotated[str, typer.Argument(help="An id from `keys list`.", metavar="ID")], file: File) -> None:
    """Revoke a key. A running endpoint refuses it from then on.

    Example: rankloom keys revoke 0123456789ab
    """
    from rankloom.gateway.keys import KeyFile

    key = KeyFile(file).revoke(key_id)
    typer.echo(f"revoked {key.id} of {key.name}")
