"""Finding and reading sources."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import datasets
import fsspec
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rankloom.config.data import DataConfig, Source
from rankloom.data.sources import check_sources, locate, pick_columns, resolve_sources
from rankloom.errors import ConfigError, DataError, RankloomError

ROWS = [{"text": "hello", "label": "a"}, {"text": "bye, now", "label": "b"}]
CSV = 'text,label\nhello,a\n"bye, now",b\n'


def read(path: str | Path, scratch: Path, **keys: Any) -> list[dict[str, Any]]:
    folder = scratch / "scratch"
    folder.mkdir(exist_ok=True)
    return locate(Source(path=str(path), **keys), "train").read(folder).to_list()


def write(kind: str, file: Path) -> Path:
    if kind.startswith("parquet"):
        pd.DataFrame(ROWS).to_parquet(file)
        return file
    texts = {"csv": CSV, "jsonl": "\n".join(map(json.dumps, ROWS)), "json": json.dumps(ROWS)}
    text = texts[kind.removesuffix(".gz")].encode()
    file.write_bytes(gzip.compress(text) if kind.endswith(".gz") else text)
    return file


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "csv.gz", "jsonl.gz", "json.gz"])
def test_each_kind_of_file(kind: str, tmp_path: Path) -> None:
    assert read(write(kind, tmp_path / f"rows.{kind}"), tmp_path) == ROWS


def test_a_pattern_reads_all_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},x\n")
    assert [row["text"] for row in read(tmp_path / "*.csv", tmp_path)] == ["a", "b"]


def test_csv_values_are_kept_as_written(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("\ufefftext,label\nNone,007\n1.50,null\nNA,\n2024-01-02,x\n", encoding="utf-8")
    assert [tuple(row.values()) for row in read(file, tmp_path)] == [
        ("None", "007"), ("1.50", "null"), ("NA", ""), ("2024-01-02", "x"),
    ]  # fmt: skip


def test_csv_with_more_fields_than_its_header(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\nwell, hello,a\nbye, now,b\n")
    with pytest.raises(DataError, match="more fields than its header"):
        read(tmp_path / "x.csv", tmp_path)


def test_remote_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/sources/rows.csv", CSV.encode())
    url = "memory://sources/rows.csv"
    assert read(url, tmp_path) == ROWS
    assert read("memory://sources/*.csv", tmp_path) == ROWS
    key = locate(Source(path=url), "train").key
    assert key == locate(Source(path=url), "train").key
    memory.pipe("/sources/rows.csv", CSV.replace("hello", "hallo").encode())
    assert key != locate(Source(path=url), "train").key
    with pytest.raises(DataError, match=r"no file 'memory://sources/row.csv'; did you mean 'rows.csv'"):
        locate(Source(path="memory://sources/row.csv"), "train")


class Unmarked(MemoryFileSystem):
    """A filesystem that marks no change, so that a key takes all contents."""

    protocol = "unmarked"
    store: ClassVar[dict[str, Any]] = {}
    num_opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("unmarked://").strip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path)
        return {key: found[key] for key in ("name", "size", "type")}

    def _open(self, *given: Any, **options: Any) -> Any:
        Unmarked.num_opened += 1
        return super()._open(*given, **options)


def test_a_check_reads_no_contents() -> None:
    fsspec.register_implementation("unmarked", Unmarked)
    Unmarked().pipe("/rows.csv", CSV.encode())
    Unmarked.num_opened = 0
    train = Source(path="unmarked://rows.csv")
    check_sources(DataConfig(train=train), None)
    assert Unmarked.num_opened == 0
    assert len(locate(train, "train").key) == 64
    assert Unmarked.num_opened == 1
    for config, retention, message in (
        (DataConfig(train=Source(path="builtin:nothing")), None, "data.train: unknown"),
        (DataConfig(train=train), Source(path="unmarked://row.csv"), "eval.retention: no file"),
    ):
        with pytest.raises(RankloomError, match=message):
            check_sources(config, retention)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = write("csv", tmp_path / "x.csv")
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read all files")
    with pytest.raises(DataError, match="can't be read: PermissionError"):
        locate(Source(path=str(file)), "train")


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (
            ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("ENDPOINT_URL", endpoint), ("REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="lake")
        client.put_object(Bucket="lake", Key="sets/rows.csv", Body=CSV.encode())
        assert read("s3://lake/sets/rows.csv", tmp_path) == ROWS
        assert read("s3://lake/sets/*.csv", tmp_path) == ROWS
        with pytest.raises(DataError, match=r"did you mean 'rows.csv'"):
            locate(Source(path="s3://lake/sets/rwos.csv"), "train")
    finally:
        server.stop()


def test_the_key_follows_the_contents_not_the_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text(CSV)
    other.write_text(CSV)
    keys = [locate(Source(path=str(file)), "train").key for file in (one, other)]
    assert keys[0] == keys[1]
    one.write_text(CSV + "x,a\n")
    assert locate(Source(path=str(one)), "train").key != keys[0]
    assert len(read(one, tmp_path)) == 3


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    for path, message in (
        ("trian.jsonl", r"data.train: no file .*did you mean 'train.jsonl'"),
        ("nowhere/x.csv", r"no file .*, nor its folder"),
        ("*.csv", "no file matches"),
        ("", "is a folder; give a file, or a pattern such as"),
    ):
        with pytest.raises(DataError, match=message):
            locate(Source(path=f"{tmp_path}/{path}"), "train")


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    write("parquet", tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(CSV.encode() * 99)[:-12])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "latin.csv").write_bytes("text,label\nol\xe9,a\n".encode("latin-1"))
    (tmp_path / "quote.csv").write_text('text,label\n"hello,a\n')
    for name in ("cut.parquet", "cut.csv.gz", "broken.jsonl", "latin.csv", "quote.csv"):
        with pytest.raises(DataError, match=rf"data.train: .*{name} can't be read as \w+: \w+"):
            read(tmp_path / name, tmp_path)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=r"empty.csv is empty"):
        read(tmp_path / "empty.csv", tmp_path)


def test_keys_that_a_file_would_ignore(tmp_path: Path) -> None:
    file = write("csv", tmp_path / "x.csv")
    for key in ("split", "subset", "revision"):
        with pytest.raises(ConfigError, match=f"data.train.{key}: 'x' does not apply to the file"):
            locate(Source(path=str(file), **{key: "x"}), "train")
    (tmp_path / "x.xml").touch()
    for path in (str(tmp_path / "x.xml"), "what is this", "ghost://x/y.csv"):
        with pytest.raises(ConfigError):
            locate(Source(path=path), "train")


def test_builtin(tmp_path: Path) -> None:
    rows = read("builtin:bank-intents", tmp_path)
    assert len(rows) > 100
    assert set(rows[0]) == {"text", "label"}
    test = resolve_sources(DataConfig(train=Source(path="builtin:bank-intents")), None)["test"]
    assert locate(test, "test").key == locate(Source(path="builtin:bank-intents"), "test").key
    assert resolve_sources(DataConfig(train=Source(path="x.csv")), None).keys() == {"train"}
    for source, role, message in (
        (Source(path="builtin:bank-intent"), "train", "did you mean 'bank-intents'.*allowed: builtin:bank-intents"),
        (Source(path="builtin:bank-intents"), "validation", "no split 'validation'; it has test, train"),
        (Source(path="builtin:bank-intents", revision="x"), "train", "data.train.revision: 'x' does not apply"),
    ):
        with pytest.raises(ConfigError, match=message):
            locate(source, role)  # type: ignore[arg-type]


def test_a_hub_set_that_can_not_be_had() -> None:
    with pytest.raises(DataError, match=r"data.test: 'nobody/nothing' \(split 'test'\).*HF_TOKEN"):
        assert locate(Source(path="nobody/nothing"), "test").key


def test_a_hub_set_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    folder = tmp_path / "somebody___intents" / "default" / "0.0.0" / "abc"
    writer = datasets.Dataset.from_list([{"text": "hello", "label": 1}], features=features)
    folder.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "intents-train.arrow"), features=features) as arrow:
        for row in writer:
            arrow.write(row)
        arrow.finalize()
    info = datasets.DatasetInfo(
        features=features, builder_name="parquet", dataset_name="intents", config_name="default"
    )
    info.splits = datasets.SplitDict()
    info.splits.add(datasets.SplitInfo("train", num_examples=1, dataset_name="intents"))
    info.write_to_directory(str(folder))
    located = locate(Source(path="somebody/intents"), "train")
    assert located.read(tmp_path).to_list() == [{"text": "hello", "label": 1}]
    assert located.key == locate(Source(path="somebody/intents"), "train").key
    head = located.try_read_head(5)
    assert head is not None
    assert (head.to_list(), head.features) == ([{"text": "hello", "label": 1}], features)
    with pytest.raises(DataError, match="split 'test'"):
        assert locate(Source(path="somebody/intents"), "test").key


def columns_of(tmp_path: Path, header: str, format: str = "auto", **columns: str) -> tuple[list[str], str]:
    file = tmp_path / "c.csv"
    file.write_text(f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    located = locate(Source(path=str(file)), "train")
    dataset, found = pick_columns(located.read(tmp_path), located, format, columns)
    return dataset.column_names, found


def test_the_format_follows_the_columns(tmp_path: Path) -> None:
    for header, format, columns in (
        ("id,text,label", "classification", {}),
        ("text,category", "classification", {"label": "category"}),
        ("text,url", "text", {}),
        ("prompt,completion", "completion", {}),
        ("instruction,response,text", "instruction", {}),
        ("question,answer", "completion", {"prompt": "question", "completion": "answer"}),
        ("label,text,other", "classification", {"text": "other"}),
    ):
        names, found = columns_of(tmp_path, header, **columns)
        assert found == format
        assert set(names) <= {"text", "label", "prompt", "completion", "instruction", "response"}


def test_columns_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no format fits.*has 'a', 'b'.*classification: text, label.*data.columns"):
        columns_of(tmp_path, "a,b")
    with pytest.raises(DataError, match=r"data.columns: label: no column 'categry'; did you mean 'category'"):
        columns_of(tmp_path, "text,category", label="categry")
    with pytest.raises(DataError, match=r"the format completion needs the column 'completion'; .* data.columns"):
        columns_of(tmp_path, "prompt,answer", "completion")
    with pytest.raises(ConfigError, match="'label' is not read by the format text"):
        columns_of(tmp_path, "text,category", "text", label="category")
    with pytest.raises(ConfigError, match="need a column each"):
        columns_of(tmp_path, "text,category", "classification", label="text")


def test_a_header_without_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"data.train: .*x.csv has no rows"):
        read(tmp_path / "x.csv", tmp_path)
