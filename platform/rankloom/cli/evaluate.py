"""`rankloom evaluate`: score a published adapter again, a trial's untuned base, or a served model on suites."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.options import Json, Overrides, Root, print_json


def evaluate(
    subject: Annotated[
        str,
        typer.Argument(
            help="An adapter (name, name@3, name@alias or its folder), or a trial's YAML file for its untuned base. "
            "With --url: a model of that endpoint.",
            metavar="ADAPTER|TRIAL.yaml",
        ),
    ],
    root: Root,
    overrides: Overrides = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="A task to run in place of the test rows: lm-eval:TASK or inspect:TASK, a name or a file; repeatable.",
            metavar="LIBRARY:TASK",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="For suites: an endpoint that serves it already, with /v1; OPENAI_API_KEY is its key."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For suites: rows of each task, at most.")] = None,
    as_json: Json = False,
) -> None:
    """Score an adapter beside its base, or the untuned base of a trial, on the trial's test rows, or on suites.

    Examples:

    rankloom evaluate bank-intents-lora@champion eval.max_test_rows=500

    rankloom evaluate bank-intents-lora data.test=new-messages.csv

    rankloom evaluate bank-intents-lora eval.metric=my_metrics:f1

    rankloom evaluate shipped:trials/lora.yaml

    rankloom evaluate bank-intents-lora --suite lm-eval:gsm8k --limit 100
    """
    import rankloom as rl
    from rankloom.cli.progress import show_run
    from rankloom.cli.tables import print_measures, print_table
    from rankloom.registry.card import list_suite_rows

    score: rl.EvaluationResult | rl.SuiteEvaluation
    with show_run(on_stderr=as_json) as show:
        if suite:
            score = rl.evaluate(
                subject, suites=suite, url=url, limit=limit, overrides=overrides or [], registry=root, on_event=show
            )
        else:
            for name, value in (("--url", url), ("--limit", limit)):
                if value is not None:
                    raise rl.ConfigError(f"{name}: only with --suite; name one, such as lm-eval:gsm8k")
            score = rl.evaluate(subject, overrides=overrides or [], registry=root, on_event=show)
    if as_json:
        print_json(score.to_dict())
        return
    typer.echo()
    if isinstance(score, rl.SuiteEvaluation):
        print_table(("task", "score", ""), list_suite_rows(score.suites))
    else:
        print_measures(score.result, score.base)
