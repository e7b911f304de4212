"""Which node: eligible, then score, then pick. Pure functions over the pool's nodes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from router.core.names import Name, Pin, pinned
from router.core.node import Node
from router.core.types import Reason, Refusal, Rejected


@dataclass(frozen=True, slots=True)
class Target:
    """What a request needs of a node. `model` None: any node will do; `sent` is the model's
    name as the node is to be told it, without pin, prefix or alias. `known`: a node has it."""

    model: Name | None = None
    pin: Pin | None = None
    sent: str = ""
    known: bool = field(default=False, compare=False)


class Eligible(msgspec.Struct, frozen=True, eq=False):
    """Nodes of one pool that may be asked now, and the reason that holds for any of them."""

    nodes: Sequence[Node]
    reason: Reason


def eligible(
    pools: Sequence[Sequence[Node]], target: Target, tried: Collection[str]
) -> Eligible | Rejected:
    """The nodes that may be asked; `tried` holds urls of nodes that have failed this request."""
    if target.pin is not None:
        return _pinned(pools, target, target.pin, tried)
    model = target.model
    for place, nodes in enumerate(pools):
        usable = [n for n in nodes if n.up and n.serves(model) and n.spec.url not in tried]
        if usable:
            return Eligible(usable, _reason(place, usable))
    return _nobody([node for nodes in pools for node in nodes if node.serves(model)], pools)


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


def _pinned(
    pools: Sequence[Sequence[Node]], target: Target, pin: Pin, tried: Collection[str]
) -> Eligible | Rejected:
    by_url = {node.spec.url: node for nodes in pools for node in nodes}
    everyone = [node.spec for node in by_url.values()]
    found = pinned(pin, everyone)
    if len(found) != 1:
        if not found and pin.host is None:
            return Rejected(Refusal.BAD_NAME)
        refusal = Refusal.AMBIGUOUS_PIN if found else Refusal.UNKNOWN_PIN
        return Rejected(refusal, tuple(found or everyone))
    node = by_url[found[0].url]
    if not node.up or node.spec.url in tried:
        return _rejected(Refusal.PIN_DOWN, [node])
    if not node.serves(target.model):
        return _rejected(Refusal.NOT_ON_PIN, [node])
    return Eligible([node], Reason.PINNED)


def pick(nodes: Sequence[Node]) -> Node:
    """Least in flight for its size; among equals the one whose turn is longest ago."""
    if len(nodes) == 1:
        return nodes[0]
    return min(nodes, key=lambda node: (node.load, node.turn))
