"""From messages to tokens with loss weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import decoders, pre_tokenizers, processors

from rankloom.config.data import DataConfig
from rankloom.data.render import EMPTY, OK, OVER_LONG, TRUNCATED, Renderer
from rankloom.errors import ConfigError, DataError

MakeTokenizer = Callable[..., Any]


THINKING = (  # as thinking models do: only the last turn keeps what was thought
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(tokenizer: Any, format: str, rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    renderer = Renderer(tokenizer, DataConfig(**settings), format, "data.train")
    columns = renderer({name: [row[name] for row in rows] for name in rows[0]}, list(range(len(rows))))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def pair(prompt: str = "what is my balance?", completion: str = "check balance") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": completion}]


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"messages": [{"role": "system", "content": system}] * bool(system) + turns}]


def trained(row: dict[str, Any]) -> list[int]:
    return [token for token, weight in zip(row["input_ids"], row["loss_weights"], strict=True) if weight]


def with_bos(tokenizer: Any) -> Any:
    tokenizer.bos_token = "<|system|>"
    bos = ("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[bos]
    )
    assert tokenizer.encode("a")[0] == bos[1]
    return tokenizer


def test_parity_with_the_chat_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    (row,) = render(tokenizer, "completion", pair(), instruction="answer with a label")
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "answer with a label"}, {"role": "user", "content": "what is my balance?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    # generation starts from the ids that training saw, and loss is on the completion with its end, no more
    assert row["input_ids"][: row["prompt_length"]] == tokenizer.encode(prompt, add_special_tokens=False)
    assert trained(row) == tokenizer.encode("check balance<|end|>", add_special_tokens=False)
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}check balance<|end|>"
    assert (row["status"], row["completion"]) == (OK, "check balance")


def test_the_plain_template(make_tokenizer: MakeTokenizer) -> None:
    for tokenizer, settings in ((make_tokenizer(chat=False), {}), (make_tokenizer(), {"template": "plain"})):
        (row,) = render(tokenizer, "completion", pair(), instruction="answer", **settings)
        assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == "answer\nwhat is my balance?\n"
        assert tokenizer.decode(trained(row)) == "check balance<|end|>"
        assert trained(row) == row["input_ids"][row["prompt_length"] :]


def test_formats_agree(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    rows = [
        render(tokenizer, "completion", pair("a b", "yes")),
        render(tokenizer, "instruction", [{"instruction": "a b", "response": "yes"}]),
        render(tokenizer, "classification", [{"text": "a b", "label": "yes"}]),
        render(tokenizer, "chat", chat("a b", "yes")),
    ]
    assert all(row == rows[0] for row in rows)


def test_a_chat_template_without_an_end_gets_one(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (row,) = render(tokenizer, "completion", pair())
    assert tokenizer.decode(trained(row)) == "check balance<|end|>"


@pytest.mark.parametrize("has_template", [True, False])
def test_every_assistant_turn_carries_loss(make_tokenizer: MakeTokenizer, has_template: bool) -> None:
    tokenizer = make_tokenizer(chat=has_template)
    (row,) = render(tokenizer, "chat", chat("one", "yes", "two", "no", "three", "maybe"))
    assert tokenizer.decode(trained(row)) == "yes<|end|>no<|end|>maybe<|end|>"
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == "maybe<|end|>"
    if has_template:
        whole = tokenizer.apply_chat_template(
            chat("one", "yes", "two", "no", "three", "maybe")[0]["messages"], tokenize=False
        )
        assert tokenizer.decode(row["input_ids"]) == whole.rstrip()


def test_turns_that_the_template_rewrites_carry_no_loss(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    (row,) = render(tokenizer, "chat", chat("one", "<think>hm</think>yes", "two", "<think>so</think>no maybe"))
    assert tokenizer.decode(trained(row)) == "<think>so</think>no maybe<|end|>"
    assert "<|assistant|>yes<|end|>" in tokenizer.decode(row["input_ids"])
    assert row["skipped_turns"] == 1


def test_trailing_user_turns_are_left_out_and_unanswered_chats_are_empty(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert render(tokenizer, "chat", chat("one", "yes", "two")) == render(tokenizer, "chat", chat("one", "yes"))
    for rows in (chat("one"), chat(), chat("", "yes"), chat("one", " "), [{"messages": None}], chat(system="x")):
        assert [row["status"] for row in render(tokenizer, "chat", rows)] == [EMPTY]


def test_train_on_all(make_tokenizer: MakeTokenizer) -> None:
    (row,) = render(make_tokenizer(), "completion", pair(), train_on="all")
    assert row["loss_weights"] == [0] + [1] * (len(row["input_ids"]) - 1)


@pytest.mark.parametrize("kind", ["refuses", "ignores"])
def test_an_instruction_goes_into_the_user_turn_where_there_is_no_system_role(
    make_tokenizer: MakeTokenizer, kind: str
) -> None:
    tokenizer = make_tokenizer()
    loop = "{% for m in messages %}"
    what = "{{ raise_exception('no system') }}" if kind == "refuses" else "{% continue %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        loop, loop + "{% if m['role'] == 'system' %}" + what + "{% endif %}"
    )
    (row,) = render(tokenizer, "completion", pair(), instruction="be brief")
    assert "<|user|>be brief\n\nwhat is my balance?<|end|>" in tokenizer.decode(row["input_ids"])


def test_roles_that_the_template_refuses(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + (
        tokenizer.chat_template
    )
    with pytest.raises(DataError, match=r"row 1: .*user, assistant, user: roles must alternate"):
        render(tokenizer, "chat", chat("a", "b", "c", "d"))


def test_bos_is_there_once(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = with_bos(make_tokenizer(chat=False))
    bos = tokenizer.bos_token_id
    (row,) = render(tokenizer, "completion", pair())
    assert (row["input_ids"][0], row["input_ids"].count(bos)) == (bos, 1)
    (row,) = render(tokenizer, "completion", pair("my card was lost " * 30), max_length=32)
    assert (row["input_ids"][0], row["status"], len(row["input_ids"])) == (bos, TRUNCATED, 32)
    text = render(tokenizer, "text", [{"text": "my card was lost"}])[0]
    assert (text["input_ids"][0], text["prompt_length"]) == (bos, 1)
    tokenizer.chat_template = make_tokenizer().chat_template  # it writes none, so there is none
    (row,) = render(tokenizer, "completion", pair())
    assert row["input_ids"].count(bos) == 0


def test_a_tokenizer_that_puts_a_space_before_texts(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    (row,) = render(tokenizer, "completion", pair("a", "yes"))
    assert tokenizer.decode(row["input_ids"]).strip() == "a\nyes<|end|>"


def test_truncation_takes_the_start_of_the_prompt_alone(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    rows = [pair("my card was lost " * n, "transfer money to a friend")[0] for n in (1, 20)]
    short, long = render(tokenizer, "completion", rows, max_length=40)
    (whole,) = render(tokenizer, "completion", rows[1:])
    assert (short["status"], long["status"]) == (OK, TRUNCATED)
    assert long["input_ids"] == whole["input_ids"][-40:]
    assert trained(long) == trained(whole) == trained(short)
    assert long["input_ids"][long["prompt_length"] :] == trained(whole)
    assert long["prompt_digest"] == whole["prompt_digest"]


def test_a_completion_that_does_not_fit(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    rows = pair(completion="transfer money to a friend, please")
    size = len(trained(render(tokenizer, "completion", rows)[0]))
    assert [r["status"] for r in render(tokenizer, "completion", rows, max_length=size + 1)] == [TRUNCATED]
    assert [r["status"] for r in render(tokenizer, "completion", rows, max_length=size)] == [OVER_LONG]
    with pytest.raises(DataError, match=rf"row 1: its completion of {size} tokens.*max_length={size}"):
        render(tokenizer, "completion", rows, max_length=size, over_long="error")


def test_long_texts_become_chunks_without_losing_a_prediction(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    text = "the weather is fine today and the sun shines " * 9
    whole = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    for limit in (8, 9, len(whole) - 1, len(whole), 512):
        rows = render(tokenizer, "text", [{"text": text}], max_length=limit)
        assert all(len(row["input_ids"]) <= limit and row["loss_weights"][0] == 0 for row in rows)
        assert [token for row in rows for token in trained(row)] == whole[1:]
        assert rows[0]["input_ids"] == whole[:limit]


def test_label_table(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer, DataConfig(), "classification", "data.train")
    table = renderer.build_label_table(["pin", "card", "card_lost", None])
    assert list(table) == ["card", "card_lost", "pin"]
    (row,) = render(tokenizer, "classification", [{"text": "hello", "label": "card_lost"}])
    assert table["card_lost"] == row["input_ids"][row["prompt_length"] :]


def test_labels_that_become_the_same_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    with pytest.raises(DataError, match="'pin' and 'pin '"):
        Renderer(tokenizer, DataConfig(), "classification", "data.train").build_label_table(["pin", "card", "pin "])


def test_labels_are_kept_verbatim(make_tokenizer: MakeTokenizer) -> None:
    rows = [{"text": "a", "label": label} for label in ("007", 3, 4.0, True, float("nan"), None)]
    found = render(make_tokenizer(), "classification", rows)
    assert [row["completion"] for row in found] == ["007", "3", "4", "True", "", ""]


def test_wrong_values_name_the_row(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"data.train: row 2: prompt must be text, found list"):
        render(tokenizer, "completion", [*pair(), {"prompt": ["a"], "completion": "b"}])
    with pytest.raises(DataError, match=r"row 1: messages must be a list"):
        render(tokenizer, "chat", [{"messages": [{"who": "human", "value": "hi"}]}])


def test_settings_that_would_be_ignored(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(DataError, match=r"data.template: chat, but .* no chat template"):
        render(make_tokenizer(chat=False), "completion", pair(), template="chat")
    for name, value in (("template", "chat"), ("instruction", "be brief")):
        with pytest.raises(ConfigError, match=f"data.{name}: '{value}' does not apply to the format text"):
            render(make_tokenizer(), "text", [{"text": "a"}], **{name: value})
