"""Requests as nodes read them: keys, bodies and names that others would refuse."""

import json
from typing import Any

import pytest

from tests.live.target import NOBODYS, Target

# When these came is not known; 0.17.4 did not have them.
_SINCE = pytest.mark.since(0, 33)


def _object(model: str, text: str) -> bytes:
    """`text` with MODEL and NOBODYS as JSON strings."""
    filled = text.replace("MODEL", json.dumps(model)).replace("NOBODYS", json.dumps(NOBODYS))
    return filled.encode("latin-1")


@pytest.mark.parametrize(
    "text",
    [
        '{"Model":MODEL}',
        '{"mODEL":MODEL,"Stream":null}',
        '{"model":NOBODYS,"model":MODEL}',
        '{"model":NOBODYS,"Model":MODEL}',
        '{"messages":[],"model":MODEL,"prompt":""}',
        '{"options":{"model":NOBODYS,"no_such_option":1},"model":MODEL,"no_such_field":[{}]}',
        '{"model":MODEL} and more',
        '{"model":MODEL}{"model":NOBODYS}',
        ' \r\n\t{ "model" : MODEL }\n',
        '{"model":MODEL,"system":"\xff\xfe"}',
        '{"model":MODEL,"system":"\\ud800"}',
        '{"\\u006dodel":MODEL}',
        '{"model":MODEL,"stream":true}',
        '{"model":MODEL,"keep_alive":null}',
    ],
)
async def test_a_body_is_read_as_go_reads_it(target: Target, text: str) -> None:
    answer = await target.post("/api/generate", _object(target.model, text))
    assert (answer.status, answer.json["done_reason"]) == (200, "load")
    assert answer.json["model"] == target.model


@pytest.mark.parametrize("kind", ["text/plain", "image/png", "application/x-www-form-urlencoded"])
async def test_the_content_type_of_a_request_means_nothing(target: Target, kind: str) -> None:
    body = {"model": target.model}
    answer = await target.post("/api/generate", body, f"Content-Type: {kind}")
    assert (answer.status, answer.json["done_reason"]) == (200, "load")


async def test_a_body_may_be_large(target: Target) -> None:
    answer = await target.load(target.model, no_such_field="a" * 3_000_000)
    assert answer.status == 200


async def test_a_body_may_come_in_chunks(target: Target) -> None:
    data = json.dumps({"model": target.model}).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (data[:7], data[7:]))
    head = target.request("POST", "/api/generate", None, "Transfer-Encoding: chunked")
    answer = await target.exchange(head + chunks + b"0\r\n\r\n")
    assert (answer.status, answer.json["done_reason"]) == (200, "load")


def _cased(name: str) -> str:
    return name.swapcase()


@pytest.mark.parametrize(
    "spelled",
    [
        "{name}",
        pytest.param(" {name}\t", marks=_SINCE),
        pytest.param("{name}:local", marks=_SINCE),
        pytest.param("{name}:LOCAL", marks=_SINCE),
        "library/{name}",
        "registry.ollama.ai/library/{name}",
        "https://registry.ollama.ai/library/{name}",
    ],
)
@pytest.mark.parametrize("case", [str, _cased])
async def test_a_model_is_found_by_any_spelling_and_told_as_asked(
    target: Target, spelled: str, case: Any
) -> None:
    if "/" in target.model and "/" in spelled:
        pytest.skip("a model with a namespace has fewer spellings")
    asked = spelled.format(name=case(target.model))
    answer = await target.load(asked)
    assert (answer.status, answer.json["model"]) == (200, asked)


async def test_another_tag_is_another_model(target: Target) -> None:
    asked = f"{target.model.rpartition(':')[0]}:{NOBODYS}"
    answer = await target.load(asked)
    assert (answer.status, answer.json) == (404, {"error": f"model '{asked}' not found"})


async def test_only_the_old_embeddings_know_the_case_of_names(target: Target) -> None:
    name = target.embedder
    assert name != name.swapcase()
    for path, status in (("/api/embed", 200), ("/api/embeddings", 404)):
        body = {"model": name.swapcase(), "input": "hi", "prompt": "hi"}
        assert (await target.post(path, body)).status == status


async def test_show_takes_the_model_from_model_or_name(target: Target) -> None:
    for body in ({"model": target.model}, {"name": target.model}, {"model": target.model.upper()}):
        answer = await target.post("/api/show", body)
        assert (answer.status, answer.type) == (200, "application/json; charset=utf-8")
        assert isinstance(answer.json["model_info"], dict)
        assert isinstance(answer.json["details"], dict)
        assert "completion" in answer.json["capabilities"]


@pytest.mark.parametrize("name", ["{name}", "{other}"])
async def test_openais_model_is_told_as_asked(target: Target, name: str) -> None:
    if "/" in target.model:
        pytest.skip("a name with a slash is never found there")
    asked = name.format(name=target.model, other=target.model.upper())
    answer = await target.get(f"/v1/models/{asked}")
    assert (answer.status, answer.json["id"]) == (200, asked)
