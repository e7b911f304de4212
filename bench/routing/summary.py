"""What the documentation shows of all figures: each load in one line, and goodput."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from bench.routing.experiment import Case, Figures, Quantiles
from bench.routing.foreseen import Foreseen, within
from bench.routing.goodput import SHARES
from bench.routing.report import line, seconds, title

COMPARED = _BASE, _PEER, _OURS = "least-in-flight", "warm-and-free", "ollamux"
_FACTOR, _LEAST_S = 2.0, 0.5


def overview(found: Sequence[Figures]) -> str:
    """A line for each load that all three of the routers compared have been run on."""
    heads = [
        "", "least in flight", "warm and free, else free", "ollamux",
        "first token p50 / p99 ÷ least in flight", "end p50 / p99 ÷", "loads", "refused",
    ]  # fmt: skip
    lines = [line(heads), "|---" * len(heads) + "|"]
    for _, group in groupby(found, lambda one: title(one.case)):
        rows = {one.case.router: one for one in group}
        if rows.keys() >= set(COMPARED):
            lines.append(_compared(rows[_BASE], rows[_PEER], rows[_OURS]))
    return "\n".join(lines)


def goodputs(found: Mapping[Case, Sequence[float]]) -> str:
    """A line for each source, layout and share, a column for each router."""
    routers = list(dict.fromkeys(case.router for case in found))
    heads = ["requests an hour", *routers, f"{_OURS} ÷ {_PEER}"]
    lines = [line(heads), "|---" * len(heads) + "|"]
    for load, group in groupby(found.items(), lambda one: title(one[0], rate=False)):
        by_router = {case.router: rates for case, rates in group}
        for place, share in enumerate(SHARES):
            rates = {name: one[place] for name, one in by_router.items()}
            cells = [_rate(rates[name]) if name in rates else "" for name in routers]
            lines.append(line([f"{load}: {share:.0%}", *cells, _gain(rates)]))
    return "\n".join(lines)


def _rate(per_hour: float) -> str:
    return f"{per_hour:,.0f}" if per_hour else "none"


def _gain(rates: Mapping[str, float]) -> str:
    ours, peers = rates.get(_OURS), rates.get(_PEER)
    return "" if ours is None or not peers else f"{ours / peers:.2f}"


def honest(found: Sequence[Foreseen]) -> str:
    """How much of what was expected has come true."""
    heads = ["as expected, up to twice or half, or 0.5 s", "waits", "true", "first tokens", "true"]
    lines = [line(heads), "|---" * len(heads) + "|"]
    for one in found:
        cells = [title(one.case)]
        for what in (one.waits, one.firsts):
            cells += [f"{len(what):,}", f"{within(what, _FACTOR, _LEAST_S):.0%}" if what else ""]
        lines.append(line(cells))
    return "\n".join(lines)


def _compared(base: Figures, peer: Figures, ours: Figures) -> str:
    refused = f"{ours.refused:,}" if ours.refused else ""
    return line(
        [
            title(ours.case), _cell(base), _cell(peer), _cell(ours),
            _ratios(base.first, ours.first), _ratios(base.total, ours.total),
            f"{ours.loads_per_hour / base.loads_per_hour - 1:+.0%}", refused,
        ]
    )  # fmt: skip


def _cell(one: Figures) -> str:
    return f"{seconds(one.first.p50)} / {seconds(one.first.p99)}; {one.loads_per_hour:.0f}"


def _ratios(base: Quantiles, ours: Quantiles) -> str:
    return f"{ours.p50 / base.p50:.2f} / {ours.p99 / base.p99:.2f}"
