"""`rankloom tune`: run a study, from its config to the winner in the registry."""

from __future__ import annotations

import typer

from rankloom.cli.options import INTERRUPTED, Json, Overrides, ResumeStudy, StudyFile, print_json


def tune(config: StudyFile, overrides: Overrides = None, resume: ResumeStudy = False, as_json: Json = False) -> None:
    """Search for the best trial: many train at once on one shared base.

    The best trials by validation are scored on the test rows and published: the winner under the study's name,
    each method's best under NAME-METHOD. After Ctrl-C, --resume continues the study.

    Examples:

    rankloom tune shipped:studies/quickstart.yaml

    rankloom tune study.yaml search.num_trials=32 trial.budget.steps=100 name=longer

    rankloom tune study.yaml --resume
    """
    import rankloom as rl
    from rankloom.cli.progress import interrupt_at_events
    from rankloom.cli.study_view import build_result_rows, format_result, show_study
    from rankloom.cli.tables import print_table

    study = rl.load(rl.StudyConfig, config, overrides or [])
    try:
        with show_study(on_stderr=as_json) as view, interrupt_at_events(view) as show:
            result = rl.tune(study, resume=resume, on_event=show)  # Ray Tune catches the first Ctrl-C itself
    except KeyboardInterrupt:  # before the search began, or the second Ctrl-C
        typer.echo("aborted; --resume continues from what was saved", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo()
        if result.status == "done":
            header, *rows = build_result_rows(result)
            print_table(header, rows)
            typer.echo()
        for line in format_result(result, config, overrides or []):
            typer.echo(line)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
