"""Requests that change which models the nodes have: pull, create, copy, delete, blobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from router import downstream
from router.admission import Held, Memory
from router.beside import beside
from router.build import Builds, recipe
from router.core import dialect, names
from router.core.dialect import Asked, Call
from router.core.policy import Target
from router.core.registry import Registry
from router.core.types import NodeSpec, Refusal, Rejected, Scope
from router.dispatch import Refused
from router.downstream import Reply, Request
from router.errors import ClientError
from router.fanout import Errand, Fanout
from router.log import Report

# What the same name must not be read as an alias for: a change of an alias's model is a surprise.
_AS_WRITTEN = ("/api/create", "/api/delete")


@dataclass(slots=True)
class Manage:
    """Answers the routes of Kind.MANAGED."""

    registry: Registry
    fanout: Fanout
    builds: Builds
    memory: Memory

    async def handle(self, request: Request, report: Report, asked: Asked, extra: bytes) -> Reply:
        """Answer one request; `extra` header lines are added to the answer.

        Raises ClientError and Refused where no node may be asked; of what a node does not do,
        the answer tells.
        """
        errand = Errand(request, report, asked, extra, asked.target)
        if asked.route.path == "/api/blobs/:digest":
            return await self.builds.blob(errand)
        held = Held(self.memory)
        try:
            return await self._handle(errand, report, asked, held)
        finally:
            held.close()

    async def _handle(self, errand: Errand, report: Report, asked: Asked, held: Held) -> Reply:
        route = asked.route
        call, body = await self._read(errand, held)
        target = self._target(call, asked.scope)
        assert target.model is not None  # a resolved name
        report.model, report.sent, report.known = target.model.key, target.sent, target.known
        errand.body = await beside(body, partial(dialect.rename, body, call, target.sent))
        try:
            match route.path:
                case "/api/pull":
                    return await self._pull(errand, call, target)
                case "/api/create":
                    return await self._create(errand, call, target)
                case _:
                    return await self.fanout.change(given(self.registry.holders(target)), errand)
        except Refused as refused:
            refused.model = refused.model or target.sent
            raise

    async def _read(self, errand: Errand, held: Held) -> tuple[Call, bytes | bytearray]:
        limits = self.fanout.settings.limits
        body = await downstream.body(errand.request, limits.body_bytes, limits.stalled_body_s, held)
        if not body:
            raise ClientError(400, "missing request body")
        return await beside(body, partial(dialect.parse, errand.asked.route, body)), body

    def _target(self, call: Call, scope: Scope | None) -> Target:
        """What the body names. Raises Refused."""
        if call.route.path not in _AS_WRITTEN:
            target = self.registry.resolve(call.model, scope)
            if isinstance(target, Rejected):
                raise Refused(target, call.model)
            return target
        try:
            left, pin = names.split_pin(call.model)
            name = names.parse(left)
        except names.BadName:
            raise Refused(Rejected(Refusal.BAD_NAME), call.model) from None
        return Target(name, pin, name.text, self.registry.knows(name.key), scope)

    async def _pull(self, errand: Errand, call: Call, target: Target) -> Reply:
        nodes = given(self.registry.homes(target))
        if target.pin is None and target.scope is None:
            nodes = nodes[: self.fanout.settings.pull_to]
        return await self.fanout.follow(nodes, errand, streams=call.streams)

    async def _create(self, errand: Errand, call: Call, target: Target) -> Reply:
        """Make a model where it may live and all that it is made of is at hand. A node that lacks
        a blob says so itself; one that lacks the model it is made from pulls it."""
        homes = nodes = given(self.registry.homes(target))
        body = b"".join(errand.body)
        made_of = await beside(body, partial(recipe, call.route, body))
        if made_of.digests:
            nodes = await self.builds.having(homes, errand, made_of.digests) or homes[:1]
        if made_of.base.model:
            nodes = await self._from(errand, made_of.base, body, nodes)
        if target.pin is None and target.scope is None:
            nodes = nodes[: self.fanout.settings.create_to]
        return await self.fanout.follow(nodes, errand, streams=call.streams)

    async def _from(
        self, errand: Errand, base: Call, body: bytes, nodes: Sequence[NodeSpec]
    ) -> Sequence[NodeSpec]:
        """Those of the nodes that have the model it is made from, or all where none has it; and
        take the pin off its name. Raises Refused and ClientError."""
        source = self.registry.resolve(base.model, errand.asked.scope)
        if isinstance(source, Rejected):
            raise Refused(source, base.model)
        errand.body = await beside(body, partial(dialect.rename, body, base, source.sent))
        holders = self.registry.holders(source)
        if isinstance(holders, Rejected):
            if source.pin is not None and errand.asked.scope is None:
                raise Refused(holders, source.sent)
            return nodes
        able = [node for node in nodes if node in holders]
        if source.pin is not None and not able:
            raise ClientError(400, "the model may not be made on the node that `from` pins")
        return able or nodes


def given(found: Sequence[NodeSpec] | Rejected) -> Sequence[NodeSpec]:
    """The nodes that the registry gives. Raises Refused where it gives none."""
    if isinstance(found, Rejected):
        raise Refused(found)
    return found
