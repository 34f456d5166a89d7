"""Reads files of rows so that every value keeps its text.

JSON is read here, because other readers reinterpret dates, numbers and mixed columns. Each column is text; it holds a
list or a mapping as its JSON (`messages.NESTED`). CSV and Parquet go through `datasets`.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable
from fsspec.core import OpenFile

from rankloom.data.messages import NESTED
from rankloom.errors import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
"""File extension (`.gz` may follow) -> kind of file."""
BATCH = 10_000
"""Rows of JSON that are turned into a table at a time."""
CHUNK_BYTES = 1 << 16
"""Bytes of a file that are read at a time."""
SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}


def read_files(files: list[str], kind: str, scratch: Path) -> datasets.Dataset:
    """Read the rows of local files of one kind.

    Args:
        kind: a value of `BUILDERS`.
        scratch: folder for temporary files; it must outlive the data set.

    Raises:
        DataError: a file is not of that kind. The message names the file, but not the setting.
        Exception: pyarrow, pandas and gzip raise their own kinds as well.
    """
    if kind == "json":
        return _read_json(files, scratch)
    if kind == "parquet":
        given, files = files, [file for file in files if _is_gzip(file) or _count_rows(file)]
        if not files:
            raise _make_no_rows_error(given)
    options = _choose_csv_options(files, kind) if kind != "parquet" else {}
    return datasets.load_dataset(
        "csv" if kind == "tsv" else kind,
        data_files=[glob.escape(file) for file in files],
        split="train",
        # our cache is keyed by the files' contents; the builder's own, keyed by path and time, can be stale
        cache_dir=str(scratch),
        **options,
    )


def read_head(files: Sequence[OpenFile], kind: str, num_rows: int) -> datasets.Dataset:
    """Read the first rows of the first file that has any, as `read_files` does, and little more of the file.

    Raises:
        DataError: as in `read_files`.
    """
    for file in files:
        with file as raw:
            table = _read_head(raw, file.path, kind, num_rows)
        if table.num_rows:
            return datasets.Dataset(InMemoryTable(table))
    raise _make_no_rows_error([file.path for file in files])


def _read_head(raw: IO[bytes], file: str, kind: str, num_rows: int) -> pa.Table:
    lines = _unpack(raw, file)
    if kind == "json":
        return _build_json_table(list(islice(_iter_rows(lines, file, num_rows), num_rows)))
    if kind == "parquet":
        parquet = pq.ParquetFile(lines, buffer_size=CHUNK_BYTES, pre_buffer=False)
        _check_columns(parquet.schema_arrow, file)
        return pa.Table.from_batches(islice(parquet.iter_batches(num_rows), 1), parquet.schema_arrow)
    frame = _read_csv_frame(lines, file, kind, num_rows)
    return pa.Table.from_pandas(frame, pa.schema([(str(name), pa.string()) for name in frame]), preserve_index=False)


def _count_rows(file: str) -> int:
    metadata = pq.read_metadata(file)
    _check_columns(metadata.schema.to_arrow_schema(), file)
    return int(metadata.num_rows)


def _check_columns(schema: pa.Schema, file: str) -> None:
    if duplicate := _find_duplicate(schema.names):
        raise DataError(f"{file} has the column {duplicate!r} more than once")


def explain_not_utf8(file: str) -> str | None:
    """Return in words where a text file is not UTF-8, or None if it is."""
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
        with _open(file) as lines:
            rows = _iter_rows(lines, file)
            while batch := list(islice(rows, BATCH)):
                tables.append(_build_json_table(batch))
    if not tables:
        raise _make_no_rows_error(files)
    table = pa.concat_tables(tables, promote_options="default")
    path = str(scratch / "rows.arrow")
    with datasets.arrow_writer.ArrowWriter(
        path=path, features=datasets.Features.from_arrow_schema(table.schema)
    ) as writer:
        writer.write_table(table)
        writer.finalize()
    return datasets.Dataset.from_file(path)


def _build_json_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([_format_cell(row.get(name)) for row in rows], pa.string()) for name in names})


class _Float(float):
    """A number with a point or an exponent that remembers how it was written."""

    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def _format_cell(value: Any) -> str | None:
    """Return a value as a column holds it: text as in the file, or JSON."""
    if value is None or (isinstance(value, str) and not value.startswith(NESTED)):
        return value
    if isinstance(value, _Float):
        return value.text
    encoded = json.dumps(value, ensure_ascii=False)
    return encoded if isinstance(value, (bool, int)) else f"{NESTED}{encoded}"


def _iter_rows(lines: io.BufferedReader, file: str, num_rows: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file: one per line, or those of a list; a text in a list is a row with the column `text`.

    Args:
        num_rows: number of objects wanted from a list; None: all.
    """
    if lines.peek(3).startswith(codecs.BOM_UTF8):
        lines.read(3)
    if lines.peek(CHUNK_BYTES).lstrip().startswith(b"["):
        for number, row in enumerate(_read_elements(lines, file, num_rows), 1):
            yield _check_object({"text": row} if isinstance(row, str) else row, file, f"row {number}: ")
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"line {number}: "
            yield _check_object(_parse_json(line, file, place), file, place)


