"""Clients of every kind, at work all the time, each of which knows what it is to be told."""

import asyncio
import contextlib
import enum
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from tests.chaos.orders import Catalog, Kind, Order
from tests.chaos.verdicts import Outcome, Violation, verdict
from tests.rig import Answer, Talk

_KEPT_SHARE = 0.5
_REFUSED_S = 0.02  # what nobody answers is not asked in a hurry
_WORST_SHOWN = 20
_REASONS = 15
_NAMES = re.compile(r"\bn[0-9]+\b|[0-9][0-9.e-]*")


class Vanishing(enum.StrEnum):
    """Where a client is when it vanishes."""

    HEAD = "while it sends the head"
    BODY = "while it sends the body"
    WAITING = "before the first byte"
    READING = "in the middle of the answer"


@dataclass
class Pace:
    """When the parts of one answer came: seconds."""

    begun: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    longest_gap_s: float = 0.0
    _last: float = 0.0

    def tick(self) -> None:
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now - self.begun
        else:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self._last = now


@dataclass
class Tally:
    """What all requests have come to."""

    outcomes: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    unhappy: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # errors told, without pins
    first_s: float = 0.0
    gap_s: float = 0.0
    kept: int = 0
    on_end: Callable[[Order, Outcome], None] = lambda _order, _outcome: None

    def count(self, outcome: Outcome, *kinds: Kind) -> int:
        """How many requests of these kinds (of all, without any) had an outcome."""
        return sum(n for (kind, o), n in self.outcomes.items() if o == outcome and kind in kinds)

    def total(self, *kinds: Kind) -> int:
        """How many of these kinds have ended, but for those whose client left."""
        return sum(
            n for (kind, o), n in self.outcomes.items() if kind in kinds and o != Outcome.LEFT
        )

    def add(self, order: Order, outcome: Outcome, answer: Answer, pace: Pace) -> None:
        self.outcomes[order.kind, outcome] += 1
        self.statuses[answer.status] += 1
        self.nodes[answer.header("X-Ollamux-Node") or ""] += 1
        self.first_s = max(self.first_s, pace.first_s or 0.0)
        self.gap_s = max(self.gap_s, pace.longest_gap_s)
        if outcome is not Outcome.RIGHT and len(self.unhappy) < _WORST_SHOWN:
            told = " ".join(answer.body[-200:].decode(errors="replace").split())
            self.unhappy.append(f"{order.number} {order.kind}: {answer.status} …{told}")
        if outcome not in (Outcome.RIGHT, Outcome.LEFT) and order.kind is not Kind.PINNED:
            self.reasons[f"{answer.status} {_reason(answer.body)}"] += 1
        self.on_end(order, outcome)

    def merge(self, other: "Tally") -> None:
        """Add what another load came to."""
        self.outcomes += other.outcomes
        self.statuses += other.statuses
        self.nodes += other.nodes
        self.violations += other.violations
        self.reasons += other.reasons
        self.unhappy += other.unhappy[: _WORST_SHOWN - len(self.unhappy)]
        self.first_s = max(self.first_s, other.first_s)
        self.gap_s = max(self.gap_s, other.gap_s)
        self.kept += other.kept

    def violated(self, order: Order, why: object) -> None:
        self.outcomes[order.kind, "VIOLATED"] += 1
        self.violations.append(f"{order.number} {order.kind}: {why}")


