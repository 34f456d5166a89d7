"""`evaluate`: score an adapter on a trial's test rows, or on the tasks of other libraries, where it is served."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, overload

from rankloom.config import TrialConfig, parse
from rankloom.config.base import apply_overrides
from rankloom.config.files import is_config_file
from rankloom.config.model import ModelConfig
from rankloom.config.serve import ServeConfig
from rankloom.errors import AdapterNotFoundError, ConfigError, RankloomError, RegistryError
from rankloom.evals.own_metric import MetricFunction
from rankloom.events import OnEvent, PhaseStarted, WarningRaised
from rankloom.launch.evaluation import score_subject
from rankloom.launch.results import EvaluationResult, SuiteEvaluation
from rankloom.paths import get_registry_root
from rankloom.registry import Record, Registry
from rankloom.registry.scorecard import SuiteResult
from rankloom.suites.libraries import LIBRARIES, ServedModel, Suite, parse_suite


@overload
def evaluate(
    subject: str | Path | TrialConfig | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    data: Any = None,
    metric: MetricFunction | None = None,
    suites: None = None,
    url: None = None,
    limit: None = None,
    registry: str | None = None,
    on_event: OnEvent = ...,
) -> EvaluationResult: ...


@overload
def evaluate(
    subject: str,
    *,
    suites: Sequence[str],
    overrides: Sequence[str] = (),
    url: str | None = None,
    limit: int | None = None,
    registry: str | None = None,
    on_event: OnEvent = ...,
) -> SuiteEvaluation: ...


def evaluate(
    subject: str | Path | TrialConfig | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    data: Any = None,
    metric: MetricFunction | None = None,
    suites: Sequence[str] | None = None,
    url: str | None = None,
    limit: int | None = None,
    registry: str | None = None,
    on_event: OnEvent = lambda _: None,
) -> EvaluationResult | SuiteEvaluation:
    """Score an adapter beside its base on its trial's test rows, or on tasks of lm-eval and Inspect.

    Args:
        subject: An adapter of the registry (`tickets`, `tickets@3`, `tickets@champion`) or its folder; or a trial (a
            `TrialConfig`, a dict, or the path of a YAML file), whose untuned base is scored. With `url`, the model's
            name on that endpoint.
        overrides: Settings of the trial to change, such as `["data.test=new.csv", "eval.max_test_rows=500"]`; with
            suites, settings of the endpoint that serves the adapter meanwhile, such as `["replicas.gpus=1"]`.
        data: Rows to score on, in place of the trial's: a `datasets.Dataset`, a pandas DataFrame or a list of dicts.
        metric: A function of predictions, measured beside the loss (see `rankloom.evals.own_metric`).
        suites: Tasks to run in place of the test rows, such as `["lm-eval:gsm8k", "inspect:my_tasks.py@math"]`. Their
            scores are stored in the registry, beside the adapter's scorecard.
        url: An endpoint that serves the model already, with `/v1`; `$OPENAI_API_KEY` is its key, where it asks for one.
        limit: Rows of each task, at most; for a first look.
        registry: A folder or URL; None: `$RANKLOOM_REGISTRY`, else `~/rankloom/registry`.
        on_event: Called in this thread with every event.

    Returns:
        The measures: `result` is the adapter's (None for a base alone) and `base` the base's; or with suites, theirs.

    Raises:
        ConfigError: A setting is wrong, the adapter's record does not say which rows to score on, a suite's library is
            not installed, or the endpoint has no such model.
        AdapterNotFoundError: The registry has no such adapter.
        TrialError: A suite failed; those before it are stored.

    Examples:
        >>> import rankloom as rl
        >>> score = rl.evaluate("tickets@1", overrides=["eval.max_test_rows=100"])
        >>> score.result.loss < score.base.loss
        True
    """
    root = registry or get_registry_root()
    if suites is None:
        for name, value in (("url", url), ("limit", limit)):
            if value is not None:
                raise ConfigError(f"{name}: only with suites; name one, such as lm-eval:gsm8k")
        return score_subject(subject, overrides=overrides, data=data, metric=metric, registry=root, on_event=on_event)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: give at least 1, or leave it out for all rows")
    if data is not None or metric is not None:
        raise ConfigError("data and metric are for the trial's test rows; a suite has its own")
    if not isinstance(subject, str) or is_config_file(subject) or Path(subject).expanduser().is_dir():
        raise ConfigError(f"suites run on an adapter of the registry or a model of an endpoint, not on {subject!s:.80}")
    if url is not None and overrides:
        raise ConfigError(f"{overrides[0]}: an endpoint that runs already can't be changed; leave out url or this")
    parsed = [parse_suite(suite) for suite in suites]
    if not parsed:
        raise ConfigError("suites: name at least one, such as lm-eval:gsm8k")
    with _open_target(subject, url, overrides, root, on_event) as (target, record):
        results = []
        for suite in parsed:
            on_event(PhaseStarted("suite", f"{suite.name} on {target.model}"))
            result = _run(suite, target, limit)
            results.append(result)
            if record is not None:
                Registry(root).record_suite(record.ref, result)
    return SuiteEvaluation(model=target.model, adapter=None if record is None else record.ref, suites=tuple(results))


def _run(suite: Suite, target: ServedModel, limit: int | None) -> SuiteResult:
    outcome = suite.run(target, limit)
    return SuiteResult(
        suite=suite.name,
        library=LIBRARIES[suite.library].release,
        limit=limit,
        num_rows=outcome.num_rows,
        at=datetime.now(UTC),
        scores=outcome.scores,
    )


@contextmanager
def _open_target(
    subject: str, url: str | None, overrides: Sequence[str], root: str, on_event: OnEvent
) -> Iterator[tuple[ServedModel, Record | None]]:
    """Yield where the model is served, and its record if the registry has it; serve it for the while without a URL."""
    if url is not None:
        yield _find_target(url, subject, root, on_event)
        return
    from rankloom.deploy.run import serve

    ref = Registry(root).get(subject).ref
    settings = {"adapters": [ref], "registry": root, "port": 0}
    with serve(parse(ServeConfig, apply_overrides(settings, overrides), "serve"), on_event=on_event) as endpoint:
        yield _find_target(f"{endpoint.url}/v1", ref, root, on_event)


def _find_target(url: str, model: str, root: str, on_event: OnEvent) -> tuple[ServedModel, Record | None]:
    """Ask an endpoint about a model. Raises ConfigError where it does not answer, or has no such model."""
    url, key = url.rstrip("/"), os.environ.get("OPENAI_API_KEY") or "none"
    asked = urllib.request.Request(f"{url}/models/{model}", headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            about = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} does not serve {model!r}: {error.read(500).decode(errors='replace')}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"url: {url} does not answer as OpenAI's API does: {error}") from None
    record = _find_record(about.get("root") or model, root)
    if record is None:
        on_event(WarningRaised(f"{root} has no version that {url} serves as {model!r}: the scores are only returned"))
    tokenizer = None if record is None else _find_tokenizer(record)
    return ServedModel(url, model, key, about.get("max_model_len") or 2048, tokenizer), record


def _find_record(ref: str, root: str) -> Record | None:
    try:
        return Registry(root).get(ref)
    except (AdapterNotFoundError, RegistryError, ConfigError):
        return None  # the base, or a model of another registry


def _find_tokenizer(record: Record) -> str | None:
    """Return the folder of the base's tokenizer; None where it is not on this machine."""
    from rankloom.models.folder import locate_folder

    try:
        return str(locate_folder(ModelConfig(id=record.base.id), weights=False))
    except RankloomError:
        return None
