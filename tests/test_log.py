"""Log lines: one format for ours and for those of libraries, one line per request."""

import asyncio
import io
import json
import logging
from typing import Any

import pytest

from router import log
from router.core.usage import Usage
from router.log import Ending, Report


def report(**fields: Any) -> Report:
    return Report(**{"id": "r1", "client": "10.0.0.1", "method": "POST", "started": 5.0, **fields})


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (200, Ending.OK),
        (304, Ending.OK),
        (400, Ending.CLIENT_ERROR),
        (499, Ending.CLIENT_ERROR),
        (500, Ending.NODE_ERROR),
        (503, Ending.NODE_ERROR),
    ],
)
def test_a_status_says_how_a_request_ended(status: int, ending: Ending) -> None:
    assert log.ending(status) is ending


async def told(done: Report, ended: float, style: str = "json") -> io.StringIO:
    out = io.StringIO()
    log.setup("info", style, out)
    tell = log.requests()
    assert tell is not None
    tell(done, ended)
    await asyncio.sleep(0)
    return out


async def test_the_canonical_line_has_every_field() -> None:
    done = report(
        endpoint="/api/chat", model="llama3:8b", node="n1", reason="pinned", attempts=2,
        first_at=5.25, status=200, ending=Ending.OK, usage=Usage(7, 35, 0.5, 1.0),
    )  # fmt: skip
    (line,) = lines(await told(done, 6.5))
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request", "level": "info", "id": "r1", "client": "10.0.0.1", "method": "POST",
        "endpoint": "/api/chat", "model": "llama3:8b", "node": "n1", "reason": "pinned",
        "attempts": 2, "ttft_ms": 250.0, "duration_ms": 1500.0, "prompt_tokens": 7,
        "completion_tokens": 35, "status": 200, "outcome": "ok",
    }  # fmt: skip


async def test_a_request_that_got_no_answer_says_so_and_why() -> None:
    (line,) = lines(await told(report(error="node n1: connection refused"), 5.0))
    assert line["ttft_ms"] is None
    assert line["prompt_tokens"] is None
    assert line["outcome"] == "cancelled"
    assert line["error"] == "node n1: connection refused"


async def test_a_terminal_gets_the_same_fields() -> None:
    text = (await told(report(model="llama3:8b", status=200), 5.5, "console")).getvalue()
    assert "request" in text
    assert "model=llama3:8b" in text
    assert "duration_ms=500.0" in text
    assert "error=" not in text


async def test_lines_of_requests_stand_in_order_and_before_what_is_said_later() -> None:
    out = io.StringIO()
    log.setup("info", "json", out)
    tell = log.requests()
    assert tell is not None
    tell(report(id="a"), 5.0)
    tell(report(id="b"), 5.0)
    log.logger().info("later")
    tell(report(id="c"), 5.0)
    await asyncio.sleep(0)
    assert [line.get("id", line["event"]) for line in lines(out)] == ["a", "b", "later", "c"]


def test_below_their_level_lines_of_requests_are_not_made() -> None:
    log.setup("warning", "json", io.StringIO())
    assert log.requests() is None


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_the_least_that_is_told(level: str, told: list[str]) -> None:
    out = io.StringIO()
    log.setup(level, "json", out)
    for name in log.LEVELS:
        getattr(log.logger(), name)("x")
    assert [line["level"] for line in lines(out)] == told


def test_libraries_speak_through_the_same_renderer_from_warnings_up() -> None:
    out = io.StringIO()
    log.setup("debug", "json", out)
    logging.getLogger("asyncio").warning("late by %d", 5)
    logging.getLogger("aiohttp.server").info("not told")
    (line,) = lines(out)
    assert (line["event"], line["level"]) == ("late by 5", "warning")


def test_an_exception_is_one_line_with_its_trace() -> None:
    out = io.StringIO()
    log.setup("info", "json", out)
    try:
        raise RuntimeError("a mistake")
    except RuntimeError:
        log.logger().exception("broken")
    (line,) = lines(out)
    assert line["exception"][0]["exc_value"] == "a mistake"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("style", "out", "is_json"),
    [
        ("json", Terminal(), True),
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_the_format_is_as_asked_or_fits_the_terminal(
    style: str, out: io.StringIO, is_json: bool
) -> None:
    log.setup("info", style, out)
    log.logger().info("hello", node="n1")
    assert out.getvalue().startswith("{") is is_json
    assert "hello" in out.getvalue()


def test_logs_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info", "json")
    log.logger().info("hello")
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["event"]) == ("", "hello")
