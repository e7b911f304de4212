"""Figures as Markdown tables, JSON, and, where matplotlib is installed, plots."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from bench.routing.experiment import Case, Figures, Quantiles
from bench.routing.fleet import CLASSES

_COLUMNS: Mapping[str, Callable[[Figures], str]] = {
    "first token p50 / p90 / p99, s": lambda one: _three(one.first),
    "end p50 / p90 / p99, s": lambda one: _three(one.total),
    "within 10 s": lambda one: f"{one.soon:.1%}",
    "loads/h": lambda one: f"{one.loads_per_hour:.0f}",
    "refused": lambda one: str(one.refused),
    "µs a decision": lambda one: f"{one.decision_us:.0f}" if one.decision_us else "",
}


def tables(found: Sequence[Figures]) -> str:
    """One table for each load, with a line for each router."""
    parts = []
    for title, group in groupby(found, lambda one: _title(one.case)):
        rows = list(group)
        parts.append(f"### {title}\n\n{_table(rows)}\n\n{_by_class(rows)}")
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


def plot(found: Sequence[Figures], folder: Path) -> Sequence[Path]:
    """A PNG for each load. Nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    groups = groupby(found, lambda one: _title(one.case))
    return [_bars(title, list(rows), folder) for title, rows in groups]


def _title(case: Case) -> str:
    source = Path(case.source).stem
    minutes = "" if case.minutes == math.inf else f", first {case.minutes:g} min"
    return f"{source}, {case.per_hour:,.0f}/h, {case.layout}, {case.scenario}{minutes}"


def _table(rows: Sequence[Figures]) -> str:
    columns = dict(_COLUMNS)
    if any(one.goodput_per_hour is not None for one in rows):
        columns["goodput/h"] = _goodput
    lines = [_line(["router", *columns]), "|---" * (len(columns) + 1) + "|"]
    lines += [_line([one.case.router, *(cell(one) for cell in columns.values())]) for one in rows]
    return "\n".join(lines)


def _by_class(rows: Sequence[Figures]) -> str:
    names = [name for name, _ in CLASSES if any(name in one.classes for one in rows)]
    lines = [_line(["first token by model, s", *names]), "|---" * (len(names) + 1) + "|"]
    for one in rows:
        cells = [_three(one.classes[name]) if name in one.classes else "" for name in names]
        lines.append(_line([one.case.router, *cells]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _three(times: Quantiles) -> str:
    return " / ".join(_seconds(one) for one in (times.p50, times.p90, times.p99))


def _seconds(time_s: float) -> str:
    return f"{time_s:.2f}" if time_s < 10 else f"{time_s:.0f}"


def _goodput(one: Figures) -> str:
    return "" if one.goodput_per_hour is None else f"{one.goodput_per_hour:,.0f}"


def _bars(title: str, rows: Sequence[Figures], folder: Path) -> Path:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (times, loads) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    names = [one.case.router for one in rows]
    for label in ("p99", "p90", "p50"):
        times.barh(names, [getattr(one.first, label) for one in rows], label=label)
    times.set(xscale="log", xlabel="time to first token, s")
    times.legend()
    loads.barh(names, [one.loads_per_hour for one in rows])
    loads.set(xlabel="cold loads per hour")
    figure.suptitle(title)
    figure.tight_layout()
    path = folder / f"routing-{'-'.join(title.replace(',', '').replace('/', '-').split())}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
