"""Which adapter is loaded, which one goes, and which ones were refused."""

from __future__ import annotations

from rankloom.engine.adapter_cache.eviction import EvictionPolicy
from rankloom.engine.adapter_cache.load_backoff import LONGEST_S, MOST, LoadBackoff
from rankloom.errors import RegistryError


def loaded(residency: EvictionPolicy[str], *refs: str) -> None:
    """Asks for adapters, loads them and lets them go again."""
    for ref in refs:
        residency.ask(ref)
        while (load := residency.choose_load()) is not None:
            residency.mark_loaded(load[0], load[0].upper())
        residency.release(ref)


def held(residency: EvictionPolicy[str]) -> list[str]:
    return [ref for ref, entry in residency.entries.items() if entry.adapter is not None]


def test_what_is_asked_for_is_loaded_once() -> None:
    residency = EvictionPolicy[str](2)
    residency.ask("a")
    residency.ask("a")
    assert residency.choose_load() == ("a", None)
    assert residency.choose_load() is None
    assert residency.get("a") is None
    residency.mark_loaded("a", "A")
    assert residency.get("a") == "A"


def test_the_least_recently_used_goes() -> None:
    residency = EvictionPolicy[str](2)
    loaded(residency, "a", "b", "a", "c")
    assert held(residency) == ["a", "c"]


def test_a_thousand_take_the_place_of_two() -> None:
    residency = EvictionPolicy[str](2)
    loaded(residency, *map(str, range(1000)))
    assert held(residency) == ["998", "999"]
    assert len(residency.entries) == 2


def test_pinned_and_used_ones_stay_and_who_comes_later_waits() -> None:
    residency = EvictionPolicy[str](2)
    assert residency.pin("a")
    residency.ask("b")
    residency.ask("c")
    assert [residency.choose_load(), residency.choose_load()] == [("a", None), ("b", None)]
    residency.mark_loaded("a", "A")
    residency.mark_loaded("b", "B")
    assert residency.choose_load() is None
    residency.release("b")
    assert residency.choose_load() == ("c", "b")


def test_no_more_than_all_places_are_pinned() -> None:
    residency = EvictionPolicy[str](1)
    assert residency.pin("a")
    assert residency.pin("a")
    assert not residency.pin("b")
    residency.unpin("a")
    assert residency.pin("b")


def test_what_nobody_waits_for_any_more_is_not_loaded() -> None:
    residency = EvictionPolicy[str](1)
    residency.ask("a")
    residency.release("a")
    assert residency.choose_load() is None


def test_a_failure_is_forgotten_and_its_place_is_free() -> None:
    residency = EvictionPolicy[str](1)
    residency.ask("bad")
    assert residency.choose_load() == ("bad", None)
    residency.mark_failed("bad")
    residency.release("bad")
    residency.ask("good")
    assert residency.choose_load() == ("good", None)
    residency.ask("bad")
    assert residency.choose_load() is None  # the one place is being filled


def test_a_refusal_holds_for_twice_as_long_each_time_and_is_forgotten_when_it_loads() -> None:
    refusals, now = LoadBackoff(), 100.0
    assert refusals.get("bad@1", now) is None
    for held_s in (1, 2, 4, 8):
        refusals.add("bad@1", RegistryError("does nothing"), now)
        first, second = (refusals.get("bad@1", now + 0.99 * held_s) for _ in range(2))
        assert first is not second  # each is raised by itself
        assert (type(first), str(first)) == (RegistryError, "does nothing")
        now += held_s
        assert refusals.get("bad@1", now) is None
    for _ in range(20):
        refusals.add("bad@1", RegistryError("does nothing"), now)
    assert refusals.get("bad@1", now + LONGEST_S - 1) is not None
    assert refusals.get("bad@1", now + LONGEST_S) is None
    refusals.clear("bad@1")
    refusals.add("bad@1", RegistryError("does nothing"), now)
    assert refusals.get("bad@1", now + 1) is None


def test_no_more_refusals_are_remembered_than_fit() -> None:
    refusals = LoadBackoff()
    for number in range(MOST + 1):
        refusals.add(f"bad@{number}", RegistryError("does nothing"), 0.0)
    assert refusals.get("bad@0", 0.5) is None
    assert refusals.get("bad@1", 0.5) is not None
