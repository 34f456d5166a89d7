"""Charts: plain dataclasses in, Vega-Lite specifications out; pure.

Fields of the data have fixed names, so that no text of the user's is read as an expression. Every chart of trials has
the parameter `chosen`: the others fade while a trial is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, log
from typing import Any

from rankloom.pages.pieces import CHOSEN, COLOURS, Chart
from rankloom.reporting.trials import Axis, Goal, ReportedTrial, Stay, format_knob

Spec = dict[str, Any]

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
NUM_POINTS = 1000
"""Most points of a run's line: a browser draws no more than its pixels."""
LOG_FROM = 30.0
"""Ratio of the largest to the smallest loss from which its axis is logarithmic."""


def draw_curves(trials: Sequence[ReportedTrial], field: str, title: str, id: str) -> Chart:
    """Return the trials' learning curves of one field of `CurvePoint`."""
    data: list[Spec] = [
        {"trial": trial.name, "group": trial.group, "step": point.step, "value": value, "status": trial.status}
        for trial in trials
        for point in trial.curve
        if (value := getattr(point, field)) is not None and isfinite(value)
    ]
    y = _scale("value", title, log=_is_wide(each["value"] for each in data)) | _format_percent(field == "accuracy")
    encoding = {
        "x": _scale("step", "steps"),
        "y": y,
        "color": _colour_groups(trials),
        "detail": {"field": "trial"},
        "opacity": _fade(0.8),
        "tooltip": [
            _show_text("trial"), _show_text("group", "method"), _show_text("status"), _scale("step", "step"),
            {"field": "value", "type": "quantitative", "title": title, "format": ".4g"},
        ],
    }  # fmt: skip
    spec = _make_spec(data, {"type": "line", "point": {"size": 28}, "strokeWidth": 1.6}, encoding)
    description = f"Learning curves of {len(trials)} trials: {title} against the steps made."
    return Chart(id=id, title=title[:1].upper() + title[1:], description=description, spec=spec)


