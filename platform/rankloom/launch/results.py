"""Results of a training or an evaluation, for Python and notebooks; `--json` prints `to_dict`.

A study's result is `rankloom.search.results`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rankloom.registry.card import list_measure_rows, list_scorecard_rows, list_suite_rows
from rankloom.registry.scorecard import Measures, Scorecard, SuiteResult


class Result(BaseModel):
    """A frozen result with a short `repr` and a table for notebooks."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, as `--json` prints it, without fields that were not set."""
        return self.model_dump(mode="json", by_alias=True, include=self.model_fields_set)

    def __str__(self) -> str:
        return repr(self)


class TrialResult(Result):
    """A trained trial: its scorecard, and where its adapter is."""

    status: Literal["done", "interrupted"]
    """interrupted: it was stopped; train again with `resume=True`."""
    name: str
    """The trial's name."""
    steps: int
    """Optimiser steps made."""
    scorecard: Scorecard | None = None
    """The measures on the test rows, beside the untuned base's."""
    memory_bytes: int | None = None
    """Bytes of the base's weights, quantised as configured, with the adapter."""
    version: int | None = None
    """The adapter's version in the registry."""
    registry: str | None = None
    """The registry's folder or URL."""
    folder: str | None = Field(default=None, alias="adapter")
    """The adapter's folder in the registry; in JSON it is called `adapter`."""
    run: str
    """The run's folder: checkpoints, TensorBoard's curves, events.jsonl."""

    @property
    def adapter(self) -> str | None:
        """The published version, such as `tickets@1`; None where nothing was published."""
        return None if self.version is None else f"{self.name}@{self.version}"

    def __repr__(self) -> str:
        facts = [self.status, f"{self.steps} steps"]
        if self.scorecard is not None:
            facts.append(summarize(self.scorecard.result, self.scorecard.base))
        return f"TrialResult({self.adapter or self.name}: {', '.join(facts)})"

    def _repr_html_(self) -> str:
        rows = list_scorecard_rows(self.scorecard) if self.scorecard is not None else []
        return render_html_table(f"{self.adapter or self.name}, {self.status}", ("", "adapter", "base"), rows)


class EvaluationResult(Result):
    """An adapter's measures on the test rows beside its base's, or the base's alone."""

    status: Literal["done"] = "done"
    name: str
    """The name of the trial whose data and measures these are."""
    result: Measures | None
    """The adapter's measures; None: the base alone was scored."""
    base: Measures
    """The untuned base's measures."""
    adapter: str | None = None
    """The adapter that was scored, with its version, or its folder."""

    def __repr__(self) -> str:
        subject = self.adapter or f"the base of {self.name}"
        measures = summarize(self.base, None) if self.result is None else summarize(self.result, self.base)
        return f"EvaluationResult({subject}: {measures})"

    def _repr_html_(self) -> str:
        if self.result is None:
            rows = [row[:2] for row in list_measure_rows(self.base, None)]
            return render_html_table(f"the base of {self.name}", ("", "base"), rows)
        return render_html_table(
            self.adapter or self.name, ("", "adapter", "base"), list_measure_rows(self.result, self.base)
        )


class SuiteEvaluation(Result):
    """A served model's scores on tasks of other libraries."""

    status: Literal["done"] = "done"
    model: str
    """Its name on the endpoint."""
    adapter: str | None
    """Its version, under which the registry has the scores; None: it is not in the registry."""
    suites: tuple[SuiteResult, ...]

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def __repr__(self) -> str:
        scores = [f"{score.task} {score.metric} {score.value:.4g}" for each in self.suites for score in each.scores]
        return f"SuiteEvaluation({self.adapter or self.model}: {', '.join(scores)})"

    def _repr_html_(self) -> str:
        return render_html_table(self.adapter or self.model, ("", "score", ""), list_suite_rows(self.suites))


def summarize(result: Measures, base: Measures | None) -> str:
    """Return a result's loss and accuracy as short text, beside the base's."""
    words = []
    if result.metric is not None:
        beside = f" (base {base.metric.value:.4g})" if base is not None and base.metric is not None else ""
        words.append(f"{result.metric.name} {result.metric.value:.4g}{beside}")
    for name in ("accuracy", "exact_match"):
        if share := getattr(result, name):
            other = base and getattr(base, name)
            beside = f" (base {100 * other.value:.1f} %)" if other else ""
            words.append(f"{name.replace('_', ' ')} {100 * share.value:.1f} %{beside}")
            break
    return ", ".join([*words, f"loss {result.loss:.4f}" + (f" (base {base.loss:.4f})" if base else "")])


def render_html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a small table for a notebook; every text is escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = f"<caption>{escape(caption)}</caption><thead>{line(header, 'th')}</thead>"
    return f"<table>{head}<tbody>{body}</tbody></table>"
