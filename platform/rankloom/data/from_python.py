"""Rows that Python code hands over, as the contents of files: from there on they are data like any other.

A list of dicts becomes JSON lines, which keep each row's own keys; a table becomes Parquet.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import pandas
import pyarrow as pa
from pyarrow import parquet

from rankloom.errors import ConfigError, DataError

ROLES = ("train", "validation", "test")


@dataclass(frozen=True)
class RowsFile:
    """A file to be written."""

    name: str
    """Begins with the content's hash, so that equal rows have one file."""
    content: bytes


def write_rows_files(given: Any, role: str = "train") -> dict[str, RowsFile]:
    """Return the file of each role: train, validation or test.

    Args:
        given: a `datasets.Dataset`, a pandas DataFrame or a list of dicts; or a mapping from roles to these.
        role: what rows without a mapping are.

    Raises:
        ConfigError: it is something else. DataError: a value of the rows can't be written.
    """
    if isinstance(given, Mapping):
        if unknown := [key for key in given if key not in ROLES]:
            raise ConfigError(
                f"data: unknown key {unknown[0]!r}; allowed: {', '.join(ROLES)}, each with a datasets.Dataset, a "
                f"DataFrame or a list of dicts"
            )
        parts = {key: rows for key, rows in given.items() if rows is not None}
        if not parts:
            raise ConfigError(f"data: an empty mapping; give rows for {', '.join(ROLES)}")
    else:
        parts = {role: given}
    named = isinstance(given, Mapping)
    return {key: _write_file(rows, f"data[{key!r}]" if named else "data") for key, rows in parts.items()}


def _write_file(rows: Any, field: str) -> RowsFile:
    if isinstance(rows, datasets.Dataset):
        content, suffix = _encode_parquet(rows), "parquet"
    elif isinstance(rows, pandas.DataFrame):
        content, suffix = _encode_frame(rows, field), "parquet"
    elif isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows):
        content, suffix = "".join(_encode_line(row, f"{field}[{n}]") for n, row in enumerate(rows)).encode(), "jsonl"
    else:
        raise ConfigError(
            f"{field}: expected a datasets.Dataset, a pandas DataFrame or a list of dicts (given {type(rows).__name__})"
        )
    if not len(rows):
        raise DataError(f"{field}: has no rows")
    return RowsFile(f"{hashlib.sha256(content).hexdigest()[:32]}.{suffix}", content)


def _encode_line(row: Mapping[str, Any], field: str) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"{field}: can't be written as JSON: {error}; give text, numbers, lists and dicts") from None


def _encode_parquet(rows: datasets.Dataset) -> bytes:
    sink = io.BytesIO()
    rows.with_format(None).to_parquet(sink)  # with the features, which name the labels of a ClassLabel
    return sink.getvalue()


def _encode_frame(frame: pandas.DataFrame, field: str) -> bytes:
    sink = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{field}: the DataFrame can't be written as Parquet: {error}") from None
    return sink.getvalue()
