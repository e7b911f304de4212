"""Logging: structlog set-up, the facts of one request, and its one canonical line."""

import enum
import logging
import sys
from dataclasses import dataclass, field
from typing import TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from router.core.usage import Usage

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Ending(enum.StrEnum):
    """How a request ended, for the log and the `outcome` label."""

    OK = "ok"
    CLIENT_ERROR = "client_error"  # a node, or the router, answered 4xx
    NODE_ERROR = "node_error"  # a node answered 5xx
    REJECTED = "rejected"  # no node could be asked
    FAILED = "failed"  # a node was asked and gave no answer
    BROKEN = "broken"  # the answer had begun and could not be finished
    CANCELLED = "cancelled"  # the client left


def ending(status: int) -> Ending:
    """How a request with an answer of this status ended."""
    if status < 400:
        return Ending.OK
    return Ending.CLIENT_ERROR if status < 500 else Ending.NODE_ERROR


@dataclass(slots=True)
class Report:
    """What is known of one request; times are seconds on the monotonic clock.

    `model` is a canonical name; `known` says whether a node has it, so that it may become a
    metric label. `client` is an address. `forwarded`: a node was chosen for it.
    """

    id: str
    client: str
    method: str
    started: float
    endpoint: str = "other"
    model: str = ""
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
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    final: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=stream.isatty())]
        if console
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=shared + final,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    _route_stdlib(shared, final, stream)


def _route_stdlib(shared: list[Processor], final: list[Processor], stream: TextIO) -> None:
    """Libraries that log (aiohttp, asyncio) speak through the same renderer, from warnings up."""
    handler = logging.StreamHandler(stream)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)


def logger() -> FilteringBoundLogger:
    log: FilteringBoundLogger = structlog.get_logger()
    return log


def request(log: FilteringBoundLogger, report: Report, ended: float) -> None:
    """Write the canonical line of a request. It never holds prompts, keys or header values."""
    first = report.first_at
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
        "prompt_tokens": report.usage.prompt_tokens,
        "completion_tokens": report.usage.completion_tokens,
        "status": report.status,
        "outcome": report.ending.value,
    }
    if report.error:
        fields["error"] = report.error
    log.info("request", **fields)
