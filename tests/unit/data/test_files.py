"""Values of files keep their text, and what is wrong with a file is said in its terms."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankloom.config import parse
from rankloom.config.data import DataConfig
from rankloom.data import TaskData, load_data
from rankloom.data.messages import read_messages
from rankloom.errors import DataError

MakeTokenizer = Callable[..., Any]


def load(tokenizer: Any, file: Path | str, **settings: Any) -> TaskData:
    return load_data(parse(DataConfig, {"train": str(file), **settings}), tokenizer)


def texts(data: TaskData, tokenizer: Any) -> list[str]:
    """All rows, in the order of their texts."""
    return sorted(tokenizer.decode(row.input_ids) for rows in (data.train, data.validation, data.test) for row in rows)


def lines(rows: list[Any]) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def completions(data: TaskData) -> set[str]:
    return {row.completion for rows in (data.train, data.validation, data.test) for row in rows}


WRITTEN = ["5.0", "1.50", "1e3", "12345678901234567890123", "9007199254740993", "-0.10", "true", "7"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "JSONL.GZ"])
def test_json_values_keep_their_text(make_tokenizer: MakeTokenizer, tmp_path: Path, kind: str) -> None:
    rows = [f'{{"prompt": "q {i}", "completion": {value}}}' for i, value in enumerate([*WRITTEN, "null", "NaN"])]
    rows += [
        json.dumps({"prompt": f"d {text}", "completion": text})
        for text in ("2024-01-02", "2024-01-02T03:04:05Z", "007")
    ]
    text = "\ufeff" + (f"[{', '.join(rows)}]" if kind == "json" else "\r\n\n".join(rows))
    file = tmp_path / f"rows.{kind}"
    file.write_bytes(gzip.compress(text.encode()) if kind.lower().endswith("gz") else text.encode())
    data = load(make_tokenizer(), file)
    assert completions(data) == {*WRITTEN, "2024-01-02", "2024-01-02T03:04:05Z", "007"}
    assert data.report.splits["train"].empty == 2


def test_mixed_columns_and_missing_keys(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "x"},
        {"prompt": 3, "completion": 2.5},
        {"completion": "y"},
        {"prompt": "\0b", "completion": "z"},
    ]
    rows += [{"prompt": "c\u2028d", "completion": "w", "more": {"a": 1}}]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    data = load(make_tokenizer(), tmp_path / "a.jsonl")
    assert completions(data) == {"x", "2.5", "z", "w"}
    assert "train: 1 column(s) are not read: 'more'" in data.report.warnings


def test_nested_values_are_as_in_the_file(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    """Arrow would give every call the arguments of all others, empty, and read texts as dates."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for t in m.tool_calls or [] %}"
        "{{ t.function | tojson }}"
        "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    arguments = [{"day": "2024-01-02"}, {"n": 12345678901234567890}, {"x": 5.0, "y": None}, {}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q {i}"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": each}}]},
            ]
        }
        for i, each in enumerate(arguments)
    ]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    found = {json.dumps({"name": "f", "arguments": each}) for each in arguments}
    assert completions(load(tokenizer, tmp_path / "a.jsonl")) == found


