"""Blobs and what is made of them: on which nodes a model is being built."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from router import downstream
from router.core import dialect, peek
from router.core.dialect import Call, Route
from router.core.registry import Registry
from router.core.types import NodeSpec, Refusal, Rejected, Scope
from router.dispatch import Refused
from router.downstream import Reply
from router.errors import ClientError
from router.fanout import Errand, Fanout, Said, together
from router.log import Ending

_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
_DIGESTS_IN = ("files", "draft_files", "adapters")
# A model of several files is sent blob after blob: all of them must come to the same nodes.
_BUILD_S = 3600.0
_BLOBS_MAX = 1000  # of one model: each is asked for
_END = b""


@dataclass(slots=True)
class Builds:
    """Answers for blobs, and knows the nodes that a model is being built on."""

    registry: Registry
    fanout: Fanout
    _chosen: frozenset[str] = frozenset()
    _until: float = 0.0

    def nodes(self, scope: Scope | None) -> Sequence[NodeSpec]:
        """The nodes that get blobs: those of the scope, else as many as are configured. A choice
        stays for an hour after it was last asked for. Raises Refused where no node is up."""
        nodes = self.registry.everyone(scope)
        if not nodes:
            raise Refused(Rejected(Refusal.NODES_DOWN, tuple(self.registry.specs())))
        to = self.fanout.settings.create_to
        if scope is not None or to is None:
            return nodes
        now = self.fanout.clock()
        kept = [node for node in nodes if node.url in self._chosen]
        if now >= self._until or not kept:
            kept = sorted(nodes, key=lambda node: self._disk().get(node.url, 0))[:to]
            self._chosen = frozenset(node.url for node in kept)
        self._until = now + _BUILD_S
        return kept

    def _disk(self) -> dict[str, float]:
        """Bytes of models per node."""
        return {
            view.spec.url: sum(model.size_bytes for model in view.present.values())
            for view in self.registry.snapshot()
        }

    async def blob(self, errand: Errand) -> Reply:
        """Answer HEAD or POST of a blob."""
        if not _DIGEST.fullmatch(errand.asked.path.rpartition("/")[2]):
            raise ClientError(400, "invalid digest format", last=errand.unread)
        nodes = self.nodes(errand.asked.scope)
        errand.name(nodes)
        said = await self.fanout.ask(nodes, errand, "HEAD")
        lacking = [one for one in said if one.failure is None and one.status == 404]
        if errand.request.method == "HEAD":
            return self._head(errand, said, lacking)
        having = [one for one in said if one.ok]
        if lacking:
            return await self._receive(errand, lacking, having)
        if having:
            return self.fanout.pass_on(errand, replace(having[0], headers=()))
        return self.fanout.conclude(errand, said)

    def _head(self, errand: Errand, said: Sequence[Said], lacking: Sequence[Said]) -> Reply:
        """There is such a blob if every node has it, so that a model can be made of it. A node
        that does not answer has it not: the upload will leave it out."""
        if lacking:
            return self.fanout.pass_on(errand, lacking[0])
        having = [one for one in said if one.ok]
        if having and len(having) < len(said):
            return self.fanout.refuse(errand, 404, "not every node answers", Ending.CLIENT_ERROR)
        return self.fanout.conclude(errand, said)

    async def _receive(
        self, errand: Errand, lacking: Sequence[Said], having: Sequence[Said]
    ) -> Reply:
        """Pass the body on to the nodes that lack it, in one pass. It has come to the nodes that
        took it; a node that fails on the way is left behind while another goes on."""
        request, fanout = errand.request, self.fanout
        if downstream.waits(request):
            await downstream.go_ahead(request)
        branches = [Branch() for _ in lacking]
        source = downstream.pieces(request, fanout.settings.limits.stalled_body_s)
        async with contextlib.aclosing(source), together() as group:
            tasks = [
                group.create_task(self._send(errand, one.node, branch))
                for one, branch in zip(lacking, branches, strict=True)
            ]
            feeding = group.create_task(tee(source, branches))
            await asyncio.wait(tasks)
            feeding.cancel()  # all have answered: what the client has yet to send goes nowhere
        said = [task.result() for task in tasks]
        errand.name([one.node for one in (*having, *said) if one.ok] or [o.node for o in said])
        self._until = max(self._until, fanout.clock() + _BUILD_S)  # it may have taken hours
        good = [one for one in said if one.ok]
        if not good and all(one.failure is not None for one in said):
            good = [replace(one, headers=()) for one in having]
        if good:
            return fanout.pass_on(errand, max(good, key=lambda one: one.status))
        return fanout.conclude(errand, said)

    async def _send(self, errand: Errand, node: NodeSpec, branch: "Branch") -> Said:
        try:
            return await self.fanout.send(errand, node, branch)
        finally:
            branch.leave()

    async def having(
        self, nodes: Sequence[NodeSpec], errand: Errand, digests: Iterable[str]
    ) -> Sequence[NodeSpec]:
        """Those of the nodes that have all of these blobs. Raises ClientError for too many."""
        digests = list(digests)
        if len(digests) > _BLOBS_MAX:
            raise ClientError(400, f"a model is made of at most {_BLOBS_MAX} blobs here")
        for digest in digests:
            blob = replace(errand, target=f"/api/blobs/{digest}", body=())
            said = await self.fanout.ask(nodes, blob, "HEAD")
            nodes = [one.node for one in said if one.ok]
        return nodes


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model is made of, as far as it decides where: the digests of blobs, and the model
    that `from` names."""

    digests: Sequence[str]
    base: Call


def recipe(route: Route, body: bytes) -> Recipe:
    """Read the body of a create; what is no digest is for the node to refuse."""
    base = dialect.parse(replace(route, model_in=("from",)), body)
    try:
        fields = peek.top_level(body)
    except peek.Unreadable:
        return Recipe((), base)
    found: set[str] = set()
    for name in _DIGESTS_IN:
        start, end = fields.get(name, (0, 0))
        try:
            named = json.loads(body[start:end])
        except (ValueError, RecursionError):
            continue
        if isinstance(named, dict):
            found.update(d for d in named.values() if isinstance(d, str) and _DIGEST.fullmatch(d))
    return Recipe(sorted(found), base)


class Branch:
    """One node's share of a body that goes to several: iterate over it, and leave in the end."""

    __slots__ = ("_left", "_pieces")

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._left = False

    @property
    def left(self) -> bool:
        """Nobody takes any more of it."""
        return self._left

    async def give(self, piece: bytes) -> None:
        """Wait until the piece before has been taken. `b""` is the end."""
        if not self._left:
            await self._pieces.put(piece)

    def leave(self) -> None:
        """Take no more; whoever waits to give goes on."""
        self._left = True
        while not self._pieces.empty():
            self._pieces.get_nowait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._pieces.get()
        if piece == _END:
            raise StopAsyncIteration
        return piece


async def tee(source: AsyncIterator[bytes], branches: Sequence[Branch]) -> None:
    """Give each piece to every branch: as fast as the slowest, and with two pieces in memory."""
    async for piece in source:
        for branch in branches:
            await branch.give(piece)
        if all(branch.left for branch in branches):
            return
    for branch in branches:
        await branch.give(_END)
