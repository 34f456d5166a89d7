"""The libraries whose tasks a suite names, each behind one function: `check` before an endpoint starts, `run` on it.

Both are optional, and imported when a suite needs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankloom.errors import ConfigError, TrialError
from rankloom.registry.scorecard import SuiteScore

NUM_CONCURRENT = 16
"""Requests at a time."""


@dataclass(frozen=True)
class ServedModel:
    """A model of an endpoint that speaks OpenAI's protocol."""

    url: str
    """Its base URL, with `/v1`."""
    model: str
    key: str = field(repr=False)
    context: int
    """Tokens that a prompt and its completion may have."""
    tokenizer: str | None = None
    """A folder or hub id; None: not known here."""


@dataclass(frozen=True)
class Outcome:
    scores: tuple[SuiteScore, ...]
    num_rows: int


@dataclass(frozen=True)
class Library:
    """A library of tasks."""

    module: str
    packages: str
    """The arguments of `pip install`, its own package first."""
    run: Callable[[str, ServedModel, int | None], Outcome]
    """Run a task on at most this many rows of each."""

    @property
    def release(self) -> str:
        """Its name and version."""
        name = re.findall(r"[\w-]+", self.packages)[0]
        return f"{name} {version(name)}"


@dataclass(frozen=True)
class Suite:
    """A task of a library, such as `lm-eval:gsm8k`."""

    library: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.library}:{self.task}"

    def run(self, target: ServedModel, limit: int | None) -> Outcome:
        """Run it. Raises TrialError with the library's reason where it fails."""
        try:
            return LIBRARIES[self.library].run(self.task, target, limit)
        except (ConfigError, TrialError):
            raise
        except Exception as error:  # the libraries raise what their tasks raise
            raise TrialError(f"suite {self.name}: {type(error).__name__}: {error}") from error


def parse_suite(text: str) -> Suite:
    """Read a suite's name, and check what can be known before it runs.

    Raises:
        ConfigError: the name is wrong, its library is not installed, or its file is missing.
    """
    library, colon, task = text.partition(":")
    if not colon or not task or library not in LIBRARIES:
        allowed = " or ".join(f"{name}:TASK" for name in LIBRARIES)
        raise ConfigError(f"suite {text!r}: give {allowed}, where TASK is a name or a file")
    known = LIBRARIES[library]
    if find_spec(known.module) is None:
        raise ConfigError(f"suite {text!r} needs {library}: pip install {known.packages}")
    file = Path(task.partition("@")[0]).expanduser()
    if file.suffix in (".py", ".yaml"):
        if not file.is_file():
            raise ConfigError(f"suite {text!r}: no file {str(file)!r}")
        task = str(file.absolute()) + task[len(task.partition("@")[0]) :]
    return Suite(library, task)


def _run_lm_eval(task: str, target: ServedModel, limit: int | None) -> Outcome:
    """Run a task of lm-eval's on plain prompts, as `lm_eval --model local-completions` does."""
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import check_remote_tokenizer_support

    manager = TaskManager(include_defaults=not task.endswith(".yaml"))  # they are 14,000 files
    backend = "huggingface" if target.tokenizer else "remote"
    if backend == "remote" and not check_remote_tokenizer_support(f"{target.url}/completions", auth_token=target.key):
        backend = "none"
        kinds = {each.OUTPUT_TYPE for each in manager.load([task])["tasks"].values()}
        if kinds != {"generate_until"}:
            raise ConfigError(
                f"suite lm-eval:{task} scores given texts, which needs the model's tokenizer: the endpoint has no "
                f"/tokenizer_info, and the base is not on this machine"
            )
    model = LocalCompletionsAPI(  # made here: lm-eval logs the arguments of a model that it makes, with the key
        model=target.model,
        base_url=f"{target.url}/completions",
        header={"Authorization": f"Bearer {target.key}"},
        auth_token=target.key,
        num_concurrent=NUM_CONCURRENT,
        max_length=target.context,
        tokenizer=target.tokenizer,
        tokenizer_backend=backend,
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        log_samples=False,
    )
    shown: dict[str, dict[str, Any]] = results.get("groups") or results["results"]
    scores = [
        SuiteScore(task=name, metric=_name_metric(key), value=value, stderr=_find_stderr(measures, key))
        for name, measures in shown.items()
        for key, value in measures.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    return Outcome(tuple(scores), sum(each["effective"] for each in results["n-samples"].values()))


def _name_metric(key: str) -> str:
    """Return `exact_match`, or `exact_match (strict-match)` where a filter chose the answer."""
    metric, _, chosen = key.partition(",")
    return metric if chosen == "none" else f"{metric} ({chosen})"


def _find_stderr(measures: dict[str, Any], key: str) -> float | None:
    value = measures.get(key.replace(",", "_stderr,", 1))
    return float(value) if isinstance(value, int | float) else None  # lm-eval writes "N/A" for none


def _run_inspect(task: str, target: ServedModel, limit: int | None) -> Outcome:
    """Run a task of Inspect's on conversations."""
    import inspect_ai
    from inspect_ai.model import get_model

    model = get_model(
        f"openai-api/rankloom/{target.model}",
        base_url=target.url,
        api_key=target.key,
        config=inspect_ai.model.GenerateConfig(max_connections=NUM_CONCURRENT),
    )
    with TemporaryDirectory(prefix="rankloom-") as logs, redirect_stdout(None):
        (log,) = inspect_ai.eval(task, model=model, limit=limit, log_dir=logs, display="none")
    if log.status != "success" or log.results is None:
        raise TrialError(f"suite inspect:{task}: {log.error.message if log.error else log.status}")
    scores = [
        SuiteScore(task=log.eval.task, metric=f"{name} ({score.name})", value=metric.value, stderr=_find_error(score))
        for score in log.results.scores
        for name, metric in score.metrics.items()
        if name != "stderr"
    ]
    return Outcome(tuple(scores), log.results.completed_samples)


def _find_error(score: Any) -> float | None:
    """Return the standard error of a score, where it has one of one metric."""
    stderr = score.metrics.get("stderr")
    return float(stderr.value) if stderr is not None and len(score.metrics) == 2 else None


LIBRARIES = {
    "lm-eval": Library("lm_eval", "'lm-eval[api]>=0.4.13'", _run_lm_eval),
    "inspect": Library("inspect_ai", "'inspect-ai>=0.3.285' openai", _run_inspect),
}
