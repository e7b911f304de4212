"""Requests that wait for their turn: slots that hold, and whose turn it is."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from router.sim import Fault, FaultKind, SimSpec
from tests.rig import MODEL, Answer, Rig, model, parsed, rig, spec, talk
from tests.test_metrics import scrape, total

K = FaultKind
OTHER = "phi:latest"
WAITS: dict[str, Any] = {"policy": "expected-delay"}


def node(*models: str, slots: int = 1, **fields: Any) -> SimSpec:
    """A node that has these models in its memory."""
    made = [model(name) for name in models or (MODEL,)]
    return spec(*made, num_parallel=slots, warm=tuple(one.name for one in made), **fields)


async def ask(r: Rig, name: str = MODEL, *headers: str, **fields: Any) -> Answer:
    messages = [{"role": "user", "content": "hello"}]
    body = json.dumps({"model": name, "messages": messages, **fields}).encode()
    async with talk(r.url) as client:
        await client.post("/api/chat", body, *headers)
        return await client.answer()


def waiting(r: Rig) -> int:
    return r.app.pool.waiting


def error(answer: Answer) -> str:
    return str(json.loads(answer.body)["error"])


@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_no_node_gets_more_at_once_than_it_has_slots(slots: int) -> None:
    async with rig(node(slots=slots), node(slots=slots), routing=WAITS) as r:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(r)) for _ in range(60)]
        assert {task.result().status for task in tasks} == {200}
        assert {task.result().header("X-Ollamux-Reason") for task in tasks} == {"warm"}
        assert [one.peak_in_flight for one in r.nodes] == [slots, slots]
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


async def test_slots_that_nobody_has_configured_are_one_at_first() -> None:
    async with rig(node(slots=4), entries=[{"slots": "auto"}], routing=WAITS) as r:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(r)) for _ in range(6)]
        assert {task.result().status for task in tasks} == {200}
        assert r.nodes[0].peak_in_flight <= 2, "one, and one that tries"


async def test_a_request_for_a_busy_model_blocks_none_for_an_idle_one() -> None:
    async with rig(node(MODEL, OTHER), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, model=MODEL, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        second = group.create_task(ask(r))
        await r.until(lambda: waiting(r) == 1)
        assert (await ask(r, OTHER)).status == 200
        assert waiting(r) == 1
        r.nodes[0].release()
        assert (await first).status == (await second).status == 200


async def test_what_needs_no_slot_waits_for_none() -> None:
    async with rig(node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, path="/api/chat", times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        async with r.session.post(f"{r.url}/api/show", json={"model": MODEL}) as shown:
            assert shown.status == 200
            assert "template" in await shown.json()
        r.nodes[0].release()
        assert (await first).status == 200


async def test_a_client_that_leaves_while_it_waits_is_forgotten_at_once() -> None:
    async with rig(node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        async with talk(r.url) as client:
            await client.post("/api/chat", json.dumps({"model": MODEL, "messages": []}).encode())
            await r.until(lambda: waiting(r) == 1)
            client.leave()
            await r.until(lambda: waiting(r) == 0)
        r.nodes[0].release()
        assert (await first).status == 200
        assert r.app.pool.in_flight == 0


@pytest.mark.parametrize(
    ("text", "status"), [("20", 503), ("0", 503), ("soon", 400), ("-1", 400), ("1e3", 400)]
)
async def test_a_deadline_of_its_own_is_kept(text: str, status: int) -> None:
    async with rig(node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        answer = await ask(r, MODEL, f"X-Ollamux-Deadline-Ms: {text}")
        assert answer.status == status
        if status == 503:
            assert error(answer) == f"no node had room for model '{MODEL}' in time"
            assert int(answer.header("Retry-After") or 0) >= 1
            assert answer.header("X-Ollamux-Reason") == "late"
        else:
            assert error(answer).startswith("X-Ollamux-Deadline-Ms: ")
        r.nodes[0].release()
        assert (await first).status == 200
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


async def test_nobody_waits_longer_than_configured() -> None:
    timeouts = {"busy_s": 0.05}
    async with rig(node(), routing=WAITS, timeouts=timeouts) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        assert (await ask(r)).status == 503
        r.nodes[0].release()
        assert (await first).status == 200


async def order(r: Rig, *asked: Mapping[str, str]) -> list[int]:
    """In which order requests with these headers are answered, that come one after the other
    while the only slot is taken."""
    ended: list[int] = []

    async def one(place: int, headers: Mapping[str, str]) -> None:
        answer = await ask(r, MODEL, *(f"{name}: {value}" for name, value in headers.items()))
        assert answer.status == 200
        ended.append(place)

    async with asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        for place, headers in enumerate(asked):
            group.create_task(one(place, headers))
            await r.until(lambda place=place: waiting(r) == place + 1)  # type: ignore[misc]
        r.nodes[0].release()
        await first
    return ended


TEAMS = {**WAITS, "flow_header": "X-Team"}
A, B, C = {"X-Team": "a"}, {"X-Team": "b"}, {"X-Team": "c"}
BATCH, SOON = {"X-Ollamux-Priority": "batch"}, {"X-Ollamux-Priority": "Interactive"}


async def test_behind_a_flood_of_one_team_another_is_next() -> None:
    """A test of order: whoever has had less goes first."""
    async with rig(node(), routing=TEAMS, trusted=["127.0.0.0/8"]) as r:
        found = await order(r, *[A] * 8, B, B)
        assert found.index(8) <= 1
        assert found.index(9) <= 3
        assert [place for place in found if place < 8] == list(range(8))


async def test_a_header_of_one_that_is_not_trusted_names_no_team() -> None:
    async with rig(node(), routing=TEAMS) as r:
        assert await order(r, A, A, A, B) == [0, 1, 2, 3]


async def test_who_is_urgent_goes_first() -> None:
    async with rig(node(), routing=WAITS, trusted=["127.0.0.1"]) as r:
        assert await order(r, BATCH, {}, SOON) == [2, 1, 0]


async def test_a_flow_has_the_priority_that_its_configuration_says() -> None:
    teams = {**TEAMS, "flows": {"b": {"priority": "interactive"}, "c": {"priority": "batch"}}}
    async with rig(node(), routing=teams, trusted=["127.0.0.1"]) as r:
        assert await order(r, C, A, B) == [2, 1, 0]


async def test_a_request_says_its_priority_better_than_its_flow_does() -> None:
    teams = {**TEAMS, "flows": {"b": {"priority": "interactive"}, "c": {"priority": "batch"}}}
    async with rig(node(), routing=teams, trusted=["127.0.0.1"]) as r:
        assert await order(r, {**B, **BATCH}, A, {**C, **SOON}) == [2, 1, 0]


async def test_a_client_that_is_not_trusted_has_the_priority_of_its_address() -> None:
    flows = {"127.0.0.1": {"priority": "batch"}}
    async with rig(node(), routing={**WAITS, "flows": flows}) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        second = group.create_task(ask(r, MODEL, "X-Ollamux-Priority: interactive"))
        await r.until(lambda: waiting(r) == 1)
        assert r.app.pool.queued() == {"interactive": 0, "normal": 0, "batch": 1}
        r.nodes[0].release()
        assert (await first).status == (await second).status == 200


async def test_a_flow_with_more_weight_has_more_turns() -> None:
    teams = {**TEAMS, "flows": {"b": {"weight": 4}}}
    async with rig(node(), routing=teams, trusted=["127.0.0.1"]) as r:
        found = await order(r, A, A, A, B, B, B)
        assert found.index(5) < found.index(2)


async def test_a_reload_changes_what_a_flow_is_given() -> None:
    async with rig(node(), routing=TEAMS, trusted=["127.0.0.1"]) as r:
        flows = {"b": {"priority": "interactive"}}
        r.app.reconfigure(parsed({**r.settings, "routing": {**TEAMS, "flows": flows}}))
        assert await order(r, A, A, B) == [2, 0, 1]


@pytest.mark.parametrize(
    ("limits", "statuses", "said"),
    [
        ({"max_queued": 2}, [503, 503], "queue-full"),
        ({"max_queued_per_flow": 2}, [429, 0], "flow-full"),
        ({"max_queued_bytes_per_flow": 300_000}, [429, 0], "flow-full"),
    ],
)
async def test_more_than_may_wait_are_told_to_come_back(
    limits: Mapping[str, int], statuses: list[int], said: str
) -> None:
    """The bodies that wait count in what all requests hold, too."""
    prompt = "x" * 100_000
    body = [{"role": "user", "content": prompt}]
    async with (
        rig(node(), routing=TEAMS, limits=limits, trusted=["127.0.0.1"]) as r,
        asyncio.TaskGroup() as group,
    ):
        r.nodes[0].fault = Fault(K.HANG, times=1)
        tasks = [group.create_task(ask(r))]
        await r.until(lambda: r.nodes[0].held == 1)
        for number in (1, 2):
            tasks.append(group.create_task(ask(r, MODEL, "X-Team: a", messages=body)))
            await r.until(lambda number=number: waiting(r) == number)  # type: ignore[misc]
        assert r.app._means.keep.bytes > 2 * len(prompt)
        for team, status in zip("ab", statuses, strict=True):
            if not status:
                tasks.append(group.create_task(ask(r, MODEL, f"X-Team: {team}", messages=body)))
                await r.until(lambda: waiting(r) == 3)
                continue
            answer = await ask(r, MODEL, f"X-Team: {team}", messages=body)
            assert (answer.status, answer.header("X-Ollamux-Reason")) == (status, said)
            assert int(answer.header("Retry-After") or 0) >= 1
        r.nodes[0].release()
        assert {(await task).status for task in tasks} == {200}
        assert r.app._means.keep.bytes == 0


async def test_a_priority_that_is_none_is_told() -> None:
    async with rig(node(), routing=WAITS, trusted=["127.0.0.1"]) as r:
        answer = await ask(r, MODEL, "X-Ollamux-Priority: urgent")
        assert answer.status == 400
        expected = "X-Ollamux-Priority: one of interactive, normal, batch is expected"
        assert error(answer) == expected


async def test_those_that_wait_go_where_a_node_comes_back() -> None:
    async with rig(node(), node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        await r.nodes[1].refuse()
        await r.look()
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        second = group.create_task(ask(r))
        await r.until(lambda: waiting(r) == 1)
        await r.nodes[1].accept()
        await r.look()
        await r.look()
        assert (await second).header("X-Ollamux-Node") == "n2"
        r.nodes[0].release()
        assert (await first).status == 200


@pytest.mark.parametrize("how", ["drained", "removed", "down"])
async def test_those_that_wait_for_a_node_that_goes_are_told_or_go_elsewhere(how: str) -> None:
    async with rig(node(), node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        for one in r.nodes:
            one.fault = Fault(K.HANG, times=1)
        running = [group.create_task(ask(r)) for _ in range(2)]
        await r.until(lambda: [one.held for one in r.nodes] == [1, 1])
        tasks = [group.create_task(ask(r)) for _ in range(4)]
        await r.until(lambda: waiting(r) == 4)
        if how == "drained":
            r.app.pool.registry.drain("n1", draining=True)
        elif how == "removed":
            r.app.reconfigure(parsed({**r.settings, "nodes": r.settings["nodes"][1:]}))
        else:
            url = r.nodes[0].url
            await r.nodes[0].refuse()
            for _ in range(3):
                await r.look()
            assert r.app.pool.registry.suspect(url)
        r.nodes[1].release()
        answers = [await task for task in tasks]
        assert {(one.status, one.header("X-Ollamux-Node")) for one in answers} == {(200, "n2")}
        r.nodes[0].release()
        await asyncio.wait(running)
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


@pytest.mark.parametrize(("how", "status"), [("drained", 503), ("removed", 404), ("deleted", 404)])
async def test_who_waits_for_a_model_that_is_gone_is_told_like_one_who_comes(
    how: str, status: int
) -> None:
    async with (
        rig(node(), spec(model(OTHER)), routing=WAITS) as r,
        asyncio.TaskGroup() as group,
    ):
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        tasks = [group.create_task(ask(r)) for _ in range(3)]
        await r.until(lambda: waiting(r) == 3)
        if how == "drained":
            async with r.session.post(f"{r.admin}/drain", params={"node": "n1"}) as done:
                assert done.status == 200
        elif how == "removed":
            r.app.reconfigure(parsed({**r.settings, "nodes": r.settings["nodes"][1:]}))
        else:
            async with r.session.delete(f"{r.url}/api/delete", json={"model": MODEL}) as done:
                assert done.status == 200
        told = [await task for task in tasks]
        new = await ask(r)
        assert {(one.status, error(one)) for one in (*told, new)} == {(status, error(new))}
        r.nodes[0].release()
        await asyncio.wait([first])
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


async def test_a_node_that_dies_hands_its_request_to_the_others_queue() -> None:
    async with rig(node(), node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.DIE, times=1)
        r.nodes[1].fault = Fault(K.HANG, times=1)
        tasks = [group.create_task(ask(r)) for _ in range(2)]
        await r.until(lambda: r.nodes[1].held == 1)
        r.nodes[1].release()
        assert {(await task).status for task in tasks} == {200}
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


async def test_a_model_is_loaded_once_on_a_node_and_the_others_wait_for_it() -> None:
    cold = spec(model(load_s=0.2), num_parallel=2)
    async with rig(cold, routing=WAITS) as r:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(r)) for _ in range(6)]
        reasons = [task.result().header("X-Ollamux-Reason") for task in tasks]
        assert reasons.count("load") == 1
        assert {task.result().status for task in tasks} == {200}


async def test_a_reload_to_the_other_policy_loses_nobody_who_waits() -> None:
    async with rig(node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        tasks = [group.create_task(ask(r)) for _ in range(3)]
        await r.until(lambda: waiting(r) == 3)
        settings = {**r.settings, "routing": {"policy": "least-in-flight"}}
        r.app.reconfigure(parsed(settings))
        r.nodes[0].release()
        assert {(await task).status for task in (first, *tasks)} == {200}
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


async def test_decisions_are_counted_by_their_reason() -> None:
    async with rig(node(MODEL), spec(model(OTHER)), routing=WAITS) as r:
        await ask(r)
        await ask(r, OTHER)
        samples = await scrape(r)
        for reason in ("warm", "load"):
            assert total(samples, "ollamux_decisions_total", reason=reason) == 1


async def test_waits_are_measured_and_shown_while_they_last() -> None:
    async with rig(node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        second = group.create_task(ask(r))
        await r.until(lambda: waiting(r) == 1)
        assert total(await scrape(r), "ollamux_queue_depth", priority="normal") == 1
        r.nodes[0].release()
        assert (await first).status == (await second).status == 200
        samples = await scrape(r)
        assert total(samples, "ollamux_queue_depth", priority="normal") == 0
        for name in ("queue_wait", "queue_expected_wait"):
            assert total(samples, f"ollamux_{name}_seconds_count", priority="normal") == 1


async def test_the_operator_sees_which_slots_were_learned() -> None:
    async with rig(node(slots=2), entries=[{"slots": "auto"}], routing=WAITS) as r:
        await ask(r)
        async with r.session.get(f"{r.admin}/status") as shown:
            [told] = (await shown.json())["nodes"]
        assert (told["slots"], told["slots_learned"]) == ("auto", {MODEL: 1})
        assert total(await scrape(r), "ollamux_node_model_slots", node="n1", model=MODEL) == 1


# Several pools.


def pools(r: Rig, *said: Mapping[str, Any]) -> None:
    """Give each node a pool of its own, of which this is said."""
    nodes, others = r.settings["nodes"], {k: v for k, v in r.settings.items() if k != "nodes"}
    pairs = zip(nodes, said, strict=True)
    found = [{"name": one["name"], "nodes": [one], **more} for one, more in pairs]
    r.app.reconfigure(parsed({**others, "pools": found}))


def where(answer: Answer) -> tuple[int, str | None, str | None]:
    return answer.status, answer.header("X-Ollamux-Node"), answer.header("X-Ollamux-Reason")


async def test_who_has_waited_long_enough_is_answered_by_the_next_pool() -> None:
    async with rig(node(), node(), routing=WAITS) as r, asyncio.TaskGroup() as group:
        pools(r, {"spill_after_s": 0.01}, {})
        r.nodes[0].fault = Fault(K.HANG, times=1)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        assert where(await ask(r)) == (200, "n2", "later-pool")
        r.nodes[0].release()
        assert where(await first) == (200, "n1", "warm")
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)


async def test_pools_have_policies_of_their_own() -> None:
    async with rig(node(), node()) as r, asyncio.TaskGroup() as group:
        later = {"policy": "least-in-flight"}
        pools(r, {"policy": "expected-delay", "spill_after_s": 0.01}, later)
        await r.look()
        for each in r.nodes:
            each.fault = Fault(K.HANG, times=3)
        first = group.create_task(ask(r))
        await r.until(lambda: r.nodes[0].held == 1)
        others = [group.create_task(ask(r)) for _ in range(3)]
        await r.until(lambda: r.nodes[1].held == 3)
        for each in r.nodes:
            each.release()
        assert where(await first) == (200, "n1", "warm")
        assert {where(await one) for one in others} == {(200, "n2", "later-pool")}
        assert [one.peak_in_flight for one in r.nodes] == [1, 3], "slots or not"
        assert (waiting(r), r.app.pool.in_flight) == (0, 0)
