"""`rankloom train`: train one trial, from its config to a version in the registry."""

from __future__ import annotations

import typer

from rankloom.cli.options import INTERRUPTED, Json, Overrides, ResumeRun, TrialFile, print_json


def train(config: TrialFile, overrides: Overrides = None, resume: ResumeRun = False, as_json: Json = False) -> None:
    """Train one trial, score it beside its base, and publish the adapter.

    The first Ctrl-C stops after the current step with a checkpoint, the second stops at once; --resume continues.

    Examples:

    rankloom train shipped:trials/lora.yaml

    rankloom train trial.yaml method.rank=8 optim.learning_rate=2e-4 name=rank8

    rankloom train trial.yaml --resume
    """
    import rankloom as rl
    from rankloom.cli.progress import show_run, stop_on_interrupt
    from rankloom.cli.tables import list_next_steps, print_scorecard

    trial = rl.load(rl.TrialConfig, config, overrides or [])
    with show_run(on_stderr=as_json) as show, stop_on_interrupt() as stop:
        result = rl.train(trial, resume=resume, on_event=show, stop=stop)
    if as_json:
        print_json(result.to_dict())
    else:
        if result.scorecard is not None:
            typer.echo()
            print_scorecard(result.scorecard)
            typer.echo()
        for line in list_next_steps(result):
            typer.echo(line)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
