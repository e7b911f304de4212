"""One request's way over the nodes: what it has met there, and what may follow."""

from collections.abc import Sequence

from router.core import retry
from router.core.policy import Attempt, Target
from router.core.retry import Verdict
from router.core.types import Failure, FailureKind, NodeSpec, Outcome, Resilience
from router.core.work import NO_WORK, Work

_BUSY, _ANSWERED = FailureKind.BUSY, FailureKind.ANSWERED
_ANSWERS = frozenset((_ANSWERED, FailureKind.MISSING))  # what costs budget


class Trail:
    """The attempts of one request. `changes`: it changes something outside the nodes.

    `met` is all that has failed, in order; `tried` the nodes that have since the client saw a
    record, by their urls.
    """

    __slots__ = ("_answered", "_changes", "_target", "_work", "digest", "met", "tried")

    def __init__(self, target: Target, work: Work = NO_WORK, *, changes: bool = False) -> None:
        self.digest = ""  # of the model, once another node has to go on with its answer
        self.met: list[tuple[NodeSpec, Failure]] = []
        self.tried: set[str] = set()
        self._target = target
        self._work = work
        self._changes = changes
        self._answered = ""

    def attempt(self) -> Attempt:
        """The next one."""
        met = frozenset(node.url for node, one in self.met if one.kind is not _BUSY)
        tried = frozenset(self.tried)
        return Attempt(self._target, tried, self.digest, self._answered, self._work, met)

    def failed(self, node: NodeSpec, failure: Failure, rules: Resilience) -> Verdict:
        """An attempt on this node has failed.

        A node that is full is not counted, and costs no budget: the pool itself keeps requests
        away from it. What nodes have answered counts over the whole life of a request.
        """
        self.met.append((node, failure))
        self._answered = node.url if failure.kind in _ANSWERS else ""
        if failure.kind is not _BUSY:
            self.tried.add(node.url)
        answered = sum(one.kind in _ANSWERS for _, one in self.met)
        left = rules.other_nodes + 1 - max(len(self.tried), answered)
        return retry.decide(failure, changes=self._changes, left=left)

    def went_on(self) -> None:
        """The client has seen another record: so many other nodes may be asked once more."""
        self.tried.clear()

    def outcome(self, failure: Failure) -> Outcome:
        """What a failure says of the node. A request that one node has failed to answer tells
        nothing of the next one that fails the same way: it may be the request. Of one that is
        pinned, none else can tell."""
        if failure.kind is not _ANSWERED:
            return Outcome(failure)
        untold = self._target.pin is not None or self._unanswered
        return Outcome(told=False) if untold else Outcome(failure)

    def excused(self, failure: Failure) -> NodeSpec | None:
        """The node whose failure was the request's, now that another one has failed alike."""
        found = self._unanswered
        return found[0] if failure.kind is _ANSWERED and len(found) == 1 else None

    @property
    def _unanswered(self) -> Sequence[NodeSpec]:
        return [node for node, one in self.met if one.kind is _ANSWERED]

    @property
    def busy(self) -> bool:
        """The last node had no room."""
        return bool(self.met) and self.met[-1][1].kind is _BUSY
