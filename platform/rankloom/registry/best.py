"""Chooses the best version of an adapter by its scorecards' results on the test rows; pure."""

from __future__ import annotations

from collections.abc import Sequence

from rankloom.errors import RegistryError
from rankloom.registry.record import Record
from rankloom.registry.scorecard import MetricValue, Scorecard


def choose_best(records: Sequence[Record]) -> tuple[Record, str]:
    """Choose the best of one adapter's versions; the latest of equal ones. Versions without a scorecard are skipped.

    Args:
        records: all versions of one adapter, in ascending order; at least one.

    Returns:
        The record, and the measure that decided: the user's own metric if every scored version has the same, else
        `accuracy` if every one has it, else `loss`.

    Raises:
        RegistryError: no version was scored, or they were scored on different rows.
    """
    scored = [(record, record.scorecard) for record in records if record.scorecard is not None]
    name = records[0].name
    if not scored:
        raise RegistryError(f"{name}: none of its versions has a scorecard; name the one to promote: {records[-1].ref}")
    first, *others = scored
    for record, card in others:
        if _identify_rows(record, card) != _identify_rows(*first):
            raise RegistryError(
                f"{first[0].ref} and {record.ref} were scored on different rows, so they can't be compared; name "
                f"the one to promote"
            )
    if (own := _find_same_metric([card for _, card in scored])) is not None:
        best = max(scored, key=lambda pair: (_read_value(pair[1]), -pair[1].result.loss, pair[0].version))
        return best[0], own.name
    accuracies = [card.result.accuracy for _, card in scored]
    if None not in accuracies:
        return max(scored, key=lambda pair: (_read_accuracy(pair[1]), -pair[1].result.loss, pair[0].version))[
            0
        ], "accuracy"
    return min(scored, key=lambda pair: (pair[1].result.loss, -pair[0].version))[0], "loss"


def _identify_rows(record: Record, card: Scorecard) -> tuple[str | None, int]:
    return record.data_fingerprint, card.result.num_rows


def _find_same_metric(cards: Sequence[Scorecard]) -> MetricValue | None:
    """Return the user's own metric if it scored all cards, else None."""
    metrics = [card.result.metric for card in cards]
    first = metrics[0]
    if first is None or any(other is None or (other.name, other.best) != (first.name, first.best) for other in metrics):
        return None
    return first


def _read_value(card: Scorecard) -> float:
    metric = card.result.metric
    if metric is None:
        return 0.0
    return metric.value if metric.best == "max" else -metric.value


def _read_accuracy(card: Scorecard) -> float:
    return card.result.accuracy.value if card.result.accuracy else 0.0
