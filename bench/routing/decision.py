"""What a decision costs: a pool whose slots are all taken, with so many requests waiting.

python -m bench.routing.decision [--nodes 16] [--waiting 200] [--models 12] [--cycles 2000]
"""

import argparse
import random
import time
from collections import deque
from collections.abc import Sequence

from router.core.lease import Lease
from router.core.names import parse
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Sign,
    Topology,
)
from router.core.work import Work

_SLOTS, _WARM, _FLOWS = 4, 3, 20
_GB = 10**9


def pool(nodes: int, models: Sequence[str]) -> Pool:
    """Nodes that have all models on disk and some in memory."""
    specs = tuple(
        NodeSpec(f"n{i}", f"http://n{i}:1", "http", f"n{i}", 1, slots=_SLOTS, gpus=(48 * _GB,))
        for i in range(nodes)
    )
    made = Pool(Topology((PoolSpec("p", specs),), policy=Policy.EXPECTED_DELAY), 0.0)
    for place, spec in enumerate(specs):
        listed = {key: Model(key, key, {"name": key, "size": 5 * _GB}) for key in models}
        warm = [models[(place * _WARM + i) % len(models)] for i in range(_WARM)]
        resident = {key: Model(key, key, {"size_vram": 12 * _GB}) for key in warm}
        made.observe(spec.url, Observation(Sign.GOOD, "0.33.0", listed, resident), 0.0)
    return made


def cycles(made: Pool, models: Sequence[str], waiting: int, count: int) -> Sequence[float]:
    """Seconds of each cycle: a request ends, another gets its slot, a new one comes."""
    roll = random.Random(1)
    targets = {key: Target(parse(key), None, key) for key in models}
    running: deque[Attempt] = deque()
    now, found = 100.0, []

    def come() -> None:
        work = Work(f"team-{roll.randrange(_FLOWS)}", roll.randrange(100, 8000))
        attempt = Attempt(targets[roll.choice(models)], work=work)
        if isinstance(made.submit(attempt, now), Lease):
            running.append(attempt)

    while made.waiting < waiting:
        come()
    for _ in range(count):
        now += 0.01
        began = time.perf_counter()
        made.leave(running.popleft(), Outcome(), now)
        for one in made.granted(now):
            running.append(one.attempt)
        come()
        found.append(time.perf_counter() - began)
        while made.waiting < waiting:
            come()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--waiting", type=int, default=200)
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--cycles", type=int, default=2000)
    args = parser.parse_args()
    models = [f"m{i}:8b" for i in range(args.models)]
    found = sorted(cycles(pool(args.nodes, models), models, args.waiting, args.cycles))
    p50, p99 = found[len(found) // 2] * 1e6, found[int(len(found) * 0.99)] * 1e6
    print(f"{args.nodes} nodes, {args.waiting} waiting: p50 {p50:.0f} µs, p99 {p99:.0f} µs")


if __name__ == "__main__":
    main()
