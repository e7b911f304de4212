"""How long requests take on nodes: what answers have told, kept so that asking costs little."""

from collections.abc import Mapping

from router.core.estimate import Cost, Lengths, cost, guess, learned, pace
from router.core.node import Node
from router.core.usage import Usage
from router.core.work import Work

_CONTEXTS_MAX = 4096
_ANEW = 16  # answers of a model, after which its node's pace is worked out anew

# Of one request: tokens to read; whether these are cut, so that none of them is in a cache; tokens
# to write.
Size = tuple[float, bool, float]


class Costs:
    """What models cost on nodes, and how large requests for them are."""

    __slots__ = ("_contexts", "_costs", "_guesses", "_lengths", "_paces")

    def __init__(self) -> None:
        self._lengths = Lengths()
        self._contexts: dict[str, int] = {}  # how many tokens each model was last loaded for
        self._costs: dict[Node, dict[str, Cost]] = {}
        self._paces: dict[Node, float] = {}
        self._guesses: dict[str, Cost] = {}

    def __repr__(self) -> str:
        return f"<Costs of {list(self._costs)}>"

    def learn(self, node: Node, key: str, flow: str, told: Usage) -> None:
        """Take what the final record of an answer told, after the node's rates have: that says
        something of models there, too, that have shown nothing yet."""
        rates, costs = node.replicas[key].rates, self._costs.get(node)
        if rates.answers % _ANEW == 0 or not rates.learned:
            self._paces.pop(node, None)
            self._costs.pop(node, None)
        elif costs is not None and key in costs:
            load_s = costs[key].load_s if rates.load_s is None else rates.load_s
            costs[key] = learned(load_s, rates)
        if told.completion_tokens:
            self._lengths.learn(key, flow, told.completion_tokens)

    def forget(self) -> None:
        """Nodes have come or gone, or have other models."""
        self._costs.clear()
        self._paces.clear()
        self._guesses.clear()

    def see(self, contexts: Mapping[str, int]) -> None:
        """Take for how many tokens models are loaded."""
        for key, tokens in contexts.items():
            self._contexts.pop(key, None)  # the one that was loaded longest ago is the first
            self._contexts[key] = tokens
        while len(self._contexts) > _CONTEXTS_MAX:
            del self._contexts[next(iter(self._contexts))]

    def size(self, work: Work, key: str) -> Size:
        """How large a request is likely to be. Of a prompt that is longer than the context its
        beginning is left out, and so is all that would be cached."""
        out = self._lengths.expected(key, work.flow, work.max_tokens)
        context = self._contexts.get(key)
        if context is None or work.prompt_tokens <= context:
            return work.prompt_tokens, False, out
        return context, True, out

    def guessed(self, node: Node, key: str) -> Cost:
        """What a model costs wherever it is: its size alone counts, as this node tells it."""
        found = self._guesses.get(key)
        if found is None:
            found = self._guesses[key] = guess(node.size(key))
        return found

    def of(self, node: Node, key: str) -> Cost:
        """What a model costs on a node."""
        costs = self._costs.get(node)
        if costs is None:
            costs = self._costs[node] = {}
        found = costs.get(key)
        if found is None:
            replica = node.replicas.get(key)
            rates = None if replica is None else replica.rates
            found = costs[key] = cost(node.size(key), rates, lambda: self._pace(node))
        return found

    def _pace(self, node: Node) -> float:
        found = self._paces.get(node)
        if found is None:
            replicas = node.replicas.items()
            known = [(node.size(key), one.rates) for key, one in replicas if one.rates.answers]
            found = self._paces[node] = pace(known, node.spec.weight)
        return found
