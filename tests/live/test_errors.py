"""What is refused, and how each of the three APIs says so."""

import re
from typing import Any

import pytest

from tests.live.target import ASKED, NOBODYS, Reply, Target

JSON = "application/json; charset=utf-8"
_CASED = NOBODYS.capitalize()
_NULLS = {"param": None, "code": None}
# When these came is not known; 0.17.4 did not have them.
_SINCE = pytest.mark.since(0, 33)


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/chat", {"messages": ASKED}, 400, "model is required"),
        ("/api/chat", {"model": "", "messages": ASKED}, 400, "model is required"),
        ("/api/chat", {"model": NOBODYS, "messages": ASKED}, 404, f"model '{NOBODYS}' not found"),
        ("/api/generate", {"prompt": "hi"}, 404, "model '' not found"),
        ("/api/generate", {"model": _CASED, "prompt": "hi"}, 404, f"model '{_CASED}' not found"),
        ("/api/embed", {"model": NOBODYS, "input": "hi"}, 404,
         f'model "{NOBODYS}" not found, try pulling it first'),
        pytest.param("/api/show", {"name": NOBODYS}, 404, f"model '{NOBODYS}:latest' not found",
                     marks=_SINCE),
        ("/api/copy", {"source": NOBODYS, "destination": f"{NOBODYS}-2"}, 404,
         f'model "{NOBODYS}" not found'),
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/generate", b"", 400, "missing request body"),
        ("/api/embed", b"", 400, "missing request body"),
        ("/api/show", b"", 400, "missing request body"),
    ],
)  # fmt: skip
async def test_the_native_api_says_it_in_one_text(
    target: Target, path: str, body: Any, status: int, text: str
) -> None:
    answer = await target.post(path, body)
    assert (answer.status, answer.json) == (status, {"error": text})
    assert answer.type == JSON


@_SINCE
@pytest.mark.parametrize("name", ["a/b/c/d", "-a", "m@", "m@sha256:ab", "hf.co/m"])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_what_is_no_name_is_refused(target: Target, path: str, name: str) -> None:
    answer = await target.post(path, {"model": name, "prompt": "hi", "messages": ASKED})
    assert (answer.status, answer.json) == (400, {"error": "invalid model name"})


async def test_what_is_not_there_cannot_be_deleted(target: Target) -> None:
    answer = await target.ask("DELETE", "/api/delete", {"model": NOBODYS})
    assert (answer.status, answer.json) == (404, {"error": f"model '{NOBODYS}' not found"})


@pytest.mark.parametrize("destination", ["a/b/c/d", "-a", "a@b"])
async def test_a_copy_needs_a_name(target: Target, destination: str) -> None:
    body = {"source": target.model, "destination": destination}
    assert (await target.post("/api/copy", body)).status == 400


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/show"])
@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xef\xbb\xbf{}", b"\x1f\x8b\x08\x00", b'"text"'])
async def test_a_body_that_is_no_object_is_refused(target: Target, path: str, body: bytes) -> None:
    answer = await target.post(path, body)
    assert (answer.status, answer.json.keys()) == (400, {"error"})


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"stream": "true"}, 400),
        ({"model": 5}, 400),
        ({"messages": [5]}, 400),
        ({"keep_alive": "10"}, 400),
        ({"keep_alive": "-1"}, 400),
        ({"keep_alive": True}, 400),
        ({"options": {"num_ctx": "many"}}, 500),
    ],
)
async def test_a_value_of_the_wrong_type_is_refused(
    target: Target, fields: dict[str, Any], status: int
) -> None:
    answer = await target.post("/api/chat", {"model": target.model, "messages": ASKED, **fields})
    assert (answer.status, answer.json.keys()) == (status, {"error"})


@_SINCE
async def test_cloud_and_local_together_are_refused(target: Target) -> None:
    answer = await target.load("x:20b-cloud:local")
    assert (answer.status, answer.json.keys()) == (400, {"error"})


def _is_json(answer: Reply) -> bool:
    """What is refused before the model is looked for is told with a charset."""
    told = ("application/json",) if answer.status == 404 else ("application/json", JSON)
    return answer.type in told


@pytest.mark.parametrize(
    ("path", "fields", "status", "kind"),
    [
        ("/v1/chat/completions", {"model": NOBODYS}, 404, "not_found_error"),
        ("/v1/chat/completions", {"model": "a/b/c/d"}, 400, "invalid_request_error"),
        ("/v1/chat/completions", {"messages": []}, 400, "invalid_request_error"),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, "invalid_request_error"),
        ("/v1/completions", {"model": NOBODYS, "prompt": "hi"}, 404, "not_found_error"),
        ("/v1/embeddings", {"model": NOBODYS, "input": "hi"}, 404, "not_found_error"),
        pytest.param("/v1/responses", {"model": NOBODYS, "input": "hi"}, 404, "not_found_error",
                     marks=pytest.mark.since(0, 13, 3)),
    ],
)  # fmt: skip
async def test_openais_api_says_it_in_an_object(
    target: Target, path: str, fields: dict[str, Any], status: int, kind: str
) -> None:
    if "model" not in fields:
        fields = {**fields, "model": target.model}
    answer = await target.post(path, {"messages": ASKED, **fields})
    assert answer.status == status
    assert _is_json(answer)
    error = answer.json["error"]
    assert error["message"]
    assert error == {"message": error["message"], "type": error["type"], **_NULLS}
    assert error["type"] == kind or target.version < (0, 33)


async def test_openais_api_knows_the_text_of_a_missing_model(target: Target) -> None:
    answer = await target.post("/v1/chat/completions", {"model": NOBODYS, "messages": ASKED})
    assert answer.json["error"]["message"] == f"model '{NOBODYS}' not found"


async def test_a_model_that_openais_list_lacks_is_a_404(target: Target) -> None:
    answer = await target.get(f"/v1/models/{NOBODYS}")
    assert answer.status == 404
    assert answer.json["error"]["type"] == "not_found_error" or target.version < (0, 33)


@pytest.mark.since(0, 14, 0)
@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": NOBODYS}, 404, "not_found_error"),
        ({"model": ""}, 400, "invalid_request_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"model": "a/b/c/d"}, 400, "invalid_request_error"),
    ],
)
async def test_anthropics_api_says_it_in_an_event_of_its_own(
    target: Target, fields: dict[str, Any], status: int, kind: str
) -> None:
    if "model" not in fields:
        fields = {**fields, "model": target.model}
    body = {"max_tokens": 4, "messages": ASKED, **fields}
    answer = await target.post("/v1/messages?beta=true", body)
    assert answer.status == status
    assert _is_json(answer)
    assert answer.json.keys() == {"type", "error", "request_id"}
    assert (answer.json["type"], answer.json["error"]["type"]) == ("error", kind)
    assert answer.json["error"]["message"]
    assert re.fullmatch("req_[0-9a-f]{24}", answer.json["request_id"])


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_body_in_gzip_is_refused(target: Target, path: str) -> None:
    data = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xabV*\x01\x00\x00\x00\x00\x00"
    answer = await target.post(path, data, "Content-Encoding: gzip")
    assert answer.status == 400
