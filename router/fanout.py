"""One request sent to several nodes: what each of them said, and what the client is told of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from itertools import chain

import msgspec
from aiohttp import hdrs

from router import answers, log
from router.core import retry, wording
from router.core.dialect import Asked, Framing
from router.core.progress import SUCCESS, Progress, told
from router.core.types import Failure, FailureKind, NodeSpec
from router.downstream import Reply, Request
from router.errors import UpstreamError
from router.exchange import Exchange
from router.headers import TO_NODE, Header, forwarded
from router.log import Ending, Report
from router.relay import Limits, own_lines, read_head
from router.upload import CHUNKED, Upload
from router.upstream import Upstream, request_head
from router.wire import Bytes

_JSON = b"Content-Type: application/json; charset=utf-8\r\n"
_DONE = wording.dumps({"status": SUCCESS})
_errors = msgspec.json.Decoder(dict[str, object]).decode
Learn = Callable[[Sequence[NodeSpec]], Awaitable[None]]
Hear = Callable[[NodeSpec, Exchange], Awaitable["Said"]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of managing; a reload replaces it whole. `pull_to`, `create_to`:
    how many nodes get a model, None for all."""

    limits: Limits
    pull_to: int | None
    create_to: int | None


@dataclass(slots=True)
class Errand:
    """A client's request that is to be done on several nodes. `extra`: header lines of the gate's
    for the answer; `target`: what nodes are asked for; `body`: what they are sent."""

    request: Request
    report: Report
    asked: Asked
    extra: bytes
    target: str
    body: Sequence[Bytes] = field(default=(), repr=False)

    @property
    def unread(self) -> bool:
        """What the client sent, or is still to send, has not been read to its end."""
        return not self.request.content.is_eof()

    def name(self, nodes: Iterable[NodeSpec]) -> None:
        """Write down which nodes it concerns."""
        self.report.node = ",".join(node.name for node in nodes)
        self.report.reason = "manage"
        self.report.attempts = 1

    def lines(self) -> bytes:
        """Header lines of our own for the answer."""
        return own_lines(self.report, self.extra)


@dataclass(frozen=True, slots=True)
class Said:
    """What one node answered, whole; with a `failure`, why it did not."""

    node: NodeSpec
    status: int
    reason: bytes = b""
    headers: Sequence[Header] = ()
    body: bytes = b""
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None and self.status < 300

    @property
    def text(self) -> str:
        """The error in the node's words, or what became of the connection to it."""
        if self.failure is not None:
            return self.failure.detail or self.failure.kind.value
        try:
            error = _errors(self.body).get("error")
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            error = None
        return error if isinstance(error, str) else f"status {self.status}"

    def worded(self, *, alone: bool) -> str:
        """The error as the client is told it; of several nodes the names are told anyway."""
        return f"node {self.node.name}: {self.text}" if alone and self.failure else self.text


@contextlib.asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A group of tasks whose first failure comes out as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None


