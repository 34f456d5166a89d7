"""Large data, and data sets on the hub, are refused for their first rows before anything starts."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import ray
import yaml
from fsspec.implementations.local import LocalFileSystem
from transformers import AutoTokenizer

from rankloom.cli import main
from rankloom.config import TrialConfig, parse
from rankloom.errors import DataError
from rankloom.launch import cluster
from rankloom.training import preflight as module
from rankloom.training.preflight import HEAD_ROWS, preflight

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz")
NOISE = [hashlib.sha512(bytes([i % 256, i // 256])).hexdigest() * 3 for i in range(4000)]  # so that gzip leaves much
ROWS = [{"text": f"my card {noise}", "label": ("lost", "found")[i % 2]} for i, noise in enumerate(NOISE)]


@pytest.fixture(autouse=True)
def all_data_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", -1)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def ray_started(*_: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", ray_started)


@pytest.fixture
def whole_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read as a whole."""
    read: list[str] = []
    monkeypatch.setattr(module, "load_data", lambda data, *_, **__: read.append(data.train.path))
    return read


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of local files was read through fsspec, read by read."""
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            sizes.append(super().readinto(buffer) or 0)
            return sizes[-1]

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size) or b""
            sizes.append(len(found))
            return found

    open_reads(monkeypatch, Counted)
    return sizes


def open_reads(monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Any]) -> None:
    opened = LocalFileSystem._open

    def _open(self: LocalFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        return make(path) if mode == "rb" else opened(self, path, mode, **options)

    monkeypatch.setattr(LocalFileSystem, "_open", _open)


def write(rows: list[dict[str, Any]], file: Path) -> Path:
    kind = file.name.split(".", 1)[1]
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(file, row_group_size=500)
        return file
    if kind.startswith(("csv", "tsv")):
        text = pd.DataFrame(rows).to_csv(index=False, sep="\t" if kind.startswith("tsv") else ",")
    else:
        text = json.dumps(rows, indent=1) if kind == "json" else "\n".join(map(json.dumps, rows))
    file.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return file


def trial_of(model: Path, **data: Any) -> TrialConfig:
    return parse(TrialConfig, {"name": "t", "model": {"id": str(model)}, "data": data})


@pytest.mark.parametrize("kind", KINDS)
def test_of_large_files_the_first_rows_alone_are_read(
    kind: str, tiny_llama: Path, tmp_path: Path, whole_reads: list[str], bytes_read: list[int]
) -> None:
    file = write(ROWS, tmp_path / f"rows.{kind}")
    preflight([trial_of(tiny_llama, train=str(file), max_length=1000)])
    assert whole_reads == []
    assert 0 < sum(bytes_read) < file.stat().st_size / 2
    bytes_read.clear()
    with pytest.raises(DataError, match=r"data\.columns: label: no column 'lable'; did you mean 'label'"):
        preflight([trial_of(tiny_llama, train=str(file), columns={"label": "lable"})])
    assert 0 < sum(bytes_read) < file.stat().st_size / 2
    assert whole_reads == []


def test_what_is_wrong_behind_the_first_rows_is_left_to_the_run(
    tiny_llama: Path, tmp_path: Path, whole_reads: list[str]
) -> None:
    file = write(ROWS[: HEAD_ROWS + 1], tmp_path / "rows.jsonl")
    for number in (HEAD_ROWS + 2, HEAD_ROWS):
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[: number - 1], "{broken", *lines[number:]]))
        if number > HEAD_ROWS:
            preflight([trial_of(tiny_llama, train=str(file), max_length=1000)])
    with pytest.raises(DataError, match=rf"data\.train: .*rows\.jsonl can't be read as json: line {HEAD_ROWS}: "):
        preflight([trial_of(tiny_llama, train=str(file), max_length=1000)])
    assert whole_reads == []


ANSWERED = {"role": "assistant", "content": "an answer"}
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a key": ({"messages": [{"speaker": "user", "content": "hi"}]}, {}, "row 2: messages must be a list of {role"),
    "a role": ({"messages": [{"role": "boss", "content": "hi"}]}, {}, "row 2: no turn has the role assistant"),
    "a row": (["hi"], {}, "line 2: expected an object"),
    "a format": ({"messages": [ANSWERED]}, {"format": "instruction"}, "the format instruction needs the column"),
    "a long row": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no " * 50}]},
        {"over_long": "error", "max_length": 32},
        "tokens does not fit beside a prompt in data.max_length=32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("command", ["train", "tune", "evaluate"])
@pytest.mark.usefixtures("no_ray")
def test_a_wrong_row_ends_each_command_without_ray(
    command: str, case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, settings, message = WRONG[case]
    rows = [{"messages": [{"role": "user", "content": f"hi {i}"}, ANSWERED]} for i in range(500)]
    rows[1] = row
    write(rows, tmp_path / "rows.jsonl.gz")
    tree: dict[str, Any] = {
        "model": {"id": str(tiny_llama)},
        "data": {"train": str(tmp_path / "rows.jsonl.gz"), **settings},
        "output": {"root": str(tmp_path / "out")},
    }
    if command == "tune":
        tree = {"trial": tree, "space": [{"optim": {"learning_rate": {"choice": [1e-4, 1e-3]}}}]}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump({"name": "it", **tree}))
    with pytest.raises(SystemExit) as ended:
        main([command, str(tmp_path / "it.yaml")])
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not ray.is_initialized()
    assert not list(tmp_path.glob("out/*/*"))


@pytest.mark.usefixtures("no_ray")
def test_a_template_that_drops_text_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    file = write([{"prompt": f"q {i}", "completion": "a"} for i in range(500)], tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"data\.train: row 1: .*template.*data\.template=plain"):
        preflight([trial_of(folder, train=str(file))])


def pairs(count: int, **row: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"q {i}", "completion": f"a {i}"} | row for i in range(count)]


def test_a_head_is_not_taken_for_the_whole(tiny_llama: Path, tmp_path: Path, whole_reads: list[str]) -> None:
    """Splits, labels and what only some rows have are not judged by the first rows."""
    alike = write(pairs(200, prompt="q") + pairs(300), tmp_path / "alike.jsonl")
    sorted_rows = write(sorted(ROWS, key=lambda row: row["label"]), tmp_path / "sorted.csv")
    other_label = write([row for row in ROWS if row["label"] == "lost"], tmp_path / "test.csv")
    preflight([trial_of(tiny_llama, train=str(alike))])
    preflight([trial_of(tiny_llama, train=str(sorted_rows), test=str(other_label), max_length=1000)])
    assert whole_reads == []


@pytest.mark.parametrize(
    ("first", "settings"),
    [({"completion": ""}, {}), ({"completion": "no " * 100}, {"max_length": 32}), ({}, {"columns": {"system": "s"}})],
)
def test_what_the_first_rows_do_not_settle_all_rows_do(
    first: dict[str, Any], settings: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    none = write(pairs(200, **first), tmp_path / "none.jsonl")
    later = write(pairs(200, **first) + pairs(50, s="system"), tmp_path / "later.jsonl")
    preflight([trial_of(tiny_llama, train=str(later), **settings)])
    with pytest.raises(DataError, match=r"none of its 200 rows can be used|no column 's'"):
        preflight([trial_of(tiny_llama, train=str(none), **settings)])


class Pipe(io.BytesIO):
    """As a web server's answer without a length."""

    def seek(self, *_: Any) -> int:
        raise ValueError("Cannot seek streaming HTTP file")