@dataclass
class Load:
    """`workers` clients that ask one thing after the other. `leaving`: the share of requests
    whose client vanishes; `patience_s`: a client that has waited so long was not answered."""

    url: str
    seed: str
    catalog: Catalog
    kinds: Sequence[Kind] = tuple(Kind)
    workers: int = 16
    leaving: float = 0.0
    patience_s: float = 20.0
    limit: int | None = None  # requests in all
    tally: Tally = field(default_factory=Tally)
    _ended: bool = False
    _begun: int = 0

    async def run(self) -> None:
        """Until `stop`, or until all requests that there may be have ended."""
        self._ended = False
        async with asyncio.TaskGroup() as group:
            for number in range(self.workers):
                group.create_task(self._work(number))

    def stop(self) -> None:
        """No new requests; those that run come to their end."""
        self._ended = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Tally]:
        """It runs while the block does; at its end, every request has come to an end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.run())
            try:
                yield self.tally
            finally:
                self.stop()

    async def _work(self, worker: int) -> None:
        dice = random.Random(f"{self.seed}/{self._begun}/{worker}")
        kept: Talk | None = None
        while not self._ended and (self.limit is None or self._begun < self.limit):
            self._begun += 1
            order = self.catalog.order(f"{self.seed}-{self._begun}", dice.choice(self.kinds), dice)
            if dice.random() < self.leaving:
                await self._vanish(order, dice)
                continue
            kept = await self._ask(order, kept, keep=dice.random() < _KEPT_SHARE)
        if kept is not None:
            kept.leave()

    async def _ask(self, order: Order, kept: Talk | None, *, keep: bool) -> Talk | None:
        """Ask, and judge. Returns the connection if it may be used again."""
        pace = Pace()
        talk = kept
        try:
            async with asyncio.timeout(self.patience_s):
                talk = talk or await connect(self.url)
                answer = await exchanged(talk, order, pace)
            try:
                outcome = verdict(order, answer)
            except Violation as violation:
                raise Violation(f"{violation}; the end of it: {answer.body[-400:]!r}") from None
            self.tally.add(order, outcome, answer, pace)
            self.tally.kept += kept is not None
            if outcome is Outcome.REFUSED:
                await asyncio.sleep(_REFUSED_S)
        except Violation as violation:
            self.tally.violated(order, violation)
        except TimeoutError:
            self.tally.violated(order, f"no whole answer after {self.patience_s} s")
        except (OSError, EOFError, ValueError) as error:
            where = "kept" if kept else "fresh"
            self.tally.violated(order, f"no answer on a {where} connection: {error!r}")
        else:
            if keep and answer.header("Connection") != "close":
                return talk
        if talk is not None:
            talk.leave()
        return None

    async def _vanish(self, order: Order, dice: random.Random) -> None:
        stage = dice.choice(tuple(Vanishing))
        try:
            talk = await connect(self.url)
        except OSError as error:
            self.tally.violated(order, f"no connection: {error!r}")
            return
        with contextlib.suppress(OSError, EOFError, ValueError, TimeoutError):
            async with asyncio.timeout(self.patience_s):
                await _until(talk, order, stage, dice)
        if dice.random() < 0.5:
            talk.leave()
        else:
            talk.writer.close()
        self.tally.outcomes[order.kind, Outcome.LEFT] += 1


async def connect(url: str) -> Talk:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    return Talk(*await asyncio.open_connection(host, int(port)))


def _request(order: Order) -> bytes:
    lines = (
        f"POST {order.path} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
        f"X-Request-Id: {order.number}", f"Content-Length: {len(order.body)}",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + order.body


async def _until(talk: Talk, order: Order, stage: Vanishing, dice: random.Random) -> None:
    """Get as far as `stage`."""
    data = _request(order)
    head = data.index(b"\r\n\r\n")
    match stage:
        case Vanishing.HEAD:
            await talk.send(data[: dice.randrange(1, head)])
        case Vanishing.BODY:
            await talk.send(data[: dice.randrange(head + 4, len(data))])
        case Vanishing.WAITING:
            await talk.send(data)
        case Vanishing.READING:
            await talk.send(data)
            _, _, headers = await talk.head()
            chunked = any(name.lower() == "transfer-encoding" for name, _ in headers)
            left = dice.randint(0, 5) if chunked else 0
            while left and await talk.chunk():
                left -= 1
            return
    await asyncio.sleep(dice.random() * 0.1)


async def exchanged(talk: Talk, order: Order, pace: Pace) -> Answer:
    """Send an order; returns the answer. Raises OSError, EOFError or ValueError without one."""
    await talk.send(_request(order))
    version, status, headers = await talk.head()
    pace.tick()
    named = {name.lower(): value for name, value in headers}
    body, whole = bytearray(), True
    if "content-length" in named:
        body += await talk.reader.readexactly(int(named["content-length"]))
    else:
        try:
            while chunk := await talk.chunk():
                pace.tick()
                body += chunk
        except (OSError, EOFError, ValueError):
            whole = False
    return Answer(version, status, headers, bytes(body), whole)


def _reason(body: bytes) -> str:
    """The text of the error that ends an answer, without names of nodes and numbers."""
    _, _, error = body.decode(errors="replace").rpartition('"error":')
    text = error.strip(' {}"\n').removeprefix('message":"').partition('"')[0]
    return _NAMES.sub("…", text)[:120]


def told(tally: Tally) -> str:
    """The outcomes as lines of text."""
    rows = sorted((kind, outcome, count) for (kind, outcome), count in tally.outcomes.items())
    lines = [f"{kind:<26} {outcome:<18} {count:>7}" for kind, outcome, count in rows]
    reasons = [f"{count:>7} {reason}" for reason, count in tally.reasons.most_common(_REASONS)]
    statuses = f"statuses {json.dumps(tally.statuses)}"
    return "\n".join([*lines, "", statuses, "", "what clients without a pin were told:", *reasons])
