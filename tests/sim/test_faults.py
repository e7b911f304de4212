"""A node that misbehaves on command."""

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import ClientSession

from router.sim import Fault, FaultKind, SimNode
from router.sim.faults import from_json
from tests.sim.nodes import chat_body, records, slow

BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError)


async def raw(node: SimNode, path: str = "/api/chat", **changes: object) -> bytes:
    """Every byte of a response, however it ends."""
    body = json.dumps(chat_body(**changes)).encode()
    reader, writer = await asyncio.open_connection(node.host, node.port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    found = bytearray()
    try:
        while part := await reader.read(65536):
            found += part
    except ConnectionError:
        found += b"<reset>"
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            found += b""
    return bytes(found)


async def status(web: ClientSession, method: str = "POST", path: str = "/api/chat") -> int:
    async with web.request(method, path, json=chat_body()) as response:
        await response.read()
        return response.status


def lines(answer: bytes) -> int:
    return answer.count(b'"done":false}\n')


async def test_status_with_the_dialects_error(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.STATUS, status=500, message="llama runner terminated")
    async with web.post("/api/chat", json=chat_body()) as response:
        assert await response.json() == {"error": "llama runner terminated"}
    async with web.post("/v1/chat/completions", json=chat_body()) as response:
        assert (await response.json())["error"]["type"] == "api_error"
    assert node.seen[0].outcome == "error"


async def test_status_with_any_body_and_headers(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.STATUS, status=429, body="slow", headers=(("Retry-After", "7"),))
    async with web.post("/api/chat", json=chat_body()) as response:
        assert (response.status, await response.text()) == (429, "slow")
        assert response.headers["Retry-After"] == "7"


async def test_fault_meets_inference_alone_unless_told_otherwise(
    node: SimNode, web: ClientSession
) -> None:
    node.fault = Fault(FaultKind.STATUS, status=500)
    assert await status(web, "GET", "/api/version") == 200
    node.fault = Fault(FaultKind.STATUS, path="/api/version", status=500)
    assert await status(web, "GET", "/api/version") == 500
    assert await status(web) == 200
    node.fault = Fault(FaultKind.STATUS, path="*", status=502)
    assert await status(web, "GET", "/api/ps") == await status(web) == 502
    node.fault = None
    assert await status(web) == 200


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags", "/api/ps"])
async def test_probe_can_meet_a_dying_node(node: SimNode, web: ClientSession, path: str) -> None:
    node.fault = Fault(FaultKind.DIE, path="*")
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await status(web, "GET", path)


async def test_fault_meets_one_model(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.STATUS, model="LLAMA3:8b", status=500)
    assert await status(web) == 500
    async with web.post("/api/embed", json={"model": "nomic-embed-text"}) as response:
        assert response.status == 200
    async with web.post("/api/embed", data=b"") as response:
        assert response.status == 400


async def test_faults_are_followed_in_turn_and_times(node: SimNode, web: ClientSession) -> None:
    node.faults.add(Fault(FaultKind.STATUS, status=500, times=2))
    node.faults.add(Fault(FaultKind.STATUS, status=503, times=1))
    assert node.fault is not None
    assert [await status(web) for _ in range(4)] == [500, 500, 503, 200]
    assert node.fault is None


async def test_hang_holds_a_request_before_the_scheduler_until_released(node: SimNode) -> None:
    node.fault = Fault(FaultKind.HANG, times=1)
    async with ClientSession(node.url) as web, asyncio.TaskGroup() as group:
        task = group.create_task(status(web))
        await node.until(lambda: node.held == 1)
        assert node.scheduler.in_flight == 0
        node.release()
        assert await task == 200


async def test_hanging_request_ends_with_its_client(node: SimNode) -> None:
    node.fault = Fault(FaultKind.HANG)
    async with ClientSession(node.url) as web, asyncio.TaskGroup() as group:
        task = group.create_task(status(web))
        await node.until(lambda: node.in_flight == 1)
        task.cancel()
        await node.until(lambda: node.in_flight == 0)
    assert node.seen[0].outcome == "cancelled"


@pytest.mark.parametrize("after", [0, 1, 3, 6])
async def test_die_after_records(node: SimNode, after: int) -> None:
    node.fault = Fault(FaultKind.DIE, after=after)
    answer = await raw(node)
    assert lines(answer) == after
    assert bool(answer) is bool(after)
    assert b"0\r\n\r\n" not in answer
    assert (node.seen[0].records, node.seen[0].outcome) == (after, "error")
    assert node.scheduler.in_flight == 0


@pytest.mark.parametrize("after", [0, 2])
async def test_die_within_a_record(node: SimNode, after: int) -> None:
    node.fault = Fault(FaultKind.DIE, after=after, partial=True)
    answer = await raw(node)
    assert lines(answer) == after
    tail = answer[answer.rindex(b'{"model"') :]
    assert not tail.endswith(b"\n")
    assert b"done" not in tail


@pytest.mark.parametrize(("partial", "head"), [(False, b""), (True, b"HTTP/1.1 200 OK\r\n")])
async def test_die_with_an_answer_in_one_piece(node: SimNode, partial: bool, head: bytes) -> None:
    node.fault = Fault(FaultKind.DIE, partial=partial)
    answer = await raw(node, stream=False)
    assert answer.startswith(head)
    assert bool(answer) is partial
    assert b'"done"' not in answer


async def test_die_can_reset_the_connection(node: SimNode) -> None:
    node.fault = Fault(FaultKind.DIE, reset=True)
    assert await raw(node) == b"<reset>"


async def test_stall_holds_a_stream_until_released(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.STALL, after=2)
    async with web.post("/api/chat", json=chat_body()) as response:
        first = [await response.content.readline() for _ in range(2)]
        await node.until(lambda: node.held == 1)
        assert node.seen[0].records == 2
        node.release()
        rest = await records(response)
    assert (len(first), len(rest)) == (2, 5)


async def test_stall_holds_an_answer_in_one_piece(node: SimNode) -> None:
    node.fault = Fault(FaultKind.STALL)
    async with ClientSession(node.url) as web, asyncio.TaskGroup() as group:
        task = group.create_task(status(web, path="/v1/chat/completions"))
        await node.until(lambda: node.held == 1)
        assert node.seen[0].status is None
        node.release()
        assert await task == 200


async def test_garbage_is_no_http(node: SimNode, web: ClientSession) -> None:
    node.fault = Fault(FaultKind.GARBAGE)
    with pytest.raises(BROKEN):
        await status(web)
    node.fault = Fault(FaultKind.GARBAGE, body="hello\r\n")
    assert await raw(node) == b"hello\r\n"


async def test_slow_multiplies_every_duration(web: ClientSession, node: SimNode) -> None:
    async with (
        SimNode(slow(warm=("llama3:8b",))) as crawling,
        ClientSession(crawling.url) as other,
    ):
        crawling.fault = Fault(FaultKind.SLOW, factor=0.0)
        async with other.post("/api/chat", json=chat_body(stream=False)) as response:
            answer = await response.json()
    assert answer["eval_count"] > 0
    assert "eval_duration" not in answer


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("/api/chat", b'{"error":"the runner was told to fail"}\n'),
        ("/api/generate", b'{"error":"the runner was told to fail"}\n'),
        ("/v1/chat/completions", b'"finish_reason":null}]}\n\n'),
        ("/v1/completions", b'"finish_reason":null}]}\n\n'),
        ("/v1/messages", b'"type":"text_delta"'),
        ("/v1/responses", b"response.content_part.added"),
    ],
)
async def test_error_in_mid_stream_is_that_of_the_api(
    node: SimNode, path: str, ending: bytes
) -> None:
    node.fault = Fault(FaultKind.ERROR, after=4)
    answer = await raw(node, path, prompt="hi", input="hi", max_tokens=50, stream=True)
    assert ending in answer[-400:]
    assert answer.endswith(b"0\r\n\r\n")
    assert (b'"model":""' in answer) is (b"finish_reason" in ending)
    for last in (b'"done":true', b"[DONE]", b"message_stop", b"response.completed"):
        assert last not in answer


