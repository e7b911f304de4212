"""Run routers on a trace and print a table of each load: in virtual time, or through sockets too.

python -m bench.routing [--trace FILE] [--rate 965 1700] [--router ollamux random]
python -m bench.routing --sockets [--minutes 10] [--speed 20] [--router ollamux]
    [--other NAME='COMMAND {port} {nodes}'] [--other NAME=URL --first-port 12001]
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bench.routing import sockets
from bench.routing.experiment import ROUTERS, SEEDS, Case, Figures, measure
from bench.routing.fleet import Layout
from bench.routing.generate import TRACES
from bench.routing.goodput import goodput
from bench.routing.plots import drawable, first_tokens
from bench.routing.report import agreement, as_json, tables
from bench.routing.scenario import SCENARIOS
from bench.routing.stage import OURS, Contender, Setting, contender


def main() -> None:
    args = _arguments()
    cases = [
        Case(args.trace, rate, layout, scenario, router, args.minutes)
        for rate, layout, scenario, router in product(
            args.rate, args.layout, args.scenario, args.router
        )
    ]
    compared = list(_on_sockets(cases, args)) if args.sockets else []
    found = [one for both in compared for one in both] or [_measured(case, args) for case in cases]
    print(f"{args.seeds.capitalize()} seeds {', '.join(map(str, SEEDS[args.seeds]))}, pooled.\n")
    print(tables(found))
    for virtual, real in (both for both in compared if len(both) == 2):
        print(f"\n{agreement(virtual, real)}")
    if args.json:
        args.json.write_bytes(as_json(found))
    if args.plots and drawable():
        first_tokens(found, args.plots / "first-token.png")


def _measured(case: Case, args: argparse.Namespace) -> Figures:
    seeds: Sequence[int] = SEEDS[args.seeds]
    found = measure(case, seeds, args.jobs)
    if args.goodput:
        found = replace(found, goodput_per_hour=goodput(case, seeds))
    print(f"{case.router}: {found.requests} requests", file=sys.stderr)
    return found


def _on_sockets(cases: Sequence[Case], args: argparse.Namespace) -> Iterator[Sequence[Figures]]:
    """The figures of each case through sockets, behind those in virtual time where it has some."""
    others: dict[str, Contender] = {one.name: one for one in args.other}
    for case in cases:
        virtual = [] if case.router in others else [_measured(case, args)]
        setting = Setting(args.speed, args.first_port)
        real = sockets.measure(case, SEEDS[args.seeds], setting, others.get(case.router))
        yield [*virtual, replace(real, case=replace(case, router=f"{case.router} (sockets)"))]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", default="mooncake", help=f"a file, or made up: {' or '.join(TRACES)}")
    add("--rate", type=float, nargs="+", default=[965.0], help="requests an hour")
    add("--layout", type=Layout, nargs="+", choices=list(Layout), default=[Layout.EVERYWHERE])
    add("--scenario", nargs="+", choices=SCENARIOS, default=["plain"])
    add("--router", nargs="*", help=f"{', '.join(ROUTERS)}, or module:function")
    add("--seeds", choices=SEEDS, default="tuning")
    add("--minutes", type=float, default=math.inf, help="send only those of the first minutes")
    add("--goodput", action="store_true", help="search the highest rate that is good enough")
    add("--jobs", type=int, default=1, help="processes")
    add("--json", type=Path)
    add("--plots", type=Path, help="a folder for a PNG file")
    add("--sockets", action="store_true", help="through real processes as well")
    add("--speed", type=float, default=20.0, help="how many times faster than the trace")
    add("--other", type=contender, action="append", default=[], help="a further router")
    add("--first-port", type=int, default=0, help="of the nodes; 0 takes free ones")
    return _checked(parser, parser.parse_args())


def _checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """What no single argument can tell. Fills in the routers."""
    if args.router is None:
        args.router = list(OURS if args.sockets else ROUTERS)
    if not args.sockets:
        return args
    if unknown := set(args.router) - set(OURS):
        parser.error(f"only in virtual time: {', '.join(sorted(unknown))}")
    if changing := [name for name in args.scenario if SCENARIOS[name].changes]:
        parser.error(f"only in virtual time: {', '.join(changing)}")
    if any(one.url for one in args.other) and not args.first_port:
        parser.error("a router that runs already needs nodes at known ports: --first-port")
    args.router += [one.name for one in args.other]
    return args


if __name__ == "__main__":
    main()
