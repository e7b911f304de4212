"""Which node: eligible, then score, then pick. Pure functions over the pool's nodes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from router.core.bounds import Bounds
from router.core.names import Name, Pin, pinned
from router.core.node import Node
from router.core.types import Reason, Refusal, Rejected, Scope


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


class Eligible(msgspec.Struct, frozen=True, eq=False):
    """Nodes of one pool that may be asked now, and the reason that holds for any of them."""

    nodes: Sequence[Node]
    reason: Reason


def eligible(
    pools: Sequence[Sequence[Node]], target: Target, tried: Collection[str]
) -> Eligible | Rejected:
    """The nodes that may be asked; `tried` holds urls of nodes that have failed this request."""
    if target.pin is not None:
        return _pinned(pools, target, tried)
    if target.bounds is not None:
        return _bounded(pools, target.model, target.bounds, tried)
    return _among(pools, target.model, tried) or _nobody(_holders(pools, target.model), pools)


def _among(
    pools: Sequence[Sequence[Node]], model: Name | None, tried: Collection[str]
) -> Eligible | None:
    for place, nodes in enumerate(pools):
        usable = [n for n in nodes if n.up and n.serves(model) and n.spec.url not in tried]
        if usable:
            return Eligible(usable, _reason(place, usable))
    return None


def _bounded(
    pools: Sequence[Sequence[Node]], model: Name | None, bounds: Bounds, tried: Collection[str]
) -> Eligible | Rejected:
    pools = _within(pools, bounds.only)
    able = _within(pools, bounds.only - bounds.old)
    found = _among(_within(able, bounds.preferred), model, tried) or _among(able, model, tried)
    if found is not None:
        return found
    if model is not None and not pools:
        return Rejected(Refusal.NO_MODEL)
    holders, too_old = _holders(able, model), _holders(pools, model)
    if too_old and not holders:
        return _too_old(too_old)
    return _nobody(holders, pools)


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


def _nobody(holders: Sequence[Node], pools: Sequence[Sequence[Node]]) -> Rejected:
    if any(node.up for node in holders):
        return _rejected(Refusal.ALL_TRIED, holders)
    everyone = [node for nodes in pools for node in nodes]
    if not holders and any(node.up for node in everyone):
        return Rejected(Refusal.NO_MODEL)
    # With every node down, what they have is not known well enough to say "no such model".
    return _rejected(Refusal.NODES_DOWN, holders or everyone)


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
        return _nobody(having, [nodes])
    return _rejected(Refusal.NOT_ON_PIN if nodes[0].up else Refusal.PIN_DOWN, nodes)


def _unknown(pools: Sequence[Sequence[Node]], nodes: Sequence[Node], pin: Pin) -> Rejected:
    outside = pinned(pin, [node.spec for pool in pools for node in pool])
    if outside:
        return Rejected(Refusal.OUT_OF_SCOPE, tuple(outside))
    return Rejected(Refusal.BAD_NAME) if pin.host is None else _rejected(Refusal.UNKNOWN_PIN, nodes)


def _pinned(
    pools: Sequence[Sequence[Node]], target: Target, tried: Collection[str]
) -> Eligible | Rejected:
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
    return Eligible(found, Reason.PINNED)


def pick(nodes: Sequence[Node]) -> Node:
    """Least in flight for its size; among equals the one whose turn is longest ago."""
    if len(nodes) == 1:
        return nodes[0]
    return min(nodes, key=lambda node: (node.load, node.turn))
