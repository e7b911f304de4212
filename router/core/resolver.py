"""What clients ask for by name, and which nodes it leaves: scope, pin, alias, prefix, bounds."""

from collections.abc import Collection, Sequence
from math import inf

from router.core import names, policy
from router.core.bounds import Rules, Terms
from router.core.names import BadName, Name, Pin
from router.core.node import Node
from router.core.policy import Target
from router.core.types import Need, Refusal, Rejected, Scope, Topology

# Names as clients write them, read once per revision. A client may send any number of them.
_KNOWN_MAX = 1000
_TEXT_MAX = 1000
_NO_NEED = Need.NONE
_ANYONE = Target()
_NEWEST = (1 << 40,)  # newer than all: no version is known


class Resolver:
    """Reads names for the pools of one configuration. What was worked out holds until the
    registry's `revision` changes."""

    def __init__(self, pools: Sequence[Sequence[Node]], rules: Rules, topology: Topology) -> None:
        self._pools = pools
        self._nodes = [node for nodes in pools for node in nodes]
        self._rules = rules
        self._resilience = topology.resilience
        self._aliases = {
            names.parse(name).key: (to,) if isinstance(to, str) else to
            for name, to in topology.aliases.items()
        }
        self._resolved: dict[object, Target | Rejected] = {}
        self._scopes: dict[str, Scope] = {}
        self._known_at = -1
        self._oldest: tuple[int, ...] = _NEWEST

    @property
    def aliases(self) -> Collection[str]:
        """Their canonical names."""
        return self._aliases.keys()

    def scope(self, text: str, revision: int) -> Scope | Rejected:
        """The nodes that `/@text/...` leaves: one, by its name or address, or those of a pool."""
        if self._known_at != revision or len(self._scopes) > _KNOWN_MAX:
            self._forget(revision)
        found: Scope | Rejected | None = self._scopes.get(text)
        if found is None:
            found = self._scope(text)
            if isinstance(found, Scope):
                self._scopes[text] = found
        return found

    def _scope(self, text: str) -> Scope | Rejected:
        specs = [node.spec for node in self._nodes]
        try:
            found = names.pinned(names.pin(text), specs)
        except BadName:
            found = []
        if len(found) == 1:
            return Scope(text, frozenset([found[0].url]))
        pool = [n.spec.url for n in self._nodes if n.pool.lower() == text.lower()]
        if pool:
            return Scope(text, frozenset(pool))
        refusal = Refusal.AMBIGUOUS_PIN if found else Refusal.UNKNOWN_PIN
        return Rejected(refusal, tuple(found or specs))

    def resolve(
        self,
        text: str,
        scope: Scope | None,
        need: Need,
        since: tuple[int, ...],
        revision: int,
    ) -> Target | Rejected:
        """Read a model's name as a client wrote it: pin, alias and prefix taken off."""
        if self._known_at != revision or len(self._resolved) > _KNOWN_MAX:
            self._forget(revision)
        plain = scope is None and need is _NO_NEED and since <= self._oldest
        asked = text if plain else (text, scope, need, since)
        found = self._resolved.get(asked)
        if found is None:
            found = self._resolve(text, Terms(scope, need, since))
            if len(text) <= _TEXT_MAX:
                self._resolved[asked] = found
        return found

    def anyone(
        self, scope: Scope | None, need: Need, since: tuple[int, ...], revision: int
    ) -> Target | Rejected:
        """What a request needs that names no model."""
        if self._known_at != revision:
            self._forget(revision)
        if scope is None and need is _NO_NEED and since <= self._oldest:
            return _ANYONE
        return self._target(None, None, Terms(scope, need, since))

    def _forget(self, revision: int) -> None:
        self._known_at = revision
        self._resolved.clear()
        self._scopes.clear()
        releases = [node.release for node in self._nodes if node.release]
        self._oldest = min(releases, default=_NEWEST)

    def _resolve(self, text: str, terms: Terms) -> Target | Rejected:
        try:
            left, pin = names.split_pin(text)
            name = self._name(left)
            candidates = self._aliases.get(name.key)
            if candidates is None:
                return self._target(name, pin, terms)
            found = [self._candidate(one, pin, terms) for one in candidates]
        except BadName:
            return Rejected(Refusal.BAD_NAME)
        return next((one for one in found if self._can_be_had(one)), found[0])

    def _candidate(self, text: str, pin: Pin | None, terms: Terms) -> Target | Rejected:
        """What an alias stands for. A pin of the client's, also by path, replaces its own."""
        left, own = names.split_pin(text)
        target = self._target(self._name(left), pin or own, terms)
        if isinstance(target, Rejected) and target.refusal is Refusal.OUT_OF_SCOPE and pin is None:
            return self._target(self._name(left), None, terms)
        return target

    def _can_be_had(self, target: Target | Rejected) -> bool:
        if isinstance(target, Rejected):
            return False
        # Whom a breaker keeps away for a moment is a matter of each request.
        found = policy.eligible(self._pools, target, (), self._resilience, inf)
        return not isinstance(found, Rejected)

    def _target(self, name: Name | None, pin: Pin | None, terms: Terms) -> Target | Rejected:
        scope = terms.scope
        if pin is None and scope is not None and len(scope.urls) == 1:
            pin = next((Pin(n.spec.name) for n in self._nodes if n.spec.url in scope.urls), None)
        sent, known = ("", False) if name is None else (name.text, self.knows(name.key))
        target = Target(name, pin, sent, known, scope)
        nodes: Sequence[Node] = self._nodes
        if pin is not None:
            inside = policy.inside(self._pools, target)
            if isinstance(inside, Rejected):
                return inside if inside.refusal is Refusal.OUT_OF_SCOPE else target
            nodes = inside
        bounds = self._rules.bounds(nodes, name, terms)
        if isinstance(bounds, Rejected):
            return bounds
        return Target(name, pin, sent, known, scope, bounds)

    def _name(self, text: str) -> Name:
        rest = names.without_prefix(text)
        try:
            name = names.parse(text)
        except BadName:
            if rest is None:
                raise
            return names.parse(rest)
        if rest is None or self.knows(name.key):
            return name
        return names.parse(rest)

    def knows(self, key: str) -> bool:
        """Whether any node, up or down, has this model as far as known."""
        return any(key in node.present for node in self._nodes)
