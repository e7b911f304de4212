"""Figures as PNG files, where matplotlib is installed (`pip install --group plots`)."""

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.routing.experiment import STEPS, Figures
from bench.routing.foreseen import Foreseen
from bench.routing.ours import Outturn
from bench.routing.report import source, title
from bench.routing.scenario import TROUBLE

_DPI, _COLOURS = 80, 32
_PANEL = (5.6, 3.4)  # inches
_LEAST_S = 0.01  # what is shorter is drawn as this
_LOOK: Mapping[str, tuple[str, str]] = {
    "random": ("0.75", ":"),
    "round-robin": ("0.6", "--"),
    "tiers": ("tab:brown", ":"),
    "least-in-flight": ("black", "-"),
    "ollamux-least-in-flight": ("black", "--"),
    "warm-first": ("tab:orange", "--"),
    "warm-and-free": ("tab:blue", "-"),
    "ollamux": ("tab:red", "-"),
}


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def first_tokens(found: Sequence[Figures], path: Path) -> None:
    """The share of requests with their first token within so many seconds, for each load."""
    loads = [list(group) for _, group in groupby(found, lambda one: title(one.case))]
    with _panels(path, 1, len(loads)) as axes:
        for panel, rows in zip(axes, loads, strict=True):
            for one in rows:
                shares = [100 * step / STEPS for step in range(len(one.curve))]
                panel.plot([_shown(at) for at in one.curve], shares, **_look(one))
            panel.set(xscale="log", xlim=(0.05, 1000), xlabel="time to first token, s")
            panel.set(ylabel="% of requests", ylim=(0, 101), title=title(rows[0].case))
            panel.legend(fontsize=7, loc="lower right")


def rates(loads: Sequence[Sequence[Figures]], path: Path) -> None:
    """p50 and p99 of the time to the first token over the rate, for each source of requests."""
    with _panels(path, 2, len(loads)) as axes:
        for place, found in enumerate(loads):
            for row, label in enumerate(("p50", "p99")):
                panel = axes[row * len(loads) + place]
                _over_rate(panel, found, label)
                panel.set(yscale="log", ylabel=f"first token {label}, s")
                panel.set(title=source(found[0].case))
        axes[-1].set(xlabel="requests an hour")
        axes[0].legend(fontsize=7)


def _over_rate(panel: Any, found: Sequence[Figures], label: str) -> None:
    by_router = sorted(found, key=lambda one: one.case.router)
    for _, group in groupby(by_router, lambda one: one.case.router):
        rows = sorted(group, key=lambda one: one.case.per_hour)
        times = [_shown(getattr(one.first, label)) for one in rows]
        panel.plot([one.case.per_hour for one in rows], times, marker=".", **_look(rows[0]))


def troubles(loads: Sequence[Sequence[Figures]], path: Path) -> None:
    """p90 by the minute of arrival, for each load; the time of its trouble is shaded."""
    with _panels(path, math.ceil(len(loads) / 2), 2) as axes:
        for panel, rows in zip(axes, loads, strict=False):
            for one in rows:
                at = [minute for minute, p90 in enumerate(one.minutes) if p90 is not None]
                panel.plot(
                    at, [_shown(p90) for p90 in one.minutes if p90 is not None], **_look(one)
                )
            begin_s, end_s = TROUBLE[rows[0].case.scenario]
            panel.axvspan(begin_s / 60, end_s / 60, alpha=0.15)
            panel.set(yscale="log", xlabel="minute", ylabel="first token p90, s")
            panel.set(title=title(rows[0].case))
        axes[0].legend(fontsize=7)


def honesty(found: Sequence[Foreseen], path: Path) -> None:
    """What was expected against what came: waits in the upper row, first tokens below."""
    with _panels(path, 2, len(found)) as axes:
        for place, one in enumerate(found):
            name = title(one.case)
            _against(axes[place], one.waits, f"{name}: waiting for a node")
            _against(axes[len(found) + place], one.firsts, f"{name}: first token, once sent")


def _against(panel: Any, found: Sequence[Outturn], name: str) -> None:
    known = [one for one in found if one.expected_s < math.inf]
    ends = (-2.0, 3.0)
    panel.hexbin(
        [math.log10(_shown(one.expected_s)) for one in known],
        [math.log10(_shown(one.actual_s)) for one in known],
        gridsize=45, bins="log", cmap="Greys", extent=(*ends, *ends), linewidths=0,
    )  # fmt: skip
    panel.plot(ends, ends, color="tab:red", linewidth=0.8)
    ticks = range(int(ends[0]), int(ends[1]) + 1)
    labels = [f"{10.0**tick:g}" for tick in ticks]
    panel.set(xlim=ends, ylim=ends, title=name, xlabel="expected, s", ylabel="actual, s")
    panel.set_xticks(list(ticks), labels)
    panel.set_yticks(list(ticks), labels)


def _look(one: Figures) -> Mapping[str, Any]:
    colour, style = _LOOK.get(one.case.router, ("tab:green", "-"))
    return {"color": colour, "linestyle": style, "linewidth": 1.3, "label": one.case.router}


def _shown(time_s: float) -> float:
    """Something for a logarithmic axis; what never came is far off it."""
    return min(max(time_s, _LEAST_S), 1e6)


@contextmanager
def _panels(path: Path, rows: int, columns: int) -> Iterator[Sequence[Any]]:
    """Panels to draw on, row by row. The file is small: lines need few colours."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    size = (columns * _PANEL[0], rows * _PANEL[1])
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    try:
        yield list(axes.flat)
        for panel in axes.flat:
            panel.grid(alpha=0.25)
            panel.title.set_fontsize(9)
            for axis in (panel.xaxis, panel.yaxis):
                if axis.get_scale() == "log":
                    axis.set_major_formatter("{x:g}")
                    axis.set_minor_formatter("")
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI)
    finally:
        pyplot.close(figure)
    image = importlib.import_module("PIL.Image").open(path)
    image.convert("RGB").quantize(_COLOURS).save(path, optimize=True)
