"""One HTTP request's completions on an engine: fitted to the context, merged, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from echo_engine import EchoEngine
from rankloom.engine.jobs import CompletionJob, ContextError, JobProgress, Prompt, run
from rankloom.engine.protocol import ChatPrompt, Delta, Engine, Grammar, OpenChat, Request, Sampling
from rankloom.errors import RegistryError, RequestError


async def done(engine: EchoEngine, *prompts: Prompt, **work: object) -> dict[int, str]:
    """The completions' texts."""
    texts: dict[int, str] = {}
    asked = CompletionJob("w", "a@1", prompts, Sampling(max_tokens=400), **work)  # type: ignore[arg-type]
    async for progress in run(engine, asked):
        for index, delta in progress.deltas:
            texts[index] = texts.get(index, "") + delta.text
    return texts


def test_prompts_times_n_in_order() -> None:
    engine = EchoEngine()
    assert isinstance(engine, Engine)
    texts = asyncio.run(done(engine, "one", (66, 67), ChatPrompt(({"role": "user", "content": "hi"},)), n=2))
    expected = ["a@1|one|", "a@1|one|", "a@1|BC|", "a@1|BC|", "a@1|user=hi;|", "a@1|user=hi;|"]
    assert [texts[index] for index in range(6)] == expected


def test_max_tokens_is_what_was_asked_or_what_fits() -> None:
    engine = EchoEngine()
    assert asyncio.run(done(engine, "x" * 20, max_tokens=5)) == {0: "a@1|x"}
    assert len(asyncio.run(done(engine, "x" * 200))[0]) == 56  # as many as there is room for
    assert len(asyncio.run(done(engine, "x" * 20, context=30))[0]) == 10
    assert len(asyncio.run(done(engine, "x" * 251, max_tokens=5))[0]) == 5
    for prompt, most in (("x" * 252, 5), ("x" * 256, None), ("x" * 9999, None)):
        with pytest.raises(ContextError, match=r"maximum context length is 256 tokens.*in the prompt"):
            asyncio.run(done(engine, prompt, max_tokens=most))
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(done(engine, ""))


class Asked(EchoEngine):
    """Remembers its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        async for delta in super().generate(request):
            yield delta


@pytest.mark.parametrize(
    ("prompts", "seed", "expected"),
    [
        (("one",), 7, [7, 8, 9]),
        (("one", "two"), 7, [7, 8, 9, 7, 8, 9]),  # as each alone
        (("one", "two", "one"), 7, [7, 8, 9, 7, 8, 9, 10, 11, 12]),  # the same prompt again is further draws
        (("one",), 2**63 - 1, [2**63 - 1, 0, 1]),
        (("one",), None, [None] * 3),
    ],
)
def test_each_completion_of_a_prompt_is_another_draw(
    prompts: tuple[str, ...], seed: int | None, expected: list[int | None]
) -> None:
    async def ask() -> list[int | None]:
        engine = Asked()
        async for _ in run(engine, CompletionJob("w", None, prompts, Sampling(seed=seed), n=3, tenant="t")):
            pass
        assert {request.tenant for request in engine.requests} == {"t"}
        return [request.sampling.seed for request in sorted(engine.requests, key=lambda r: int(r.id.split("-")[1]))]

    assert asyncio.run(ask()) == expected


def test_one_failure_ends_them_all() -> None:
    engine = EchoEngine(broken=["a@1"])
    with pytest.raises(RegistryError, match="does nothing"):
        asyncio.run(done(engine, "forever", "x"))
    assert not engine.under_way


def test_closing_ends_the_engines_requests() -> None:
    async def begin_and_leave() -> EchoEngine:
        engine = EchoEngine()
        stream = run(engine, CompletionJob("w", None, ("forever",), Sampling(max_tokens=10_000), n=2, max_tokens=200))
        assert isinstance(await anext(stream), JobProgress)
        assert engine.under_way == {"w-0", "w-1"}
        await stream.aclose()  # type: ignore[attr-defined]
        return engine

    engine = asyncio.run(begin_and_leave())
    assert not engine.under_way
    assert sorted(engine.cancelled) == ["w-0", "w-1"]


def test_what_has_come_by_then_comes_together() -> None:
    async def read_slowly() -> list[int]:
        counts = []
        async for progress in run(EchoEngine(), CompletionJob("w", None, ("x" * 50,), Sampling(max_tokens=60))):
            counts.append(len(progress.deltas))
            await asyncio.sleep(0.05)
        return counts

    counts = asyncio.run(read_slowly())
    assert sum(counts) == 56
    assert len(counts) < 10


def test_a_template_is_given_the_names_of_who_speaks() -> None:
    class Naming(EchoEngine):
        def open_chat(self, prompt: ChatPrompt, grammar: Grammar | None) -> OpenChat:
            return OpenChat(self.tokenize(";".join(message.get("name", "-") for message in prompt.messages)))

    said = [("user", "hi", "ann"), ("assistant", "yes", None), ("user", "go on", "bob")]
    talk = ChatPrompt(tuple({"role": r, "content": c} | ({"name": n} if n else {}) for r, c, n in said))
    assert asyncio.run(done(Naming(), talk)) == {0: "a@1|ann;-;bob|"}
