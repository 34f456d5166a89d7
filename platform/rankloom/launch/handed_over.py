"""A metric that Python code handed over: its name in a config, and where a study's processes find it.

That is a pickle in the study's own folder, which its own processes alone read; what a config or a record names is never
unpickled.
"""

from __future__ import annotations

from pathlib import Path

from rankloom.config import StudyConfig, TrialConfig, dump, parse
from rankloom.config.metric import HANDED_OVER, name_of
from rankloom.errors import ConfigError
from rankloom.evals.own_metric import MetricFunction, load_metric

METRIC = "metric.pkl"


def judged_by(trial: TrialConfig, metric: MetricFunction | None) -> TrialConfig:
    """Return the trial with `eval.metric` naming a function that was handed over; None changes nothing."""
    if metric is None:
        return trial
    tree = dump(trial)
    tree["eval"]["metric"] = name_of(metric)
    return parse(TrialConfig, tree)


def searched_by(study: StudyConfig, metric: MetricFunction | None) -> StudyConfig:
    """Return the study with `search.metric` naming a function that was handed over; None changes nothing."""
    if metric is None:
        return study
    tree = dump(study)
    tree["search"]["metric"] = name_of(metric)
    return parse(StudyConfig, tree)


def keep_metric(folder: Path, function: MetricFunction) -> None:
    """Write a function by value, so that a process without its module has it.

    Raises:
        ConfigError: it can't be pickled.
    """
    from ray import cloudpickle

    try:
        content = cloudpickle.dumps(function)
    except Exception as error:  # whatever the function refers to may refuse
        raise ConfigError(f"metric: {function!r} can't be sent to other processes: {error}") from None
    staged = folder / f".{METRIC}.staged"
    staged.write_bytes(content)
    staged.replace(folder / METRIC)


def study_metric(metric: str, folder: Path | None) -> MetricFunction | None:
    """Return a study's own metric; None where its metric is one of rankloom's.

    Raises:
        ConfigError: as `load_metric`.
    """
    if folder is None or not metric.startswith(HANDED_OVER) or not (folder / METRIC).is_file():
        return load_metric(metric)
    from ray import cloudpickle

    return load_metric(metric, cloudpickle.loads((folder / METRIC).read_bytes()))
