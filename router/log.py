"""Logging: structlog set-up, the facts of one request, and its one canonical line."""

import asyncio
import enum
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from router.core.usage import NOTHING, Source, Usage

# Without the locals of each frame: they hold prompts.
_TRACEBACKS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
_PLAIN = structlog.dev.plain_traceback
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Ending(enum.StrEnum):
    """How a request ended, for the log and the `outcome` label."""

    OK = "ok"
    CLIENT_ERROR = "client_error"  # a node, or the router, answered 4xx
    NODE_ERROR = "node_error"  # a node answered 5xx
    REJECTED = "rejected"  # no node could be asked
    FAILED = "failed"  # a node was asked and gave no answer
    BROKEN = "broken"  # the answer had begun and could not be finished
    CANCELLED = "cancelled"  # the client left, or the router was stopped


class Continued(enum.StrEnum):
    """What became of an answer whose node failed in the midst of it, for the `result` label."""

    CONTINUED = "continued"  # another node went on with it
    ENDED = "ended"  # nothing was left to come but its last records
    UNABLE = "unable"  # no other node can be told how to go on
    NO_NODE = "no_node"  # no other node with the very model could be asked
    LOST = "lost"  # what had come of it was no longer kept


# A look-up in the module is a third of the price of one in the enum.
_OK, _NODE, _UNSET = Ending.OK, Source.NODE, msgspec.UNSET


def ending(status: int) -> Ending:
    """How a request with an answer of this status ended."""
    if status < 400:
        return _OK
    return Ending.CLIENT_ERROR if status < 500 else Ending.NODE_ERROR


@dataclass(slots=True, eq=False)
class Report:
    """What is known of one request; times are seconds on the monotonic clock.

    `model` is a canonical name, `sent` the one that a node is told; `known` says whether a node
    has it, so that it may become a metric label. `client` is an address. `final`: the last records
    of the answer, `chunks`: how many carried a part of it; `usage` is read from both. `url` is
    that of the last node, `place` the request's number in the line for the model there. `flow`:
    whose it is, where requests wait in turn. `sent_at`: when the last node was asked, `expected_s`:
    in how many seconds from then on its answer was expected to begin. `continuations`: one result
    for each node that failed in the midst.
    """

    id: str
    client: str
    method: str
    started: float
    endpoint: str = "other"
    model: str = ""
    sent: str = ""
    known: bool = False
    node: str = ""
    reason: str = ""
    attempts: int = 0
    overhead_s: float | None = None
    first_at: float | None = None
    status: int = 0
    ending: Ending = Ending.CANCELLED
    error: str = ""
    streamed: bool = False
    final: bytes = b""
    chunks: int = 0
    usage: Usage = NOTHING
    url: str = ""
    flow: str = ""
    place: int = 0
    sent_at: float = 0.0
    expected_s: float | None = None
    continuations: tuple[Continued, ...] = ()


def setup(level: str, style: str, out: TextIO | None = None) -> None:
    """Configure logging once per process; `style` is json, console, or auto (by terminal)."""
    stream = out or sys.stderr
    console = style == "console" or (style == "auto" and stream.isatty())
    output = _Output(stream, packed=not console)
    shared: list[Processor] = [structlog.processors.add_log_level, output.stamp]
    final: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=_PLAIN)]
        if console
        else [_TRACEBACKS, structlog.processors.JSONRenderer(_json)]
    )
    structlog.configure(
        processors=shared + final,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=output,
        cache_logger_on_first_use=False,
    )
    _route_stdlib(shared, final, output)


_pack_into = msgspec.json.Encoder().encode_into


class _Output:
    """Where lines go, and structlog's logger and its factory in one.

    It never fails: a full disk or a reader that has gone costs lines, no request. `packed`:
    lines of requests may be written together.
    """

    def __init__(self, stream: TextIO, *, packed: bool) -> None:
        self.packed = packed
        self.stamp = _Stamp()
        self._stream = stream
        self._waiting = bytearray()

    def __call__(self, *_: object) -> Self:
        return self

    def msg(self, text: str) -> None:
        self.write(text + "\n")
        self.flush()

    debug = info = warning = error = msg

    def write(self, text: str) -> None:
        if self._waiting:
            text = self._waiting.decode() + text
            self._waiting.clear()
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            return

    def flush(self) -> None:
        if self._waiting:
            self.write("")
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def soon(self, line: object) -> None:
        """Write a line of JSON before anything else is, at the latest in the loop's next turn."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        _pack_into(line, self._waiting, -1)
        self._waiting += b"\n"


class _Stamp:
    """Adds the time in UTC. The second is formatted once, the fraction each time."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def __call__(self, _: object, __: str, event: EventDict) -> EventDict:
        event["timestamp"] = self.now()
        return event

    def now(self) -> str:
        second, rest = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._text}{rest // 1000:06d}Z"


def _json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


def _route_stdlib(shared: list[Processor], final: list[Processor], output: _Output) -> None:
    """Libraries that log (aiohttp, asyncio) speak through the same renderer, from warnings up."""
    handler = logging.StreamHandler(cast(TextIO, output))
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)


def logger() -> FilteringBoundLogger:
    """A logger that follows the next `setup` too."""
    log: FilteringBoundLogger = structlog.get_logger()
    return log


class _Line(msgspec.Struct):
    """The canonical line of a request. It never holds prompts, keys or header values."""

    id: str
    client: str
    method: str
    endpoint: str
    model: str
    node: str
    reason: str
    attempts: int
    ttft_ms: float | None
    duration_ms: float
    prompt_tokens: int | None
    completion_tokens: int | None
    tokens_from: Source | msgspec.UnsetType
    status: int
    outcome: Ending
    continuations: tuple[Continued, ...] | msgspec.UnsetType
    error: str | msgspec.UnsetType
    event: str
    level: str
    timestamp: str


def requests() -> Callable[[Report, float], None] | None:
    """What writes the line of a request that ended at a time, in the set-up now in force; None
    where its level is not told."""
    log = structlog.get_logger().bind()
    if not log.is_enabled_for(logging.INFO):
        return None
    output = structlog.get_config()["logger_factory"]

    def pack(report: Report, ended: float) -> None:
        output.soon(_line(report, ended, output.stamp.now()))

    def tell(report: Report, ended: float) -> None:
        fields = msgspec.structs.asdict(_line(report, ended, ""))
        del fields["timestamp"], fields["level"]
        log.info(**{name: told for name, told in fields.items() if told is not msgspec.UNSET})

    return pack if isinstance(output, _Output) and output.packed else tell


def _ms(seconds: float) -> float:
    """With two decimals, cut: a tenth of the price of `round`."""
    return int(seconds * 1e5) / 100


def _line(report: Report, ended: float, timestamp: str) -> _Line:
    first, usage = report.first_at, report.usage
    return _Line(
        report.id,
        report.client,
        report.method,
        report.endpoint,
        report.model,
        report.node,
        report.reason,
        report.attempts,
        None if first is None else _ms(first - report.started),
        _ms(ended - report.started),
        usage.prompt_tokens,
        usage.completion_tokens,
        _UNSET if usage.source is _NODE else usage.source,
        report.status,
        report.ending,
        report.continuations or _UNSET,
        report.error or _UNSET,
        "request",
        "info",
        timestamp,
    )
