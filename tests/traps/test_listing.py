"""The contract's traps 30, 31, 43, 46 and 50: what the router answers from what it knows."""

import json
from datetime import UTC, datetime

import pytest

from router.core import wording
from router.core.dialect import Family
from router.sim import Fault, FaultKind
from tests.rig import MODEL, model, rig, spec, talk
from tests.test_hostile import CHAT
from tests.traps.asking import ASKING, ask, bodies, family, posts, send

K = FaultKind
JANUARY, MARCH = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)
DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
async def test_trap_30_head_is_answered_like_get_but_without_a_body(path: str) -> None:
    async with rig() as r, talk(r.url) as client:
        get = await send(r, path, method="GET")
        await client.send(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await client.answer(bodiless=True)
        assert (head.status, head.header("Content-Type")) == (200, get.headers["Content-Type"])
        # The next answer begins where the head ended: no body came.
        await client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).body == b"Ollama is running"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/api/ps", "GET"), ("/v1/models", "GET"), ("/api/chat", "POST"), ("/api/status", "GET")],
)
async def test_trap_30_head_is_a_405_where_ollama_has_none(path: str, allowed: str) -> None:
    async with rig() as r:
        told = await send(r, path, method="HEAD")
        alone = await send(r, r.nodes[0].url + path, method="HEAD")
        assert (told.status, told.headers["Allow"]) == (405, allowed)
        assert (alone.status, alone.headers["Allow"]) == (405, allowed)


async def test_trap_30_the_root_answers_with_every_node_down() -> None:
    async with rig() as r:
        await r.nodes[0].refuse()
        await r.look()
        assert (await send(r, "/", method="HEAD")).status == 200


async def test_trap_31_each_model_is_listed_once_in_a_stable_order() -> None:
    names = ["b", "a", "d", "c"]
    tied = [model(name) for name in names]
    specs = spec(*tied), spec(*reversed(tied), model("new", modified_at=MARCH)), spec(*tied[:2])
    async with rig(*specs) as r:
        listings = []
        for _ in range(3):
            told = await send(r, "/api/tags", method="GET")
            openai = await send(r, "/v1/models", method="GET")
            listed = [one["name"] for one in told.value["models"]]
            assert [one["id"] for one in openai.value["data"]] == listed
            listings.append(listed)
            await r.look()
        assert listings[0] == ["new:latest", "a:latest", "b:latest", "c:latest", "d:latest"]
        assert listings[0] == listings[1] == listings[2]


async def test_trap_31_spellings_of_a_name_are_one_model() -> None:
    newer = model("LLAMA3:8B", modified_at=MARCH, digest="b" * 64)
    async with rig(spec(model(modified_at=JANUARY)), spec(newer)) as r:
        (listed,) = (await send(r, "/api/tags", method="GET")).value["models"]
        assert (listed["name"], listed["digest"]) == ("LLAMA3:8B", "b" * 64)


async def test_trap_31_ps_names_a_model_once_however_often_it_is_loaded() -> None:
    async with rig(spec(warm=(MODEL,)), spec(warm=(MODEL,))) as r:
        told = await send(r, "/api/ps", method="GET")
        assert [one["name"] for one in told.value["models"]] == [MODEL]


@pytest.mark.parametrize("query", ["?beta=true", "?ts=1700000000", "?", "?a=%2F..&b=/api/tags"])
@pytest.mark.parametrize("path", ASKING)
async def test_trap_43_a_query_changes_no_route_and_goes_on(path: str, query: str) -> None:
    async with rig() as r:
        assert (await send(r, path + query, CHAT)).node == "n1"
        assert r.nodes[0].seen[-1].raw_path.partition("?")[0] == path
        assert query == "?" or r.nodes[0].seen[-1].raw_path == path + query


async def test_trap_43_listings_and_redirects_bear_a_query() -> None:
    async with rig() as r:
        for path in ("/", "/api/version", "/api/tags", "/api/ps", "/v1/models"):
            assert (await send(r, path + "?ts=1", method="GET")).status == 200
        moved = await send(r, "/api/tags/?ts=1", method="GET")
        assert (moved.status, moved.headers["Location"]) == (301, "/api/tags?ts=1")


async def test_trap_46_ps_lists_a_model_right_after_its_use() -> None:
    async with rig(spec(), spec()) as r:
        for fields in ({}, {"stream": False}):
            assert (await send(r, "/api/ps", method="GET")).value["models"] == []
            async with r.chat(**fields) as told:
                assert told.status == 200
                await told.read()
            ps = (await send(r, "/api/ps", method="GET")).value["models"]
            assert [one["name"] for one in ps] == [MODEL]
            for name in ("n1", "n2"):
                await ask(r, "/api/generate", f"{MODEL}@{name}", prompt="", keep_alive=0)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_trap_50_a_node_that_is_too_old_for_an_endpoint_is_not_asked(path: str) -> None:
    async with rig(spec(version="0.12.0"), spec(version="0.30.0")) as r:
        for _ in range(4):
            told = await ask(r, path)
            assert (told.status, told.node) == (200, "n2")
        assert bodies(r.nodes[0]) == []


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_trap_50_too_old_does_not_look_like_a_missing_model(path: str) -> None:
    async with rig(spec(version="0.12.0"), spec(version="0.13.0")) as r:
        told = await ask(r, path)
        assert (told.status, posts(r)) == (501, 0)
        assert "0.12.0" in told.error
        shape = json.loads(wording.error_body(family(path), 501, "", ""))
        assert told.value.keys() == shape.keys()
        assert told.value["error"]["type"] == "api_error"
        missing = await ask(r, path, "nope")
        assert (missing.status, family(path) is Family.NATIVE) == (404, False)


async def test_trap_50_the_version_told_is_the_lowest() -> None:
    async with rig(spec(version="0.30.10"), spec(version="0.30.9"), spec(version="0.31.0")) as r:
        assert (await send(r, "/api/version", method="GET")).value == {"version": "0.30.9"}
        r.nodes[1].fault = Fault(K.STATUS, path="*")
        for _ in range(3):
            await r.look()
        assert (await send(r, "/api/version", method="GET")).value == {"version": "0.30.10"}
