"""What a client was told, call by call, without what two Ollamas may tell differently."""

import asyncio
import inspect
import re
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from tests.clients.pair import DATES

# All that may differ between one Ollama and the pool; a value that is there is kept as its type.
# What is not in this list must be the same, field by field and record by record.
TIMES = frozenset(
    {
        "created",
        "created_at",
        "expires_at",
        "modified_at",
        "total_duration",
        "load_duration",
        "prompt_eval_duration",
        "eval_duration",
    }
)
# Identities are numbered as they appear in a call: the same one has the same number.
_IDENTITY = re.compile(
    r"\b(chatcmpl|cmpl)-\d+\b"
    r"|(?<![0-9A-Za-z])(resp|msg|req)_[0-9a-f]{24}\b"
    r"|\b(?:lc_run--)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
)
# An error that several nodes gave says which.
_NODES = re.compile(r"^n\d+(?:, n\d+)*: ")
# What is loaded is listed in no order that the contract tells.
_UNORDERED = "expires_at"
# Besides: how often a transfer tells of its progress depends on its speed, and two nodes need not
# be at the same layer. So of each layer the last record counts, at the place of its first.


@dataclass(frozen=True)
class Step:
    """One call of a client: a method by its dotted name, its arguments, the error it must raise.

    `raises` is the name of the exception's class; empty for a call that must succeed.
    """

    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    raises: str = ""


def step(method: str, /, *, raises: str = "", **fields: Any) -> Step:
    """Write a step as a call."""
    return Step(method, fields, raises)


async def play(client: object, steps: Iterable[Step], *, threaded: bool) -> list[Any]:
    """Make the calls one after another and return the client's transcript, comparable.

    `threaded`: the client is a synchronous one and waits in a thread. Raises AssertionError for
    a call that fails, or does not, against what its step says.
    """
    told = []
    for number, one in enumerate(steps):
        records, failure = await _call(attrgetter(one.method)(client), one.fields, threaded)
        name = type(failure).__name__ if failure else ""
        assert name == one.raises, f"step {number}, {one.method}: {failure!r} after {records}"
        told.append(comparable([number, one.method, records, _failure(failure)]))
    return told


async def _call(
    method: Callable[..., Any], fields: Mapping[str, Any], threaded: bool
) -> tuple[list[Any], Exception | None]:
    records: list[Any] = []
    try:
        if threaded:
            await asyncio.to_thread(_take, method, fields, records)
        else:
            await _take_async(method, fields, records)
    except Exception as error:  # noqa: BLE001 - whatever the client raises is what it told
        return records, error
    return records, None


def _take(method: Callable[..., Any], fields: Mapping[str, Any], into: list[Any]) -> None:
    value = method(**fields)
    if isinstance(value, Iterator):
        # `extend` keeps what came before an error.
        into.extend(value)
    elif hasattr(value, "__enter__"):
        with value as stream:
            into.extend(stream)
    else:
        into.append(value)


async def _take_async(
    method: Callable[..., Any], fields: Mapping[str, Any], into: list[Any]
) -> None:
    value = method(**fields)
    if inspect.isawaitable(value) and not isinstance(value, AsyncIterable):
        value = await value
    if isinstance(value, AsyncIterable):
        await _collect(value, into)
    elif hasattr(value, "__aenter__"):
        async with value as stream:
            await _collect(stream, into)
    else:
        into.append(value)


async def _collect(stream: AsyncIterable[Any], into: list[Any]) -> None:
    async for record in stream:
        into.append(record)  # noqa: PERF401 - what came before an error counts


def _failure(error: Exception | None) -> Any:
    if error is None:
        return None
    status = getattr(error, "status_code", None)
    return {"raised": type(error).__name__, "status": status, "text": str(error)}


def comparable(value: Any) -> Any:
    """Plain JSON-like values of what a call told, with all that may differ taken out."""
    numbers: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        kind = match[1] or match[2] or "uuid"
        return numbers.setdefault(match[0], f"{kind}#{len(numbers)}")

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return _IDENTITY.sub(numbered, _NODES.sub("", value))
        if isinstance(value, Mapping):
            return {key: _entry(key, walk(one)) for key, one in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return _settled([walk(one) for one in value])
        return value

    return walk(_plain(value))


def _entry(key: object, value: Any) -> Any:
    timed = key in TIMES and value is not None and value not in DATES
    return f"<{type(value).__name__}>" if timed else value


def _settled(values: list[Any]) -> list[Any]:
    if values and all(isinstance(one, dict) and _UNORDERED in one for one in values):
        return sorted(values, key=lambda one: str(one["model"]))
    places: dict[object, Any] = {}
    for at, one in enumerate(values):
        progress = isinstance(one, dict) and "status" in one and one.get("digest")
        places[progress or at] = one
    return list(places.values())


def _plain(value: Any) -> Any:
    """Models of the clients' libraries as mappings of the fields that were told."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return _plain(dump(exclude_unset=True, warnings=False))
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
