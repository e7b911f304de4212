"""Verbs that change what is on nodes, on names that the test made itself."""

import secrets
from collections.abc import AsyncIterator

import pytest

from tests.live.target import NOBODYS, SHORT, Target


@pytest.fixture
async def own(target: Target) -> AsyncIterator[str]:
    """A name of this test's, which is on no node afterwards."""
    name = f"ollamux-test-{secrets.token_hex(4)}:v1"
    yield name
    await target.ask("DELETE", "/api/delete", {"model": name})


async def _names(target: Target) -> set[str]:
    return {one["name"] for one in (await target.get("/api/tags")).json["models"]}


async def test_a_copy_can_be_used_and_deleted(target: Target, own: str) -> None:
    copied = await target.post("/api/copy", {"source": target.model, "destination": own})
    assert (copied.status, copied.body) == (200, b"")
    assert own in await _names(target)
    assert (await target.post("/api/show", {"model": own})).status == 200
    body = {"model": own, "prompt": "hi", "options": SHORT, "stream": False}
    assert (await target.post("/api/generate", body)).json["model"] == own
    assert (await target.load(own, keep_alive=0)).status == 200
    deleted = await target.ask("DELETE", "/api/delete", {"model": own})
    assert (deleted.status, deleted.body) == (200, b"")
    assert own not in await _names(target)
    assert (await target.ask("DELETE", "/api/delete", {"name": own})).status == 404


async def test_a_model_is_made_of_another_with_progress(target: Target, own: str) -> None:
    body = {"model": own, "from": target.model, "system": "Be brief."}
    answer = await target.post("/api/create", body)
    assert (answer.status, answer.type) == (200, "application/x-ndjson")
    statuses = [record["status"] for record in answer.records]
    assert statuses[-1] == "success"
    assert statuses.count("success") == 1
    assert own in await _names(target)
    assert (await target.post("/api/show", {"model": own})).json["system"] == "Be brief."


async def test_a_model_is_made_in_silence_when_told(target: Target, own: str) -> None:
    body = {"model": own, "from": target.model, "system": "Be brief.", "stream": False}
    answer = await target.post("/api/create", body)
    assert (answer.status, answer.json) == (200, {"status": "success"})
    assert answer.type is not None
    assert answer.type.startswith("application/json")


async def test_a_missing_blob_is_an_error_line(target: Target, own: str) -> None:
    body = {"model": own, "files": {"m.gguf": f"sha256:{'0' * 63}1"}}
    answer = await target.post("/api/create", body)
    assert (answer.status, answer.type) == (200, "application/x-ndjson")
    assert answer.records[-1].keys() == {"error"}


@pytest.mark.parametrize(("digest", "status"), [
    (f"sha256:{'0' * 63}1", 404), (f"sha256-{'0' * 63}1", 404), ("sha256:1", 400), ("x", 400),
])  # fmt: skip
async def test_a_head_tells_whether_a_blob_is_there(
    target: Target, digest: str, status: int
) -> None:
    answer = await target.ask("HEAD", f"/api/blobs/{digest}")
    assert (answer.status, answer.body) == (status, b"")


async def test_no_other_field_names_what_is_deleted(target: Target) -> None:
    answer = await target.ask("DELETE", "/api/delete", {"name": NOBODYS})
    assert (answer.status, answer.json) == (404, {"error": f"model '{NOBODYS}' not found"})
