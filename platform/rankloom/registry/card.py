"""The model card of a published folder, and the scorecard as rows of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from rankloom.config.printable import escape_unprintable
from rankloom.registry.record import Record
from rankloom.registry.scorecard import Measures, MetricValue, Proportion, Scorecard, SuiteResult

_QUANTIZED = {
    "none": "",
    "int8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"{double})',
}


def render_model_card(record: Record) -> str:
    """Return the card as Markdown with the front matter that the Hugging Face hub reads."""
    header: dict[str, object] = {"library_name": "peft"}
    if _is_hub_id(record.base.id):
        header["base_model"] = record.base.id
    header["tags"] = sorted({"rankloom", "base_model:adapter", record.method})
    quantized = "" if record.base.quantization == "none" else f", quantised to {record.base.quantization}"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {record.name}, version {record.version}",
        f"A low-rank adapter for `{_escape_cell(record.base.id)}`{quantized}, made with method "
        f"`{_escape_cell(record.method)}` ({_SERVABLE[record.servable]}) on {record.created:%Y-%m-%d}. "
        f"`record.json` has its whole configuration.",
    ]
    if record.scorecard:
        rows = ["| | this adapter | base |", "|---|---|---|"]
        rows += [f"| {' | '.join(map(_escape_cell, row))} |" for row in list_scorecard_rows(record.scorecard)]
        parts += ["## Scorecard", "\n".join(rows)]
    parts += ["## Load it with PEFT", _render_snippet(record)]
    return "\n\n".join(parts) + "\n"


def _escape_cell(text: str) -> str:
    """Return text that can't end a cell of a Markdown table or a code span."""
    return escape_unprintable(text).replace("|", "\\|").replace("`", "'")


def list_scorecard_rows(scorecard: Scorecard) -> list[tuple[str, str, str]]:
    """Return (measure, this adapter's value, the base's value) for each measure that was taken."""
    cut = scorecard.extraction
    rows = list_measure_rows(scorecard.result, scorecard.base)
    if cut:
        rows.append((f"energy kept at rank {cut.rank}", f"{100 * cut.energy:.1f} %", ""))
        rows.append(("loss of the trained weights", f"{cut.trained.loss:.4f}", ""))
        if cut.trained.accuracy:
            rows.append(("accuracy of the trained weights", _format_proportion(cut.trained.accuracy), ""))
    rows += [
        ("trainable parameters", f"{scorecard.trainable_parameters:,}", ""),
        ("adapter size", _format_megabytes(scorecard.adapter_bytes), ""),
        ("peak memory", _format_megabytes(scorecard.peak_memory_bytes), ""),
        ("steps", f"{scorecard.steps:,}", ""),
        ("training tokens", f"{scorecard.train_tokens:,}", ""),
        ("training time", f"{scorecard.train_s:.0f} s on {scorecard.device}", ""),
        ("training speed", f"{scorecard.tokens_per_s:.0f} tokens/s", ""),
    ]
    return rows


def list_suite_rows(suites: Iterable[SuiteResult]) -> list[tuple[str, str, str]]:
    """Return (task and metric, value with its standard error, library and rows) for each score."""
    return [
        (
            f"{score.task}: {score.metric}",
            f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}"),
            f"{result.library}, {result.num_rows} rows",
        )
        for result in suites
        for score in result.scores
    ]


def list_measure_rows(result: Measures, base: Measures | None) -> list[tuple[str, str, str]]:
    """Return (measure, the result's value, the base's value) for each measure of the result."""
    return [
        (label, form(value), _format_base_value(base, field))
        for field, (label, form) in _MEASURES.items()
        if (value := getattr(result, field)) is not None
    ]


def _format_proportion(share: Proportion) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _format_metric(metric: MetricValue) -> str:
    interval = "" if metric.low is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
    return f"{metric.value:.4g}{interval} ({metric.name})"


def _format_megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


_MEASURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "num_rows": ("test rows", str),
    "loss": ("loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "accuracy": ("accuracy [95 %]", _format_proportion),
    "macro_f1": ("macro F1", "{:.3f}".format),
    "exact_match": ("exact match [95 %]", _format_proportion),
    "metric": ("own metric [95 %]", _format_metric),
    "retention_loss": ("retention loss", "{:.4f}".format),
    "latency_ms": ("decode latency, ms per token", "{:.1f}".format),
    "generated_tokens_per_s": ("generation, tokens/s", "{:.0f}".format),
}
_SERVABLE = {
    "itself": "the trained adapter itself",
    "rank pattern": "converted exactly to LoRA with a rank for each layer",
    "extracted": "cut from the trained weights by truncated SVD",
}


def _format_base_value(base: Measures | None, field: str) -> str:
    value = getattr(base, field) if base else None
    return "" if value is None else _MEASURES[field][1](value)


def _is_hub_id(base: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", base)) and not Path(base).exists()


def _render_snippet(record: Record) -> str:
    base = record.base.id if _is_hub_id(record.base.id) else "path/to/the/base"
    comment = "" if base == record.base.id else f"  # {record.base.id!r}, with the fingerprint in record.json"
    quantization = record.trial.get("quantization")
    double = isinstance(quantization, dict) and quantization.get("double") is True
    options = _QUANTIZED[record.base.quantization].format(double=", bnb_4bit_use_double_quant=True" if double else "")
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if options else "")
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {imports}\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r}{options}){comment}\n"
        f'model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()\n'
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})\n```"
    )