async def test_error_of_an_answer_in_one_piece_is_a_status(
    node: SimNode, web: ClientSession
) -> None:
    node.fault = Fault(FaultKind.ERROR)
    async with web.post("/api/chat", json=chat_body(stream=False)) as response:
        assert (response.status, await response.json()) == (
            500,
            {"error": "the runner was told to fail"},
        )


@pytest.mark.parametrize("after", [0, 3])
async def test_clean_end_without_a_final_record(node: SimNode, after: int) -> None:
    node.fault = Fault(FaultKind.END, after=after)
    answer = await raw(node)
    assert lines(answer) == after
    assert answer.endswith(b"0\r\n\r\n")
    assert b'"done":true' not in answer


@pytest.mark.parametrize("at_byte", [1, 17, 100, 200, 333])
async def test_cut_at_any_byte(node: SimNode, at_byte: int) -> None:
    node.fault = Fault(FaultKind.CUT, at_byte=at_byte)
    assert len(await raw(node)) == at_byte


async def test_refusing_node_comes_back_on_its_port(node: SimNode, web: ClientSession) -> None:
    assert await status(web) == 200
    await node.refuse()
    assert " refusing " in repr(node)
    async with ClientSession(node.url) as fresh:
        with pytest.raises(aiohttp.ClientConnectorError):
            await status(fresh)
    await node.accept()
    async with ClientSession(node.url) as fresh:
        assert await status(fresh) == 200


