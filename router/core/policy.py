"""Which node: eligible, then score, then pick. Pure functions over the pool's nodes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import inf

import msgspec

from router.core.bounds import Bounds
from router.core.names import Name, Pin, pinned
from router.core.node import Node
from router.core.types import Reason, Refusal, Rejected, Resilience, Scope, Weighed
from router.core.work import NO_WORK, Work

BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Target:
    """What a request needs of a node. `model` None: any node will do; `sent` is the model's
    name as the node is to be told it, without pin, prefix or alias. `known`: a node has it.
    `scope` is that of the path, `bounds` what else limits the choice; None for no limit."""

    model: Name | None = None
    pin: Pin | None = None
    sent: str = ""
    known: bool = field(default=False, compare=False)
    scope: Scope | None = None
    bounds: Bounds | None = field(default=None, compare=False)


class Attempt(msgspec.Struct, frozen=True, eq=False):
    """One try on one node. Each has an identity of its own: it enters and leaves once.

    `tried`: urls of nodes that are not to be asked. `digest`: of the model, where it has to be the
    very same. `answered`: the url of the node whose answer is the reason for another try. `met`:
    urls of those that have failed this request at any time: others go before them.
    """

    target: Target
    tried: Collection[str] = frozenset()
    digest: str = ""
    answered: str = ""
    work: Work = NO_WORK
    met: Collection[str] = frozenset()


class Eligible(msgspec.Struct, frozen=True, eq=False):
    """Nodes of one pool that may be asked now, and the reason that holds for any of them. `then`:
    those of the next pool, for who has waited for these as long as this pool says."""

    nodes: Sequence[Node]
    reason: Reason
    then: "Eligible | None" = None


def eligible(
    pools: Sequence[Sequence[Node]], target: Target, tried: Collection[str], rules: Resilience,
    now: float,
) -> Eligible | Rejected:  # fmt: skip
    """The nodes that may be asked; `tried` holds urls of nodes that have failed this request."""
    if target.pin is not None:
        return _pinned(pools, target, tried, now)
    if target.bounds is not None:
        return _bounded(pools, target.model, target.bounds, tried, rules, now)
    model = target.model
    kept_away = _kept_away(pools, model, rules, now)
    return _among(pools, model, tried, kept_away) or _nobody(pools, model, pools, tried, now)


def _among(
    pools: Sequence[Sequence[Node]], model: Name | None, tried: Collection[str],
    kept_away: Collection[Node],
) -> Eligible | None:  # fmt: skip
    for place, nodes in enumerate(pools):
        usable = [n for n in nodes if n.open and n.serves(model) and n.spec.url not in tried]
        if kept_away:
            usable = [n for n in usable if n not in kept_away]
        if usable:
            then = None
            if usable[0].spill_s < inf:
                then = _among(pools[place + 1 :], model, tried, kept_away)
            return Eligible(usable, _reason(place, usable), then)
    return None


def _kept_away(
    pools: Sequence[Sequence[Node]], model: Name | None, rules: Resilience, now: float
) -> Collection[Node]:
    """The nodes that a breaker keeps requests for this model away from, or that are full. Where
    too few of those that have it would be left, none is kept away but the full ones."""
    if now == inf or not any(node.troubled for nodes in pools for node in nodes):
        return ()
    key = "" if model is None else model.key
    holders = [n for n in _holders(pools, model) if not n.draining]
    ejected = [n for n in holders if n.open and not n.lets(key, now)]
    left = sum(n.open for n in holders) - len(ejected)
    if left < rules.panic_share * len(holders):
        return [n for n in ejected if n.busy_until(key, now) is not None]
    return ejected


def _bounded(
    pools: Sequence[Sequence[Node]], model: Name | None, bounds: Bounds, tried: Collection[str],
    rules: Resilience, now: float,
) -> Eligible | Rejected:  # fmt: skip
    pools = _within(pools, bounds.only)
    able = _within(pools, bounds.only - bounds.old)
    kept_away = _kept_away(able, model, rules, now)
    found = _among(_within(able, bounds.preferred), model, tried, kept_away) or _among(
        able, model, tried, kept_away
    )
    if found is not None:
        return found
    if model is not None and not pools:
        return Rejected(Refusal.NO_MODEL)
    if _holders(pools, model) and not _holders(able, model):
        return _too_old(_holders(pools, model))
    return _nobody(able, model, pools, tried, now)


def _within(pools: Sequence[Sequence[Node]], urls: Collection[str]) -> Sequence[Sequence[Node]]:
    limited = ([node for node in nodes if node.spec.url in urls] for nodes in pools)
    return [nodes for nodes in limited if nodes]


def _holders(pools: Sequence[Sequence[Node]], model: Name | None) -> Sequence[Node]:
    return [node for nodes in pools for node in nodes if node.serves(model)]


def _too_old(nodes: Sequence[Node]) -> Rejected:
    specs = tuple(node.spec for node in nodes)
    return Rejected(Refusal.TOO_OLD, specs, tuple(node.version for node in nodes))


def _reason(place: int, usable: Sequence[Node]) -> Reason:
    if place > 0:
        return Reason.LATER_POOL
    return Reason.ONLY if len(usable) == 1 else Reason.LEAST_IN_FLIGHT


def _nobody(
    able: Sequence[Sequence[Node]], model: Name | None, pools: Sequence[Sequence[Node]],
    tried: Collection[str], now: float,
) -> Rejected:  # fmt: skip
    """Why none of the able nodes may be asked; `pools` are all that the request is about."""
    holders = _holders(able, model)
    opened = [node for node in holders if node.open]
    if opened:
        left = [node for node in opened if node.spec.url not in tried]
        key = "" if model is None else model.key
        return _full(left, key, now) or _rejected(Refusal.ALL_TRIED, holders)
    if any(node.up for node in holders):
        return _rejected(Refusal.DRAINED, [node for node in holders if node.up])
    everyone = [node for nodes in pools for node in nodes]
    if not holders and any(node.up for node in everyone):
        return Rejected(Refusal.NO_MODEL)
    # With every node down, what they have is not known well enough to say "no such model".
    return _rejected(Refusal.NODES_DOWN, holders or everyone)


def _full(nodes: Sequence[Node], key: str, now: float) -> Rejected | None:
    """Nodes that will have room again, and when the first of them may."""
    full = {node: at for node in nodes if (at := node.busy_until(key, now)) is not None}
    if not full:
        return None
    specs = tuple(node.spec for node in full)
    return Rejected(Refusal.BUSY, specs, until=min(full.values()))


def _rejected(refusal: Refusal, nodes: Sequence[Node]) -> Rejected:
    return Rejected(refusal, tuple(node.spec for node in nodes))


def inside(pools: Sequence[Sequence[Node]], target: Target) -> Sequence[Node] | Rejected:
    """The nodes that pin and scope leave: one where there is a pin."""
    scope, pin = target.scope, target.pin
    nodes = [n for pool in pools for n in pool if scope is None or n.spec.url in scope.urls]
    if pin is None:
        return nodes
    found = pinned(pin, [node.spec for node in nodes])
    if len(found) == 1:
        return [node for node in nodes if node.spec.url == found[0].url]
    if found:
        return Rejected(Refusal.AMBIGUOUS_PIN, tuple(found))
    return _unknown(pools, nodes, pin)


def nobody_has(nodes: Sequence[Node], having: Sequence[Node], target: Target) -> Rejected:
    """Why none of the nodes that pin and scope leave has the model, or none that is up."""
    if target.pin is None:
        if not having and any(node.up for node in nodes):
            return Rejected(Refusal.NO_MODEL)
        return _rejected(Refusal.NODES_DOWN, having or nodes)
    return _rejected(Refusal.NOT_ON_PIN if nodes[0].up else Refusal.PIN_DOWN, nodes)


def _unknown(pools: Sequence[Sequence[Node]], nodes: Sequence[Node], pin: Pin) -> Rejected:
    outside = pinned(pin, [node.spec for pool in pools for node in pool])
    if outside:
        return Rejected(Refusal.OUT_OF_SCOPE, tuple(outside))
    return Rejected(Refusal.BAD_NAME) if pin.host is None else _rejected(Refusal.UNKNOWN_PIN, nodes)


def _pinned(
    pools: Sequence[Sequence[Node]], target: Target, tried: Collection[str], now: float
) -> Eligible | Rejected:
    """The one node. No breaker keeps away who asked for it by its name."""
    found = inside(pools, target)
    if isinstance(found, Rejected):
        return found
    [node] = found
    bounds = target.bounds
    if not node.up or node.spec.url in tried:
        return _rejected(Refusal.PIN_DOWN, found)
    if not node.serves(target.model):
        return _rejected(Refusal.NOT_ON_PIN, found)
    if bounds is not None and node.spec.url not in bounds.only:
        return _rejected(Refusal.NOT_ON_PIN, found)
    if bounds is not None and bounds.old:
        return _too_old(found)
    if node.draining:
        return _rejected(Refusal.DRAINED, found)
    key = "" if target.model is None else target.model.key
    return _full(found, key, now) or Eligible(found, Reason.PINNED)


def why_not(node: Node, target: Target, now: float) -> str:
    """What keeps a request for this from a node, first of all; empty where nothing of its does."""
    model, bounds = target.model, target.bounds
    key = "" if model is None else model.key
    if target.pin is not None and not pinned(target.pin, [node.spec]):
        return "another node is pinned"
    if bounds is not None and node.spec.url not in bounds.only:
        return "placement, path or marks leave it out"
    if bounds is not None and node.spec.url in bounds.old:
        return f"its version {node.version} is too old"
    if not node.up:
        return f"down: {node.detail}"
    if node.draining:
        return "drained"
    if not node.serves(model):
        return "does not have the model"
    if node.busy_until(key, now) is not None:
        return BUSY
    return "" if node.lets(key, now) else "ejected"


def barred(node: Node, target: Target, now: float) -> Weighed:
    """Why this node is not among those that a request for this may have."""
    why = why_not(node, target, now)
    return Weighed(node.spec, why or "others go before it", later=why == BUSY)


def fresh(nodes: Sequence[Node], met: Collection[str]) -> Sequence[Node]:
    """Those that have not failed this request, at the urls `met`; all where that leaves none."""
    return [node for node in nodes if node.spec.url not in met] or nodes if met else nodes


def pick(nodes: Sequence[Node], rules: Resilience, now: float) -> Node:
    """Least in flight for its size; among equals the one whose turn is longest ago."""
    if len(nodes) == 1:
        return nodes[0]
    return min(nodes, key=_turns(rules, now))


def order(nodes: Sequence[Node], rules: Resilience, now: float) -> Sequence[Node]:
    """As they would be picked, were the ones before not there."""
    return sorted(nodes, key=_turns(rules, now))


def _turns(rules: Resilience, now: float) -> Callable[[Node], tuple[float, int]]:
    slow_start_s = rules.slow_start_s
    return lambda node: (node.load(now, slow_start_s), node.turn)
