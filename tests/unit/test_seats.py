"""Who trains in a host now: the pure decision."""

from __future__ import annotations

import random

from rankloom.launch.seats import Seat, decide


def seat(key: str, order: int, **changed: object) -> Seat:
    return Seat(key, order, **changed)  # type: ignore[arg-type]


def test_the_first_come_first_and_all_slots_are_filled() -> None:
    seating = decide([seat(k, i) for i, k in enumerate("abc")], num_slots=2, run_ahead=1)
    assert (seating.evict, seating.admit, seating.train) == ((), ("a", "b"), ("a", "b"))


def test_who_is_at_the_bound_gives_its_slot_to_who_waits() -> None:
    ahead = seat("a", 0, made=2, accepted=0, seated=True)
    seating = decide([ahead, seat("b", 1)], num_slots=1, run_ahead=1)
    assert (seating.evict, seating.admit, seating.train) == (("a",), ("b",), ("b",))
    ahead.seated, ahead.accepted = False, 1  # its driver asked on
    seating = decide([ahead, seat("b", 1, seated=True)], num_slots=1, run_ahead=1)
    assert seating.train == ("b",)
    seating = decide([ahead, seat("b", 1, seated=True, finished=True)], num_slots=1, run_ahead=1)
    assert (seating.evict, seating.admit) == (("b",), ("a",))


def test_who_is_at_the_bound_keeps_its_slot_while_nobody_waits() -> None:
    ahead = seat("a", 0, made=2, accepted=0, seated=True)
    seating = decide([ahead, seat("b", 1)], num_slots=2, run_ahead=1)
    assert (seating.evict, seating.admit, seating.train) == ((), ("b",), ("b",))


def test_who_is_behind_its_driver_comes_before_who_runs_ahead() -> None:
    runner, asked = seat("a", 0, made=3, accepted=2), seat("b", 1, made=2, accepted=2)
    assert decide([runner, asked], num_slots=1, run_ahead=1).admit == ("b",)


def test_without_running_ahead_a_member_waits_for_its_driver() -> None:
    assert decide([seat("a", 0, made=1, seated=True)], num_slots=1, run_ahead=0).train == ()
    assert decide([seat("a", 0, made=1, accepted=1, seated=True)], num_slots=1, run_ahead=0).train == ("a",)


def test_leaving_and_finished_members_go() -> None:
    seats = [
        seat("a", 0, seated=True, leaving=True),
        seat("b", 1, seated=True, finished=True),
        seat("c", 2, leaving=True),
    ]
    seating = decide(seats, num_slots=2, run_ahead=1)
    assert (seating.evict, seating.admit, seating.train) == (("a", "b"), (), ())


def test_never_more_than_the_slots_and_none_empty_while_somebody_waits() -> None:
    rng = random.Random(0)
    for _ in range(500):
        slots, run_ahead = rng.randint(1, 4), rng.randint(0, 2)
        seats = []
        for order in range(rng.randint(0, 9)):
            accepted = rng.randint(0, 3)
            flags = {name: rng.random() < 0.2 for name in ("finished", "leaving")}
            made = accepted + rng.randint(0, run_ahead + 1)
            seats.append(seat(str(order), order, accepted=accepted, made=made, **flags))
        for each in rng.sample(seats, min(slots, len(seats))):
            each.seated = True
        seating = decide(seats, slots, run_ahead)
        before = {s.key for s in seats if s.seated}
        inside = before - set(seating.evict) | set(seating.admit)
        wanting = {s.key for s in seats if s.wants(run_ahead)}
        assert set(seating.evict) <= before
        assert not set(seating.admit) & before
        assert set(seating.train) == inside & wanting
        assert len(seating.train) == min(slots, len(wanting))
        assert len(inside) <= slots