async def test_what_comes_as_it_begins_to_refuse_is_broken_and_not_lost_sight_of(
    node: SimNode,
) -> None:
    with socket.create_connection(("127.0.0.1", node.port)) as client:
        for _ in range(2):  # asyncio has accepted, and has no transport yet
            await asyncio.sleep(0)
        await node.refuse()
        gc.collect()  # what is lost sight of warns, and that is an error
        client.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""


@pytest.fixture
async def control(node: SimNode) -> AsyncIterator[ClientSession]:
    async with ClientSession(node.url) as session:
        yield session


async def test_faults_over_http(node: SimNode, control: ClientSession, web: ClientSession) -> None:
    fault = {"kind": "status", "status": 418, "times": 5, "headers": {"X-A": "b"}, "body": "tea"}
    async with control.post("/sim/fault", json=fault) as response:
        assert response.status == 204
    assert await status(web) == 418
    async with control.get("/sim/state") as response:
        state = await response.json()
    assert (state["faults"], state["in_flight"], state["peak_in_flight"]) == (["status"], 0, 1)
    assert state["seen"] == [{"method": "POST", "path": "/api/chat", "outcome": "error"}]
    async with control.get("/sim/seen") as response:
        assert await response.json() == [{**state["seen"][0], "at": node.seen[0].started}]
    async with control.delete("/sim/fault") as response:
        assert response.status == 204
    assert await status(web) == 200
    async with control.post("/sim/release") as response:
        assert response.status == 204


@pytest.mark.parametrize(
    ("method", "path", "body", "wanted"),
    [
        ("POST", "/sim/fault", "{", 400),
        ("POST", "/sim/fault", "[]", 400),
        ("POST", "/sim/fault", "{}", 400),
        ("POST", "/sim/fault", '{"kind":"melt"}', 400),
        ("POST", "/sim/fault", '{"kind":"die","wrong":1}', 400),
        ("POST", "/sim/refuse", "{}", 400),
        ("GET", "/sim/nope", "", 404),
    ],
)
async def test_wrong_commands_are_refused(
    control: ClientSession, method: str, path: str, body: str, wanted: int
) -> None:
    async with control.request(method, path, data=body) as response:
        assert response.status == wanted


async def test_refusal_over_http_ends_by_itself(node: SimNode, control: ClientSession) -> None:
    async with control.post("/sim/refuse", json={"for_s": 0}) as response:
        assert response.status == 204
    await node.until(lambda: " up " in repr(node))
    assert await status(control) == 200


async def test_stop_during_a_refusal(node: SimNode, control: ClientSession) -> None:
    async with control.post("/sim/refuse", json={"for_s": 3600}) as response:
        assert response.status == 204
    assert " refusing " in repr(node)


def test_fault_from_json() -> None:
    fault = from_json({"kind": "die", "after": 3, "partial": True})
    assert fault == Fault(FaultKind.DIE, after=3, partial=True)
