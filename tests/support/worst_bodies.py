"""Bodies of almost two megabytes that make a server work as hard as possible: (name, path, body)."""

from __future__ import annotations

import json
from collections.abc import Iterator

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
MOST = 2 * 2**20 - 200


def fill(before: str, item: str, after: str) -> bytes:
    """Return a body that repeats `item`, separated by commas, as often as fits."""
    count = (MOST - len(before) - len(after)) // (len(item) + 1)
    return (before + ",".join([item] * count) + after).encode()


def fill_numbered(before: str, item: str, after: str, count: int) -> bytes:
    """Return a body of `count` items, with a number in place of `#` in each."""
    return (before + ",".join(item.replace("#", str(number)) for number in range(count)) + after).encode()


def worst_bodies() -> Iterator[tuple[str, str, bytes]]:
    """Yield invalid and valid bodies."""
    messages, parts = '{"model":"bank","messages":[', '{"model":"bank","messages":[{"role":"user","content":['
    prompt, stop = '{"model":"bank","prompt":[', '{"model":"bank","prompt":"hi","stop":['
    for item in ("0", "{}", '"a"', "null"):
        yield f"messages {item}", CHAT, fill(messages, item, "]}")
        yield f"parts {item}", CHAT, fill(parts, item, "]}]}")
        yield f"prompt {item}", TEXT, fill(prompt, item, "]}")
        yield f"stop {item}", TEXT, fill(stop, item, "]}")
    message, part = '{"role":"user","content":"a"}', '{"type":"text","text":"a"}'
    yield "messages", CHAT, fill(messages, message, "]}")
    yield "messages that fit", CHAT, (messages + ",".join([message] * 4096) + "]}").encode()
    yield (
        "messages of long texts",
        CHAT,
        (messages + ",".join([message.replace("a", "b" * 480)] * 4096) + "]}").encode(),
    )
    yield "parts", CHAT, fill(parts, part, "]}]}")
    several = '{"role":"user","content":[' + ",".join([part] * 3) + "]}"
    yield "messages of parts that fit", CHAT, (messages + ",".join([several] * 4000) + "]}").encode()
    yield "a part with keys", CHAT, fill_numbered(parts + '{"type":"text","text":"a",', '"k#":1', "}]}]}", 170_000)
    yield "unknown keys", TEXT, fill_numbered('{"model":"bank","prompt":"hi",', '"k#":1', "}", 170_000)
    yield "null keys", TEXT, fill_numbered('{"model":"bank","prompt":"hi",', '"k#":null', "}", 130_000)
    yield "fewer unknown keys", TEXT, fill_numbered('{"model":"bank","prompt":"hi",', '"k#":1', "}", 60_000)
    yield "fewer null keys", TEXT, fill_numbered('{"model":"bank","prompt":"hi",', '"k#":null', "}", 60_000)
    yield "the same key", TEXT, fill('{"model":"bank",', '"a":1', "}")
    yield "a long key", TEXT, b'{"model":"bank","prompt":"hi","' + b"k" * (MOST - 100) + b'":1}'
    yield "metadata", TEXT, fill_numbered('{"model":"bank","prompt":"hi","metadata":{', '"k#":1', "}}", 60_000)
    yield "logit_bias", TEXT, fill_numbered('{"model":"bank","prompt":"hi","logit_bias":{', '"#":1', "}}", 60_000)
    yield "prediction", CHAT, fill_numbered(messages + message + '],"prediction":{', '"#":[1]', "}}", 30_000)
    given = '{"model":"bank","input":['
    for item in ("0", "{}", '"a"', "[7]", message):
        yield f"items {item}", RESPONSES, fill(given, item, "]}")
        yield f"embedded {item}", EMBEDDINGS, fill(given, item, "]}")
    yield "items that fit", RESPONSES, (given + ",".join([message] * 4095) + "]}").encode()
    said = '{"role":"user","content":[' + ",".join(['{"type":"input_text","text":"a"}'] * 3) + "]}"
    yield "items of parts that fit", RESPONSES, (given + ",".join([said] * 4000) + "]}").encode()
    call = '{"type":"function_call","call_id":"1","name":"f","arguments":"{}"}'
    yield "items of calls that fit", RESPONSES, (given + ",".join([call] * 128) + "," + message + "]}").encode()
    yield "items of calls", RESPONSES, fill(given, call, "]}")
    yield "embedded texts that fit", EMBEDDINGS, (given + ",".join(['"' + "a" * 300 + '"'] * 2048) + "]}").encode()
    tokens = "[" + ",".join("7" * 100) + "]"
    yield "embedded tokens that fit", EMBEDDINGS, (given + ",".join([tokens] * 2048) + "]}").encode()
    yield "deep lists", TEXT, fill('{"model":"bank","prompt":[', "[" * 150 + "]" * 150, "]}")
    yield "deep unknown lists", TEXT, fill('{"model":"bank","x":[', "[" * 150 + "]" * 150, "]}")
    yield "deep objects", TEXT, fill('{"model":"bank","x":[', '{"":' * 150 + "0" + "}" * 150, "]}")
    yield "too deep", TEXT, b"[" * MOST
    yield "no end", TEXT, b'{"model":"bank","prompt":"' + b"a" * MOST
    yield "one-token prompts", TEXT, fill(prompt, "[7]", "]}")
    yield "one-letter prompts", TEXT, fill(prompt, '"a"', "]}")
    yield "a prompt of tokens", TEXT, fill(prompt, "7", "]}")
    yield "a prompt of large tokens", TEXT, fill(prompt, "151643", "]}")
    yield "a last token that is wrong", TEXT, fill(prompt, "7", ",-1]}")
    yield "large numbers", TEXT, fill(prompt, "9" * 4000, "]}")
    yield "a prompt", TEXT, json.dumps({"model": "bank", "prompt": "a, b " * (MOST // 6)}).encode()
    yield "an escaped prompt", TEXT, b'{"model":"bank","prompt":"' + b"\\u00fc" * (MOST // 7) + b'"}'
    yield "a prompt of quotes", TEXT, b'{"model":"bank","prompt":"' + b'\\"' * (MOST // 3) + b'"}'
    yield "a prompt of brackets", CHAT, (messages + message.replace("a", "[{" * (MOST // 3)) + "]}").encode()
    yield "a model", TEXT, b'{"prompt":"hi","model":"' + b"a" * (MOST - 100) + b'"}'
    choices = '{"model":"bank","prompt":"hi","n":16,"structured_outputs":{"choice":['
    yield "long choices", TEXT, fill_numbered(choices, '"#' + "c" * 2000 + '"', "]}}", 1024)
    yield "short choices", TEXT, fill_numbered(choices, '"#"', "]}}", 200_000)
    yield "choices that fit", TEXT, fill_numbered(choices, '"#' + "c" * 58 + '"', "]}}", 1024)
    yield "long stops", TEXT, fill_numbered(stop, '"#' + "s" * 200 + '"', "]}", 64)
