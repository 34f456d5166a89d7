"""The channel between workers and driver, as the plain object that the actor wraps."""

from __future__ import annotations

from rankloom.errors import DataError
from rankloom.events import RunResumed
from rankloom.launch.channel import Channel
from rankloom.launch.failures import Failure


def test_events_come_in_order_and_once() -> None:
    channel = Channel()
    assert channel.push([RunResumed(1), RunResumed(2)]) is False
    channel.push([RunResumed(3)])
    assert channel.take(stop=False) == [RunResumed(1), RunResumed(2), RunResumed(3)]
    assert channel.take(stop=False) == []


def test_the_wish_to_stop_reaches_workers_and_stays() -> None:
    channel = Channel()
    channel.take(stop=True)
    channel.take(stop=False)
    assert channel.push([]) is True


def test_the_first_failure_is_kept_and_keeps_restarted_workers_out() -> None:
    channel = Channel()
    assert channel.join(0)
    assert channel.join(1)
    channel.fail(1, Failure(DataError("rows.csv: no such file"), None))
    channel.fail(0, Failure(DataError("another"), None))
    failure = channel.failure()
    assert failure is not None
    assert str(failure.error) == "rows.csv: no such file"
    assert not channel.join(2)
    assert channel.all_left({0, 1, 2})


def test_a_restarted_worker_counts_as_there_again() -> None:
    channel = Channel()
    channel.join(1)
    channel.leave(1)
    assert channel.all_left({1})
    channel.join(1)
    assert not channel.all_left({1})