def test_parquet_values(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    values = {
        "dates": [datetime.date(2024, 1, i + 1) for i in range(4)],
        "decimals": [Decimal(f"1.{i}0") for i in range(4)],
        "large": [2**53 + 1 + i if i else None for i in range(5)],
    }
    for name, column in values.items():
        pq.write_table(
            pa.table({"prompt": [f"q {i}" for i in range(len(column))], "completion": column}), tmp_path / "a.parquet"
        )
        assert completions(load(tokenizer, tmp_path / "a.parquet")) == {
            str(each) for each in column if each is not None
        }, name
    pd.DataFrame(
        {
            "messages": [
                [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a", "weight": 1}]
                for i in range(4)
            ]
        }
    ).to_parquet(tmp_path / "b.parquet")
    assert completions(load(tokenizer, tmp_path / "b.parquet")) == {"a"}
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), tmp_path / "c.parquet"
    )
    short = pa.array([0.1, 2.4, 5.0, float("nan")], pa.float32())
    pq.write_table(pa.table({"text": list("abcd"), "label": short}), tmp_path / "e.parquet")
    assert completions(load(tokenizer, tmp_path / "e.parquet")) == {"0.1", "2.4", "5"}
    pq.write_table(pa.table({"prompt": ["\0[1]", "\0b", "c"], "completion": list("abc")}), tmp_path / "f.parquet")
    assert any("\0[1]" in text for text in texts(load(tokenizer, tmp_path / "f.parquet"), tokenizer))
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "label", "label"])
    pq.write_table(twice, tmp_path / "g.parquet")
    with pytest.raises(DataError, match=r"g.parquet has the column 'label' more than once"):
        load(tokenizer, tmp_path / "g.parquet")
    times = pd.to_datetime(["2024-01-02"] * 3)
    pd.DataFrame({"prompt": ["a", "b", "c"], "completion": times}).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row 1: completion must be text, found the point in time '2024-01-02"):
        load(tokenizer, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"c.parquet has no rows"):
        load(tokenizer, tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl can't be read as json: it is not UTF-8 (line 1); save it"),
        ("a.csv", b"text,label\nb,c\ncaf\xe9,a\n", "a.csv can't be read as csv: it is not UTF-8 (line 3); save it"),
        ("a.csv", "text,label\nb,c\n".encode("utf-16"), "it is not UTF-8 but UTF-16; save it as UTF-8"),
        ("a.jsonl", lines([{"text": "b"}]).encode("utf-16"), "it is not UTF-8 but UTF-16; save it as UTF-8"),
        ("a.csv", b"text;label\nq, please, now;b\n", "it is separated by ';', not by commas; save it with commas"),
        ("a.csv", b"text;label\nq;b\n", "it is separated by ';', not by commas"),
        ("a.csv", b"text\tlabel\nq\tb\n", "separated by tabs, not by commas; save it with commas, or name it .tsv"),
        ("a.tsv", b"text;label\nq;b\n", "separated by ';', not by tabs"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl can't be read as json: line 2: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "line 2: expected an object such as"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "line 2: it holds half of a surrogate pair"),
        ("a.json", b"[" * 100_000, "can't be read as json"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}', "line 2: the key 'text' occurs more than once"),
        ("a.csv", b"\n\n", "a.csv has no rows"),
        ("a.csv", b"text, label\nq,b\n", "the format classification would read these columns without the capitals or "
         "spaces in their names; rename with data.columns={label: ' label'}, or set data.format"),
        ("a.csv", b"Prompt,Completion\nq,b\n", "data.columns={prompt: 'Prompt', completion: 'Completion'}"),
        ("a.csv", b"instruction,output,Input\nq,b,c\n", "data.columns={input: 'Input'}"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(
    make_tokenizer: MakeTokenizer, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(make_tokenizer(), tmp_path / name)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("data.train: ")


def test_tabs_and_the_kind_of_a_file(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer, content = make_tokenizer(), "text\tlabel,\n" + "".join(f"q, {i}\ta\n" for i in range(6))
    for name in ("a.tsv", "a.csv"):  # the same bytes
        (tmp_path / name).write_text(content)
    assert completions(load(tokenizer, tmp_path / "a.tsv", columns={"label": "label,"})) == {"a"}
    with pytest.raises(DataError, match="no format fits"):
        load(tokenizer, tmp_path / "a.csv")


NAMES = ["train[1].csv", "v [2024]/x.csv", "dir*/x.csv", "we?rd.csv", "a{b}.csv", "y[!a].jsonl", "p%25 #1.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_was_named_is_read(make_tokenizer: MakeTokenizer, tmp_path: Path, name: str) -> None:
    tokenizer = make_tokenizer()
    others = ("train1.csv", "v 2/x.csv", "dirs/x.csv", "weird.csv", "ab.csv", "yb.jsonl", "p25.parquet")
    for file, text in [*((tmp_path / other, "wrong") for other in others), (tmp_path / name, "right")]:
        file.parent.mkdir(exist_ok=True)
        rows = pd.DataFrame([{"prompt": f"{text} {i}", "completion": "a"} for i in range(6)])
        if file.suffix == ".parquet":
            rows.to_parquet(file)
        else:
            file.write_text(
                rows.to_csv(index=False) if file.suffix == ".csv" else rows.to_json(orient="records", lines=True)
            )
    found = texts(load(tokenizer, tmp_path / name), tokenizer)
    assert len(found) == 6
    assert "wrong" not in "".join(found)
    if "/" in name:  # a pattern in a folder of that name
        assert texts(load(tokenizer, (tmp_path / name).parent / "*.csv"), tokenizer) == found


def row_of(tokenizer: Any, tmp_path: Path, row: dict[str, Any], **settings: Any) -> str:
    (tmp_path / "a.jsonl").write_text(
        lines(
            [{key: json.loads(json.dumps(value).replace("#", str(i))) for key, value in row.items()} for i in range(4)]
        )
    )
    data = load(tokenizer, tmp_path / "a.jsonl", **settings)
    assert not [line for line in data.report.warnings if "not read" in line]
    return texts(data, tokenizer)[0]


def test_known_formats_are_read_fully(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    expected = "<|user|>sum up 0\n\nTHE TEXT<|end|>\n<|assistant|>short<|end|>"
    for rest in ({"input": "THE TEXT", "output": "short"}, {"context": "THE TEXT", "response": "short"}):
        assert row_of(tokenizer, tmp_path, {"instruction": "sum up #", **rest}) == expected
    assert (
        row_of(
            tokenizer,
            tmp_path,
            {"task": "sum up #", "more": "THE TEXT", "response": "short"},
            columns={"instruction": "task", "input": "more"},
        )
        == expected
    )
    assert row_of(tokenizer, tmp_path, {"instruction": "sum up #", "input": "", "output": "short"}) == expected.replace(
        "\n\nTHE TEXT", ""
    )
    asked = "<|system|>be brief<|end|>\n<|user|>hi 0<|end|>\n<|assistant|>yes<|end|>"
    system, user, answer = (
        {"role": role, "content": text}
        for role, text in (("system", "be brief"), ("user", "hi #"), ("assistant", "yes"))
    )
    for row in (
        {"system": "be brief", "prompt": "hi #", "completion": "yes"},
        {"prompt": [system, user], "completion": [answer]},
        {"system": "be brief", "messages": [user, answer]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, user, answer]},
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "hi #"},
                {"from": "gpt", "value": "yes"},
            ]
        },
    ):
        assert row_of(tokenizer, tmp_path, row) == asked


def test_trl_rows_train_the_completion_alone(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no"))
    ]
    (tmp_path / "a.jsonl").write_text(
        lines(
            [{"prompt": [{"role": "user", "content": f"{i}"}, *turns[1:3]], "completion": turns[3:]} for i in range(4)]
        )
    )
    row = load(tokenizer, tmp_path / "a.jsonl").train[0]
    assert tokenizer.decode([t for t, w in zip(row.input_ids, row.loss_weights, strict=True) if w]) == "no<|end|>"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_train_on_all_is_all_of_a_trl_row(make_tokenizer: MakeTokenizer, tmp_path: Path, template: str) -> None:
    prompt = [said("system"), said("user"), said("assistant"), said("user")]
    rows = [{"prompt": [*prompt, said("user", f"{i}")], "completion": [ANSWER]} for i in range(4)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    row = load(make_tokenizer(), tmp_path / "a.jsonl", train_on="all", template=template).train[0]
    assert list(row.loss_weights) == [0] + [1] * (len(row.input_ids) - 1)
    rows = [{"messages": [{**said("user", f"{i}"), "weight": 0}, ANSWER]} for i in range(4)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    with pytest.raises(DataError, match="weight 0"):
        load(make_tokenizer(), tmp_path / "a.jsonl", train_on="all", template=template)


def said(role: str, content: Any = "a") -> dict[str, Any]:
    return {"role": role, "content": content}


def called(function: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


ANSWER = said("assistant")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("human"), said("gpt")], "no turn has the role assistant; roles here: human, gpt; rename"),
        ([said("User"), said("Assistant")], "roles here: User, Assistant"),
        ([said("user", [{"type": "image_url"}]), ANSWER], "content is a list of parts, of which image_url can't"),
        ([said("user", {"a": 1}), ANSWER], "messages.content must be text, found dict"),
        ([said("user"), called({"name": "f", "arguments": "{"})], "the arguments of 'f' must be a JSON object"),
        ([said("user"), called({"id": 1})], "messages.tool_calls must be a list of"),
        ([said("user"), {**ANSWER, "tool_calls": 3}], "messages.tool_calls must be a list of"),
        ([said("user"), {**ANSWER, "tool_calls": "f(1)"}], "found 'f(1)'"),
        ([said("user"), {**ANSWER, "function_call": "f"}], "messages.tool_calls must be a list of"),
        ([said("user"), called({"name": "f"})], "'a call'; change the row, or try a model whose template shows"),
        ("hello", "messages must be a list of {role: ..., content: ...}"),
    ],
)  # fmt: skip
def test_messages_that_can_not_be_trained_on(
    make_tokenizer: MakeTokenizer, tmp_path: Path, messages: Any, expected: str
) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"messages": messages}] * 4))
    with pytest.raises(DataError) as caught:
        load(make_tokenizer(), tmp_path / "a.jsonl")
    assert f"data.train: row 1: {expected}" in str(caught.value) or expected in str(caught.value)
    assert "dates" not in str(caught.value)


