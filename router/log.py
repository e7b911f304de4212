"""Logging: structlog set-up, the facts of one request, and its one canonical line."""

import enum
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from router.core.usage import Usage

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


def ending(status: int) -> Ending:
    """How a request with an answer of this status ended."""
    if status < 400:
        return Ending.OK
    return Ending.CLIENT_ERROR if status < 500 else Ending.NODE_ERROR


@dataclass(slots=True)
class Report:
    """What is known of one request; times are seconds on the monotonic clock.

    `model` is a canonical name, `sent` the one that a node is told; `known` says whether a node
    has it, so that it may become a metric label. `client` is an address.
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
    usage: Usage = field(default_factory=Usage)


def setup(level: str, style: str, out: TextIO | None = None) -> None:
    """Configure logging once per process; `style` is json, console, or auto (by terminal)."""
    stream = out or sys.stderr
    console = style == "console" or (style == "auto" and stream.isatty())
    shared: list[Processor] = [structlog.processors.add_log_level, _Stamp()]
    final: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=_PLAIN)]
        if console
        else [_TRACEBACKS, structlog.processors.JSONRenderer(_json)]
    )
    structlog.configure(
        processors=shared + final,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _Lines(stream))),
        cache_logger_on_first_use=False,
    )
    _route_stdlib(shared, final, stream)


class _Lines:
    """A stream that never fails: a full disk or a reader that has gone costs lines, no request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            return

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class _Stamp:
    """Adds the time in UTC. The second is formatted once, the fraction each time."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def __call__(self, _: object, __: str, event: EventDict) -> EventDict:
        second, rest = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        event["timestamp"] = f"{self._text}{rest // 1000:06d}Z"
        return event


def _json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


def _route_stdlib(shared: list[Processor], final: list[Processor], stream: TextIO) -> None:
    """Libraries that log (aiohttp, asyncio) speak through the same renderer, from warnings up."""
    handler = logging.StreamHandler(cast(TextIO, _Lines(stream)))
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)


def logger() -> FilteringBoundLogger:
    """A logger that follows the next `setup` too, for what is logged now and then."""
    log: FilteringBoundLogger = structlog.get_logger()
    return log


def bound() -> FilteringBoundLogger:
    """A logger of the set-up in force, for what is logged all the time: half the price."""
    log: FilteringBoundLogger = structlog.get_logger().bind()
    return log


def request(log: FilteringBoundLogger, report: Report, ended: float) -> None:
    """Write the canonical line of a request. It never holds prompts, keys or header values."""
    first = report.first_at
    usage = report.usage
    fields = {
        "id": report.id,
        "client": report.client,
        "method": report.method,
        "endpoint": report.endpoint,
        "model": report.model,
        "node": report.node,
        "reason": report.reason,
        "attempts": report.attempts,
        "ttft_ms": None if first is None else round((first - report.started) * 1e3, 2),
        "duration_ms": round((ended - report.started) * 1e3, 2),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "status": report.status,
        "outcome": report.ending.value,
    }
    if report.error:
        fields["error"] = report.error
    log.info("request", **fields)
