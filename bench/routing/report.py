"""Figures as Markdown tables and JSON."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from bench.routing.experiment import Case, Figures, Quantiles
from bench.routing.fleet import CLASSES, Layout

_COLUMNS: Mapping[str, Callable[[Figures], str]] = {
    "first token p50 / p90 / p99, s": lambda one: three(one.first),
    "end p50 / p90 / p99, s": lambda one: three(one.total),
    "within 10 s": lambda one: f"{one.soon:.1%}",
    "loads/h": lambda one: f"{one.loads_per_hour:.0f}",
    "refused": lambda one: str(one.refused),
    "µs a decision": lambda one: f"{one.decision_us:.0f}" if one.decision_us else "",
}
_SOURCES = {
    "AzureLLMInferenceTrace_conv": "Azure",
    "mooncake_conversation_trace": "Mooncake",
    "azure": "made up, Azure's statistics",
    "mooncake": "made up, Mooncake's statistics",
}
_WHAT = {
    "plain": "",
    "flood": ", a flood (the others)",
    "slow": ", a slow node",
    "one-model": ", one model",
}


def tables(found: Sequence[Figures]) -> str:
    """One table for each load, with a line for each router."""
    parts = []
    for load, group in groupby(found, lambda one: title(one.case)):
        parts.append(f"### {load}\n\n{_table(list(group))}")
    return "\n\n".join(parts)


def agreement(virtual: Figures, real: Figures) -> str:
    """How far the times of a real run are from those of the virtual one, in percent."""
    parts = [
        f"{what} {_apart(one.p50, other.p50)} / {_apart(one.p90, other.p90)}"
        f" / {_apart(one.p99, other.p99)}"
        for what, one, other in (
            ("first token", virtual.first, real.first),
            ("end", virtual.total, real.total),
        )
    ]
    return f"{real.case.router}, against virtual time (p50 / p90 / p99): {', '.join(parts)}"


def _apart(expected_s: float, found_s: float) -> str:
    return f"{found_s / expected_s - 1:+.1%}"


def as_json(found: Sequence[Figures]) -> bytes:
    """All figures; null for an infinite time."""
    return msgspec.json.format(msgspec.json.encode(list(found)), indent=2)


def title(case: Case, *, rate: bool = True) -> str:
    """The load of a case in words, with its rate or without."""
    per_hour = f", {case.per_hour:,.0f}/h" if rate else ""
    copies = ", three copies" if case.layout is Layout.THREE else ""
    minutes = "" if case.minutes == math.inf else f", first {case.minutes:g} min"
    return f"{source(case)}{per_hour}{copies}{_WHAT[case.scenario]}{minutes}"


def source(case: Case) -> str:
    """Where its arrivals are from."""
    stem = Path(case.source).stem
    return _SOURCES.get(stem, stem)


def _table(rows: Sequence[Figures]) -> str:
    columns = dict(_COLUMNS)
    for name, _ in CLASSES:
        if any(name in one.classes for one in rows):
            columns[f"first token, {name}"] = _by_class(name)
    if any(one.goodput_per_hour is not None for one in rows):
        columns["goodput/h"] = _goodput
    lines = [line(["router", *columns]), "|---" * (len(columns) + 1) + "|"]
    lines += [line([one.case.router, *(cell(one) for cell in columns.values())]) for one in rows]
    return "\n".join(lines)


def _by_class(name: str) -> Callable[[Figures], str]:
    return lambda one: three(one.classes[name]) if name in one.classes else ""


def line(cells: Iterable[str]) -> str:
    """One of a table."""
    return "| " + " | ".join(cells) + " |"


def three(times: Quantiles) -> str:
    """p50 / p90 / p99."""
    return " / ".join(seconds(one) for one in (times.p50, times.p90, times.p99))


def seconds(time_s: float) -> str:
    """As precise as it matters."""
    return f"{time_s:.2f}" if time_s < 10 else f"{time_s:.0f}"


def _goodput(one: Figures) -> str:
    return "" if one.goodput_per_hour is None else f"{one.goodput_per_hour:,.0f}"