def draw_series(
    named: Mapping[str, Sequence[tuple[float, float]]], title: str, id: str, *, is_small: bool = False
) -> Chart:
    """Return lines of (step, value) points of one run, such as its training and validation loss.

    A line of very many points shows about `NUM_POINTS` of them, evenly spread; values that are not finite are left out.
    """
    data: list[Spec] = [
        {"trial": name, "group": name, "step": step, "value": value}
        for name, points in named.items()
        for step, value in points[:: -(-len(points) // NUM_POINTS) or 1]
        if isfinite(value)
    ]
    encoding = {
        "x": _scale("step", "steps"),
        "y": _scale("value", title, log=_is_wide(each["value"] for each in data)),
        "color": _colour_names([*named], legend=len(named) > 1),
        "tooltip": [_show_text("group", "line"), _scale("step", "step"), _scale("value", title) | {"format": ".4g"}],
    }
    spec = _make_spec(data, {"type": "line", "point": {"size": 20}, "strokeWidth": 1.6}, encoding)
    description = f"{title} against the steps: {', '.join(named)}."
    return Chart(id=id, title=title[:1].upper() + title[1:], description=description, spec=spec, is_small=is_small)


def draw_importances(shares: Mapping[str, float]) -> Chart:
    """Return each knob's share of the importance as bars, the largest first."""
    data: list[Spec] = [{"knob": name, "share": share} for name, share in shares.items()]
    encoding = {
        "y": {"field": "knob", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 260}},
        "x": _scale("share", "share of the importance") | {"axis": {"format": ".0%"}, "scale": {"domainMin": 0}},
        "tooltip": [_show_text("knob"), _scale("share", "share") | {"format": ".1%"}],
    }
    spec = _make_spec(data, {"type": "bar", "color": COLOURS[0], "cornerRadiusEnd": 2}, encoding)
    largest = next(iter(shares), "none")
    return Chart(
        id="importance",
        title="Importance of the knobs",
        description=f"Bars of each knob's importance; {largest} has the largest.",
        spec=spec,
        height=max(60, 26 * len(data)),
    )


def draw_effect(trials: Sequence[ReportedTrial], axis: Axis, goal: Goal, id: str) -> Chart:
    """Return the trials' best values against their values of one knob."""
    shown = [trial for trial in trials if axis.name in trial.knobs and trial.value is not None]
    data: list[Spec] = [
        {
            "trial": trial.name,
            "group": trial.group,
            "knob": format_knob(trial.knobs[axis.name]) if axis.choices else trial.knobs[axis.name],
            "value": trial.value,
            "settings": trial.settings,
        }
        for trial in shown
    ]
    name = axis.name.rpartition(".")[2]
    x: Spec = (
        {"field": "knob", "type": "ordinal", "sort": list(axis.choices), "title": name, "axis": {"labelAngle": 0}}
        if axis.choices
        else _scale("knob", name, log=axis.is_log)
        | {"axis": {"format": "~g" if not axis.is_log else ".0e", "tickCount": 4, "labelOverlap": True}}
    )
    encoding = {
        "x": x,
        "y": _scale("value", f"best {goal.name}", log=_is_wide(each["value"] for each in data))
        | _format_percent(goal.key == "accuracy"),
        "color": _colour_groups(trials, legend=False),
        "shape": _shape_groups(trials),
        "opacity": _fade(0.85),
        "tooltip": [_show_text("trial"), _show_text("group", "method"), _show_text("settings"), _show_value(goal)],
    }
    spec = _make_spec(data, {"type": "point", "filled": True, "size": 60}, encoding)
    description = f"The best {goal.name} of {len(data)} trials against {axis.name}."
    return Chart(id=id, title=axis.name, description=description, spec=spec, height=200, is_small=True)


def draw_parallel(trials: Sequence[ReportedTrial], axes: Sequence[Axis], goal: Goal, title: str, id: str) -> Chart:
    """Return parallel coordinates: a line for each trial over the knobs of one branch and the best value.

    The last axis is turned so that the best values are at its top.
    """
    scored = [trial for trial in trials if trial.value is not None]
    values = [trial.value for trial in scored if trial.value is not None]
    ends = (min(values), max(values)) if goal.best == "max" else (max(values), min(values))
    last = f"best {goal.name}"
    lines = [
        {"trial": trial.name, "axis": name, "place": place, "value": trial.value, "settings": trial.settings}
        for trial in scored
        for name, place in [
            *((axis.name, _place_on(axis, trial.knobs[axis.name])) for axis in axes),
            (last, _normalize(trial.value or 0.0, *ends)),
        ]
    ]
    labels = [{"axis": axis.name, "place": place, "label": text} for axis in axes for place, text in _list_ticks(axis)]
    labels += [{"axis": last, "place": float(end), "label": goal.format(ends[end])} for end in (0, 1)]
    names = [*(axis.name for axis in axes), last]
    limit = {"expr": f"width / {len(names)} - 4"}
    x: Spec = {"field": "axis", "type": "nominal", "sort": names, "scale": {"type": "point", "padding": 0.35}}
    place: Spec = {"field": "place", "type": "quantitative", "axis": None, "scale": {"domain": [-0.04, 1.04]}}
    shown = {"title": None, "labelAngle": 0, "labelLimit": limit, "domain": False, "ticks": False, "grid": True}
    colour = {
        "field": "value", "type": "quantitative", "title": goal.name, "legend": None,
        "scale": {"range": ["#8b8f9a", COLOURS[0]], "domain": sorted(ends), "reverse": goal.best == "min"},
    }  # fmt: skip
    spec: Spec = {
        "params": [_make_parameter()],
        "layer": [
            {
                "data": {"values": lines},
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {
                    "x": x | {"axis": shown},
                    "y": place,
                    "color": colour,
                    "detail": {"field": "trial"},
                    "opacity": _fade(0.7),
                    "tooltip": [_show_text("trial"), _show_text("settings"), _show_value(goal)],
                },
            },
            {
                "data": {"values": labels},
                "mark": {"type": "text", "align": "left", "dx": 5, "fontSize": 11, "limit": 110},
                "encoding": {"x": x, "y": place, "text": {"field": "label"}},
            },
        ],
    }
    description = (
        f"Parallel coordinates of {len(scored)} trials over {', '.join(names)}; the best are at the top right."
    )
    return Chart(id=id, title=title, description=description, spec=spec)


COSTS: dict[str, tuple[str, float]] = {
    "memory_bytes": ("memory to serve, MB", 1e6),
    "latency_ms": ("latency, ms per token", 1.0),
}
"""Name of a cost -> title of its axis, and the unit in which it is shown."""


def draw_front(trials: Sequence[ReportedTrial], cost: str, goal: Goal) -> Chart:
    """Return quality against one cost, the Pareto front of these two filled and joined by a line."""
    title, unit = COSTS[cost]
    shown = [trial for trial in trials if cost in trial.costs and trial.value is not None]
    best = _find_front([(trial.costs[cost], trial.value or 0.0) for trial in shown], goal)
    data: list[Spec] = [
        {
            "trial": trial.name, "group": trial.group, "cost": trial.costs[cost] / unit, "value": trial.value,
            "settings": trial.settings, "front": "front" if front else "other",
        }
        for trial, front in zip(shown, best, strict=True)
    ]  # fmt: skip
    x = _scale("cost", title) | {"scale": {"zero": False, "nice": True}}
    y = _scale("value", f"best {goal.name}") | _format_percent(goal.key == "accuracy")
    tooltip = [_show_text("trial"), _show_text("group", "method"), _show_text("settings"), _show_value(goal)]
    tooltip += [_scale("cost", title) | {"format": ".4g"}]
    points = {
        "x": x, "y": y, "color": _colour_groups(trials), "shape": _shape_groups(trials), "opacity": _fade(0.9),
        "tooltip": tooltip,
        "size": {"condition": {"test": "datum.front === 'front'", "value": 130}, "value": 45},
    }  # fmt: skip
    joined = {"x": x, "y": y, "order": {"field": "cost"}}
    spec: Spec = {
        "params": [_make_parameter()],
        "data": {"values": data},
        "layer": [
            {
                "transform": [{"filter": "datum.front === 'front'"}],
                "mark": {"type": "line", "strokeDash": [4, 3], "color": COLOURS[5], "interpolate": "step-after"},
                "encoding": joined,
            },
            {"mark": {"type": "point", "filled": True}, "encoding": points},
        ],
    }
    description = f"{goal.name} against {title} of {len(data)} trials; {sum(best)} of them are on the front."
    return Chart(id=f"pareto-{cost.partition('_')[0]}", title=f"{goal.name[:1].upper()}{goal.name[1:]} against {title}",
                 description=description, spec=spec, height=260)  # fmt: skip


def draw_timeline(stays: Sequence[Stay], names: Sequence[str]) -> Chart:
    """Return when each trial was where: a bar for each stay.

    Args:
        names: the trials' groups in the order of their colours.
    """
    data: list[Spec] = [
        {
            "trial": stay.trial, "group": stay.group, "lane": stay.lane, "start": stay.start_s, "end": stay.end_s,
            "seconds": stay.end_s - stay.start_s,
        }
        for stay in stays
    ]  # fmt: skip
    lanes = sorted({stay.lane for stay in stays})
    encoding = {
        "y": {"field": "lane", "type": "nominal", "title": None, "sort": lanes, "axis": {"labelLimit": 180}},
        "x": _scale("start", "seconds since the start"),
        "x2": {"field": "end"},
        "color": _colour_names(names),
        "opacity": _fade(0.9),
        "tooltip": [
            _show_text("trial"), _show_text("group", "method"), _show_text("lane", "where"),
            _scale("start", "from, s") | {"format": ".1f"}, _scale("seconds", "for, s") | {"format": ".1f"},
        ],
    }  # fmt: skip
    mark = {"type": "bar", "height": {"band": 0.8}, "cornerRadius": 2, "stroke": "white", "strokeWidth": 0.5}
    return Chart(
        id="timeline",
        title="Who trained where, and when",
        description=f"Bars of the time that {len({stay.trial for stay in stays})} trials spent in {len(lanes)} places.",
        spec=_make_spec(data, mark, encoding),
        height=max(80, (24 if len(lanes) < 24 else 12) * len(lanes)),
    )


def draw_labels(counts: Mapping[str, int], id: str, title: str) -> Chart:
    """Return the number of rows of each label as bars, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    encoding = {
        "y": {"field": "label", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 220}},
        "x": _scale("rows", "rows"),
        "tooltip": [_show_text("label"), _scale("rows", "rows")],
    }
    data: list[Spec] = [{"label": label, "rows": count} for label, count in ordered]
    spec = _make_spec(data, {"type": "bar", "color": COLOURS[0]}, encoding)
    description = f"Rows of each of {len(data)} labels, from {ordered[0][1]} to {ordered[-1][1]}."
    height = max(60, (20 if len(data) < 30 else 12) * len(data))
    return Chart(id=id, title=title, description=description, spec=spec, height=height)


def draw_lengths(bins: Iterable[tuple[int, int, int]], id: str, title: str, limit: int) -> Chart:
    """Return a histogram of (low, high, rows) bins of rows' lengths in tokens; `limit` is `data.max_length`."""
    data: list[Spec] = [
        {"low": low, "high": high + 1, "rows": rows, "bin": f"{low} to {high}"} for low, high, rows in bins
    ]
    axis = {"tickMinStep": 1, "format": "d", "labelOverlap": True}
    encoding = {
        "x": _scale("low", "tokens") | {"bin": "binned", "scale": {"zero": False, "nice": False}, "axis": axis},
        "x2": {"field": "high"},
        "y": _scale("rows", "rows"),
        "tooltip": [_show_text("bin", "tokens"), _scale("rows", "rows")],
    }
    spec = _make_spec(data, {"type": "bar", "color": COLOURS[0], "binSpacing": 1}, encoding)
    description = f"Histogram of the rows' lengths in tokens; at most {limit} are allowed."
    return Chart(id=id, title=title, description=description, spec=spec, height=180, is_small=True)


def _make_spec(values: list[dict[str, Any]], mark: Spec, encoding: Spec) -> Spec:
    return {"params": [_make_parameter()], "data": {"values": values}, "mark": mark, "encoding": encoding}


def _make_parameter() -> Spec:
    return {"name": "chosen", "value": ""}


def _fade(opacity: float) -> Spec:
    return {"condition": {"test": CHOSEN, "value": opacity}, "value": 0.08}


def _show_text(field: str, title: str | None = None) -> Spec:
    return {"field": field, "type": "nominal", "title": title or field}


def _scale(field: str, title: str, *, log: bool = False) -> Spec:
    scale = {"type": "log"} if log else {"zero": False}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def _show_value(goal: Goal) -> Spec:
    form = ".1%" if goal.key == "accuracy" else ".4g"
    return {"field": "value", "title": f"best {goal.name}", "type": "quantitative", "format": form}


def _format_percent(is_share: bool) -> Spec:
    return {"axis": {"format": ".0%"}} if is_share else {}


def _list_groups(trials: Sequence[ReportedTrial]) -> list[str]:
    return list(dict.fromkeys(trial.group for trial in trials))


def _colour_groups(trials: Sequence[ReportedTrial], *, legend: bool = True) -> Spec:
    return _colour_names(_list_groups(trials), legend=legend)


def _colour_names(names: Sequence[str], *, legend: bool = True) -> Spec:
    shown = {} if legend and len(names) > 1 else {"legend": None}
    ranged = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    scale = {"domain": list(names), "range": ranged}
    return {"field": "group", "type": "nominal", "title": None, "scale": scale} | shown


def _shape_groups(trials: Sequence[ReportedTrial]) -> Spec:
    names = _list_groups(trials)
    ranged = [SHAPES[number % len(SHAPES)] for number in range(len(names))]
    return {"field": "group", "type": "nominal", "legend": None, "scale": {"domain": names, "range": ranged}}


def _is_wide(values: Iterable[float]) -> bool:
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) / min(known) > LOG_FROM


def _normalize(value: float, low: float, high: float) -> float:
    return 0.5 if low == high else (value - low) / (high - low)


def _place_on(axis: Axis, value: Any) -> float:
    if axis.is_log:
        return _normalize(log(value), log(axis.low), log(axis.high))
    return _normalize(axis.locate(value), axis.low, axis.high)


def _list_ticks(axis: Axis) -> list[tuple[float, str]]:
    if axis.choices is not None:
        return [(_normalize(number, axis.low, axis.high), text) for number, text in enumerate(axis.choices)]
    return [(0.0, format_knob(axis.low)), (1.0, format_knob(axis.high))]


def _find_front(points: Sequence[tuple[float, float]], goal: Goal) -> list[bool]:
    """Return for each (cost, value) whether no other is as good in both and better in one."""
    sign = 1 if goal.best == "min" else -1
    signed = [(cost, sign * value) for cost, value in points]
    return [
        not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in signed) for mine in signed
    ]