@dataclass(slots=True)
class Fanout:
    """Sends requests to several nodes at once. `learn` asks nodes what they have now."""

    upstream: Upstream
    settings: Settings
    via: Header
    clock: Callable[[], float]
    learn: Learn

    async def ask(
        self, nodes: Sequence[NodeSpec], errand: Errand, method: str = ""
    ) -> Sequence[Said]:
        """Each node's whole answer, in their order; `method` other than the client's."""
        async with together() as group:
            ask = partial(self._ask, errand, method or errand.request.method)
            tasks = [group.create_task(ask(node)) for node in nodes]
        return [task.result() for task in tasks]

    async def _ask(self, errand: Errand, method: str, node: NodeSpec) -> Said:
        first_byte_s = self.settings.limits.first_byte_s
        return await _said(node, self.open(errand, method, node, first_byte_s), self.whole)

    async def whole(self, node: NodeSpec, exchange: Exchange) -> Said:
        """An answer that is no stream. Raises UpstreamError."""
        body = bytearray()
        while piece := await exchange.read():
            body += piece
            if len(body) > self.settings.limits.held_bytes:
                raise UpstreamError(Failure(FailureKind.GARBAGE, detail="an answer too large"))
        return Said(node, exchange.status, exchange.reason, exchange.headers, bytes(body))

    async def open(
        self, errand: Errand, method: str, node: NodeSpec, first_byte_s: float | None
    ) -> Exchange:
        """Send the request: a change over a new connection, since whether a node has read it
        before a kept one broke cannot be told, and none may be asked for twice."""
        body = errand.body if method == errand.request.method else ()
        return await self.upstream.open(
            node, self.head(errand, method, node, _length(method, body)), body,
            fresh=method != "HEAD", renew=True, no_body=method == "HEAD",
            first_byte_s=first_byte_s, between_s=self.settings.limits.between_s,
        )  # fmt: skip

    async def send(self, errand: Errand, node: NodeSpec, source: AsyncIterator[bytes]) -> Said:
        """Send a body as it comes: over a new connection, since it cannot be sent again."""
        limits, length = self.settings.limits, errand.request.content_length
        length = CHUNKED if length is None else length
        head = self.head(errand, errand.request.method, node, length)
        opening = self.upstream.open(
            node, head, Upload(source, length), fresh=True,
            first_byte_s=limits.first_byte_s, between_s=limits.between_s,
        )  # fmt: skip
        return await _said(node, opening, self.whole)

    def head(self, errand: Errand, method: str, node: NodeSpec, length: int | None) -> bytes:
        request = errand.request
        connection = request.headers.getall(hdrs.CONNECTION, None)
        headers = forwarded(request.raw_headers, connection, self.via)
        return request_head(node, method, errand.target, headers, length, TO_NODE)

    async def tell(self, nodes: Sequence[NodeSpec], errand: Errand) -> Reply:
        """Have each of the nodes do something that leaves its models as they are."""
        errand.name(nodes)
        return self.conclude(errand, await self.ask(nodes, errand))

    async def change(self, nodes: Sequence[NodeSpec], errand: Errand) -> Reply:
        """Do something on each of the nodes that is done at once, and tell how it went."""
        errand.name(nodes)
        said = await self.ask(nodes, errand)
        await self.learn([one.node for one in said if one.ok])
        return self.conclude(errand, said)

    async def follow(self, nodes: Sequence[NodeSpec], errand: Errand, *, streams: bool) -> Reply:
        """Do something on each of the nodes that takes long and tells how far it is."""
        errand.name(nodes)
        story = _Story(self, errand, Progress([node.name for node in nodes]), len(nodes) == 1)
        # Without a stream a node says nothing until it has done it all, which may take hours.
        first_byte_s = self.settings.limits.first_byte_s if streams else None
        async with together() as group:
            tasks = [group.create_task(story.hear(node, first_byte_s)) for node in nodes]
        said = [task.result() for task in tasks]
        done = set(story.progress.done)
        await self.learn([node for node in nodes if node.name in done])
        told_any = story.reply is not None or any(one.ok for one in said)
        return story.end() if story.head is not None and told_any else self.conclude(errand, said)

    def conclude(self, errand: Errand, said: Sequence[Said]) -> Reply:
        """The answer to a request of which each node has said how it went.

        Where all say the same, it is a node's own answer, and so it is where one node was asked.
        What a node does not have any more need not be taken from it.
        """
        good = [one for one in said if one.ok]
        bad = [one for one in said if not one.ok and not (good and one.status == 404)]
        if not bad:
            return self.pass_on(errand, good[0])
        worst = max(bad, key=lambda one: one.status)
        alike = len({(one.status, one.text) for one in bad}) == 1 and bad[0].failure is None
        if not good and alike and (len(bad) == 1 or worst.status < 500):
            return self.pass_on(errand, worst)
        status = max(500, worst.status) if good else worst.status
        failures = {one.node.name: one.worded(alone=len(said) == 1) for one in bad}
        text = told(failures, [one.node.name for one in good])
        ending = Ending.FAILED if worst.failure is not None else log.ending(status)
        return self.refuse(errand, status, text, ending)

    def pass_on(self, errand: Errand, said: Said) -> Reply:
        """Answer with what one node said."""
        head, _, length = read_head(said.headers)
        report = errand.report
        report.status, report.ending = said.status, log.ending(said.status)
        report.first_at = self.clock()
        if report.method != "HEAD":
            length = len(said.body)
        head += errand.lines()
        reply = Reply(
            errand.request, said.status, said.reason, head, length or 0, last=errand.unread
        )
        reply.finish_with(said.body)
        return reply

    def refuse(self, errand: Errand, status: int, text: str, ending: Ending) -> Reply:
        report = errand.report
        report.status, report.ending, report.error = status, ending, text
        body = wording.dumps({"error": text})
        later = answers.retry_after(status)
        head = _JSON + (f"Retry-After: {later}\r\n".encode() if later else b"") + errand.lines()
        reply = Reply(errand.request, status, _reason(status), head, len(body), last=errand.unread)
        reply.finish_with(b"" if report.method == "HEAD" else body)
        return reply


