"""`load_data` turns a data config into tokenised splits, cached on disk; `check_heads` reads only the first rows.

The cache's key covers the sources' contents, the tokenizer and the settings. An entry is written to a temporary folder
and renamed into place, checked against its own hash when it is read, and rebuilt if it is broken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from rankloom.config.base import dump
from rankloom.config.data import OPTIONAL, DataConfig, Source
from rankloom.data.check import DataReport, Part, build_report, check_usable, gather
from rankloom.data.render import Renderer
from rankloom.data.rows import FEATURES, Rows, store
from rankloom.data.sources import (
    FIELDS,
    Located,
    Role,
    explain,
    find_unread_columns,
    locate,
    pick_columns,
    resolve_sources,
)
from rankloom.data.split import split_off
from rankloom.errors import ConfigError, DataError
from rankloom.paths import get_cache_dir

FORMAT_VERSION = 3
"""Increase it with every change of the output for equal input, so that older cache entries are not used."""
PARALLEL_FROM = 50_000
"""Number of rows from which rendering in several processes is faster."""

RENDERED = datasets.Features(
    {
        **FEATURES,
        "prompt_digest": datasets.Value("string"),
        "row_digest": datasets.Value("string"),
        "preview": datasets.Value("string"),
        "skipped_turns": datasets.Value("int32"),
        "notes": datasets.Value("string"),
        "chunk": datasets.Value("int32"),
        "status": datasets.Value("int8"),
        "source_row": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class TaskData:
    """The splits of one task."""

    train: Rows
    validation: Rows
    test: Rows
    retention: Rows | None
    labels: dict[str, list[int]] | None
    """Label -> the token ids of its completion with the end of the turn; None unless the format is classification."""
    fingerprint: str
    """Hash of the splits' tokens and labels, equal on every machine."""
    report: DataReport


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, retention: Source | None = None) -> TaskData:
    """Read, render, split and check all sources, or open the cached result.

    Args:
        retention: a second data set, rendered by its own columns without `config.columns` and `config.instruction`.

    Raises:
        DataError: a source is missing, malformed or would train nothing.
        ConfigError: the settings contradict each other.
    """
    with _silence():
        located = {role: locate(source, role) for role, source in resolve_sources(config, retention).items()}
        key = _make_key(config, tokenizer, located)
        folder = get_cache_dir() / "tokens" / key
        if cached := _open(folder):
            return cached
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # the first worker of a machine renders, the others wait
                return _open(folder) or _make(folder, config, tokenizer, located)
        except OSError as error:
            raise DataError(
                f"the token cache {folder} can't be written: {explain(error)}; set RANKLOOM_CACHE"
            ) from error


def check_heads(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, retention: Source | None = None, num_rows: int
) -> bool:
    """Read and render the first rows of each source, as `load_data` would.

    Returns:
        True if these rows prove that each source can be used; False if only all rows can.

    Raises:
        DataError, ConfigError: as in `load_data`, for problems that no later row can cure.
    """
    with _silence(), tempfile.TemporaryDirectory() as scratch:
        located = {role: locate(source, role) for role, source in resolve_sources(config, retention).items()}
        heads: dict[Role, datasets.Dataset] = {}
        for role, source in located.items():
            head = source.try_read_head(num_rows)
            if head is None or (role != "retention" and not _has_optional(head, config)):
                return False
            heads[role] = head
        parts, *_ = _render_all(config, tokenizer, located, Path(scratch), heads)
        return all(part.trained_tokens for part in parts.values())


def _has_optional(head: datasets.Dataset, config: DataConfig) -> bool:
    """Return whether `head` has the optional columns of `config.columns`, which only later rows of JSON may have."""
    optional = {role for roles in OPTIONAL.values() for role in roles}
    return all(name in head.column_names for role, name in config.columns.items() if role in optional)


