"""Whose a request is, how urgent it is, and until when it has to have a node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from multidict import istr

from router.core import sizing
from router.core.dialect import Route
from router.core.work import USUAL, FlowRule, Priority, Work
from router.downstream import Network, Request, is_trusted
from router.errors import ClientError
from router.log import Report

_DEADLINE, _PRIORITY = istr("X-Ollamux-Deadline-Ms"), istr("X-Ollamux-Priority")
_NAME_MAX = 200
_PRIORITIES = {priority.word: priority for priority in Priority}


@dataclass(frozen=True, slots=True)
class Settings:
    """`header` names the flow, in requests of `trusted` peers. `most_s`: nobody waits longer.
    `rules`: those of the flows that have one of their own, by name."""

    header: str | None
    trusted: Sequence[Network]
    most_s: float
    rules: Mapping[str, FlowRule] = field(default_factory=dict)


def work(
    request: Request, report: Report, route: Route, body: bytes | bytearray, settings: Settings,
    now: float, *, at_least: bool = False,
) -> Work:  # fmt: skip
    """What is known of a request before it has a node; its flow is noted in the report. `at_least`:
    the context that it asks for may be raised. Raises ClientError for a header that cannot be
    read."""
    headers, flow, priority = request.headers, report.client, None
    if settings.trusted and is_trusted(request, settings.trusted):
        if settings.header is not None:
            flow = headers.get(settings.header, "")[:_NAME_MAX] or flow
        if _PRIORITY in headers:
            priority = _priority(headers[_PRIORITY])
    report.flow = flow
    rule, most_s = settings.rules.get(flow, USUAL), settings.most_s
    if _DEADLINE in headers:
        most_s = min(most_s, _milliseconds(headers[_DEADLINE]) / 1000)
    return sizing.work(
        body, flow, rule.priority if priority is None else priority, now + most_s, rule.weight,
        answers=bool(route.final), options=route.options, at_least=at_least,
    )  # fmt: skip


def _priority(text: str) -> Priority:
    found = _PRIORITIES.get(text.strip().lower())
    if found is None:
        names = ", ".join(_PRIORITIES)
        raise ClientError(400, f"{_PRIORITY}: one of {names} is expected")
    return found


def _milliseconds(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal() and len(text) <= 12):
        raise ClientError(400, f"{_DEADLINE}: a number of milliseconds is expected")
    return int(text)
