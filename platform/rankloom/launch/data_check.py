"""`check_data`: the data check of a trial or a study alone, in this process, without Ray and without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankloom.config import StudyConfig, TrialConfig, coerce, load
from rankloom.config.base import ConfigT, read_yaml
from rankloom.config.files import find_config
from rankloom.config.paths import resolve_paths
from rankloom.data.check import DataReport
from rankloom.data.preview import RowPreview
from rankloom.errors import ConfigError
from rankloom.launch.handed_over import use_trial_rows
from rankloom.launch.results import Result, render_html_table

if TYPE_CHECKING:
    from rankloom.data import Rows

NUM_BINS = 24
"""Bins of the histogram of lengths."""


class LengthBin(Result):
    """A bin of a histogram of rows' lengths."""

    low: int
    """Tokens of its shortest possible row."""
    high: int
    """Tokens of its longest possible row."""
    rows: int


class DataCheck(Result):
    """What a run would read: counts, warnings, and rows as the model sees them."""

    name: str
    """The trial's name, or the study's."""
    model: str
    """The base whose tokenizer and template render the rows."""
    sources: dict[str, str]
    """The split's name -> the source that the config names; a split without one is taken from `train`."""
    template: str
    """`chat template` or `plain`."""
    max_length: int
    """`data.max_length` in tokens."""
    report: DataReport
    """Counts of each split, prompts shared between splits, and the warnings."""
    lengths: dict[str, tuple[LengthBin, ...]]
    """Split -> histogram of its rows' lengths."""
    examples: dict[str, tuple[RowPreview, ...]]
    """Split -> rows, with the tokens that carry loss apart from those that do not."""
    digest: str
    """Hash of the training and validation rows' tokens and loss weights and of the labels, as origin.json has it."""

    def __repr__(self) -> str:
        rows = ", ".join(f"{split.rows:,} {name}" for name, split in self.report.splits.items())
        return f"DataCheck({self.name}: {self.report.format}, {rows} rows, {len(self.report.warnings)} warnings)"

    def _repr_html_(self) -> str:
        header = ("split", "rows", "tokens", "trained", "longest")
        rows = [
            (name, *(f"{count:,}" for count in (split.rows, split.tokens, split.trained_tokens, split.max_length)))
            for name, split in self.report.splits.items()
        ]
        return render_html_table(f"{self.name}, {self.report.format}", header, rows)


def check_data(
    config: TrialConfig | StudyConfig | str | Path | Mapping[str, Any], *, data: Any = None, num_examples: int = 3
) -> tuple[DataCheck, ...]:
    """Read, render and check the rows of a trial or a study, before a GPU hour is spent.

    It needs the base's tokenizer, not its weights, and starts no Ray. The rendered rows stay in the cache, where a run
    with these settings finds them.

    Args:
        config: A `TrialConfig`, a `StudyConfig`, a dict of the same settings, or the path of a YAML file with them.
        data: Rows in place of a trial's `data.train`, as for `rankloom.train`.
        num_examples: Rows of each split to show, spread evenly over it.

    Returns:
        One check for a trial. For a study one for each model and data set in its space.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The data is missing or malformed, or would train nothing.
        ModelError: The base's tokenizer can't be found.

    Examples:
        >>> import rankloom as rl
        >>> (check,) = rl.check_data({"name": "tickets", "data": {"train": "tickets.csv"}})
        >>> check.report.splits["train"].rows
        48
        >>> check.examples["train"][0].trained_tokens
        2
    """
    if num_examples < 0:
        raise ConfigError(f"num_examples={num_examples}: expected 0 or more")
    found = config if isinstance(config, (TrialConfig, StudyConfig)) else read_config(config)
    if isinstance(found, TrialConfig):
        trials = [use_trial_rows(found, data)]
    elif data is None:
        trials = list(_list_distinct(found))
    else:
        raise ConfigError("data: a study's space may name several data sets; give the rows in its config")
    return tuple(_check(resolve_paths(trial), found.name, num_examples) for trial in trials)


def read_config(given: str | Path | Mapping[str, Any], overrides: list[str] | None = None) -> TrialConfig | StudyConfig:
    """Return a trial or, where the settings have a `space`, a study."""
    tree = given if isinstance(given, Mapping) else read_yaml(find_config(str(given)))
    cls: type[TrialConfig | StudyConfig] = StudyConfig if "space" in tree else TrialConfig
    return _load(cls, given, overrides or [])


def _load(cls: type[ConfigT], given: str | Path | Mapping[str, Any], overrides: list[str]) -> ConfigT:
    return coerce(cls, given) if isinstance(given, Mapping) else load(cls, str(given), overrides)


def _list_distinct(study: StudyConfig) -> Iterator[TrialConfig]:
    """Yield a trial for each model, data set and retention set of a study."""
    seen = set()
    for trial in study.probe_trials():
        key = repr([trial.model, trial.data, trial.eval.retention])
        if key not in seen:
            seen.add(key)
            yield trial


def _check(trial: TrialConfig, name: str, num_examples: int) -> DataCheck:
    from rankloom.data import load_data
    from rankloom.data.conversation import uses_chat_template
    from rankloom.data.preview import preview_rows
    from rankloom.models import load_tokenizer
    from rankloom.training.resume_check import digest_data

    tokenizer = load_tokenizer(trial.model)
    task = load_data(trial.data, tokenizer, retention=trial.eval.retention)
    splits = {split: getattr(task, split) for split in task.report.splits}
    sources = {split: getattr(trial.data, split, trial.eval.retention) for split in splits}
    return DataCheck(
        name=name,
        model=trial.model.id,
        sources={split: source.path for split, source in sources.items() if source is not None},
        template="chat template" if uses_chat_template(trial.data, tokenizer, task.report.format) else "plain",
        max_length=trial.data.max_length,
        report=task.report,
        lengths={split: _count_lengths(rows) for split, rows in splits.items()},
        examples={split: preview_rows(rows, tokenizer, num_examples) for split, rows in splits.items()},
        digest=digest_data(task),
    )


def _count_lengths(rows: Rows) -> tuple[LengthBin, ...]:
    import numpy as np

    low, high = int(rows.lengths.min()), int(rows.lengths.max()) + 1
    width = -(-(high - low) // NUM_BINS)
    edges = np.arange(low, high + width, width)
    counts, _ = np.histogram(rows.lengths, bins=edges)
    return tuple(
        LengthBin(low=int(edge), high=int(edge) + width - 1, rows=int(count))
        for edge, count in zip(edges, counts, strict=False)
    )
