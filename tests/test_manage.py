"""Managing models on a pool: pull, create, copy, delete and blobs, over simulated nodes."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import ollama
import pytest

from router.sim import Fault, FaultKind, SimNode
from tests.rig import MODEL, Peer, Rig, model, rig, scripted, spec, talk

PHI = model("phi:latest", size_bytes=1000)
NOT_THERE = "pull model manifest: file does not exist"
DATA = b"GGUF" + bytes(range(256)) * 4000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
BLOB = f"/api/blobs/{DIGEST}"
RARE = model("rare:latest", size_bytes=1000)  # in no registry but where a test says so
OTHER = model("mistral:7b")


async def records(answer: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await answer.read()).splitlines()]


async def pull(made: Rig, name: str = "phi", path: str = "/api/pull", **fields: Any) -> list[Any]:
    """The records of a pull that is answered with 200."""
    async with made.session.post(made.url + path, json={"model": name, **fields}) as answer:
        assert answer.status == 200, await answer.text()
        return await records(answer)


async def delete(made: Rig, name: str, path: str = "/api/delete") -> tuple[int, str]:
    async with made.session.delete(made.url + path, json={"model": name}) as answer:
        return answer.status, await answer.text()


async def names(made: Rig, at: str = "") -> set[str]:
    async with made.session.get(f"{at or made.url}/api/tags") as answer:
        return {entry["name"] for entry in (await answer.json())["models"]}


async def having(made: Rig, name: str = "phi:latest") -> list[str]:
    """The nodes that have a model, by their names."""
    return [f"n{n + 1}" for n, node in enumerate(made.nodes) if name in await names(made, node.url)]


def asked(node: SimNode, path: str, method: str = "POST") -> int:
    """How often a node was asked for something."""
    return sum(seen.method == method for seen in node.calls(path))


class TestPull:
    async def test_it_goes_to_all_and_ends_in_one_success(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 3) as made:
            lines = await pull(made)
            assert await having(made) == ["n1", "n2", "n3"]
            statuses = [line["status"] for line in lines]
            assert statuses.count("success") == 1
            assert statuses[-1] == "success"
            for status in ("pulling manifest", "verifying sha256 digest", "writing manifest"):
                assert statuses.count(status) == 1
            (line,) = made.requests
            assert line["node"] == "n1,n2,n3"
            assert (line["reason"], line["outcome"]) == ("manage", "ok")
            assert (line["endpoint"], line["model"]) == ("/api/pull", "phi:latest")

    async def test_the_bar_of_each_layer_only_grows_and_ends_at_its_size(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 3) as made:
            lines = [line for line in await pull(made) if "digest" in line]
            digests = {line["digest"] for line in lines}
            assert len(digests) > 1
            for digest in digests:
                told = [line for line in lines if line["digest"] == digest]
                counts = [line.get("completed", 0) for line in told]
                assert counts == sorted(counts)
                assert counts[-1] == told[-1]["total"]
                assert len({line["total"] for line in told}) == 1

    async def test_one_node_is_heard_word_for_word(self) -> None:
        one = spec(library=(PHI,))
        async with rig(one) as made, SimNode(one) as alone:
            body = json.dumps({"model": "phi"})
            async with made.session.post(f"{alone.url}/api/pull", data=body) as answer:
                wanted = await answer.read()
            async with made.session.post(f"{made.url}/api/pull", data=body) as answer:
                assert await answer.read() == wanted
                assert answer.headers["Content-Type"] == "application/x-ndjson"

    async def test_the_listing_shows_the_model_at_once(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 2) as made:
            await pull(made)
            assert "phi:latest" in await names(made)
            async with made.chat(model="phi") as answer:
                assert answer.status == 200

    async def test_as_many_nodes_get_it_as_are_configured(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 3, manage={"pull": {"to": 2}}) as made:
            await pull(made)
            assert len(await having(made)) == 2

    async def test_a_node_that_has_it_comes_first(self) -> None:
        full = spec(model(), PHI, library=(PHI,))
        settings = {"pull": {"to": "one"}}
        async with rig(spec(library=(PHI,)), full, manage=settings) as made:
            await pull(made)
            assert await having(made) == ["n2"]

    async def test_a_pin_is_obeyed_and_taken_off(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 3) as made:
            await pull(made, "phi@n2")
            assert await having(made) == ["n2"]

    async def test_a_path_pin_is_obeyed(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 3) as made:
            await pull(made, path="/@n3/api/pull")
            assert await having(made) == ["n3"]

    async def test_placement_says_where_it_goes(self) -> None:
        place = [{"models": ["phi"], "nodes": ["n1", "n3"]}]
        async with rig(*[spec(library=(PHI,))] * 3, placement=place) as made:
            await pull(made)
            assert await having(made) == ["n1", "n3"]

    async def test_a_failing_node_is_named_and_the_others_go_on(self) -> None:
        async with rig(spec(library=(RARE,)), spec(), spec(library=(RARE,))) as made:
            lines = await pull(made, "rare")
            assert await having(made, "rare:latest") == ["n1", "n3"]
            assert lines[-1] == {"error": f"n2: {NOT_THERE}; done on n1, n3"}
            assert {"status": "success"} not in lines
            assert made.requests[-1]["outcome"] == "node_error"
            assert "n2" in made.requests[-1]["error"]

    async def test_a_node_that_dies_on_the_way_is_named_and_the_others_go_on(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 2) as made:
            made.nodes[1].faults.add(Fault(FaultKind.DIE, path="/api/pull", after=2))
            lines = await pull(made)
            assert lines[-1] == {"error": "n2: connection closed inside the response; done on n1"}
            assert await having(made) == ["n1"]
            assert "phi:latest" in await names(made)

    async def test_the_only_node_that_dies_on_the_way_is_named(self) -> None:
        async with rig(spec(library=(PHI,))) as made:
            made.nodes[0].faults.add(Fault(FaultKind.DIE, path="/api/pull", after=2))
            lines = await pull(made)
            assert lines[-1] == {"error": "node n1: connection closed inside the response"}

    async def test_a_model_that_is_nowhere_ends_in_an_error_line(self) -> None:
        async with rig(spec(), spec()) as made:
            lines = await pull(made, "nope")
            assert lines == [{"status": "pulling manifest"}, {"error": f"n1, n2: {NOT_THERE}"}]

    async def test_without_a_stream_it_is_one_object_or_an_error_with_its_status(self) -> None:
        async with rig(spec(library=(PHI,)), spec(library=(PHI,))) as made:
            assert await pull(made, stream=False) == [{"status": "success"}]
            assert await having(made) == ["n1", "n2"]
            body = {"model": "nope", "stream": False}
            async with made.session.post(f"{made.url}/api/pull", json=body) as answer:
                assert answer.status == 500
                assert await answer.json() == {"error": f"n1, n2: {NOT_THERE}"}
            body = {"model": "nope@n1", "stream": False}
            async with made.session.post(f"{made.url}/api/pull", json=body) as answer:
                assert await answer.json() == {"error": NOT_THERE}

    async def test_a_client_that_leaves_cancels_it_everywhere(self) -> None:
        slow = spec(library=(PHI,), transfer_bps=1)
        async with rig(slow, slow) as made, talk(made.url) as client:
            await client.post("/api/pull", b'{"model":"phi"}')
            await client.head()
            client.leave()
            await made.until(lambda: all(node.in_flight == 0 for node in made.nodes))
            await made.until(lambda: bool(made.requests))
            assert made.requests[-1]["outcome"] == "cancelled"
            assert await having(made) == []

    async def test_all_nodes_that_cannot_be_reached_are_a_status(self) -> None:
        async with rig(spec(), spec()) as made:
            for node in made.nodes:
                node.faults.add(Fault(FaultKind.DIE, path="/api/pull"))
            body = {"model": "phi"}
            async with made.session.post(f"{made.url}/api/pull", json=body) as answer:
                assert answer.status == 502
                assert (await answer.json())["error"].startswith("n1, n2: ")
            assert made.requests[-1]["outcome"] == "failed"

    @pytest.mark.parametrize("name", ["", "a/b/c/d", "m@x@y"])
    async def test_a_bad_name_reaches_no_node(self, name: str) -> None:
        async with rig() as made:
            async with made.session.post(f"{made.url}/api/pull", json={"model": name}) as answer:
                assert answer.status == 400
                assert await answer.json() == {"error": "invalid model name"}
            assert not asked(made.nodes[0], "/api/pull")

    async def test_an_empty_body_is_said_to_be_missing(self) -> None:
        async with rig() as made, made.session.post(f"{made.url}/api/pull") as answer:
            assert (answer.status, await answer.json()) == (400, {"error": "missing request body"})

    async def test_an_answer_carries_the_headers_of_the_router_and_of_cors(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 2) as made:
            body, origin = {"model": "phi"}, {"Origin": "http://localhost:3000"}
            url = f"{made.url}/api/pull"
            async with made.session.post(url, json=body, headers=origin) as answer:
                assert answer.headers["X-Ollamux-Node"] == "n1,n2"
                assert answer.headers["X-Ollamux-Reason"] == "manage"
                assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"


class TestDelete:
    async def test_it_is_gone_from_all_that_had_it(self) -> None:
        async with rig(spec(), spec(OTHER), spec()) as made:
            assert await delete(made, MODEL) == (200, "")
            assert await having(made, MODEL) == []
            assert await names(made) == {"mistral:7b"}
            assert not asked(made.nodes[1], "/api/delete", "DELETE")
            assert made.requests[0]["node"] == "n1,n3"

    async def test_a_pin_limits_it(self) -> None:
        async with rig(spec(), spec()) as made:
            assert await delete(made, f"{MODEL}@n1") == (200, "")
            assert await having(made, MODEL) == ["n2"]
            assert await delete(made, MODEL, "/@n2/api/delete") == (200, "")
            assert await having(made, MODEL) == []

    async def test_what_nobody_has_is_ollamas_404(self) -> None:
        async with rig(spec(), spec()) as made:
            assert await delete(made, "nope") == (404, """{"error":"model 'nope' not found"}""")

    async def test_what_all_have_lost_meanwhile_is_ollamas_404(self) -> None:
        async with rig(spec(), spec()) as made:
            for node in made.nodes:
                async with made.session.delete(f"{node.url}/api/delete", json={"model": MODEL}):
                    pass
            status, text = await delete(made, MODEL)
            assert (status, json.loads(text)) == (404, {"error": f"model '{MODEL}' not found"})

    async def test_what_one_has_lost_meanwhile_is_gone(self) -> None:
        async with rig(spec(), spec()) as made:
            url = f"{made.nodes[0].url}/api/delete"
            async with made.session.delete(url, json={"model": MODEL}):
                pass
            assert await delete(made, MODEL) == (200, "")

    async def test_a_partial_failure_says_where_it_worked(self) -> None:
        async with rig(spec(), spec(), spec()) as made:
            fault = Fault(FaultKind.STATUS, path="/api/delete", status=500, message="disk on fire")
            made.nodes[1].faults.add(fault)
            status, text = await delete(made, MODEL)
            assert status == 500
            assert json.loads(text) == {"error": "n2: disk on fire; done on n1, n3"}
            assert await having(made, MODEL) == ["n2"]
            assert MODEL in await names(made)
            assert made.requests[0]["outcome"] == "node_error"

    async def test_an_alias_is_not_taken_for_its_model(self) -> None:
        async with rig(spec(), aliases={"mine": MODEL}) as made:
            status, _ = await delete(made, "mine")
            assert status == 404
            assert await having(made, MODEL) == ["n1"]


class TestCopy:
    async def test_every_holder_copies(self) -> None:
        async with rig(spec(), spec(OTHER), spec()) as made:
            body = {"source": MODEL, "destination": "twin"}
            async with made.session.post(f"{made.url}/api/copy", json=body) as answer:
                assert (answer.status, await answer.read()) == (200, b"")
            assert await having(made, "twin:latest") == ["n1", "n3"]
            assert "twin:latest" in await names(made)

    async def test_a_pin_of_the_source_is_taken_off(self) -> None:
        async with rig(spec(), spec()) as made:
            body = {"Source": f"{MODEL}@n2", "destination": "twin"}
            async with made.session.post(f"{made.url}/api/copy", json=body) as answer:
                assert answer.status == 200
            assert await having(made, "twin:latest") == ["n2"]

    async def test_what_nobody_has_is_ollamas_404(self) -> None:
        async with rig() as made:
            body = {"source": "nope", "destination": "twin"}
            async with made.session.post(f"{made.url}/api/copy", json=body) as answer:
                assert answer.status == 404
                assert await answer.json() == {"error": 'model "nope" not found'}

    async def test_what_a_node_says_of_a_destination_is_passed_on(self) -> None:
        async with rig() as made:
            body = {"source": MODEL, "destination": "a/b/c/d"}
            async with made.session.post(f"{made.url}/api/copy", json=body) as answer:
                assert answer.status == 400


async def slices() -> AsyncIterator[bytes]:
    for start in range(0, len(DATA), 65536):
        yield DATA[start : start + 65536]


async def has_blob(made: Rig, url: str) -> int:
    async with made.session.head(url + BLOB) as answer:
        return answer.status


class TestBlobs:
    async def test_a_blob_comes_to_every_node_in_one_pass(self) -> None:
        async with rig(spec(), spec(), spec()) as made:
            assert await has_blob(made, made.url) == 404
            async with made.session.post(made.url + BLOB, data=DATA) as answer:
                assert (answer.status, await answer.read()) == (201, b"")
            assert [await has_blob(made, node.url) for node in made.nodes] == [200, 200, 200]
            assert await has_blob(made, made.url) == 200
            assert [seen["status"] for seen in made.requests] == [404, 201, 200]

    async def test_a_blob_without_a_length_goes_on_in_chunks(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(made.url + BLOB, data=slices()) as answer:
                assert answer.status == 201
            assert [await has_blob(made, node.url) for node in made.nodes] == [200, 200]

    async def test_it_is_there_only_if_every_node_has_it(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(made.nodes[0].url + BLOB, data=DATA) as answer:
                assert answer.status == 201
            assert await has_blob(made, made.url) == 404
            async with made.session.post(made.url + BLOB, data=DATA) as answer:
                assert answer.status == 201
            assert await has_blob(made, made.url) == 200
            assert asked(made.nodes[0], BLOB) == 1  # the one that had it was not sent it again

    async def test_a_client_that_waits_is_told_to_go_on_only_if_a_node_lacks_it(self) -> None:
        async with rig(spec(), spec()) as made, talk(made.url) as client:
            await client.send(
                f"POST {BLOB} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                f"Content-Length: {len(DATA)}\r\n\r\n".encode()
            )
            _, status, _ = await client.head()
            assert status == 100
            await client.send(DATA)
            assert (await client.answer()).status == 201

    async def test_a_client_that_waits_with_what_all_have_is_answered_at_once(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(made.url + BLOB, data=DATA) as answer:
                assert answer.status == 201
            async with talk(made.url) as client:
                await client.send(
                    f"POST {BLOB} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                    f"Content-Length: {len(DATA)}\r\n\r\n".encode()
                )
                told = await client.answer()
                assert (told.status, told.body) == (200, b"")
                assert told.header("Connection") == "close"

    async def test_bytes_of_another_digest_are_the_nodes_400(self) -> None:
        async with (
            rig(spec(), spec()) as made,
            made.session.post(made.url + BLOB, data=b"other") as answer,
        ):
            assert answer.status == 400
            assert "digest mismatch" in (await answer.json())["error"]

    async def test_a_node_that_dies_is_left_behind(self) -> None:
        async with rig(spec(), spec()) as made:

            async def dying() -> AsyncIterator[bytes]:
                yield DATA[:65536]
                await made.until(lambda: bool(asked(made.nodes[0], BLOB)))
                await made.nodes[0].refuse()
                yield DATA[65536:]

            async with made.session.post(made.url + BLOB, data=dying()) as answer:
                assert answer.status == 201
            assert await has_blob(made, made.nodes[1].url) == 200

    async def test_what_some_have_is_there_when_the_others_die(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(made.nodes[1].url + BLOB, data=DATA) as answer:
                assert answer.status == 201

            async def dying() -> AsyncIterator[bytes]:
                yield DATA[:65536]
                await made.until(lambda: bool(asked(made.nodes[0], BLOB)))
                await made.nodes[0].refuse()
                yield DATA[65536:]

            async with made.session.post(made.url + BLOB, data=dying()) as answer:
                assert answer.status == 200
            assert made.requests[-1]["node"] == "n2"

    async def test_a_node_that_does_not_answer_has_no_blob(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(made.url + BLOB, data=DATA) as answer:
                assert answer.status == 201
            await made.nodes[0].refuse()
            assert await has_blob(made, made.url) == 404
            await made.nodes[1].refuse()
            assert await has_blob(made, made.url) == 503
            async with made.session.post(made.url + BLOB, data=DATA) as answer:
                assert answer.status == 503
            await made.look()
            assert await has_blob(made, made.url) == 503

    async def test_a_client_that_leaves_cuts_the_uploads(self) -> None:
        async with rig(spec(), spec()) as made, talk(made.url) as client:
            await client.send(
                f"POST {BLOB} HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Length: {len(DATA)}\r\n\r\n".encode(),
                DATA[:100],
            )
            await made.until(lambda: all(asked(node, BLOB) for node in made.nodes))
            client.leave()
            await made.until(lambda: bool(made.requests))
            assert made.requests[-1]["outcome"] == "cancelled"
            assert [await has_blob(made, node.url) for node in made.nodes] == [404, 404]

    async def test_a_malformed_digest_is_a_400(self) -> None:
        async with rig() as made:
            async with made.session.post(f"{made.url}/api/blobs/sha256:12", data=b"x") as answer:
                assert answer.status == 400
            async with made.session.head(f"{made.url}/api/blobs/sha256:12") as answer:
                assert answer.status == 400

    async def test_a_build_stays_on_the_nodes_that_it_began_on(self) -> None:
        few = {"create": {"to": "one"}}
        async with rig(spec(), spec(OTHER), spec(), manage=few) as made:
            more = [b"one", b"two", b"three"]
            for data in more:
                digest = hashlib.sha256(data).hexdigest()
                url = f"{made.url}/api/blobs/sha256:{digest}"
                async with made.session.post(url, data=data) as answer:
                    assert answer.status == 201
            assert len({line["node"] for line in made.requests}) == 1


class TestCreate:
    async def create(self, made: Rig, path: str = "/api/create", **fields: Any) -> list[Any]:
        async with made.session.post(made.url + path, json=fields) as answer:
            assert answer.status == 200, await answer.text()
            return await records(answer)

    async def test_blobs_then_create_makes_the_model_everywhere(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(made.url + BLOB, data=DATA) as answer:
                assert answer.status == 201
            lines = await self.create(made, model="mine", files={"m.gguf": DIGEST})
            assert lines[-1] == {"status": "success"}
            assert lines.count({"status": "success"}) == 1
            assert await having(made, "mine:latest") == ["n1", "n2"]
            async with made.chat(model="mine") as answer:
                assert answer.status == 200

    async def test_it_goes_to_the_nodes_that_have_all_its_blobs(self) -> None:
        async with rig(spec(), spec(), spec()) as made:
            for node in made.nodes[1:]:
                async with made.session.post(node.url + BLOB, data=DATA) as answer:
                    assert answer.status == 201
            await self.create(made, model="mine", files={"m.gguf": DIGEST})
            assert await having(made, "mine:latest") == ["n2", "n3"]

    async def test_a_blob_that_is_nowhere_is_the_nodes_own_error(self) -> None:
        async with rig(spec(), spec()) as made:
            async with made.session.post(
                f"{made.url}/api/create", json={"model": "mine", "files": {"m.gguf": DIGEST}}
            ) as answer:
                assert "error" in (await records(answer))[-1]
            assert sum(asked(node, "/api/create") for node in made.nodes) == 1

    async def test_from_goes_to_the_nodes_that_have_that_model(self) -> None:
        async with rig(spec(), spec(OTHER), spec()) as made:
            await self.create(made, **{"model": "mine", "from": MODEL, "system": "be brief"})
            assert await having(made, "mine:latest") == ["n1", "n3"]

    async def test_from_a_model_that_nobody_has_is_pulled_by_the_nodes(self) -> None:
        async with rig(*[spec(library=(PHI,))] * 2) as made:
            await self.create(made, **{"model": "mine", "from": "phi"})
            assert await having(made, "mine:latest") == ["n1", "n2"]

    async def test_pins_of_both_names_are_taken_off(self) -> None:
        async with rig(spec(), spec()) as made:
            await self.create(made, **{"model": "mine@n2", "from": MODEL})
            assert await having(made, "mine:latest") == ["n2"]
            await self.create(made, **{"model": "yours", "from": f"{MODEL}@n1"})
            assert await having(made, "yours:latest") == ["n1"]

    async def test_pins_that_contradict_each_other_are_a_400(self) -> None:
        async with rig(spec(), spec()) as made:
            body = {"model": "mine@n2", "from": f"{MODEL}@n1"}
            async with made.session.post(f"{made.url}/api/create", json=body) as answer:
                assert answer.status == 400

    async def test_without_a_stream_it_is_one_object(self) -> None:
        async with rig(spec(), spec()) as made:
            fields: dict[str, Any] = {"model": "mine", "from": MODEL, "stream": False}
            assert await self.create(made, **fields) == [{"status": "success"}]

    async def test_the_official_client_builds_uploads_copies_and_deletes(
        self, tmp_path: Any
    ) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(DATA)
        async with rig(spec(), spec()) as made, ollama.AsyncClient(host=made.url) as client:
            digest = await client.create_blob(file)
            assert digest == DIGEST
            await client.create(model="mine", files={"m.gguf": digest})
            await client.copy("mine", "twin")
            await client.delete("mine")
            assert {one.model for one in (await client.list()).models} == {MODEL, "twin:latest"}


class TestAllow:
    @pytest.mark.parametrize(
        ("verb", "method", "path"),
        [
            ("pull", "POST", "/api/pull"),
            ("push", "POST", "/api/push"),
            ("create", "POST", "/api/create"),
            ("create", "POST", BLOB),
            ("create", "HEAD", BLOB),
            ("copy", "POST", "/api/copy"),
            ("delete", "DELETE", "/api/delete"),
        ],
    )
    async def test_what_is_not_allowed_reaches_no_node(
        self, verb: str, method: str, path: str
    ) -> None:
        async with rig(manage={verb: {"allow": False}}) as made:
            body = {"model": MODEL, "source": MODEL, "destination": "x"}
            async with made.session.request(method, made.url + path, json=body) as answer:
                assert answer.status == 403
                if method != "HEAD":
                    assert "does not allow" in (await answer.json())["error"]
            assert {seen.method for seen in made.nodes[0].seen} == {"GET"}


NO_CONTENT = b"HTTP/1.1 204 No Content\r\nContent-Type: application/x-ndjson\r\nDate: now\r\n\r\n"


async def test_a_progress_without_content_does_not_run_into_the_next_answer() -> None:
    async def act(peer: Peer) -> None:
        await peer.say(NO_CONTENT)

    async with (
        scripted(act) as url,
        rig(entries=[{"url": url}]) as made,
        talk(made.url) as client,
    ):
        await client.post("/api/pull", json.dumps({"model": "phi"}).encode())
        answer = await client.answer()
        assert (answer.status, answer.body) == (204, b"")
        await client.send(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer()).status == 200


async def test_a_model_of_very_many_blobs_is_refused_before_nodes_are_asked() -> None:
    files = {f"f{n}": f"sha256:{n:064x}" for n in range(1001)}
    async with rig() as made:
        body = {"model": "big", "files": files}
        async with made.session.post(f"{made.url}/api/create", json=body) as answer:
            assert answer.status == 400
            assert "at most 1000 blobs" in (await answer.json())["error"]
        assert not [seen for seen in made.nodes[0].seen if seen.method == "HEAD"]


async def test_a_set_of_nodes_is_no_label() -> None:
    async with rig(spec(), spec()) as made:
        await pull(made)
        metrics = await made.metrics()
        assert 'endpoint="/api/pull",model="unknown",node="several"' in metrics
        assert "n1,n2" not in metrics


FULL = b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfull"


@contextlib.asynccontextmanager
async def full() -> AsyncIterator[str]:
    """A node that takes no blob, and says so without waiting for it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            lists = b'{"version":"0.33.0","models":[]}'
            missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            well = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            answers = {b"HEAD": missing, b"POST": FULL, b"GET": well % len(lists) + lists}
            writer.write(answers[head.split(b" ", 1)[0]])
            await writer.drain()
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_when_all_nodes_have_answered_the_client_need_not_send_the_rest() -> None:
    async with (
        full() as one,
        full() as two,
        rig(spec(), spec(), entries=[{"url": one}, {"url": two}]) as made,
        talk(made.url) as client,
    ):
        head = f"POST {BLOB} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n"
        await client.send(head.encode() + b"x" * 1000)
        assert (await client.answer()).status == 507


async def test_a_change_that_no_node_could_be_asked_for_may_be_tried_again() -> None:
    async with rig() as r:
        await r.nodes[0].refuse()  # and no probe knows
        body = {"model": "new", "stream": False}
        async with r.session.post(f"{r.url}/api/pull", json=body) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
