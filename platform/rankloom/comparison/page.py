"""The page of a comparison: its result as pieces that `rankloom.pages` draws."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rankloom.comparison.results import CompareResult, Estimate, MethodResult
from rankloom.comparison.table import COSTS_NOTE, build_cost_rows, build_quality_rows, format_estimate
from rankloom.pages.pieces import CHOSEN, COLOURS, Block, Cell, Chart, Line, Listing, Note, Page, Section, Table

MEMORY = {
    "weight_bytes": "weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser states",
    "activation_bytes": "activations",
}
"""Field of `MethodCost` -> its name in the chart of memory."""
PARAMS = [{"name": "chosen", "value": ""}]


def make_page(result: CompareResult) -> Page:
    """Return the page of a finished comparison."""
    names = [method.name for method in result.methods]
    interval = "Intervals of 95 % are over seeds and test rows; the untuned base is below the methods."
    quality: list[Block] = [_make_table(f"{result.num_rows} test rows. {interval}", build_quality_rows(result), names)]
    if drawn := _list_drawn(result):
        quality.insert(0, _draw_quality(result, drawn))
    costs: list[Block] = [
        Note(text=COSTS_NOTE),
        _make_table("What each method costs", build_cost_rows(result), names),
    ]
    if any(method.cost for method in result.methods):
        costs[:0] = [_draw_memory(result), *([_draw_trade(result, drawn)] if drawn else [])]
    sections = [
        Section(id="quality", title="How well", blocks=tuple(quality)),
        Section(id="cost", title="At what cost", blocks=tuple(costs)),
        Section(id="tests", title="Which differences are real", blocks=_list_test_blocks(result)),
        Section(id="repeat", title="Repeat it", blocks=_list_commands(result)),
    ]
    return Page(
        title=result.name,
        subject=f"comparison, {result.status}",
        summary=(*result.verdict, *result.notes),
        sections=tuple(sections),
    )


def _list_drawn(result: CompareResult) -> list[tuple[MethodResult, Estimate]]:
    """Return the methods and bases that have the comparison's measure."""
    found = [(method, result.read_measure(method)) for method in (*result.methods, *result.bases)]
    return [(method, estimate) for method, estimate in found if estimate is not None]


def _make_table(caption: str, rows: Sequence[Sequence[str]], marks: Sequence[str]) -> Table:
    header, *body = rows
    lines = tuple(
        Line(cells=tuple(Cell(text=cell) for cell in row), mark=row[0] if row[0] in marks else "") for row in body
    )
    return Table(caption=caption, header=tuple(header), lines=lines, num_texts=len(header))


def _list_test_blocks(result: CompareResult) -> tuple[Block, ...]:
    """Return the pairs of methods, the surest difference first."""
    tests = sorted(result.tests, key=lambda test: (test.adjusted, test.p_value))
    if not tests:
        return (Note(text="There is no pair of methods to test."),)
    lines = tuple(
        Line(
            cells=(
                Cell(text=test.first),
                Cell(text=test.second),
                Cell(text="yes" if test.is_real else "no"),
                Cell(text=f"{test.difference:+.4g}", value=test.difference),
                Cell(text=f"{test.p_value:.3g}", value=test.p_value),
                Cell(text=f"{test.adjusted:.3g}", value=test.adjusted),
            )
        )
        for test in tests
    )
    header = ("first", "second", "real", f"difference in {result.measure_name}", "p", "p after Holm")
    caption = (
        f"{len(tests)} pairs, tested on the same seeds and test rows ({tests[0].test}); real: below 0.05 after Holm"
    )
    return (Table(caption=caption, header=header, lines=lines, num_texts=3),)


def _list_commands(result: CompareResult) -> tuple[Block, ...]:
    again = shlex.join(["rankloom", "compare", f"{result.folder}/compare.yaml", "name=again"])
    found: list[Block] = [Listing(title="Compare again, under another name", text=again)]
    if result.adapter and result.registry:
        promote = shlex.join(["rankloom", "adapters", "promote", result.adapter, "--registry", result.registry])
        found.append(Listing(title="Promote the leader's adapter", text=promote))
    return tuple(found)


