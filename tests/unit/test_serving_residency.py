"""Which adapter is loaded, which one goes: least recently used first, pinned and used ones never."""

from __future__ import annotations

from rankloom.serving.residency import Residency


def loaded(residency: Residency[str], *refs: str) -> None:
    """Asks for adapters, loads them and lets them go again."""
    for ref in refs:
        residency.ask(ref)
        while (load := residency.next_load()) is not None:
            residency.loaded(load[0], load[0].upper())
        residency.release(ref)


def held(residency: Residency[str]) -> list[str]:
    return [ref for ref, entry in residency.entries.items() if entry.adapter is not None]


def test_what_is_asked_for_is_loaded_once() -> None:
    residency = Residency[str](2)
    residency.ask("a")
    residency.ask("a")
    assert residency.next_load() == ("a", None)
    assert residency.next_load() is None
    assert residency.get("a") is None
    residency.loaded("a", "A")
    assert residency.get("a") == "A"


def test_the_least_recently_used_goes() -> None:
    residency = Residency[str](2)
    loaded(residency, "a", "b", "a", "c")
    assert held(residency) == ["a", "c"]


def test_a_thousand_take_the_place_of_two() -> None:
    residency = Residency[str](2)
    loaded(residency, *map(str, range(1000)))
    assert held(residency) == ["998", "999"]
    assert len(residency.entries) == 2


def test_pinned_and_used_ones_stay_and_who_comes_later_waits() -> None:
    residency = Residency[str](2)
    assert residency.pin("a")
    residency.ask("b")
    residency.ask("c")
    assert [residency.next_load(), residency.next_load()] == [("a", None), ("b", None)]
    residency.loaded("a", "A")
    residency.loaded("b", "B")
    assert residency.next_load() is None
    residency.release("b")
    assert residency.next_load() == ("c", "b")


def test_no_more_than_all_places_are_pinned() -> None:
    residency = Residency[str](1)
    assert residency.pin("a")
    assert residency.pin("a")
    assert not residency.pin("b")
    residency.unpin("a")
    assert residency.pin("b")


def test_what_nobody_waits_for_any_more_is_not_loaded() -> None:
    residency = Residency[str](1)
    residency.ask("a")
    residency.release("a")
    assert residency.next_load() is None


def test_a_failure_is_forgotten_and_its_place_is_free() -> None:
    residency = Residency[str](1)
    residency.ask("bad")
    assert residency.next_load() == ("bad", None)
    residency.failed("bad")
    residency.release("bad")
    residency.ask("good")
    assert residency.next_load() == ("good", None)
    residency.ask("bad")
    assert residency.next_load() is None  # the one place is being filled
