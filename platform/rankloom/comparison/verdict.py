"""What a comparison shows, in sentences. A difference that may be one of chance is never called a win. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rankloom.comparison.results import CompareResult, MethodResult
from rankloom.comparison.table import format_estimate


def write_verdict(result: CompareResult) -> tuple[str, ...]:
    """Return the sentences, the most important first."""
    scored = [method for method in result.methods if method.seeds]
    if not scored:
        return ("No method could be trained and scored.",)
    leader, others = scored[0], scored[1:]
    sentences = [_state_leader(result, leader, others), _state_extent(result, scored)]
    ahead = [method for method in others if leader.name in method.better_than]
    if ahead:
        sentences.insert(1, f"On the test rows {_join_names(ahead)} {_choose_verb(ahead)} better than it.")
    if tied := [method for method in others if _is_tied(leader, method)]:
        sentences.append(_state_cheapest([leader, *tied]))
    if below := _find_at_base(result, scored):
        many = len(below) > 1
        which = f"intervals of {_join_names(below)} overlap" if many else f"interval of {_join_names(below)} overlaps"
        sentences.append(f"The {which} that of the untuned base.")
    if len(leader.seeds) == 1:
        sentences.append("With one seed, a difference may be one between two runs; give more seeds to compare methods.")
    return tuple(sentence for sentence in sentences if sentence)


def _state_leader(result: CompareResult, leader: MethodResult, others: Sequence[MethodResult]) -> str:
    got = f"{result.measure_name} {format_estimate(result.read_measure(leader), is_share=result.is_share)}"
    if result.winner is not None and others:
        return f"{leader.name} is better than every other method: {got}."
    tied = [method for method in others if _is_tied(leader, method)]
    text = f"{leader.name} leads on the validation rows: {got} on the test rows."
    if tied:
        text += f" There {_join_names(tied)} {_choose_verb(tied)} not told apart from it, so this is a tie."
    if beaten := [method for method in others if method.name in leader.better_than]:
        text += f" It is better than {_join_names(beaten)}."
    return text


def _state_extent(result: CompareResult, scored: Sequence[MethodResult]) -> str:
    """Say what the statement rests on."""
    seeds, pairs = max(len(method.seeds) for method in scored), len(result.tests)
    real, rests = sum(test.is_real for test in result.tests), f"{seeds} seed{'s' * (seeds > 1)}"
    counted = f"{real} of {pairs} pairs of methods differ" if pairs != 1 else f"{real or 'no'} pair of methods differs"
    return f"This rests on {rests} and {result.num_rows} test rows; {counted}, at 5 % after Holm's correction."


def _state_cheapest(tied: Sequence[MethodResult]) -> str:
    """Say which of the methods that are not told apart costs least."""
    known = [(method.cost.peak_bytes, method.cost.tokens_per_s, method.name) for method in tied if method.cost]
    if len(known) < 2:
        return ""
    smallest, fastest = min(known), max(known, key=lambda each: each[1])
    small = f"{smallest[2]} takes the least memory ({smallest[0] / 1e6:,.0f} MB)"
    fast = f"{fastest[2]} trains fastest ({fastest[1]:,.0f} tokens/s)"
    if smallest[2] == fastest[2]:
        return f"Of the tied methods {small} and trains fastest ({fastest[1]:,.0f} tokens/s)."
    return f"Of the tied methods {small}, and {fast}."


def _find_at_base(result: CompareResult, scored: Sequence[MethodResult]) -> list[MethodResult]:
    """Return the methods whose interval overlaps the plain base's."""
    base = next((result.read_measure(base) for base in result.bases), None)
    if base is None or base.low is None or base.high is None:
        return []
    found = []
    for method in scored:
        own = result.read_measure(method)
        if own is not None and own.low is not None and own.high is not None:
            found += [method] if own.low <= base.high and base.low <= own.high else []
    return found


def _is_tied(leader: MethodResult, method: MethodResult) -> bool:
    return method.name not in (*leader.better_than, *leader.worse_than)


def _choose_verb(methods: Sequence[MethodResult]) -> str:
    return "is" if len(methods) == 1 else "are"


def _join_names(methods: Sequence[MethodResult]) -> str:
    names = [method.name for method in methods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
