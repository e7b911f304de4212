"""Small builders for the core's tests: a node in one line, a pool in another."""

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from router.core.breaker import Ground, Roll
from router.core.lease import Lease, Queued
from router.core.node import Node
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Digest,
    Model,
    NodeSpec,
    Observation,
    Placement,
    Policy,
    PoolSpec,
    Rejected,
    Resilience,
    Sign,
    Topology,
)

_PORTS = {"http": 80, "https": 443}
# Fewer retries than by default, so that tables are short.
RULES = Resilience(budget_least=5)


def spec(
    name: str, url: str = "", *, slots: int = 1, weight: float = 1.0, models: tuple[str, ...] = (),
    labels: Mapping[str, str] | None = None, primary: bool = False, cloud: bool = False,
) -> NodeSpec:  # fmt: skip
    """A node as the configuration would give it; without a url its name is its host."""
    url = url or f"http://{name}:11434"
    parts = urlsplit(url)
    return NodeSpec(
        name=name,
        url=url,
        scheme=parts.scheme,
        host=parts.hostname or "",
        port=parts.port or _PORTS[parts.scheme],
        prefix=parts.path,
        slots=slots,
        weight=weight,
        models=models,
        labels=labels or {},
        primary=primary,
        cloud=cloud,
    )


def models(keys: Iterable[str]) -> Mapping[str, Model]:
    return {key: Model(key, f"digest of {key}", {"name": key}) for key in keys}


def seen(
    *keys: str,
    sign: Sign | None = Sign.GOOD,
    resident: Iterable[str] | None = None,
    version: str | None = None,
    detail: str = "",
) -> Observation:
    """What a probe that found these models present reports."""
    return Observation(
        sign=sign,
        version=version,
        present=models(keys),
        resident=None if resident is None else models(resident),
        detail=detail,
    )


def felt(sign: Sign | None, detail: str = "") -> Observation:
    """A probe that learned nothing but a sign of health."""
    return Observation(sign=sign, detail=detail)


def node(spec: NodeSpec, *keys: str, up: bool = True, in_flight: int = 0) -> Node:
    """A node that has been probed once."""
    made = Node(spec, "default", now=0.0)
    made.learn(seen(*keys))
    made.feel(Sign.GOOD if up else Sign.BAD, up_after=2, down_after=3, now=0.0)
    made.in_flight = in_flight
    return made


def topology(
    *pools: Iterable[NodeSpec],
    aliases: Mapping[str, str | tuple[str, ...]] | None = None,
    placements: Iterable[Placement] = (),
    digest: Digest = Digest.ANY,
    up_after: int = 2,
    down_after: int = 3,
    rules: Resilience = RULES,
    policy: Policy = Policy.LEAST_IN_FLIGHT,
) -> Topology:
    return Topology(
        pools=tuple(PoolSpec(f"pool-{i}", tuple(nodes)) for i, nodes in enumerate(pools)),
        aliases=aliases or {},
        placements=tuple(placements),
        digest=digest,
        up_after=up_after,
        down_after=down_after,
        resilience=rules,
        policy=policy,
    )


def half() -> float:
    """A throw of the dice that leaves every time as it is."""
    return 0.5


def ground(rules: Resilience = RULES, roll: Roll = half) -> Ground:
    return Ground(rules, roll)


def ready(
    topology: Topology, present: Mapping[str, Iterable[str]], down: Iterable[str] = (),
    roll: Roll = half,
) -> Pool:  # fmt: skip
    """A pool after its first probe round: what each node has by the node's name."""
    pool = Pool(topology, 0.0, roll)
    for spec in pool.registry.specs():
        sign = Sign.BAD if spec.name in down else Sign.GOOD
        pool.observe(spec.url, seen(*present.get(spec.name, ()), sign=sign), now=0.0)
    return pool


def attempt(pool: Pool, text: str, tried: Iterable[str] = ()) -> Attempt:
    target = pool.registry.resolve(text)
    assert isinstance(target, Target), target
    return Attempt(target, frozenset(tried))


def ask(
    pool: Pool, text: str, tried: Iterable[str] = (), now: float = 0.0
) -> Lease | Queued | Rejected:
    """What a client that names this model meets."""
    target = pool.registry.resolve(text)
    if isinstance(target, Rejected):
        return target
    return pool.submit(Attempt(target, frozenset(tried)), now)


def lease(pool: Pool, text: str, tried: Iterable[str] = (), now: float = 0.0) -> Lease:
    verdict = ask(pool, text, tried, now)
    assert isinstance(verdict, Lease), verdict
    return verdict


def in_flight(pool: Pool) -> dict[str, int]:
    """The count of each node by its name."""
    return {view.spec.name: view.in_flight for view in pool.registry.snapshot()}
