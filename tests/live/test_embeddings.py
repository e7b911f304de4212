"""Embeddings in all their forms."""

import base64
import struct

import pytest

from tests.live.target import Target

JSON = "application/json; charset=utf-8"


@pytest.mark.parametrize("texts", [["one"], ["one", "two", "three"]])
async def test_embed_gives_a_vector_for_each_text(target: Target, texts: list[str]) -> None:
    answer = await target.post("/api/embed", {"model": target.embedder, "input": texts})
    assert (answer.status, answer.type) == (200, JSON)
    told = answer.json
    assert told["model"] == target.embedder
    assert len(told["embeddings"]) == len(texts)
    assert len({len(vector) for vector in told["embeddings"]}) == 1
    assert told["prompt_eval_count"] >= len(texts)
    assert told["total_duration"] > 0
    assert not told.keys() & {"eval_count", "eval_duration", "done"}


async def test_embed_takes_one_text_as_it_takes_a_list_of_one(target: Target) -> None:
    one = await target.post("/api/embed", {"model": target.embedder, "input": "one"})
    listed = await target.post("/api/embed", {"model": target.embedder, "input": ["one"]})
    assert len(one.json["embeddings"]) == len(listed.json["embeddings"]) == 1


async def test_embed_never_streams(target: Target) -> None:
    body = {"model": target.embedder, "input": "one", "stream": True}
    answer = await target.post("/api/embed", body)
    assert (answer.status, answer.type) == (200, JSON)
    assert answer.json["embeddings"]


async def test_the_old_form_gives_one_vector_and_no_counts(target: Target) -> None:
    answer = await target.post("/api/embeddings", {"model": target.embedder, "prompt": "one"})
    assert (answer.status, answer.type) == (200, JSON)
    assert answer.json.keys() == {"embedding"}
    assert all(isinstance(one, float | int) for one in answer.json["embedding"])
    assert answer.json["embedding"]


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_openais_form_numbers_its_vectors(target: Target, form: str) -> None:
    body = {"model": target.embedder, "input": ["one", "two"], "encoding_format": form}
    answer = await target.post("/v1/embeddings", body)
    assert (answer.status, answer.type) == (200, "application/json")
    told = answer.json
    assert (told["object"], told["model"]) == ("list", target.embedder)
    assert [(one["object"], one["index"]) for one in told["data"]] == [
        ("embedding", 0), ("embedding", 1),
    ]  # fmt: skip
    assert told["usage"]["prompt_tokens"] == told["usage"]["total_tokens"] > 0
    for one in told["data"]:
        vector = one["embedding"]
        if form == "base64":
            packed = base64.b64decode(vector, validate=True)
            vector = struct.unpack(f"<{len(packed) // 4}f", packed)
        assert vector


@pytest.mark.since(0, 33)
async def test_openais_form_wants_text(target: Target) -> None:
    body = {"model": target.embedder, "input": [[1, 2, 3]]}
    answer = await target.post("/v1/embeddings", body)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