def _read_elements(lines: io.BufferedReader, file: str, num_rows: int | None) -> list[Any]:
    """Return the elements of a list; with `num_rows` its first ones, and read the file only as far as they extend."""
    text = b""
    while num_rows is not None and (chunk := lines.read(max(CHUNK_BYTES, len(text)))):
        text += chunk
        if len(elements := _read_whole_elements(text, num_rows)) == num_rows:
            return elements
    whole: list[Any] = _parse_json(text + lines.read(), file, "")  # the file is short or malformed; parsing says how
    return whole


def _read_whole_elements(text: bytes, limit: int) -> list[Any]:
    """Return the first elements of a list, up to one that is cut off or malformed."""
    elements: list[Any] = []
    with contextlib.suppress(ValueError, RecursionError):  # cut off
        start = codecs.getincrementaldecoder("utf-8")().decode(text)
        place = start.index("[") + 1
        while len(elements) < limit:
            element, place = _DECODER.raw_decode(start, _skip_space(start, place))
            place = _skip_space(start, place)
            if start[place : place + 1] != ",":  # the last element, or a number that is cut off
                break
            elements.append(element)
            place += 1
    return elements


def _skip_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return space.end() if space else place


def _parse_json(text: bytes, file: str, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), **_HOOKS)
    except UnicodeDecodeError:
        raise DataError(f"{file} can't be read as json: {explain_not_utf8(file)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} can't be read as json: {place}{error}; give one JSON object per line, or a list of objects"
        ) from None


def _build_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError(f"the key {_find_duplicate([key for key, _ in pairs])!r} occurs more than once")
    return mapping


def _find_duplicate(names: list[str]) -> str | None:
    """Return the first name that occurs more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _parse_constant(name: str) -> str | None:
    return None if name == "NaN" else name


_HOOKS: dict[str, Any] = {"parse_float": _Float, "parse_constant": _parse_constant, "object_pairs_hook": _build_mapping}
_DECODER = json.JSONDecoder(**_HOOKS)
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


def _check_object(row: Any, file: str, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f'{file} can\'t be read as json: {place}expected an object such as {{"text": ...}}, found {str(row)[:60]!r}'
        )
    try:
        "".join(_iter_texts(row)).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{file} can't be read as json: {place}it holds half of a surrogate pair, which is not text"
        ) from None
    return row


def _iter_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _iter_texts(each)


@contextlib.contextmanager
def _open(file: str) -> Iterator[io.BufferedReader]:
    with Path(file).open("rb") as raw:
        yield _unpack(raw, file)


def _unpack(raw: IO[bytes], file: str) -> io.BufferedReader:
    """Return a reader of a file's decompressed contents; `raw` need not be seekable."""
    stream: Any = gzip.GzipFile(fileobj=raw) if _is_gzip(file) else raw
    return io.BufferedReader(stream, CHUNK_BYTES)


def _is_gzip(file: str) -> bool:
    return file.lower().endswith(".gz")


def _make_no_rows_error(files: Sequence[str]) -> DataError:
    return DataError(f"{', '.join(files)} has no rows")


def _choose_csv_options(files: list[str], kind: str) -> dict[str, Any]:
    """Return options that keep every value as written: '007', '1.50' and 'None' stay text."""
    names: list[str] = []
    for file in files:
        with _open(file) as lines:
            columns = list(map(str, _read_csv_frame(lines, file, kind, 1).columns))
        if names and set(columns) != set(names):
            raise DataError(f"{file} has the columns {', '.join(columns)}; the files before it {', '.join(names)}")
        names = names or columns
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "sep": _choose_separator(kind)}


def _choose_separator(kind: str) -> str:
    return "\t" if kind == "tsv" else ","


def _read_csv_frame(lines: IO[bytes], file: str, kind: str, num_rows: int) -> pd.DataFrame:
    separator = _choose_separator(kind)
    try:
        head = pd.read_csv(lines, nrows=num_rows, dtype=object, keep_default_na=False, sep=separator)
    except pd.errors.EmptyDataError:
        raise _make_no_rows_error([file]) from None
    columns = list(map(str, head.columns))
    other = next((each for each in SEPARATORS if each != separator and each in columns[0]), None)
    if len(columns) == 1 and other:
        raise DataError(
            f"{file}: it is separated by {SEPARATORS[other]}, not by {'tabs' if kind == 'tsv' else 'commas'}; save "
            f"it with {'tabs' if kind == 'tsv' else 'commas'}{', or name it .tsv' if other == chr(9) else ''}"
        )
    if not isinstance(head.index, pd.RangeIndex):  # pandas would read the first column as row names
        raise DataError(f"{file}: its rows have more fields than its header; quote texts that hold a comma")
    return head
