"""Every fault of the simulated node, as a client of the router sees it."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from router.core import dialect, wording
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Answer, Rig, model, rig, spec, talk

K = FaultKind
PATHS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions",
         "/v1/messages", "/v1/responses")  # fmt: skip
UNSTREAMED = ("/api/embed", "/api/embeddings", "/v1/embeddings")


def body(path: str, *, stream: bool) -> bytes:
    asked: Mapping[str, Any] = {
        "model": MODEL, "stream": stream, "max_tokens": 64, "prompt": "hello", "input": "hello",
        "messages": [{"role": "user", "content": "hello"}],
    }  # fmt: skip
    return json.dumps(asked).encode()


async def ask(r: Rig, path: str, *, stream: bool = True) -> Answer:
    async with talk(r.url) as client:
        await client.post(path, body(path, stream=stream))
        return await client.answer()


async def outcome(r: Rig) -> str:
    await r.until(lambda: r.requests != [])
    assert r.app.pool.in_flight == 0
    return str(r.requests[-1]["outcome"])


def records(path: str, data: bytes) -> list[bytes]:
    """The records of a stream, all of which must be whole."""
    mark = b"\n" if path.startswith("/api/") else b"\n\n"
    assert data.endswith(mark)
    return [record + mark for record in data.split(mark)[:-1]]


def is_error(path: str, record: bytes) -> bool:
    """An error record in the framing and the dialect of the path."""
    if path in ("/v1/messages", "/v1/responses"):
        if not record.startswith(b"event: error\n"):
            return False
        record = record.removeprefix(b"event: error\n")
    try:
        return "error" in json.loads(record.removeprefix(b"data: "))
    except ValueError:
        return False


@pytest.mark.parametrize("path", [*PATHS, *UNSTREAMED])
@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_a_status_is_passed_on_with_its_body(path: str, status: int) -> None:
    async with rig(timeouts={"busy_s": 0.01}) as r:
        r.nodes[0].fault = Fault(K.STATUS, status=status, message="told to fail")
        answer = await ask(r, path)
        assert answer.status == status
        assert b"told to fail" in answer.body
        assert answer.header("X-Ollamux-Node") == "n1"
        assert await outcome(r) == ("client_error" if status < 500 else "node_error")
        assert r.app.pool.registry.any_up, "a node that answers is not down"


async def test_an_answer_of_any_sort_is_passed_on_byte_for_byte() -> None:
    async with rig() as r:
        headers = (("Content-Type", "text/html"), ("X-Odd", "1"))
        r.nodes[0].fault = Fault(K.STATUS, status=418, body="<b>not JSON</b>", headers=headers)
        answer = await ask(r, "/api/chat")
        assert (answer.status, answer.body) == (418, b"<b>not JSON</b>")
        assert (answer.header("Content-Type"), answer.header("X-Odd")) == ("text/html", "1")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("after", [1, 5])
async def test_a_death_after_some_records_is_an_error_record(
    path: str, after: int, *, partial: bool, reset: bool
) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.DIE, after=after, partial=partial, reset=reset)
        answer = await ask(r, path)
        assert (answer.status, answer.whole) == (200, True)
        *good, last = records(path, answer.body)
        assert is_error(path, last)
        assert not any(is_error(path, record) for record in good)
        # A reset may overtake records that were on their way, but never half of one.
        assert len(good) == after or (reset and len(good) < after)
        assert await outcome(r) == "broken"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_death_before_the_first_record_is_a_502(
    path: str, *, partial: bool, stream: bool
) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.DIE, partial=partial)
        answer = await ask(r, path, stream=stream)
        assert answer.status == 502
        family = next(route.family for route in dialect.ROUTES if route.path == path)
        shape = json.loads(wording.error_body(family, 502, "", "")).keys()
        assert json.loads(answer.body).keys() == shape
        assert await outcome(r) == "failed"


@pytest.mark.parametrize("path", UNSTREAMED)
@pytest.mark.parametrize("partial", [False, True])
async def test_a_death_inside_an_embedding_is_a_502(path: str, *, partial: bool) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.DIE, partial=partial)
        answer = await ask(r, path)
        assert answer.status == 502
        assert await outcome(r) == "failed"


@pytest.mark.parametrize(
    ("path", "count", "ends"),
    [
        ("/api/chat", 3, "broken"),
        ("/api/generate", 3, "broken"),
        ("/v1/chat/completions", 4, "broken"),
        ("/v1/completions", 4, "broken"),
        ("/v1/messages", 3, "broken"),
        ("/v1/responses", 3, "broken"),
    ],
)
async def test_an_error_record_of_the_node_is_its_own(path: str, count: int, ends: str) -> None:
    """The streams of /v1 lose it: where nobody goes on, another error follows."""
    async with rig() as r:
        r.nodes[0].fault = Fault(K.ERROR, after=2, message="the runner fell over")
        answer = await ask(r, path)
        assert (answer.status, answer.whole) == (200, True)
        found = records(path, answer.body)
        assert len(found) == count
        assert (b"fell over" in found[-1]) is path.startswith("/api/")
        assert is_error(path, found[-1]) is (ends == "broken")
        assert await outcome(r) == ends


@pytest.mark.parametrize("path", PATHS)
async def test_a_clean_end_without_the_final_record_is_passed_on(path: str) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.END, after=3)
        answer = await ask(r, path)
        assert (answer.status, answer.whole) == (200, True)
        silent = path in {"/v1/messages", "/v1/responses"}  # it may have been a runner's failure
        assert len(records(path, answer.body)) == 3 + silent
        assert await outcome(r) == ("broken" if silent else "ok")


@pytest.mark.parametrize("kind", [K.ERROR, K.END])
@pytest.mark.parametrize("path", PATHS)
async def test_a_runner_that_fails_before_an_unstreamed_answer_is_the_nodes_500(
    kind: FaultKind, path: str
) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(kind, message="the runner fell over")
        answer = await ask(r, path, stream=False)
        assert answer.status == 500
        assert b"fell over" in answer.body
        assert await outcome(r) == "node_error"


@pytest.mark.parametrize("path", PATHS)
async def test_a_stall_is_an_error_record(path: str) -> None:
    async with rig(timeouts={"between_records_s": 0.05}) as r:
        r.nodes[0].fault = Fault(K.STALL, after=2)
        answer = await ask(r, path)
        assert (answer.status, answer.whole) == (200, True)
        assert is_error(path, records(path, answer.body)[-1])
        assert b"sent nothing for 0.05 s" in answer.body
        await r.nodes[0].until(lambda: r.nodes[0].seen[-1].outcome == "cancelled")
        assert await outcome(r) == "broken"


@pytest.mark.parametrize("kind", [K.HANG, K.STALL])
@pytest.mark.parametrize("path", PATHS)
async def test_no_first_byte_is_a_504(kind: FaultKind, path: str) -> None:
    async with rig(timeouts={"first_byte_s": 0.05}) as r:
        r.nodes[0].fault = Fault(kind)
        answer = await ask(r, path, stream=False)
        assert answer.status == 504
        assert b"no first byte within 0.05 s" in answer.body
        await r.nodes[0].until(lambda: r.nodes[0].seen[-1].outcome == "cancelled")
        assert await outcome(r) == "failed"


@pytest.mark.parametrize("path", [*PATHS, *UNSTREAMED])
@pytest.mark.parametrize(
    "garbage",
    ["", "HTTP/9.9 abc\r\n\r\n", "<html></html>\r\n\r\n",
     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
async def test_garbage_is_a_502_that_holds_none_of_it(path: str, garbage: str) -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(K.GARBAGE, body=garbage)
        answer = await ask(r, path)
        assert answer.status == 502
        assert b"html" not in answer.body
        assert b"no HTTP here" not in answer.body
        assert await outcome(r) == "failed"
        assert r.app.pool.registry.any_up


@pytest.mark.parametrize("path", PATHS)
async def test_a_slow_answer_is_an_answer(path: str) -> None:
    slow = model(decode_tps=1e5)
    async with rig(spec(slow)) as r:
        r.nodes[0].fault = Fault(K.SLOW, factor=2.0)
        answer = await ask(r, path)
        assert (answer.status, answer.whole) == (200, True)
        assert not is_error(path, records(path, answer.body)[-1])
        assert await outcome(r) == "ok"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_cut_at_any_byte_is_never_a_broken_200(path: str, *, stream: bool) -> None:
    """The response has about 700 bytes unstreamed; of a stream only the beginning is tried."""
    async with rig() as r:
        for at_byte in range(1, 900, 37):
            r.nodes[0].fault = Fault(K.CUT, at_byte=at_byte)
            answer = await ask(r, path, stream=stream)
            if not stream:
                assert answer.status == 502 or at_byte > 350
                assert answer.status != 200 or json.loads(answer.body)
            elif answer.status == 200:
                assert answer.whole
                *good, last = records(path, answer.body)
                assert is_error(path, last)
                assert good
            else:
                assert answer.status == 502
        r.nodes[0].fault = None
        r.nodes[0].drop_connections()  # one of them may be short still
        assert (await ask(r, path, stream=stream)).status == 200
        assert r.app.pool.in_flight == 0


async def test_a_node_that_refuses_is_left_for_another() -> None:
    async with rig(spec(), spec()) as r:
        await r.nodes[0].refuse()
        answer = await ask(r, "/api/chat")
        assert (answer.status, answer.header("X-Ollamux-Node")) == (200, "n2")
        assert answer.header("X-Ollamux-Attempts") == "2"


async def test_a_node_that_stays_busy_says_so_itself() -> None:
    busy_s = {"busy_s": 0.01}
    async with rig(spec(model(load_s=1e6), max_queue=1), timeouts=busy_s) as r:
        node = r.nodes[0]
        async with talk(node.url) as first, talk(node.url) as second:
            for client in (first, second):  # past the router, which would have one of them wait
                await client.post("/api/chat", body("/api/chat", stream=True))
            await node.until(lambda: node.scheduler.in_flight == 2)
            answer = await ask(r, "/api/chat")
            assert answer.status == 503
            told = "server busy, please try again.  maximum pending requests exceeded"
            assert json.loads(answer.body) == {"error": told}
        await r.until(lambda: r.app.pool.in_flight == 0)
