"""Objects from Python code: data becomes a file that the config names, a metric becomes a name in the config.

A study's processes unpickle the metric from the study's own folder, which only they read. A path in a config or a
record is never unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from rankloom.config import StudyConfig, TrialConfig, dump, parse
from rankloom.config.metric import HANDED_OVER, name_function
from rankloom.config.paths import resolve_path
from rankloom.errors import ConfigError, DataError
from rankloom.evals.own_metric import MetricFunction, load_metric

METRIC, DATA = "metric.pkl", "data"
Config = TypeVar("Config", TrialConfig, StudyConfig)


def use_trial_metric(trial: TrialConfig, metric: MetricFunction | None) -> TrialConfig:
    """Return the trial with `eval.metric` naming a function that was handed over; None changes nothing."""
    return _name_metric(trial, "eval", metric)


def use_study_metric(study: StudyConfig, metric: MetricFunction | None) -> StudyConfig:
    """Return the study with `search.metric` naming a function that was handed over; None changes nothing."""
    return _name_metric(study, "search", metric)


def _name_metric(config: Config, section: str, metric: MetricFunction | None) -> Config:
    if metric is None:
        return config
    tree = dump(config)
    tree[section]["metric"] = name_function(metric)
    return parse(type(config), tree)


def use_trial_rows(trial: TrialConfig, data: Any, role: str = "train") -> TrialConfig:
    """Return the trial on rows that were handed over; None changes nothing.

    The rows are written to `<output.root>/data` under names made from their contents, where workers and a resumed run
    find them.

    Args:
        data: a `datasets.Dataset`, a pandas DataFrame or a list of dicts, or a mapping from train, validation and test
            to these.
        role: what rows without a mapping are.
    """
    if data is None:
        return trial
    tree = dump(trial)
    tree["data"] |= {role: {"path": path} for role, path in write_rows(data, trial.output.root, role).items()}
    return parse(TrialConfig, tree)


def use_study_rows(study: StudyConfig, data: Any) -> StudyConfig:
    """Return the study on rows that were handed over; see `use_trial_rows`.

    Raises:
        ConfigError: the space or a warm start names other rows.
    """
    if data is None:
        return study
    paths = write_rows(data, study.baseline.output.root)
    named = [*study.space, *study.search.warm_start]
    if clashing := [role for role in paths for fragment in named if role in (fragment.get("data") or {})]:
        raise ConfigError(f"data.{clashing[0]}: the study's space names rows too; give rows in only one place")
    tree = dump(study)
    given = {role: {"path": path} for role, path in paths.items()}
    tree["trial"] = tree["trial"] | {"data": (tree["trial"].get("data") or {}) | given}
    return parse(StudyConfig, tree)


def write_rows(data: Any, root: str, role: str = "train") -> dict[str, str]:
    """Write rows that were handed over below a root, and return each role's path.

    Args:
        role: the role of rows without a mapping.
    """
    from rankloom.data.from_python import write_rows_files
    from rankloom.registry.storage import open_storage

    files, folder = write_rows_files(data, role), f"{resolve_path(root).rstrip('/')}/{DATA}"
    try:
        if "://" not in folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        storage = open_storage(folder)
        for file in files.values():
            if not storage.exist([file.name])[0]:
                storage.write(file.name, file.content)
    except OSError as error:
        raise DataError(f"data: {folder} can't be written: {error}; make room, or set output.root") from None
    return {key: f"{folder}/{file.name}" for key, file in files.items()}


def keep_metric(folder: Path, function: MetricFunction) -> None:
    """Write a function by value, so that a process without its module has it.

    Raises:
        ConfigError: it can't be pickled.
    """
    from ray import cloudpickle

    try:
        content = cloudpickle.dumps(function)
    except Exception as error:  # whatever the function refers to may fail to pickle
        raise ConfigError(f"metric: {function!r} can't be sent to other processes: {error}") from None
    staged = folder / f".{METRIC}.staged"
    staged.write_bytes(content)
    staged.replace(folder / METRIC)


def load_study_metric(metric: str, folder: Path | None) -> MetricFunction | None:
    """Return a study's own metric; None where its metric is one of rankloom's.

    Raises:
        ConfigError: as `load_metric`.
    """
    if folder is None or not metric.startswith(HANDED_OVER) or not (folder / METRIC).is_file():
        return load_metric(metric)
    from ray import cloudpickle

    return load_metric(metric, cloudpickle.loads((folder / METRIC).read_bytes()))