def test_few_rows_that_fit(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        lines([{"prompt": f"{i}", "completion": "word " * (1 if not i else 99)} for i in range(12)])
    )
    with pytest.raises(DataError, match=r"only 1 of 12 rows fits data.max_length=64") as caught:
        load(make_tokenizer(), tmp_path / "a.jsonl", max_length=64)
    assert "add rows" not in str(caught.value)


def test_labels_that_are_nearly_the_same(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    labels = ["yes", " yes", "YES", "no"]
    (tmp_path / "a.jsonl").write_text(lines([{"text": f"q {i}", "label": labels[i % 4]} for i in range(24)]))
    warnings = load(make_tokenizer(), tmp_path / "a.jsonl").report.warnings
    assert (
        "the labels ' yes', 'YES', 'yes' differ only in capitals or spaces, and count as different classes" in warnings
    )


def test_a_turn_that_says_nothing_carries_no_loss(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{"messages": [said("user"), said("assistant", None), said("user", f"{i}"), ANSWER]} for i in range(4)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    data = load(tokenizer, tmp_path / "a.jsonl")
    row = data.train[0]
    assert tokenizer.decode([t for t, w in zip(row.input_ids, row.loss_weights, strict=True) if w]) == "a<|end|>"
    assert any("without text, which carries no loss" in line for line in data.report.warnings)


def test_what_is_no_regular_file(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a.csv' is not a regular file, nor a link to one"):
        load(make_tokenizer(), tmp_path / "a.csv")


def test_results_of_tools_and_calls_in_json() -> None:
    call = json.dumps({"name": "f", "arguments": '{"a": 1}'})
    given = [
        {"role": "assistant", "function_call": call},
        {"role": "assistant", "tool_calls": json.dumps({"function": {"name": "f", "arguments": {"a": 1}}})},
        {"role": "tool", "content": [{"found": 5.0}]},
        {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    first, second, result, parts = read_messages(given, "row 1")
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert first["tool_calls"] == second["tool_calls"] == calls
    assert (result["content"], parts["content"]) == ('[{"found": 5.0}]', "ab")