@pytest.mark.parametrize("kind", KINDS)
def test_a_url_of_unknown_size(
    kind: str, tiny_llama: Path, tmp_path: Path, whole_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 10**12)
    monkeypatch.setattr(LocalFileSystem, "size", lambda *_: None)
    open_reads(monkeypatch, lambda path: Pipe(Path(path).read_bytes()))
    url = f"file://{write(ROWS, tmp_path / f'rows.{kind}')}"
    preflight([trial_of(tiny_llama, train=url, max_length=1000)])
    assert whole_reads == [url] * (kind == "parquet")  # its columns are listed at its end


def test_of_a_hub_set_the_first_rows_are_streamed(
    tiny_llama: Path, whole_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def rows(label: Any) -> Iterator[dict[str, Any]]:
        for i in range(100_000):
            made.append(i)
            yield {"text": f"my card {i}", "label": label}

    def load(path: str, *, streaming: bool = False, **asked: Any) -> datasets.IterableDataset:
        assert (path, streaming, asked) == ("org/set", True, {"name": "all", "split": "train", "revision": "main"})
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["found", "lost"])}
        )
        return datasets.IterableDataset.from_generator(rows, features, gen_kwargs={"label": 1})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"path": "org/set", "subset": "all", "revision": "main"}
    data: dict[str, Any] = {"train": source, "test": "builtin:bank-intents"}
    preflight([trial_of(tiny_llama, **data)])
    assert HEAD_ROWS <= len(made) < 20 * HEAD_ROWS
    assert whole_reads == []
    with pytest.raises(
        DataError, match=r"data\.train: the format chat needs the column 'messages'; org/set has 'text'"
    ):
        preflight([trial_of(tiny_llama, **data, format="chat")])


@pytest.mark.usefixtures("no_ray")
def test_a_hub_set_that_can_not_be_had_is_told_at_once(tiny_llama: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train: 'org/none' \(split 'train'\) is not a file here, and the hub"):
        preflight([trial_of(tiny_llama, train="org/none")])
