"""What the router answers from the pool's own knowledge."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from router.catalog import version_key
from tests.rig import MODEL, Rig, model, rig, scripted, spec


def day(number: int) -> datetime:
    return datetime(2026, 1, number, tzinfo=UTC)


async def get(r: Rig, path: str) -> Any:
    async with r.session.get(r.url + path) as answer:
        assert answer.status == 200, await answer.text()
        return json.loads(await answer.read())


async def of_node(r: Rig, index: int, path: str) -> Any:
    async with r.session.get(r.nodes[index].url + path) as answer:
        return json.loads(await answer.read())


async def test_one_nodes_lists_are_its_own() -> None:
    async with rig(spec(model(), model("some/phi", modified_at=day(9)), warm=(MODEL,))) as r:
        for path in ("/api/tags", "/v1/models", "/api/version", f"/v1/models/{MODEL}"):
            assert await get(r, path) == await of_node(r, 0, path), path
        (entry,) = (await get(r, "/api/ps"))["models"]
        (own,) = (await of_node(r, 0, "/api/ps"))["models"]
        entry.pop("expires_at"), own.pop("expires_at")
        assert entry == own


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/api/tags", "application/json; charset=utf-8"),
        ("/api/ps", "application/json; charset=utf-8"),
        ("/api/version", "application/json; charset=utf-8"),
        ("/v1/models", "application/json"),
        (f"/v1/models/{MODEL}", "application/json"),
    ],
)
async def test_the_type_is_as_a_node_says_it(path: str, content_type: str) -> None:
    async with rig() as r, r.session.get(r.url + path) as answer:
        assert answer.headers["Content-Type"] == content_type


async def test_models_are_merged_newest_first_one_entry_per_name() -> None:
    old, new = model("phi", modified_at=day(2), digest="a" * 64), model(
        "PHI", modified_at=day(3), digest="b" * 64
    )  # fmt: skip
    first = spec(model(modified_at=day(1)), old, model("zeta", modified_at=day(1)))
    second = spec(model(modified_at=day(1)), new, model("alpha", modified_at=day(1)))
    expected = ["PHI:latest", "alpha:latest", MODEL, "zeta:latest"]
    for specs in ((first, second), (second, first)):
        async with rig(*specs) as r:
            entries = (await get(r, "/api/tags"))["models"]
            assert [entry["name"] for entry in entries] == expected
            assert entries[0]["digest"] == "b" * 64, "of two digests the newest is shown"
            listed = (await get(r, "/v1/models"))["data"]
            assert [entry["id"] for entry in listed] == expected


@pytest.mark.parametrize("longest", [0, 1])
async def test_resident_models_are_merged_one_entry_per_name(longest: int) -> None:
    async with rig(spec(model(), model("phi")), spec(model(), model("phi"))) as r:
        for index, name in ((0, MODEL), (1, MODEL), (1 - longest, "phi")):
            body: dict[str, object] = {
                "model": name,
                "messages": [],
                "keep_alive": -1 if index == longest else "1h",
            }
            async with r.session.post(f"{r.nodes[index].url}/api/chat", json=body):
                pass
        await r.look()
        entries = (await get(r, "/api/ps"))["models"]
        assert [entry["name"] for entry in entries] == [MODEL, "phi:latest"]
        assert entries[0]["expires_at"] > "2300", "the longest stay"


async def test_only_nodes_that_are_up_are_listed() -> None:
    async with rig(spec(version="0.30.1"), spec(model("phi"), version="0.9.0")) as r:
        assert (await get(r, "/api/version"))["version"] == "0.9.0"
        await r.nodes[1].stop()
        await r.look()
        names = [entry["name"] for entry in (await get(r, "/api/tags"))["models"]]
        assert names == [MODEL]
        assert (await get(r, "/api/version"))["version"] == "0.30.1"
        await r.nodes[0].stop()
        await r.look()
        assert await get(r, "/api/tags") == {"models": []}
        assert await get(r, "/v1/models") == {"object": "list", "data": []}
        assert await get(r, "/api/ps") == {"models": []}
        async with r.session.get(f"{r.url}/api/version") as answer:
            assert (answer.status, await answer.json()) == (503, {"error": "no node is up"})


async def test_models_that_may_not_be_used_are_not_listed() -> None:
    many = spec(model(), model("llama3:70b"), model("phi"))
    async with rig(many, entries=[{"models": ["llama3*", "!*:70b"]}]) as r:
        assert [entry["name"] for entry in (await get(r, "/api/tags"))["models"]] == [MODEL]


async def test_lists_are_made_anew_only_when_something_has_changed() -> None:
    async with rig(spec(), spec(model("phi"))) as r:
        built = r.app._gate.catalog._built
        await get(r, "/api/tags")
        before = built["/api/tags"]
        await get(r, "/api/tags")
        assert built["/api/tags"] is before
        await r.nodes[1].stop()
        await r.look()
        assert len((await get(r, "/api/tags"))["models"]) == 1


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("LLAMA3:8b", 200, None),
        ("llama3%3A8b", 200, None),
        ("llama3", 404, "model 'llama3:latest' not found"),
        ("bad%20name", 400, "invalid model name"),
    ],
)
async def test_a_model_by_its_name(name: str, status: int, told: str | None) -> None:
    async with rig() as r, r.session.get(f"{r.url}/v1/models/{name}") as answer:
        assert answer.status == status
        found = json.loads(await answer.read())
        if told is None:
            assert found["id"] == name.replace("%3A", ":"), "as it was asked"
            assert (found["object"], found["owned_by"]) == ("model", "library")
        else:
            assert found["error"]["message"] == told


ODD: Sequence[Mapping[str, Any]] = (
    {"name": "a", "modified_at": "+292277026596-12-04T15:30:07Z"},
    {"name": "b", "modified_at": "2026-01-02T03:04:05.123456789+02:00"},
    {"name": "c", "modified_at": "2026-01-03T03:04:05"},
    {"name": "d"},
    {"name": "e", "modified_at": None, "surprise": [1.50, "\u2028"]},
)


async def test_odd_entries_are_listed_as_they_are() -> None:
    async def script(peer: object) -> None:
        raise AssertionError

    probed: Mapping[bytes, Any] = {
        b"/api/version": {"version": "0.33.0"},
        b"/api/tags": {"models": ODD},
        b"/api/ps": {"models": [{"name": "a", "expires_at": "2318-05-06T07:08:09Z"}]},
    }
    async with scripted(script, probed) as url, rig(entries=[{"url": url}]) as r:
        entries = (await get(r, "/api/tags"))["models"]
        assert entries == [ODD[2], ODD[1], ODD[0], ODD[3], ODD[4]]
        listed = (await get(r, "/v1/models"))["data"]
        assert [entry["created"] for entry in listed][2:] == [0, 0, 0]
        assert (await get(r, "/api/ps"))["models"][0]["expires_at"].startswith("2318")


def test_versions_are_ordered_by_their_numbers() -> None:
    ordered = ["0.0.0", "0.9.0", "0.30.1-rc1", "0.30.1", "0.33.0-rc2", "0.33.0", "1.0"]
    shuffled = ordered[::2] + ordered[1::2]
    assert sorted(shuffled, key=version_key) == ordered
    assert version_key("rubbish") == ((0,), True)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        (f"{MODEL}@n1", 200),
        ("ollama/llama3:8b", 404),  # two segments: as a single Ollama
        ("chat", 200),
        (f"{MODEL}@n2", 404),
        (f"{MODEL}@nobody", 400),
        ("m@", 400),
    ],
)
async def test_one_model_is_found_by_any_name_that_a_request_may_use(
    name: str, status: int
) -> None:
    async with rig(spec(), spec(model("other")), aliases={"chat": MODEL}) as r:
        async with r.session.get(f"{r.url}/v1/models/{name}") as answer:
            assert answer.status == status
            found = json.loads(await answer.read()) if status != 404 or "@" in name else {}
        assert found.get("id") == (name if status == 200 else None)


async def test_a_model_of_a_node_that_is_down_cannot_be_had() -> None:
    async with rig(spec()) as r:
        await r.nodes[0].refuse()
        await r.look()
        async with r.session.get(f"{r.url}/v1/models/{MODEL}") as answer:
            assert answer.status == 503
