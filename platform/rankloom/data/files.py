"""Files with rows, read so that every value keeps its text.

JSON is read here: other readers take dates, numbers and mixed columns for something else than they are in the file. A
column is text; a list or a mapping stands there as its JSON (`messages.NESTED`). CSV and Parquet go through `datasets`.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rankloom.data.messages import NESTED
from rankloom.errors import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
"""File extension (`.gz` may follow) -> what its files are."""
BATCH = 10_000
"""Rows of JSON that become a table at a time."""
SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}


def read_files(files: list[str], kind: str, scratch: Path) -> datasets.Dataset:
    """The rows of local files of one kind.

    Raises:
        DataError: a file is no such file. It is named, but not the setting. Whatever else the readers raise.
    """
    if kind == "json":
        return _read_json(files, scratch)
    if kind == "parquet":
        files = [file for file in files if _is_gzip(file) or _num_rows(file)] or _no_rows(files)
    options = _csv_options(files, kind) if kind != "parquet" else {}
    return datasets.load_dataset(
        "csv" if kind == "tsv" else kind,
        data_files=[glob.escape(file) for file in files],
        split="train",
        # the files' contents are a cache's key already; one by path and time, as the builder's own, can be stale
        cache_dir=str(scratch),
        **options,
    )


def _num_rows(file: str) -> int:
    metadata = pq.read_metadata(file)
    if twice := _twice(metadata.schema.to_arrow_schema().names):
        raise DataError(f"{file} has the column {twice!r} more than once")
    return int(metadata.num_rows)


def not_utf8(file: str) -> str | None:
    """Where a text file is not UTF-8, in words; None: it is."""
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                what = (
                    "but UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) and number == 1 else f"(line {number})"
                )
                return f"it is not UTF-8 {what}; save it as UTF-8"
    return None


def _read_json(files: list[str], scratch: Path) -> datasets.Dataset:
    tables: list[pa.Table] = []
    for file in files:
        rows = _rows(file)
        while batch := list(islice(rows, BATCH)):
            names = dict.fromkeys(name for row in batch for name in row)
            columns = {name: pa.array([_cell(row.get(name)) for row in batch], pa.string()) for name in names}
            tables.append(pa.table(columns))
    if not tables:
        _no_rows(files)
    table = pa.concat_tables(tables, promote_options="default")
    path = str(scratch / "rows.arrow")
    with datasets.arrow_writer.ArrowWriter(
        path=path, features=datasets.Features.from_arrow_schema(table.schema)
    ) as writer:
        writer.write_table(table)
        writer.finalize()
    return datasets.Dataset.from_file(path)


class _Float(float):
    """A number with a point or an exponent, which knows how it was written."""

    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def _cell(value: Any) -> str | None:
    """A value as a column has it: text as it is in the file, or JSON."""
    if value is None or (isinstance(value, str) and not value.startswith(NESTED)):
        return value
    if isinstance(value, _Float):
        return value.text
    found = json.dumps(value, ensure_ascii=False)
    return found if isinstance(value, (bool, int)) else f"{NESTED}{found}"


def _rows(file: str) -> Iterator[dict[str, Any]]:
    """The objects of a file: one a line, or a list of them; texts in a list are rows of `text`."""
    with _open(file) as lines:
        if _starts_list(lines):
            given = _parsed(lines.read(), file, "")
            for number, row in enumerate(given, 1):
                yield _object({"text": row} if isinstance(row, str) else row, file, f"row {number}: ")
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"line {number}: "
                yield _object(_parsed(line, file, place), file, place)


def _starts_list(lines: IO[bytes]) -> bool:
    """Whether the first letter is a bracket; leaves the file at its start, behind a byte order mark."""
    start = 3 if lines.read(3) == b"\xef\xbb\xbf" else 0
    lines.seek(start)
    first = b" "
    while first.isspace():
        first = lines.read(1)
    lines.seek(start)
    return first == b"["


def _parsed(text: bytes, file: str, place: str) -> Any:
    try:
        return json.loads(
            text.decode("utf-8"), parse_float=_Float, parse_constant=_constant, object_pairs_hook=_mapping
        )
    except UnicodeDecodeError:
        raise DataError(f"{file} can't be read as json: {not_utf8(file)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} can't be read as json: {place}{error}; give a JSON object a line, or a list of objects"
        ) from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice([key for key, _ in pairs])!r} is there more than once")
    return found


def _twice(names: list[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def _object(row: Any, file: str, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f'{file} can\'t be read as json: {place}expected an object such as {{"text": ...}}, found {str(row)[:60]!r}'
        )
    try:
        "".join(_texts(row)).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{file} can't be read as json: {place}it holds half of a surrogate pair, which is no text"
        ) from None
    return row


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(each)


def _open(file: str) -> IO[bytes]:
    return gzip.open(file) if _is_gzip(file) else Path(file).open("rb")  # type: ignore[return-value]


def _is_gzip(file: str) -> bool:
    return file.lower().endswith(".gz")


def _no_rows(files: list[str]) -> list[str]:
    raise DataError(f"{', '.join(files)} has no rows")


def _csv_options(files: list[str], kind: str) -> dict[str, Any]:
    """Every value is kept as it is written: '007', '1.50' and 'None' stay text."""
    separator = "\t" if kind == "tsv" else ","
    names: list[str] = []
    for file in files:
        try:
            head = pd.read_csv(file, nrows=1, dtype=str, keep_default_na=False, sep=separator)
        except pd.errors.EmptyDataError:
            _no_rows([file])
        found = list(map(str, head.columns))
        other = next((each for each in SEPARATORS if each != separator and each in found[0]), None)
        if len(found) == 1 and other:
            raise DataError(
                f"{file}: it is separated by {SEPARATORS[other]}, not by {'tabs' if kind == 'tsv' else 'commas'}; save "
                f"it with {'tabs' if kind == 'tsv' else 'commas'}{', or name it .tsv' if other == chr(9) else ''}"
            )
        if not isinstance(head.index, pd.RangeIndex):  # pandas would take the first column for row names
            raise DataError(f"{file}: its rows have more fields than its header; quote texts that hold a comma")
        if names and set(found) != set(names):
            raise DataError(f"{file} has the columns {', '.join(found)}; the files before it {', '.join(names)}")
        names = names or found
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "sep": separator}
