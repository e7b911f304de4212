"""The whole report: all loads and routers on the reporting seeds, written into the documentation.

python -m bench.routing.full [--traces FOLDER] [--router NAME ...] [--missing] [--draw] [--jobs N]

What came out is kept in build/routing.bin. With --router only these are run again, with --missing
only what is not kept yet, with --draw nothing. Plots are drawn where matplotlib is installed.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.routing import plots
from bench.routing.experiment import ROUTERS, SEEDS, Case, Figures, measure
from bench.routing.fleet import Layout
from bench.routing.foreseen import Foreseen, foreseen
from bench.routing.generate import TRACES
from bench.routing.goodput import SHARES, goodput
from bench.routing.report import tables
from bench.routing.scenario import SCENARIOS
from bench.routing.summary import COMPARED, goodputs, honest, overview

_FILES = ("mooncake_conversation_trace.jsonl", "AzureLLMInferenceTrace_conv.csv")
_RATES = (965.0, 1700.0, 2400.0)
_MORE_RATES = (500.0, 3400.0)  # for the plot
_RATE = 1700.0
_SEEDS = SEEDS["reporting"]
_ROUTERS = [name for name in ROUTERS if name != "ollamux-least-in-flight"]  # another's twin
_OURS, _PLAIN = "ollamux", "plain"
_T = TypeVar("_T")
_BEGIN, _END = "<!-- written by make bench-routing-report: {} -->", "<!-- end -->"


class Kept(msgspec.Struct):
    """All that has come out so far, in the order of the report."""

    figures: dict[str, Figures] = {}
    goodputs: dict[str, tuple[Case, Sequence[float]]] = {}
    foreseen: dict[str, Foreseen] = {}


def loads(sources: Sequence[str]) -> Sequence[Case]:
    """What each router is run on."""
    found = []
    for source in sources:
        one = Case(source, _RATE)
        found += [replace(one, per_hour=rate) for rate in sorted((*_RATES, *_MORE_RATES))]
        found += [replace(one, per_hour=rate, layout=Layout.THREE) for rate in _RATES]
        found += [replace(one, scenario=name) for name in SCENARIOS if name != _PLAIN]
    others = [name for name in TRACES if name not in sources]
    return [*found, *(Case(name, rate) for name, rate in product(others, _RATES))]


def main() -> None:
    args = _arguments()
    sources = [str(args.traces / name) for name in _FILES] if args.traces else list(TRACES)
    kept = Kept()
    if args.kept.exists():
        kept = msgspec.msgpack.decode(args.kept.read_bytes(), type=Kept)
    args.kept.parent.mkdir(parents=True, exist_ok=True)
    for _ in _run(kept, args, sources):
        args.kept.write_bytes(msgspec.msgpack.encode(kept))
    _write(_ordered(kept, sources), args.docs)


def _run(kept: Kept, args: argparse.Namespace, sources: Sequence[str]) -> Iterator[None]:
    """Comes back after each case."""
    cases = [replace(one, router=name) for one, name in product(loads(sources), args.router)]
    plain = [Case(source, _RATE) for source in sources if _OURS in args.router]
    searched = _everywhere_and_three(sources, args.router)
    with ProcessPoolExecutor(args.jobs) as pool:
        for found in _each(pool, _measured, _open(cases, kept.figures, args)):
            kept.figures[repr(found.case)] = found
            yield
        for one in _each(pool, _foreseen, _open(plain, kept.foreseen, args)):
            kept.foreseen[repr(one.case)] = one
            yield
        for case, rates in _each(pool, _searched, _open(searched, kept.goodputs, args)):
            kept.goodputs[repr(case)] = case, rates
            yield


def _open(cases: Sequence[Case], kept: Collection[str], args: argparse.Namespace) -> Sequence[Case]:
    """Those that are to be run."""
    if args.draw:
        return []
    return [one for one in cases if not (args.missing and repr(one) in kept)]


def _each(
    pool: ProcessPoolExecutor, task: Callable[[Case], _T], cases: Sequence[Case]
) -> Iterator[_T]:
    for case, found in zip(cases, pool.map(task, cases), strict=True):
        print(task.__name__.strip("_"), case.router, case.per_hour, case.source, file=sys.stderr)
        yield found


def _measured(case: Case) -> Figures:
    return measure(case, _SEEDS, 1)


def _searched(case: Case) -> tuple[Case, Sequence[float]]:
    return case, [goodput(case, _SEEDS, share) for share in SHARES]


def _foreseen(case: Case) -> Foreseen:
    return foreseen(case, _SEEDS)


def _everywhere_and_three(sources: Sequence[str], routers: Sequence[str]) -> Sequence[Case]:
    return [
        Case(source, 0.0, layout, router=name)
        for source, layout, name in product(sources, Layout, routers)
    ]


def _ordered(kept: Kept, sources: Sequence[str]) -> Kept:
    """Of these sources, in the order of the report, whenever which part was run."""
    cases = [replace(one, router=name) for one, name in product(loads(sources), _ROUTERS)]
    searched = _everywhere_and_three(sources, _ROUTERS)
    plain = [Case(source, _RATE) for source in sources]
    return Kept(
        {key: kept.figures[key] for key in map(repr, cases) if key in kept.figures},
        {key: kept.goodputs[key] for key in map(repr, searched) if key in kept.goodputs},
        {key: kept.foreseen[key] for key in map(repr, plain) if key in kept.foreseen},
    )


def _write(kept: Kept, docs: Path) -> None:
    """Put the tables where the documentation has a place for them, all of them into a file of their
    own, and draw."""
    found = list(kept.figures.values())
    page = docs / "benchmarks.md"
    text = page.read_text()
    text = placed(text, "overview", overview(found))
    text = placed(text, "goodput", goodputs(dict(kept.goodputs.values())))
    text = placed(text, "honesty", honest(list(kept.foreseen.values())))
    page.write_text(text)
    head = "# All figures of the routing benchmark\n\n[What they mean](benchmarks.md#routing).\n\n"
    (docs / "routing-figures.md").write_text(f"{head}{tables(found)}\n")
    if not plots.drawable():
        print("no plots: matplotlib is not installed (make bench-routing-plots)", file=sys.stderr)
        return
    draw(kept, docs / "plots")


def placed(text: str, name: str, table: str) -> str:
    """The text with the table between the two marks of that name. Raises ValueError without."""
    begin = _BEGIN.format(name)
    before, found, after = text.partition(begin)
    _, end, rest = after.partition(_END)
    if not (found and end):
        raise ValueError(f"no {begin}")
    return f"{before}{begin}\n\n{table}\n\n{_END}{rest}"


def draw(kept: Kept, folder: Path) -> None:
    """All plots. The first two sources are those shown."""
    found = list(kept.figures.values())
    if not (found and kept.foreseen):
        return
    sources = list(dict.fromkeys(one.case.source for one in found))[:2]
    everywhere = [
        one for one in found if one.case.source in sources and one.case.layout is Layout.EVERYWHERE
    ]
    plain = [one for one in everywhere if one.case.scenario == _PLAIN]
    plots.first_tokens(
        [one for one in plain if one.case.per_hour == _RATE], folder / "routing-first-token.png"
    )
    plots.rates(
        [[one for one in plain if one.case.source == source] for source in sources],
        folder / "routing-rates.png",
    )
    compared = [one for one in everywhere if one.case.router in COMPARED]
    troubled = [
        [one for one in compared if (one.case.source, one.case.scenario) == (source, scenario)]
        for scenario, source in product(("flood", "slow"), sources)
    ]
    plots.troubles(troubled, folder / "routing-trouble.png")
    plots.honesty(list(kept.foreseen.values()), folder / "routing-honesty.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--traces", type=Path, help="a folder with both; without it all is made up")
    add("--router", nargs="+", choices=_ROUTERS, default=_ROUTERS)
    add("--missing", action="store_true", help="run only what is not kept")
    add("--draw", action="store_true", help="run nothing: write what is kept")
    add("--kept", type=Path, default=Path("build/routing.bin"))
    add("--docs", type=Path, default=Path("docs"))
    add("--jobs", type=int, default=1, help="processes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