@dataclass(slots=True)
class _Story:
    """The progress of one request on several nodes, as the client is told of it."""

    fanout: Fanout
    errand: Errand
    progress: Progress
    alone: bool
    head: Said | None = None  # of the first node that streams
    reply: Reply | None = None

    async def hear(self, node: NodeSpec, first_byte_s: float | None) -> Said:
        """Tell what one node says, to its end. Raises ConnectionResetError if nobody listens."""
        opening = self.fanout.open(self.errand, self.errand.request.method, node, first_byte_s)
        said = await _said(node, opening, self._hear)
        if not said.ok:
            await self._tell(self.progress.fail(node.name, said.worded(alone=self.alone)))
        return said

    async def _hear(self, node: NodeSpec, exchange: Exchange) -> Said:
        if exchange.status != 200 or read_head(exchange.headers)[1] is not Framing.NDJSON:
            said = await self.fanout.whole(node, exchange)
            if said.ok:
                await self._tell(self.progress.take(node.name, _DONE))
            return said
        said = Said(node, exchange.status, exchange.reason, exchange.headers)
        self.head = self.head or said
        tail = b""
        while piece := await exchange.read():
            *lines, tail = (tail + piece).split(b"\n")
            if len(tail) > self.fanout.settings.limits.record_bytes:
                raise UpstreamError(Failure(FailureKind.GARBAGE, detail="a record too large"))
            take = partial(self.progress.take, node.name)
            await self._tell(chain.from_iterable(map(take, lines)))
        await self._tell(self.progress.take(node.name, tail))
        await self._tell(self.progress.end(node.name))
        return said

    async def _tell(self, records: Iterable[bytes]) -> None:
        data = b"".join(records)
        if data and not self._begun().push(data):
            await self._begun().drain()

    def _begun(self) -> Reply:
        """The answer, whose status and headers leave with the first record."""
        if self.reply is None:
            assert self.head is not None  # no other node tells of progress
            report, head = self.errand.report, self.head
            report.status, report.streamed = head.status, True
            report.first_at = self.fanout.clock()
            lines = read_head(head.headers)[0] + self.errand.lines()
            self.reply = Reply(self.errand.request, head.status, head.reason, lines, None)
        return self.reply

    def end(self) -> Reply:
        """The answer with its last record."""
        reply, report, failures = self._begun(), self.errand.report, self.progress.failures
        report.ending = Ending.NODE_ERROR if failures else Ending.OK
        if failures:
            report.error = told(failures, self.progress.done)
        reply.finish_with(self.progress.outcome())
        return reply


async def _said(node: NodeSpec, opening: Awaitable[Exchange], hear: Hear) -> Said:
    """What is heard of a node, or how it failed."""
    try:
        exchange = await opening
        try:
            return await hear(node, exchange)
        finally:
            exchange.close()
    except UpstreamError as error:
        return Said(node, retry.status(error.failure), failure=error.failure)


def _length(method: str, body: Sequence[Bytes]) -> int | None:
    if method == "HEAD":
        return None
    return sum(map(len, body))


def _reason(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode() if status in set(HTTPStatus) else b""
