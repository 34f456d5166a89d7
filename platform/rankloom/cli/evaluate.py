"""`rankloom evaluate`: score a published adapter again, or a trial's untuned base."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.options import Json, Overrides, Root, print_json


def evaluate(
    subject: Annotated[
        str,
        typer.Argument(
            help="An adapter (name, name@3, name@alias or its folder), or a trial's YAML file for its untuned base.",
            metavar="ADAPTER|TRIAL.yaml",
        ),
    ],
    root: Root,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score an adapter beside its base, or the untuned base of a trial, on the trial's test rows.

    Examples:

    rankloom evaluate bank-intents-lora@champion eval.max_test_rows=500

    rankloom evaluate bank-intents-lora data.test=new-messages.csv

    rankloom evaluate bank-intents-lora eval.metric=my_metrics:f1

    rankloom evaluate shipped:trials/lora.yaml
    """
    import rankloom as rl
    from rankloom.cli.progress import show_run
    from rankloom.cli.tables import print_measures

    with show_run(on_stderr=as_json) as show:
        score = rl.evaluate(subject, overrides=overrides or [], registry=root, on_event=show)
    if as_json:
        print_json(score.to_dict())
    else:
        typer.echo()
        print_measures(score.result, score.base)
