"""From a config to splits: the split, the check and the cache."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankloom.config.data import DataConfig, Source
from rankloom.data import load, load_data
from rankloom.data.check import DataReport
from rankloom.data.rows import Rows
from rankloom.data.split import split_off
from rankloom.errors import ConfigError, DataError
from rankloom.paths import get_cache_dir

MakeTokenizer = Callable[..., Any]
LABELS = ["card_lost", "check_balance", "transfer"]
BANKING77 = Path(__file__).resolve().parents[4] / "shared" / "data" / "banking77"


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(file)


def labelled(num_rows: int, prefix: str = "utterance") -> list[dict[str, Any]]:
    return [{"text": f"{prefix} number {i}", "label": LABELS[i % 3]} for i in range(num_rows)]


def prompts(rows: Rows, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row.input_ids[: row.prompt_length]) for row in rows]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path / "rankloom-cache"))


def test_the_builtin_set_as_it_comes(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    data = load_data(DataConfig(), tokenizer)
    assert data.labels is not None
    assert len(data.labels) >= 12
    assert data.retention is None
    assert data.report.format == "classification"
    with (Path(load.__file__).parent / "builtin/bank-intents/test.csv").open(newline="") as file:
        assert len(data.test) == len(list(csv.DictReader(file)))  # its own held-out rows
    for row in data.train:
        assert row.input_ids[row.prompt_length :] == data.labels[row.completion]
        assert sum(row.loss_weights) == len(data.labels[row.completion])
    assert data.train.lengths.tolist() == [len(row.input_ids) for row in data.train]
    assert data.report.overlaps["test"].rows == 0


def test_the_split_is_deterministic_and_keeps_equal_prompts_together(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    rows = labelled(40) + labelled(20)  # twenty texts occur twice
    config = DataConfig(train=Source(path=write(tmp_path / "a.jsonl", rows)), validation_fraction=0.2)
    data = load_data(config, tokenizer)
    sides = [set(prompts(split, tokenizer)) for split in (data.train, data.validation, data.test)]
    assert not any(one & other for one, other in combinations(sides, 2))
    assert (len(data.validation), len(data.test)) == (12, 6)
    assert len(data.train) + len(data.validation) + len(data.test) == 60
    shuffled = write(tmp_path / "b.jsonl", rows[::-1])
    again = load_data(config.model_copy(update={"train": Source(path=shuffled)}), tokenizer)
    assert set(prompts(again.test, tokenizer)) == sides[2]
    other = load_data(config.model_copy(update={"split_seed": 1}), tokenizer)
    assert set(prompts(other.test, tokenizer)) != sides[2]


def test_split_off() -> None:
    parts = split_off([f"p{i}" for i in range(100)], {"test": 0.1, "validation": 0.2}, seed=0)
    assert (len(parts["test"]), len(parts["validation"])) == (10, 20)
    assert split_off(["a"] * 50 + ["b"] * 50 + ["c"] * 2, {"test": 0.1, "validation": 0.1}, 0)["test"] == {"c"}
    for count in range(3, 12):
        parts = split_off([f"p{i}" for i in range(count)], {"test": 0.6, "validation": 0.3}, seed=count)
        assert all(parts.values())
        assert len(parts["test"] | parts["validation"]) < count
    with pytest.raises(DataError, match=r"3 row\(s\) with 2 different prompt\(s\).*at least 3 different prompts"):
        split_off(["a", "b", "b"], {"test": 0.1, "validation": 0.1}, seed=0)


def test_wrong_fractions_and_too_few_rows(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    train = Source(path=write(tmp_path / "a.jsonl", labelled(2)))
    with pytest.raises(DataError, match="at least 3 different prompts"):
        load_data(DataConfig(train=train), make_tokenizer())
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        load_data(DataConfig(train=train, test_fraction=0.5, validation_fraction=0.5), make_tokenizer())


def test_max_train_rows(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    config = DataConfig(train=Source(path=write(tmp_path / "a.jsonl", labelled(60))))
    tokenizer = make_tokenizer()
    whole, few = load_data(config, tokenizer), load_data(config.model_copy(update={"max_train_rows": 10}), tokenizer)
    assert len(few.train) == 10
    assert set(prompts(few.train, tokenizer)) < set(prompts(whole.train, tokenizer))
    assert prompts(few.test, tokenizer) == prompts(whole.test, tokenizer)
    assert few.labels == whole.labels


def test_an_unknown_label_is_named(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    train = Source(path=write(tmp_path / "a.jsonl", labelled(30)))
    wrong = [*labelled(2, "other"), {"text": "hm", "label": "card_last"}]
    config = DataConfig(train=train, validation=Source(path=write(tmp_path / "b.jsonl", wrong)))
    with pytest.raises(DataError, match=r"data.validation: row 3: the label 'card_last' .*near it: 'card_lost'"):
        load_data(config, make_tokenizer())


def test_class_label_names(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)})
    rows = [{"text": f"t {i}", "label": i % 3} for i in range(12)] + [{"text": "unlabelled", "label": -1}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = load_data(DataConfig(train=Source(path=str(tmp_path / "a.parquet"))), make_tokenizer())
    assert data.labels is not None
    assert sorted(data.labels) == LABELS
    assert data.report.splits["train"].empty == 1


def test_labels_of_several_types(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": (1, "b")[i % 2]} for i in range(12)]
    data = load_data(DataConfig(train=Source(path=write(tmp_path / "a.jsonl", rows))), make_tokenizer())
    assert data.labels is not None
    assert sorted(data.labels) == ["1", "b"]


def test_a_single_label_is_warned_of(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": "same"} for i in range(12)]
    data = load_data(DataConfig(train=Source(path=write(tmp_path / "a.jsonl", rows))), make_tokenizer())
    assert "all rows have the label 'same': there is nothing to distinguish" in data.report.warnings


def test_the_report(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    train = [
        *labelled(20),
        {"text": "", "label": "transfer"},
        {"text": "no label", "label": " "},
        {"text": "utterance number 0", "label": "card_lost"},  # a duplicate
        {"text": "utterance number 1", "label": "transfer"},  # a conflict
        {"text": "my card was lost " * 40, "label": "transfer"},  # truncated
    ]
    test = [*labelled(6, "other"), {"text": "utterance number 5", "label": "transfer"}]
    config = DataConfig(
        train=Source(path=write(tmp_path / "a.jsonl", train)),
        validation=Source(path=write(tmp_path / "b.jsonl", labelled(3, "third"))),
        test=Source(path=write(tmp_path / "c.jsonl", test)),
        max_length=64,
    )
    data = load_data(config, tokenizer)
    split = data.report.splits["train"]
    assert (split.rows, split.empty, split.duplicates, split.conflicts, split.truncated) == (23, 2, 1, 2, 1)
    assert split.labels == {"card_lost": 8, "check_balance": 7, "transfer": 8}
    assert (split.tokens, split.max_length) == (int(data.train.lengths.sum()), 64)
    assert split.median_length == np.median(data.train.lengths)
    assert split.trained_tokens == sum(sum(row.loss_weights) for row in data.train)
    assert data.report.overlaps["test"].rows == 1
    assert data.report.overlaps["test"].examples == ["utterance number 5"]
    assert data.report.overlaps["validation"].rows == 0
    words = "\n".join(data.report.warnings)
    for part in ("2 row(s) dropped: no prompt", "1 row(s) repeat", "2 row(s) have a prompt that", "1 row(s) lost the"):
        assert f"train: {part}" in words
    assert "test: 1 of 7 rows have a prompt that is also in train" in words
    assert DataReport.model_validate(json.loads(json.dumps(data.report.to_dict()))) == data.report


def test_data_that_would_train_nothing(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    empty = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 5)
    with pytest.raises(DataError, match=r"data.train: none of its 5 rows can be used: 5 without a prompt"):
        load_data(DataConfig(train=Source(path=empty)), tokenizer)
    long = write(tmp_path / "b.jsonl", [{"prompt": str(i), "completion": "yes no maybe " * 9} for i in range(5)])
    with pytest.raises(DataError, match=r"0 without .*5 whose completion does not fit in data.max_length=8"):
        load_data(DataConfig(train=Source(path=long), max_length=8), tokenizer)
    good = Source(path=write(tmp_path / "c.jsonl", labelled(30)))
    unlabelled = Source(path=write(tmp_path / "d.jsonl", [{"text": "a", "label": ""}] * 5))
    with pytest.raises(DataError, match=r"data\.test: none of its 5 rows"):
        load_data(DataConfig(train=good, test=unlabelled), tokenizer)


def test_texts_are_split_whole(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "the weather is fine today " * 12} for i in range(12)]
    tokenizer = make_tokenizer()
    config = DataConfig(train=Source(path=write(tmp_path / "a.jsonl", rows)), max_length=32, max_train_rows=20)
    data = load_data(config, tokenizer)
    starts = [sum(tokenizer.decode(r.input_ids)[0].isdigit() for r in split) for split in (data.validation, data.test)]
    assert starts == [1, 1]  # a tenth of twelve texts, not of their chunks
    assert len(data.train) == 20
    assert data.report.splits["test"].chunks == len(data.test) > 1
    assert data.report.splits["train"].duplicates == 0
    assert data.labels is None


def test_retention_has_its_own_format(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    train = [{"text": f"t {i}", "category": LABELS[i % 3]} for i in range(12)]
    config = DataConfig(
        train=Source(path=write(tmp_path / "a.jsonl", train)), columns={"label": "category"}, instruction="be brief"
    )
    texts = Source(path=write(tmp_path / "b.jsonl", [{"text": "the sun shines"}] * 2))
    data = load_data(config, make_tokenizer(), retention=texts)
    assert data.retention is not None
    assert [sum(row.loss_weights) for row in data.retention] == [len(row.input_ids) - 1 for row in data.retention]
    with pytest.raises(DataError, match=r"eval.retention: no file"):
        load_data(config, make_tokenizer(), retention=Source(path=str(tmp_path / "nothing.jsonl")))


def test_the_cache_is_used_and_rebuilt_when_broken(
    make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    file = tmp_path / "a.jsonl"
    config = DataConfig(train=Source(path=write(file, labelled(30))))
    first = load_data(config, tokenizer)
    rendered: list[int] = []
    render = load._render
    monkeypatch.setattr(load, "_render", lambda *args: rendered.append(1) or render(*args))
    assert load_data(config, make_tokenizer()).fingerprint == first.fingerprint
    assert not rendered
    (folder,) = [f for f in (get_cache_dir() / "tokens").iterdir() if f.is_dir()]
    assert sorted(f.name for f in folder.iterdir()) == ["meta.json", "test", "train", "validation"]
    arrow = next((folder / "train").glob("*.arrow"))
    whole = arrow.read_bytes()
    target = whole.index(np.asarray(first.train[0].input_ids, dtype=np.int32).tobytes())
    flipped = whole[:target] + bytes([whole[target] ^ 1]) + whole[target + 1 :]
    damages = ((arrow, whole[:-200]), (arrow, b""), (arrow, flipped), (folder / "meta.json", b"{"))
    for count, (victim, content) in enumerate(damages, 1):
        victim.unlink()  # not written in place: the first result still maps the old file
        victim.write_bytes(content)
        again = load_data(config, tokenizer)
        assert len(rendered) == count
        assert list(again.train) == list(first.train)
        assert (again.report, again.labels, again.fingerprint) == (first.report, first.labels, first.fingerprint)
    assert load_data(config.model_copy(update={"instruction": "x"}), tokenizer).fingerprint != first.fingerprint
    write(file, labelled(31))
    assert load_data(config, tokenizer).fingerprint != first.fingerprint


def test_the_tokenizer_is_part_of_the_key(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    config = DataConfig(train=Source(path=write(tmp_path / "a.jsonl", labelled(30))))
    tokenizer = make_tokenizer()
    first = load_data(config, tokenizer)
    tokenizer("a", truncation=True, max_length=4, padding="max_length")  # leaves its settings behind
    assert load._hash_tokenizer(tokenizer) == load._hash_tokenizer(make_tokenizer())
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>\n", "<|end|>")
    assert load_data(config, tokenizer).fingerprint != first.fingerprint


def _fingerprint(folder: str, path: str, cache: str) -> str:
    from transformers import AutoTokenizer

    os.environ["RANKLOOM_CACHE"] = cache
    return load_data(DataConfig(train=Source(path=path)), AutoTokenizer.from_pretrained(folder)).fingerprint


def test_several_processes_at_once(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", labelled(300))
    arguments = [str(tmp_path / "tokenizer"), path, os.environ["RANKLOOM_CACHE"]]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        found = [pool.submit(_fingerprint, *arguments) for _ in range(2)]
        assert len({future.result() for future in found}) == 1
    left = [f for f in (get_cache_dir() / "tokens").iterdir() if f.is_dir()]
    assert len(left) == 1


def test_rendering_in_parallel_changes_nothing(
    make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(train=Source(path=write(tmp_path / "a.jsonl", labelled(50))))
    first = load_data(config, make_tokenizer())
    monkeypatch.setattr(load, "PARALLEL_FROM", 10)
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path / "other"))
    again = load_data(config, make_tokenizer())
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)


def test_a_cache_that_can_not_be_written(
    make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.touch(mode=stat.S_IRUSR)
    monkeypatch.setenv("RANKLOOM_CACHE", str(blocker / "cache"))
    with pytest.raises(DataError, match=r"can't be written: NotADirectoryError.*set RANKLOOM_CACHE"):
        load_data(DataConfig(), make_tokenizer())


def _with_little_disk(path: str, folder: str) -> str:
    from transformers import AutoTokenizer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing on then fails as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        load_data(DataConfig(train=Source(path=path)), AutoTokenizer.from_pretrained(folder))
    except DataError as error:
        return str(error)
    return "loaded"


def test_a_full_disk(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", labelled(300))
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        message = pool.submit(_with_little_disk, path, str(tmp_path / "tokenizer")).result()
    assert "can't be written: OSError: [Errno 27] File too large; set RANKLOOM_CACHE" in message
    assert not [f for f in (get_cache_dir() / "tokens").iterdir() if f.is_dir()]  # nothing half-written


def test_rows(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    data = load_data(DataConfig(train=Source(path=write(tmp_path / "a.jsonl", labelled(100)))), make_tokenizer())
    rows, everything = data.train, list(data.train)
    assert rows[-1] == everything[-1]
    assert list(rows[10:13]) == everything[10:13]
    even = rows.select(8)
    assert list(even) == [everything[i * len(rows) // 8] for i in range(8)]
    assert even.lengths.tolist() == [len(row.input_ids) for row in even]
    assert list(rows.select(8, seed=1)) == list(rows.select(8, seed=1)) != list(rows.select(8, seed=2))
    assert rows.select(1000) is rows
    assert all(isinstance(weight, float) for weight in rows[0].loss_weights)
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.skipif(not BANKING77.is_dir(), reason=f"Banking77's csv files are not at {BANKING77}")
def test_banking77(make_tokenizer: MakeTokenizer) -> None:
    config = DataConfig(
        train=Source(path=str(BANKING77 / "train.csv")),
        test=Source(path=str(BANKING77 / "test.csv")),
        columns={"label": "category"},
    )
    data = load_data(config, make_tokenizer())
    assert data.labels is not None
    assert len(data.labels) == 77
    assert (len(data.train) + len(data.validation), len(data.test)) == (10_003, 3_080)
    assert set((data.report.splits["test"].labels or {}).values()) == {40}
    train = data.report.splits["train"]
    assert (train.empty, train.over_long, train.truncated) == (0, 0, 0)