def _make(
    folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase, located: Mapping[Role, Located]
) -> TaskData:
    """Render everything into a temporary folder and rename it into place."""
    shutil.rmtree(folder, ignore_errors=True)  # it exists only if it is broken
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".staged-"))
    try:
        scratch = staged / "scratch"
        scratch.mkdir()
        parts, format, labels = _make_parts(config, tokenizer, located, scratch)
        report = build_report(parts, format, labels, config.max_length)
        rows = {name: store(part.rendered, part.kept, staged / name) for name, part in parts.items()}
        meta = {
            "digests": {name: split.digest() for name, split in rows.items()},
            "labels": labels,
            "report": report.to_dict(),
        }
        (staged / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        shutil.rmtree(scratch)
        staged.chmod(0o755)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    made = _open(folder)
    if made is None:
        raise DataError(f"the token cache {folder} does not read back what was written; check the disk")
    return made


def _open(folder: Path) -> TaskData | None:
    """Return a cache entry, or None if it is missing or broken."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows = {name: Rows.open(folder / name) for name in meta["digests"]}
        if any(rows[name].digest() != digest for name, digest in meta["digests"].items()):
            return None
        report = DataReport.model_validate(meta["report"])
    except Exception:  # the Arrow and JSON readers can raise anything for a damaged file; render again
        return None
    labels = meta["labels"]
    identity = json.dumps([meta["digests"], labels], sort_keys=True)
    return TaskData(
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        retention=rows.get("retention"),
        labels=labels,
        fingerprint=f"sha256:{hashlib.sha256(identity.encode()).hexdigest()}",
        report=report,
    )


def _render_all(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    located: Mapping[Role, Located],
    scratch: Path,
    heads: Mapping[Role, datasets.Dataset] | None = None,
) -> tuple[dict[str, Part], str, dict[str, list[int]] | None]:
    """Return each source's rendered rows, the format, and the labels.

    Args:
        heads: the first rows of each source, to render instead of all; they need not be usable or show all labels.
    """
    format: str = config.format
    labels = None
    parts: dict[str, Part] = {}
    for role, source in located.items():  # train comes first: it determines the format and the labels
        own, known = (config, labels) if role != "retention" else (config.model_copy(update=_RETENTION), None)
        place = scratch / role
        place.mkdir()
        wanted = own.format if role == "retention" else format
        rows = source.read(place) if heads is None else heads[role]
        columns, own_format = pick_columns(rows, source, wanted, own.columns)
        renderer = Renderer(
            tokenizer, own, own_format, source.field, _read_label_names(columns), known if heads is None else None
        )
        if role == "train":
            format = own_format
            if format == "classification":
                labels = renderer.labels = renderer.build_label_table(_collect_values(columns, "label"))
        parts[role] = gather(
            _render(columns, renderer, place), source.field, find_unread_columns(rows, columns, own.columns)
        )
        if heads is None:
            check_usable(parts[role], own)
    return parts, format, labels


def _make_parts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, located: Mapping[Role, Located], scratch: Path
) -> tuple[dict[str, Part], str, dict[str, list[int]] | None]:
    """Return each split's rows, the format, and the labels."""
    parts, format, labels = _render_all(config, tokenizer, located, scratch)
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    fractions = {name: fraction for name, fraction in fractions.items() if name not in parts}
    if sum(fractions.values()) >= 1:
        raise ConfigError(
            f"data.test_fraction={config.test_fraction:g} and data.validation_fraction={config.validation_fraction:g} "
            f"leave nothing to train on; together they must be below 1"
        )
    train = parts["train"]
    if fractions:
        parts.update(_split(train, fractions, config))
    if config.max_train_rows is not None and config.max_train_rows < len(parts["train"].kept):
        chosen = np.random.default_rng(config.split_seed).permutation(parts["train"].kept)[: config.max_train_rows]
        parts["train"] = parts["train"].pick(np.sort(chosen))
    # train reports all rows dropped from the source, also those of the parts split off it
    parts["train"] = replace(train, kept=parts["train"].kept)
    return parts, format, labels


_RETENTION: dict[str, Any] = {
    "format": "auto", "template": "auto", "columns": {}, "instruction": None,
    "train_on": "completion", "over_long": "drop",
}  # fmt: skip
"""Settings of the task that do not apply to the second data set."""


def _split(whole: Part, fractions: Mapping[str, float], config: DataConfig) -> dict[str, Part]:
    digests, chunks = whole.get_column("prompt_digest").to_pylist(), whole.get_column("chunk").to_pylist()
    texts = [digest for digest, chunk in zip(digests, chunks, strict=True) if chunk == 0]
    try:
        chosen = split_off(texts, fractions, config.split_seed, field=whole.field)
    except DataError:
        if not whole.empty + whole.over_long:
            raise
        total, limit = len(texts) + whole.empty + whole.over_long, config.max_length
        few = f"fits data.max_length={limit}" if not whole.empty else f"can be used ({whole.describe(limit)})"
        raise DataError(
            f"{whole.field}: only {len(texts)} of {total} rows {few}: too few to split off {' and '.join(fractions)}; "
            f"{'raise data.max_length, ' if whole.over_long else ''}fix the others, or give "
            f"{' and '.join(f'data.{name}' for name in fractions)}"
        ) from None
    part_of = {digest: name for name, prompts in chosen.items() for digest in prompts}
    side = np.array([part_of.get(digest, "train") for digest in digests])
    return {name: whole.pick(whole.kept[side == name]) for name in ("train", *fractions)}


def _render(columns: datasets.Dataset, renderer: Renderer, place: Path) -> datasets.Dataset:
    processes = min(8, os.cpu_count() or 1) if len(columns) > PARALLEL_FROM else None
    return columns.map(
        renderer,
        batched=True,
        with_indices=True,
        remove_columns=columns.column_names,
        features=RENDERED,
        num_proc=processes,
        cache_file_name=str(place / "rendered.arrow"),
        load_from_cache_file=False,
        new_fingerprint="rendered",  # otherwise `datasets` pickles and hashes the tokenizer for one
    )


def _read_label_names(columns: datasets.Dataset) -> list[str] | None:
    feature = columns.features.get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _collect_values(columns: datasets.Dataset, name: str) -> list[Any]:
    if isinstance(columns.features[name], (datasets.Value, datasets.ClassLabel)):
        return list(columns.unique(name))
    return list(columns[name])  # values of several types


def _make_key(config: DataConfig, tokenizer: PreTrainedTokenizerBase, located: Mapping[Role, Located]) -> str:
    settings = {name: value for name, value in dump(config).items() if name not in FIELDS}  # `located` has them
    parts = [
        FORMAT_VERSION,
        settings,
        {role: source.key for role, source in located.items()},
        _hash_tokenizer(tokenizer),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None  # left over from the last call
        digest.update(json.dumps(state, sort_keys=True).encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    named = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map]
    digest.update(json.dumps(named, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets`, which would garble the run's own display."""
    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error it also raises
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
