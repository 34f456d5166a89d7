"""Bodies of two megabytes, or nearly, that make a server work as much as they can: (name, path, body)."""

from __future__ import annotations

import json
from collections.abc import Iterator

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MOST = 2 * 2**20 - 200


def filled(before: str, item: str, after: str) -> bytes:
    """`item` as often as fits, with commas between."""
    count = (MOST - len(before) - len(after)) // (len(item) + 1)
    return (before + ",".join([item] * count) + after).encode()


def numbered(before: str, item: str, after: str, count: int) -> bytes:
    """`item` with a number in each, in the place of `#`."""
    return (before + ",".join(item.replace("#", str(number)) for number in range(count)) + after).encode()


def worst_bodies() -> Iterator[tuple[str, str, bytes]]:
    """Wrong, and right ones."""
    messages, parts = '{"model":"bank","messages":[', '{"model":"bank","messages":[{"role":"user","content":['
    prompt, stop = '{"model":"bank","prompt":[', '{"model":"bank","prompt":"hi","stop":['
    for item in ("0", "{}", '"a"', "null"):
        yield f"messages {item}", CHAT, filled(messages, item, "]}")
        yield f"parts {item}", CHAT, filled(parts, item, "]}]}")
        yield f"prompt {item}", TEXT, filled(prompt, item, "]}")
        yield f"stop {item}", TEXT, filled(stop, item, "]}")
    message, part = '{"role":"user","content":"a"}', '{"type":"text","text":"a"}'
    yield "messages", CHAT, filled(messages, message, "]}")
    yield "messages that fit", CHAT, (messages + ",".join([message] * 4096) + "]}").encode()
    yield (
        "messages of long texts",
        CHAT,
        (messages + ",".join([message.replace("a", "b" * 480)] * 4096) + "]}").encode(),
    )
    yield "parts", CHAT, filled(parts, part, "]}]}")
    several = '{"role":"user","content":[' + ",".join([part] * 3) + "]}"
    yield "messages of parts that fit", CHAT, (messages + ",".join([several] * 4000) + "]}").encode()
    yield "a part with keys", CHAT, numbered(parts + '{"type":"text","text":"a",', '"k#":1', "}]}]}", 170_000)
    yield "unknown keys", TEXT, numbered('{"model":"bank","prompt":"hi",', '"k#":1', "}", 170_000)
    yield "null keys", TEXT, numbered('{"model":"bank","prompt":"hi",', '"k#":null', "}", 130_000)
    yield "fewer unknown keys", TEXT, numbered('{"model":"bank","prompt":"hi",', '"k#":1', "}", 60_000)
    yield "fewer null keys", TEXT, numbered('{"model":"bank","prompt":"hi",', '"k#":null', "}", 60_000)
    yield "the same key", TEXT, filled('{"model":"bank",', '"a":1', "}")
    yield "a long key", TEXT, b'{"model":"bank","prompt":"hi","' + b"k" * (MOST - 100) + b'":1}'
    yield "metadata", TEXT, numbered('{"model":"bank","prompt":"hi","metadata":{', '"k#":1', "}}", 60_000)
    yield "logit_bias", TEXT, numbered('{"model":"bank","prompt":"hi","logit_bias":{', '"#":1', "}}", 60_000)
    yield "prediction", CHAT, numbered(messages + message + '],"prediction":{', '"#":[1]', "}}", 30_000)
    yield "deep lists", TEXT, filled('{"model":"bank","prompt":[', "[" * 150 + "]" * 150, "]}")
    yield "deep unknown lists", TEXT, filled('{"model":"bank","x":[', "[" * 150 + "]" * 150, "]}")
    yield "deep objects", TEXT, filled('{"model":"bank","x":[', '{"":' * 150 + "0" + "}" * 150, "]}")
    yield "too deep", TEXT, b"[" * MOST
    yield "no end", TEXT, b'{"model":"bank","prompt":"' + b"a" * MOST
    yield "one-token prompts", TEXT, filled(prompt, "[7]", "]}")
    yield "one-letter prompts", TEXT, filled(prompt, '"a"', "]}")
    yield "a prompt of tokens", TEXT, filled(prompt, "7", "]}")
    yield "a prompt of large tokens", TEXT, filled(prompt, "151643", "]}")
    yield "a last token that is wrong", TEXT, filled(prompt, "7", ",-1]}")
    yield "large numbers", TEXT, filled(prompt, "9" * 4000, "]}")
    yield "a prompt", TEXT, json.dumps({"model": "bank", "prompt": "a, b " * (MOST // 6)}).encode()
    yield "an escaped prompt", TEXT, b'{"model":"bank","prompt":"' + b"\\u00fc" * (MOST // 7) + b'"}'
    yield "a prompt of quotes", TEXT, b'{"model":"bank","prompt":"' + b'\\"' * (MOST // 3) + b'"}'
    yield "a prompt of brackets", CHAT, (messages + message.replace("a", "[{" * (MOST // 3)) + "]}").encode()
    yield "a model", TEXT, b'{"prompt":"hi","model":"' + b"a" * (MOST - 100) + b'"}'
    choices = '{"model":"bank","prompt":"hi","n":16,"structured_outputs":{"choice":['
    yield "long choices", TEXT, numbered(choices, '"#' + "c" * 2000 + '"', "]}}", 1024)
    yield "short choices", TEXT, numbered(choices, '"#"', "]}}", 200_000)
    yield "choices that fit", TEXT, numbered(choices, '"#' + "c" * 58 + '"', "]}}", 1024)
    yield "long stops", TEXT, numbered(stop, '"#' + "s" * 200 + '"', "]}", 64)
