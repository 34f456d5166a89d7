"""`rankloom serve`: serve adapters behind one endpoint."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Annotated

import typer

from rankloom.cli.options import Json, Overrides, ServeFile
from rankloom.errors import ConfigError
from rankloom.events import Event, PhaseStarted


def serve(
    config: ServeFile,
    overrides: Overrides = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return, and leave it running on the cluster that RAY_ADDRESS names.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve adapters over one base, with OpenAI's API, until Ctrl-C.

    Ctrl-C lets the requests in flight finish first.

    Examples:

    rankloom serve shipped:serve/banking77.yaml

    rankloom serve serve.yaml adapters=bank@champion,faq port=9000 replicas.max=4
    """
    import rankloom as rl

    settings = rl.load(rl.ServeConfig, config, overrides or [])
    if detach and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("--detach: a local Ray ends with this command; set RAY_ADDRESS to a cluster's address")
    endpoint = rl.serve(settings, on_event=_show)
    about = {"url": endpoint.url, "name": settings.name}
    typer.echo(json.dumps(about) if as_json else f"ready at {endpoint.url}/v1")
    if detach:
        endpoint.detach()
        return
    with endpoint:
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        stopped.wait()
        typer.echo("stopping after the requests in flight", err=True)


def _show(event: Event) -> None:
    if isinstance(event, PhaseStarted):
        typer.echo(event.message, err=True)