def _draw_quality(result: CompareResult, drawn: Sequence[tuple[MethodResult, Estimate]]) -> Chart:
    data = [_make_point(result, method, estimate) for method, estimate in drawn]
    y = {"field": "trial", "type": "nominal", "sort": None, "title": None}
    x = _make_number("value", result.measure_name, is_share=result.is_share)
    spec = {
        "params": PARAMS,
        "data": {"values": data},
        "encoding": {"y": y, "opacity": _fade(), "color": {"value": COLOURS[0]}, "tooltip": _list_tips(result)},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}},
            },
            {"mark": {"type": "point", "filled": True, "size": 70}, "encoding": {"x": x}},
        ],
    }
    return Chart(
        id="quality",
        title=f"{result.measure_name} on the test rows, with 95 % intervals".capitalize(),
        description=f"{result.measure_name} of {len(data)} methods and bases with 95 % intervals.",
        spec=spec,
        height=max(80, 26 * len(data)),
    )


def _draw_memory(result: CompareResult) -> Chart:
    data = [
        {"trial": method.name, "part": part, "order": order, "size": getattr(method.cost, field) / 1e6}
        for method in result.methods
        if method.cost is not None
        for order, (field, part) in enumerate(MEMORY.items())
    ]
    peaks = [{"trial": m.name, "peak": m.cost.peak_bytes / 1e6} for m in result.methods if m.cost is not None]
    y = {"field": "trial", "type": "nominal", "sort": [each["trial"] for each in peaks], "title": None}
    x = {"type": "quantitative", "title": "MB"}
    parts = list(MEMORY.values())
    color = {"field": "part", "type": "nominal", "title": None, "sort": parts,
             "scale": {"domain": parts, "range": list(COLOURS[: len(parts)])}}  # fmt: skip
    spec = {
        "params": PARAMS,
        "layer": [
            {
                "data": {"values": data},
                "mark": {"type": "bar", "height": {"band": 0.7}},
                "encoding": {
                    "y": y, "x": x | {"field": "size"}, "color": color, "opacity": _fade(),
                    "order": {"field": "order"},
                    "tooltip": [{"field": "trial", "title": "method"}, {"field": "part"},
                                {"field": "size", "title": "MB", "format": ",.1f"}],
                },
            },
            {
                "data": {"values": peaks},
                "mark": {"type": "tick", "thickness": 2, "color": COLOURS[5]},
                "encoding": {
                    "y": y, "x": x | {"field": "peak"},
                    "tooltip": [{"field": "trial", "title": "method"},
                                {"field": "peak", "title": "peak, MB", "format": ",.1f"}],
                },
            },
        ],
    }  # fmt: skip
    return Chart(
        id="memory",
        title="Memory by part, each at its own most; the tick is the measured peak",
        description=f"Stacked bars of the memory of {len(peaks)} methods: {', '.join(parts)}.",
        spec=spec,
        height=max(80, 26 * len(peaks)),
    )


def _draw_trade(result: CompareResult, drawn: Sequence[tuple[MethodResult, Estimate]]) -> Chart:
    data = [
        _make_point(result, method, estimate) | {"peak": method.cost.peak_bytes / 1e6}
        for method, estimate in drawn
        if method.cost is not None
    ]
    x = {"field": "peak", "type": "quantitative", "title": "peak memory, MB", "scale": {"zero": False, "nice": True}}
    y = _make_number("value", result.measure_name, is_share=result.is_share)
    spec = {
        "params": PARAMS,
        "data": {"values": data},
        "encoding": {"x": x, "opacity": _fade(), "color": {"value": COLOURS[0]}, "tooltip": _list_tips(result)},
        "layer": [
            {"mark": {"type": "rule"}, "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 70}, "encoding": {"y": y}},
            {
                "mark": {"type": "text", "align": "left", "dx": 7, "dy": -5, "fontSize": 11},
                "encoding": {"y": y, "text": {"field": "trial"}},
            },
        ],
    }
    return Chart(
        id="trade",
        title=f"{result.measure_name} against peak memory".capitalize(),
        description=f"{result.measure_name} of {len(data)} methods against their peak memory in training.",
        spec=spec,
    )


def _make_point(result: CompareResult, method: MethodResult, estimate: Estimate) -> dict[str, Any]:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    text = format_estimate(estimate, is_share=result.is_share)
    return {"trial": method.name, "value": estimate.value, "low": low, "high": high, "text": text}


def _make_number(field: str, title: str, *, is_share: bool) -> dict[str, Any]:
    axis = {"axis": {"format": ".0%"}} if is_share else {}
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False}} | axis


def _list_tips(result: CompareResult) -> list[dict[str, Any]]:
    return [{"field": "trial", "title": "method"}, {"field": "text", "title": result.measure_name}]


def _fade() -> dict[str, Any]:
    return {"condition": {"test": CHOSEN, "value": 1}, "value": 0.15}
