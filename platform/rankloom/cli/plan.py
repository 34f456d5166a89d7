"""`rankloom plan`: what a run will take, before it starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rankloom.cli.options import Json, Overrides, print_json

if TYPE_CHECKING:
    from rankloom.planning.forecast import MethodPlan
    from rankloom.planning.plan import Plan

CONFIG = "A trial's, a study's or a comparison's YAML file, or shipped:trials/lora.yaml."
HEADER = (
    "method", "trains", "weights", "gradients", "optimiser", "activations", "logits", "peak", "fits", "batch",
    "members", "tokens/s", "time", "cost",
)  # fmt: skip


def plan(
    config: Annotated[str, typer.Argument(help=CONFIG, metavar="CONFIG.yaml")],
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a device, such as 16GB; else what is free here.")
    ] = None,
    prefer: Annotated[
        Literal["accuracy", "memory", "speed"] | None, typer.Option(help="Recommend a method that fits.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Devices that share a batch.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one device for an hour.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the speed here, in about ten seconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a run will take, without weights and without Ray: memory by part for each method, time and cost.

    The config's own methods come first, then the other recipes with its settings. Bytes are of one worker.

    Examples:

    rankloom plan shipped:trials/lora.yaml

    rankloom plan trial.yaml model=Qwen/Qwen3-0.6B compute.device=cuda --memory 16GB --prefer accuracy

    rankloom plan trial.yaml --calibrate --price 2.5

    rankloom plan study.yaml --devices 4 --json
    """
    with _pause_collector():
        import rankloom as rl
        from rankloom.planning.plan import read_config

        found = read_config(config, overrides or [])
        planned = rl.plan(
            found, num_workers=devices, memory=memory, prefer=prefer, price_per_hour=price, calibrate=calibrate
        )
    if as_json:
        print_json(planned.to_dict())
    else:
        _print(planned)


@contextmanager
def _pause_collector() -> Iterator[None]:
    """Keep the garbage collector from half a million objects of torch and transformers, a fifth of a plan's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _print(planned: Plan) -> None:
    from rankloom.cli.tables import print_table
    from rankloom.planning.words import format_count, format_plan

    for line in format_plan(planned):
        typer.echo(line)
    parts = ", ".join(f"{name} {format_count(count)}" for name, count in planned.parameters.items())
    typer.echo(f"parts   {parts}")
    rows = planned.rows
    seen = "read" if rows.are_read else "not read here, so each counts as data.max_length tokens that all carry loss"
    typer.echo(f"rows    {seen}; longest {rows.longest} tokens, largest batch {rows.batch_tokens:,} tokens\n")
    print_table(HEADER, [_format_row(each) for each in planned.methods])
    if (found := planned.recommendation) is not None:
        typer.echo(f"\ntake    {found.label or 'none'}: {'; '.join(found.reasons)}")
        for row in found.rows:
            typer.echo(f"        {row}")


def _format_row(method: MethodPlan) -> tuple[str, ...]:
    from rankloom.planning.words import format_count, format_seconds
    from rankloom.training.memory_plan import format_gb

    memory = method.memory
    sizes = (
        memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.peak
    )  # fmt: skip
    return (
        method.label,
        format_count(method.trained),
        *(format_gb(size) for size in sizes),
        {None: "", True: "yes", False: "no"}[method.fits],
        "" if method.largest_batch is None else str(method.largest_batch),
        "" if method.members is None else str(method.members),
        "" if method.speed is None else f"{method.speed.tokens_per_s:.3g}",
        "" if method.seconds is None else format_seconds(method.seconds),
        "" if method.cost is None else f"{method.cost:.2f}",
    )
