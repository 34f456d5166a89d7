"""Where requests go: names, routes, canaries and replicas, without a server."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rankloom.config import parse
from rankloom.config.serve import JudgeConfig, RouteConfig
from rankloom.errors import AdapterNotFoundError
from rankloom.gateway.policy import (
    AdapterVersions,
    CanaryCounts,
    Catalogue,
    Decision,
    RoutingRequest,
    Target,
    decide_route,
    judge,
    rank_replicas,
)

SHELVES = {
    "bank": AdapterVersions((1, 2, 4), {"champion": 2, "canary": 4, "gone": 3}),
    "faq": AdapterVersions((1, 2)),
}


def catalogue(offered: tuple[str, ...] | None = None, **routes: dict[str, Any]) -> Catalogue:
    return Catalogue(
        base="org/base",
        adapters=SHELVES,
        offered=offered,
        routes={name: parse(RouteConfig, tree) for name, tree in routes.items()},
        loaded={"mine": Target("faq", 1)},
    )


def went(decision: Decision) -> list[str | None]:
    return [target.ref for target in decision.targets]


@pytest.mark.parametrize(
    ("model", "ref"),
    [
        ("org/base", None), ("base", None), ("bank", "bank@2"), ("bank@2", "bank@2"), ("bank@1", "bank@1"),
        ("bank@canary", "bank@4"),
        ("bank@latest", "bank@4"), ("faq", "faq@2"), ("mine", "faq@1"),
    ],
)  # fmt: skip
def test_a_name_means_an_exact_version(model: str, ref: str | None) -> None:
    assert decide_route(RoutingRequest(model, "r"), catalogue()) == Decision((Target(*_parts(ref)),))


def _parts(ref: str | None) -> tuple[Any, ...]:
    return (ref.split("@")[0], int(ref.split("@")[1])) if ref else ()


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("bnk", "`bank`"), ("bank@9", "`bank`"), ("bank@02", "`bank`"),
        ("bank@gone", ""), ("bank@canari", ""), ("base@1", ""), ("", ""),
        ("../etc/passwd", ""), ("/etc/passwd", ""), ("bank\0", ""), ("bank@1/../2", ""), ("bank@", ""), ("bank@@1", ""),
        ("x" * 100_000, ""), ("bank@" + "9" * 5000, ""), ("bank@١", ""), ("Org/Base", "`org/base`"),
    ],
)  # fmt: skip
def test_unknown_and_hostile_names_are_refused(model: str, near: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="does not exist") as caught:
        decide_route(RoutingRequest(model, "r"), catalogue())
    assert near in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("offered", "model", "ref"),
    [
        (("bank",), "bank@1", "bank@1"),  # a bare name offers every version
        (("bank@canary",), "bank@canary", "bank@4"),
        (("bank@canary",), "bank", "bank@4"),  # the bare name is what is offered of it
        (("bank@canary",), "bank@4", "bank@4"),  # the same version by its number
        (("bank@canary",), "bank@1", ""),
        (("bank@canary",), "bank@champion", ""),
        (("bank@canary",), "faq", ""),
        ((), "bank", ""),
        ((), "mine", "faq@1"),  # given at run time, whatever is offered
    ],
)
def test_only_what_is_offered_can_be_asked_for(offered: tuple[str, ...], model: str, ref: str) -> None:
    if ref:
        assert went(decide_route(RoutingRequest(model, "r"), catalogue(offered))) == [ref]
    else:
        with pytest.raises(AdapterNotFoundError):
            decide_route(RoutingRequest(model, "r"), catalogue(offered))


def test_models_are_listed_without_what_is_missing() -> None:
    known = catalogue(("bank@canary", "bank@gone", "nope"), front={"to": "bank"})
    assert known.list_models() == ["org/base", "front", "mine", "bank@canary"]
    assert catalogue().list_models() == ["org/base", "mine", "bank", "faq"]


def test_a_split_follows_its_weights() -> None:
    known = catalogue((), front={"split": {"bank@1": 3, "faq": 1, "base": 4}})
    counts = Counter(went(decide_route(RoutingRequest("front", str(i)), known))[0] for i in range(4000))
    shares = [counts[ref] / 4000 for ref in ("bank@1", "faq@2", None)]
    assert shares == pytest.approx([3 / 8, 1 / 8, 4 / 8], abs=0.03)


def test_a_canary_gets_its_share_while_the_aliases_differ() -> None:
    known = catalogue(front={"canary": {"adapter": "bank", "share": 0.2}})
    seen = Counter(
        (d.arm, d.targets[0].ref) for i in range(2000) if (d := decide_route(RoutingRequest("front", str(i)), known))
    )
    assert set(seen) == {("canary", "bank@4"), ("stable", "bank@2")}
    assert seen["canary", "bank@4"] / 2000 == pytest.approx(0.2, abs=0.03)
    for candidate in ("champion2", "gone"):  # an alias that is not there, and one that points to a removed version
        route = {"canary": {"adapter": "bank", "candidate": candidate, "share": 1}}
        assert decide_route(RoutingRequest("front", "r"), catalogue(front=route)) == Decision(
            (Target("bank", 2),), "front"
        )


def test_sticky_keeps_a_user_where_he_was() -> None:
    known = catalogue(front={"split": {"bank@1": 1, "faq": 1}, "sticky": True})
    for user in ("ann", "bob", "cid", "dee"):
        assert len({went(decide_route(RoutingRequest("front", str(i), user), known))[0] for i in range(20)}) == 1
    assert len({went(decide_route(RoutingRequest("front", "r", f"user {i}"), known))[0] for i in range(20)}) == 2
    assert len({went(decide_route(RoutingRequest("front", str(i)), known))[0] for i in range(20)}) == 2


def test_who_does_not_know_the_secret_can_not_pick_a_side() -> None:
    known = catalogue(front={"canary": {"adapter": "bank", "share": 0.5}, "sticky": True})

    def sides(secret: bytes) -> list[str | None]:
        return [
            decide_route(RoutingRequest("front", "r", f"user {i}"), replace(known, secret=secret)).arm
            for i in range(400)
        ]

    mine, others = sides(b"mine"), sides(b"other")
    assert mine == sides(b"mine")
    assert sum(a == b for a, b in zip(mine, others, strict=True)) / 400 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("base", "shown"), [("/srv/models/llama", "base"), ("~/llama", "base"), ("org/m", "org/m")])
def test_a_base_in_a_folder_is_told_without_its_path(base: str, shown: str) -> None:
    known = replace(catalogue(), base=base)
    assert (known.public_base, known.list_models()[0]) == (shown, shown)
    for name in (base, "base"):
        assert decide_route(RoutingRequest(name, "r"), known) == Decision((Target(),))
    with pytest.raises(AdapterNotFoundError) as caught:
        decide_route(RoutingRequest("bas", "r"), known)
    assert base == shown or base not in str(caught.value)


def test_a_header_rule_goes_before_everything() -> None:
    rules = [
        {"header": "X-Tier", "equals": "gold", "to": "bank@4"},
        {"header": "x-tier", "equals": "tin", "to": "base"},
    ]
    known = catalogue(front={"to": "faq", "rules": rules})
    assert went(decide_route(RoutingRequest("front", "r", headers={"x-tier": "gold"}), known)) == ["bank@4"]
    assert went(decide_route(RoutingRequest("front", "r", headers={"x-tier": "tin"}), known)) == [None]
    assert went(decide_route(RoutingRequest("front", "r", headers={"x-tier": "Gold"}), known)) == ["faq@2"]


def test_fallbacks_follow_in_order_without_what_is_missing() -> None:
    known = catalogue((), front={"to": "bank@9", "fallback": ["nope", "faq@1", "faq@1", "base"]})
    assert decide_route(RoutingRequest("front", "r"), known) == Decision((Target("faq", 1), Target()), "front")
    with pytest.raises(AdapterNotFoundError, match="`front` leads to no adapter"):
        decide_route(RoutingRequest("front", "r"), catalogue(front={"to": "bank@9"}))


def test_shadow_copies_a_share() -> None:
    known = catalogue(front={"to": "bank", "shadow": {"to": "faq", "share": 0.3}})
    copied = [decide_route(RoutingRequest("front", str(i)), known).shadow for i in range(2000)]
    assert set(copied) == {None, Target("faq", 2)}
    assert sum(c is not None for c in copied) / 2000 == pytest.approx(0.3, abs=0.03)


def tally(requests: int, errors: int = 0, token_s: float | None = 0.01) -> CanaryCounts:
    return CanaryCounts(requests, errors, () if token_s is None else (token_s,) * 9 + (9.0,))


@pytest.mark.parametrize(
    ("stable", "candidate", "action"),
    [
        (tally(100), tally(9, 9), "wait"),  # too few to tell
        (tally(9), tally(100, 100), "wait"),
        (tally(100, 1), tally(100, 6), "promote"),  # worse, by the margin and no more
        (tally(100, 1), tally(100, 7), "roll back"),
        (tally(100), tally(20, token_s=0.021), "roll back"),
        (tally(100), tally(20, token_s=0.019), "wait"),
        (tally(100), tally(20, token_s=None), "wait"),
        (tally(100), tally(40, token_s=None), "wait"),  # not promoted before it was timed
        (tally(100), CanaryCounts(40, 0, (0.5,) * 9), "wait"),  # too seldom to tell
        (tally(100), tally(40), "promote"),
        (tally(100), tally(39), "wait"),
        (tally(100), tally(40, 3), "roll back"),
    ],
)
def test_a_canary_is_judged_by_its_margins(stable: CanaryCounts, candidate: CanaryCounts, action: str) -> None:
    config = JudgeConfig(min_requests=10, error_margin=0.05, latency_ratio=2, promote_after=40)
    assert judge(config, stable, candidate).action == action


def test_a_canary_is_not_promoted_unasked() -> None:
    assert judge(JudgeConfig(), tally(10_000), tally(10_000)).action == "wait"


def test_an_adapter_has_a_replica_of_its_own_until_that_is_overloaded() -> None:
    idle = dict.fromkeys("abcd", 0)
    home = {f"x@{i}": rank_replicas(f"x@{i}", idle, room=4)[0] for i in range(200)}
    assert min(Counter(home.values()).values()) > 25
    for adapter, replica in home.items():
        assert rank_replicas(adapter, idle | {replica: 3}, room=4)[0] == replica  # there is room in its batch
        assert rank_replicas(adapter, idle | {replica: 4}, room=4)[0] != replica
        assert rank_replicas(adapter, idle | {replica: 4}, room=4)[-1] == replica  # but still to be had
        assert rank_replicas(adapter, dict.fromkeys("abcd", 8), room=4)[0] == replica  # as loaded as the others
        left = {each: 0 for each in idle if each != "d"}
        assert replica == "d" or rank_replicas(adapter, left, room=4)[0] == replica  # only d's adapters move
    assert rank_replicas(None, {"a": 2, "b": 0, "c": 1}, room=4) == ["b", "c", "a"]
    assert rank_replicas("x@1", {}, room=4) == []


def test_an_unknown_name_is_compared_with_few_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"adapter-{number:05}" for number in range(10_000)]
    many = Catalogue("org/base", {name: AdapterVersions((1,)) for name in names}, offered=tuple(names))
    with pytest.raises(AdapterNotFoundError, match=r"Did you mean `adapter-04321`"):
        decide_route(RoutingRequest("adapter-043211", "x"), many)
    compared = 0
    ratio = difflib.SequenceMatcher.real_quick_ratio

    def counted(matcher: difflib.SequenceMatcher[str]) -> float:
        nonlocal compared
        compared += 1
        return ratio(matcher)

    monkeypatch.setattr(difflib.SequenceMatcher, "real_quick_ratio", counted)
    with pytest.raises(AdapterNotFoundError):
        decide_route(RoutingRequest("zzz", "x"), many)
    assert 0 < compared <= 64
