"""Loading and unloading, how long a model stays, and what `/api/ps` and `/api/tags` list."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pytest

from tests.live.target import ASKED, SHORT, Target

JSON = "application/json; charset=utf-8"
_HEX = re.compile("[0-9a-f]{64}")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/generate", {}),
        ("/api/generate", {"prompt": ""}),
        ("/api/generate", {"stream": True}),
        ("/api/chat", {}),
        ("/api/chat", {"messages": []}),
        ("/api/chat", {"messages": [], "stream": True}),
    ],
)
async def test_a_request_without_a_prompt_loads_or_unloads(
    target: Target, path: str, fields: dict[str, Any]
) -> None:
    asked = {"model": target.pinned(target.model), **fields}
    for keep_alive, reason in ((60, "load"), (0, "unload"), (0, "unload"), ("0s", "unload")):
        answer = await target.post(path, {**asked, "keep_alive": keep_alive})
        assert (answer.status, answer.type) == (200, JSON)
        assert (answer.json["done"], answer.json["done_reason"]) == (True, reason)


async def test_what_is_unloaded_is_no_longer_listed(target: Target) -> None:
    model = target.model
    await target.load(target.pinned(model))
    await target.resident_when(lambda shown: model in shown)
    await target.unload(model)
    await target.resident_when(lambda shown: model not in shown)


async def test_an_unload_leaves_nothing_loaded(target: Target) -> None:
    for name in target.everywhere(target.model):
        await target.load(name)
    await target.load(target.model, keep_alive=0)
    await target.resident_when(lambda shown: target.model not in shown)


async def test_ps_lists_a_model_right_after_its_use(target: Target) -> None:
    await target.unload(target.model)
    if target.live:
        await target.resident_when(lambda shown: target.model not in shown)
    await target.load(target.model)
    assert target.model in await target.resident()


async def test_a_prompt_with_keep_alive_0_unloads_after_its_answer(target: Target) -> None:
    await target.unload(target.model)
    body = {"messages": ASKED, "options": SHORT, "keep_alive": 0, "stream": False}
    answer = await target.post("/api/chat", {"model": target.pinned(target.model), **body})
    assert answer.json["done_reason"] in ("stop", "length")
    await target.resident_when(lambda shown: target.model not in shown)


async def test_ps_tells_of_each_loaded_model(target: Target) -> None:
    body = {"options": {"num_ctx": 1024}, "keep_alive": -1}
    assert (await target.load(target.pinned(target.model), **body)).status == 200
    shown = await target.resident_when(lambda shown: target.model in shown)
    one = shown[target.model]
    await target.unload(target.model)
    assert one["model"] == one["name"] == target.model
    assert _HEX.fullmatch(one["digest"])
    assert one["size"] >= one["size_vram"] >= 0
    assert one["details"].keys() >= {"format", "family", "parameter_size", "quantization_level"}


@pytest.mark.since(0, 10, 0)
@pytest.mark.parametrize("forever", [-1, -0.5, "-1s"])
async def test_what_stays_for_ever_expires_in_centuries(target: Target, forever: object) -> None:
    await target.unload(target.model)
    body = {"options": {"num_ctx": 1024}, "keep_alive": forever}
    await target.load(target.pinned(target.model), **body)

    def stays(shown: Mapping[str, Any]) -> bool:
        one = shown.get(target.model, {"expires_at": "", "context_length": 0})
        return bool(one["expires_at"] > "2200" and one["context_length"] == 1024)

    await target.resident_when(stays)
    await target.unload(target.model)


@pytest.mark.parametrize("keep_alive", [300, 0.5, "5m", "1h30m", "500ms", None])
async def test_a_time_to_stay_is_seconds_or_a_duration(target: Target, keep_alive: object) -> None:
    answer = await target.load(target.model, keep_alive=keep_alive)
    assert (answer.status, answer.json["done_reason"]) == (200, "load")


async def test_embed_without_input_loads(target: Target) -> None:
    answer = await target.post("/api/embed", {"model": target.embedder})
    assert (answer.status, answer.json["embeddings"]) == (200, [])
    await target.resident_when(lambda shown: target.embedder in shown)


async def test_an_empty_prompt_of_openais_completions_loads(target: Target) -> None:
    answer = await target.post("/v1/completions", {"model": target.model, "prompt": ""})
    assert (answer.status, answer.json["choices"][0]["finish_reason"]) == (200, "load")


async def test_tags_list_each_model_once_and_the_newest_first(target: Target) -> None:
    answer = await target.get("/api/tags")
    assert (answer.status, answer.type) == (200, JSON)
    models = answer.json["models"]
    names = [one["name"] for one in models]
    assert target.model in names
    assert len({*names}) == len(names)
    for one in models:
        assert one["model"] == one["name"]
        assert _HEX.fullmatch(one["digest"])
        assert one["size"] >= 0
        assert one["details"].keys() >= {"format", "family", "parameter_size"}
    seconds = [int(datetime.fromisoformat(one["modified_at"]).timestamp()) for one in models]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.since(0, 30, 0)
async def test_tags_tell_what_a_model_can_do(target: Target) -> None:
    listed = {one["name"]: one for one in (await target.get("/api/tags")).json["models"]}
    assert "completion" in listed[target.model]["capabilities"]
    assert listed[target.model]["details"]["context_length"] > 0


async def test_openais_list_has_the_same_models(target: Target) -> None:
    answer = await target.get("/v1/models")
    assert (answer.status, answer.type) == (200, "application/json")
    assert answer.json["object"] == "list"
    listed = answer.json["data"] or []  # a node without models has null there
    for one in listed:
        assert one.keys() == {"id", "object", "created", "owned_by"}
        assert (one["object"], type(one["created"])) == ("model", int)
    tags = (await target.get("/api/tags")).json["models"]
    assert {one["id"] for one in listed} == {one["name"] for one in tags}
