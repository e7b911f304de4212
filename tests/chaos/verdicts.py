"""What an answer was: right, refused with a true status, told of its error, or a broken promise."""

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.orders import Kind, Order
from tests.rig import Answer

_REFUSALS = (404, 429, 500, 502, 503, 504)
# What a simulated node says itself: the router does not make it its own.
_NODES_WORDS = ("server busy", "told to", "not found")


class Outcome(enum.StrEnum):
    """How a request ended that kept all promises."""

    RIGHT = "right"
    REFUSED = "refused"
    TOLD = "told of an error"
    LEFT = "client left"


class Violation(Exception):
    """A promise that was broken; the text says which."""


@dataclass(frozen=True)
class Said:
    """What a stream has said until its end or its error."""

    text: str
    records: int
    error: str = ""


def verdict(order: Order, answer: Answer) -> Outcome:
    """Judge a whole answer. Raises Violation."""
    if answer.status != 200:
        _refused(order, answer)
        return Outcome.REFUSED
    if not answer.whole:
        raise Violation("cut off without a word")
    if not order.streamed:
        _whole(order, _decoded(answer.body))
        return Outcome.RIGHT
    said = _openai(order, answer.body) if order.openai else _native(order, answer.body)
    if not said.error:
        return Outcome.RIGHT
    if said.records == 0:
        raise Violation(f"200 for what had failed before the first record: {said.error}")
    if not order.text.startswith(said.text):
        raise Violation(f"before its error it said {said.text!r}, which is not its text")
    return Outcome.TOLD


def _refused(order: Order, answer: Answer) -> None:
    error = _decoded(answer.body).get("error")
    message = error.get("message") if order.openai and isinstance(error, dict) else error
    if not isinstance(message, str) or not message:
        raise Violation(f"status {answer.status} without an error of its API: {answer.body!r}")
    if order.kind is Kind.PINNED and answer.status == 400 and "no such node" in message:
        return  # it was taken out
    if answer.status not in _REFUSALS:
        raise Violation(f"status {answer.status}: {message}")
    nodes = any(words in message for words in _NODES_WORDS)
    if answer.status in (404, 500) and not nodes:
        raise Violation(f"a {answer.status} that no node has said: {message}")
    if answer.status in (429, 503) and not nodes and answer.header("Retry-After") is None:
        raise Violation(f"a {answer.status} without Retry-After: {message}")


def _whole(order: Order, found: dict[str, Any]) -> None:
    if "error" in found:
        raise Violation(f"200 with an error: {found['error']}")
    if order.kind is Kind.EMBED:
        _same(order, found.get("embeddings"), [list(order.embedding)])
        return
    if order.openai:
        choice = found["choices"][0]
        _same(order, choice["message"]["content"], order.text)
        _same(order, choice["finish_reason"], order.reason)
        _same(order, found["usage"]["completion_tokens"], len(order.tokens))
    else:
        _same(order, found["message"]["content"], order.text)
        _ended(order, found)


def _native(order: Order, body: bytes) -> Said:
    """Read a stream of lines, with everything that must hold for it. Raises Violation."""
    *lines, rest = body.split(b"\n")
    if rest:
        raise Violation(f"half a record: {rest!r}")
    records = [_decoded(line) for line in lines]
    if not records:
        raise Violation("200 and nothing")
    last = records[-1]
    texts = [_said(record) for record in records if "error" not in record]
    if any("error" in record for record in records[:-1]):
        raise Violation("an error inside of a stream")
    if "error" in last:
        return Said("".join(texts), len(records) - 1, str(last["error"]))
    if not last.get("done") or any(record.get("done") for record in records[:-1]):
        raise Violation("a stream without its one final record")
    _same(order, "".join(texts), order.text)
    _ended(order, last)
    return Said("".join(texts), len(records))


def _said(record: dict[str, Any]) -> str:
    found = record.get("message", record)
    return str(found.get("content", found.get("response", "")))


def _ended(order: Order, last: dict[str, Any]) -> None:
    _same(order, last.get("done_reason"), order.reason)
    _same(order, last.get("eval_count"), len(order.tokens))


def _openai(order: Order, body: bytes) -> Said:
    """Read a stream of events, with everything that must hold for it. Raises Violation."""
    *events, rest = body.split(b"\n\n")
    if rest:
        raise Violation(f"half an event: {rest!r}")
    done = bool(events) and events[-1] == b"data: [DONE]"
    chunks = [_decoded(event.removeprefix(b"data: ")) for event in events[: len(events) - done]]
    if not chunks:
        raise Violation("200 and nothing")
    if any("error" in chunk for chunk in chunks[:-1]):
        raise Violation("an error inside of a stream")
    error = chunks.pop()["error"] if "error" in chunks[-1] else None
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    said = "".join(choice["delta"].get("content", "") for choice in choices)
    _one_stream(chunks, choices)
    if error is not None:
        return Said(said, len(chunks), str(error))
    if not done:
        raise Violation("a stream that ends without [DONE]")
    _same(order, said, order.text)
    _same(order, [one["finish_reason"] for one in choices if one["finish_reason"]], [order.reason])
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    _same(order, counts, [len(order.tokens)] if order.usage else [])
    return Said(said, len(chunks))


def _one_stream(chunks: Sequence[dict[str, Any]], choices: Sequence[dict[str, Any]]) -> None:
    """All chunks are of one stream, and the role is said once, at its beginning."""
    for key in ("id", "system_fingerprint"):
        if len({chunk.get(key) for chunk in chunks}) > 1:
            raise Violation(f"chunks of one stream with several values of {key}")
    if any("role" in choice["delta"] for choice in choices[1:]):
        raise Violation("a second role in one stream")


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        raise Violation(f"not JSON: {data[:200]!r}") from None
    if not isinstance(found, dict):
        raise Violation(f"not an object: {data[:200]!r}")
    return found


def _same(order: Order, found: object, wanted: object) -> None:
    if found != wanted:
        raise Violation(f"it said {str(found)[:300]!r}, and not {str(wanted)[:300]!r}")
