"""What /metrics shows: names, labels, and that clients cannot make them grow."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router import __version__
from router.core.lease import Queued
from router.core.memory import Loads
from router.core.policy import Attempt, Target
from router.core.pool import Learned
from router.core.rates import Speed
from router.core.usage import Source, Usage
from router.log import Continued, Ending, Report
from router.metrics import Metrics
from router.sim import Fault, FaultKind
from tests.rig import MODEL, Rig, model, parsed, rig, spec, talk

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
WHERE = {"endpoint", "model", "node"}


def read(text: str) -> Samples:
    """(sample name, labels) → value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(r: Rig) -> Samples:
    return read(await r.metrics())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all samples with at least these labels."""
    wanted = labels.items()
    return sum(found for (n, own), found in samples.items() if n == name and wanted <= own)


async def chat(r: Rig, **fields: Any) -> int:
    async with r.chat(**fields) as answer:
        await answer.read()
        status: int = answer.status
    return status


FAMILIES: Mapping[str, tuple[str, set[str]]] = {
    "ollamux_requests": ("counter", WHERE | {"outcome"}),
    "ollamux_request_duration_seconds": ("histogram", WHERE),
    "ollamux_time_to_first_token_seconds": ("histogram", WHERE),
    "ollamux_time_per_output_token_seconds": ("histogram", WHERE),
    "ollamux_model_load_seconds": ("histogram", {"model", "node"}),
    "ollamux_router_overhead_seconds": ("histogram", set()),
    "ollamux_prompt_tokens": ("counter", WHERE | {"source"}),
    "ollamux_completion_tokens": ("counter", WHERE | {"source"}),
    "ollamux_retries": ("counter", {"endpoint"}),
    "ollamux_decisions": ("counter", {"reason"}),
    "ollamux_continuations": ("counter", {"result"}),
    "ollamux_refused": ("counter", {"cause"}),
    "ollamux_node_up": ("gauge", {"node"}),
    "ollamux_node_draining": ("gauge", {"node"}),
    "ollamux_node_ejected": ("gauge", {"node"}),
    "ollamux_node_model_ejected": ("gauge", {"node", "model"}),
    "ollamux_breaker_flips": ("counter", {"node", "scope", "to"}),
    "ollamux_queue_depth": ("gauge", {"priority"}),
    "ollamux_warm_replicas": ("gauge", {"model", "state"}),
    "ollamux_queue_wait_seconds": ("histogram", {"priority"}),
    "ollamux_queue_expected_wait_seconds": ("histogram", {"priority"}),
    "ollamux_node_model_prefill_tokens_per_second": ("gauge", set()),  # nothing of these either
    "ollamux_node_model_decode_tokens_per_second": ("gauge", set()),
    "ollamux_node_model_load_seconds": ("gauge", set()),
    "ollamux_cold_loads": ("counter", {"cause", "node"}),
    "ollamux_reloads": ("counter", {"cause", "node"}),
    "ollamux_evictions": ("counter", {"node"}),
    "ollamux_first_byte_seconds": ("histogram", {"reason"}),
    "ollamux_first_byte_expected_seconds": ("histogram", {"reason"}),
    "ollamux_node_in_flight": ("gauge", {"node"}),
    "ollamux_node_model_slots": ("gauge", set()),  # nothing was learned
    "ollamux_node_slots": ("gauge", {"node"}),
    "ollamux_node_models_present": ("gauge", {"node"}),
    "ollamux_node_model_resident": ("gauge", {"node", "model"}),
    "ollamux_model_digest_conflict": ("gauge", {"model"}),
    "ollamux_node_probe_duration_seconds": ("histogram", {"node", "probe"}),
    "ollamux_node_probe_failures": ("counter", {"node", "probe"}),
    "ollamux_config_generation": ("gauge", set()),
    "ollamux_config_reloads": ("counter", {"result"}),
    "ollamux_config_last_reload_successful": ("gauge", set()),
    "ollamux_config_last_success_timestamp_seconds": ("gauge", set()),
    "ollamux_build_info": ("gauge", {"version", "python"}),
}


async def test_every_family_has_its_name_its_type_and_its_labels() -> None:
    odd = (model("odd", digest=letter * 64) for letter in "ab")
    first = spec(model(load_s=0.15), next(odd))
    async with rig(
        first, spec(next(odd)), breaker={"answers": 1}, routing={"warm": {"phi": 1}}
    ) as r:
        r.app.metrics.reloads.labels("ok").inc()
        await r.nodes[0].refuse()
        await chat(r)
        await r.nodes[0].accept()
        await r.look()
        await r.look()
        await chat(r)
        r.app.metrics.requests.count(report(attempts=2), ended=20.0)
        r.app.metrics.wait(Queued(Attempt(Target()), 1.0), 2.0)
        for node in r.nodes:
            node.fault = Fault(FaultKind.STATUS, model="odd", times=1)
        await chat(r, model="odd")
        await r.look()
        families = {
            family.name: (
                family.type,
                {name for s in family.samples for name in s.labels} - {"le"},
            )
            for family in text_string_to_metric_families(await r.metrics())
            if not family.name.endswith("_created")
        }
        assert families == FAMILIES


async def test_what_is_refused_is_counted_by_its_cause() -> None:
    async with rig(limits={"max_in_flight": 1}) as r:
        r.nodes[0].fault = Fault(FaultKind.HANG, times=1)
        async with asyncio.TaskGroup() as group:
            group.create_task(chat(r))
            await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
            async with r.chat() as answer:
                assert answer.status == 503
            r.nodes[0].release()
        samples = await scrape(r)
        for cause, count in (("connections", 0), ("in_flight", 1), ("buffered", 0)):
            assert value(samples, "ollamux_refused_total", cause=cause) == count


async def test_a_pool_that_agrees_on_nothing_has_a_bounded_number_of_series() -> None:
    first, second = (
        spec(*(model(f"m{number}", digest=letter * 64) for number in range(101))) for letter in "ab"
    )
    async with rig(first, second) as r:
        assert total(await scrape(r), "ollamux_model_digest_conflict") == 100


async def test_histograms_reach_from_a_millisecond_to_ten_minutes() -> None:
    async with rig() as r:
        await chat(r)
        samples = await scrape(r)
        bounds = {
            float(dict(labels)["le"])
            for name, labels in samples
            if name == "ollamux_request_duration_seconds_bucket"
        }
        assert {0.001, 600.0, float("inf")} <= bounds
        assert min(bounds) == 0.001


async def test_a_request_is_counted_where_it_went() -> None:
    async with rig() as r:
        assert await chat(r) == 200
        await r.until(lambda: len(r.requests) == 1)
        samples = await scrape(r)
        where = {"endpoint": "/api/chat", "model": MODEL, "node": "n1"}
        assert value(samples, "ollamux_requests_total", **where, outcome="ok") == 1
        assert total(samples, "ollamux_requests_total") == 1
        for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
            assert value(samples, f"ollamux_{name}_seconds_count", **where) == 1
        assert value(samples, "ollamux_router_overhead_seconds_count") == 1
        assert value(samples, "ollamux_prompt_tokens_total", **where, source="node") == 7
        tokens = r.requests[0]["completion_tokens"]
        name = "ollamux_completion_tokens_total"
        assert value(samples, name, **where, source="node") == tokens
        assert value(samples, name, **where, source="chunks") == 0
        assert value(samples, "ollamux_decisions_total", reason="load") == 1
        assert total(samples, "ollamux_model_load_seconds_count") == 0, "it took no time"


async def test_nodes_are_shown_as_they_are() -> None:
    slow = model(decode_tps=1e-6)
    entries = [{"slots": 3}, {"slots": 5}]
    async with rig(spec(slow, model("phi")), spec(slow), entries=entries) as r:
        await r.nodes[1].refuse()
        await r.look()
        async with talk(r.url) as client:
            await client.post("/api/chat", json.dumps({
                "model": MODEL, "messages": [{"role": "user", "content": "x"}]
            }).encode())  # fmt: skip
            await client.head()
            await r.app.prober.look(r.app.pool.registry.specs()[0], ("ps",))
            samples = await scrape(r)
        expected = {
            "up": (1, 0), "in_flight": (1, 0), "slots": (3, 5), "models_present": (2, 1),
        }  # fmt: skip
        for name, values in expected.items():
            found = tuple(value(samples, f"ollamux_node_{name}", node=n) for n in ("n1", "n2"))
            assert found == values, name
        assert value(samples, "ollamux_node_model_resident", node="n1", model=MODEL) == 1
        assert value(samples, "ollamux_node_probe_failures_total", node="n2", probe="tags") == 1
        assert total(samples, "ollamux_node_probe_duration_seconds_count", node="n1") == 7
        await r.until(lambda: r.app.pool.in_flight == 0)
        assert value(await scrape(r), "ollamux_node_in_flight", node="n1") == 0


LONG = {"resets": 1, "answers": 1, "back_off_s": 3600, "back_off_max_s": 3600}


async def test_who_is_drained_and_ejected_is_a_gauge() -> None:
    async with rig(spec(), spec(), breaker=LONG) as r:

        async def shown() -> tuple[Any, ...]:
            samples = await scrape(r)
            names = ("ollamux_node_draining", "ollamux_node_ejected", "ollamux_node_model_ejected")
            return tuple(
                {dict(labels)["node"] for (n, labels), one in samples.items() if n == name and one}
                for name in names
            )

        assert await shown() == (set(), set(), set())
        r.app.pool.registry.drain("n2", draining=True)
        assert await shown() == ({"n2"}, set(), set())
        r.nodes[0].fault = Fault(FaultKind.STATUS, status=500)
        await chat(r)
        assert await shown() == ({"n2"}, set(), {"n1"})
        r.nodes[0].fault = Fault(FaultKind.DIE)
        await chat(r, model=f"{MODEL}@n1")
        assert await shown() == ({"n2"}, {"n1"}, {"n1"})
        samples = await scrape(r)
        assert value(samples, "ollamux_node_model_ejected", node="n1", model=MODEL) == 1
        for scope in ("node", "model"):
            flips = {"node": "n1", "scope": scope, "to": "open"}
            assert value(samples, "ollamux_breaker_flips_total", **flips) == 1
        r.nodes[0].fault = None
        r.app.pool.registry.drain("n2", draining=False)
        await chat(r, model=f"{MODEL}@n1")
        assert await shown() == (set(), set(), set())
        flips = {"node": "n1", "scope": "node", "to": "closed"}
        assert value(await scrape(r), "ollamux_breaker_flips_total", **flips) == 1


async def test_ejected_models_that_no_node_has_are_one_series() -> None:
    async with rig(breaker=LONG) as r:
        r.nodes[0].fault = Fault(FaultKind.STATUS, status=500)
        for number in range(5):
            assert await chat(r, model=f"made-up-{number}:cloud") == 500
        samples = await scrape(r)
        assert len(r.app.pool.registry.snapshot()[0].ejected) == 5
        assert value(samples, "ollamux_node_model_ejected", node="n1", model="unknown") == 1
        assert total(samples, "ollamux_node_model_ejected") == 1


async def test_a_node_that_is_removed_leaves_no_gauge_behind() -> None:
    async with rig(spec(), spec()) as r:
        r.app.reconfigure(parsed({**r.settings, "nodes": r.settings["nodes"][:1]}))
        gauges = {labels for name, labels in await scrape(r) if name == "ollamux_node_up"}
        assert gauges == {frozenset({("node", "n1")})}


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_client_cannot_make_labels_grow(path: str) -> None:
    async with rig() as r:
        names = [f"made-up-{n}" for n in range(20)]
        names += [f"{MODEL}@node-{n}" for n in range(20)]
        names += [f"{name}:cloud" for name in names[:20]] + ["a b", "x/y/z/w"]
        for name in names:
            async with r.session.post(f"{r.url}{path}", json={"model": name}) as answer:
                await answer.read()
        for n in range(20):
            async with r.session.get(f"{r.url}/made-up/{n}?{n}") as answer:
                await answer.read()
            async with r.session.get(f"{r.url}/v1/models/made-up-{n}") as answer:
                await answer.read()
        text = await r.metrics()
        assert "made-up" not in text
        assert "node-1" not in text
        requests = {
            (dict(labels)["endpoint"], dict(labels)["model"])
            for name, labels in read(text)
            if name == "ollamux_requests_total"
        }
        assert requests == {
            (path, "unknown"), (path, MODEL), (path, ""), ("other", ""), ("/v1/models/:model", ""),
        }  # fmt: skip


async def test_a_model_that_is_known_but_down_is_a_label() -> None:
    async with rig() as r:
        await r.nodes[0].refuse()
        await r.look()
        assert await chat(r) == 503
        samples = await scrape(r)
        where = {"endpoint": "/api/chat", "model": MODEL, "node": "", "outcome": "rejected"}
        assert value(samples, "ollamux_requests_total", **where) == 1
        assert value(samples, "ollamux_decisions_total", reason="nodes-down") == 1


TOKENS = {
    "/api/chat": (True, True), "/api/generate": (True, True), "/api/embed": (True, False),
    "/api/embeddings": (False, False), "/v1/chat/completions": (True, True),
    "/v1/completions": (True, True), "/v1/embeddings": (True, False),
    "/v1/messages": (True, True), "/v1/responses": (True, True),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", TOKENS)
async def test_tokens_are_counted_at_every_endpoint_that_tells_them(
    path: str, *, stream: bool
) -> None:
    async with rig() as r:
        body = {
            "model": MODEL, "stream": stream, "max_tokens": 64, "prompt": "hello",
            "input": "hello", "messages": [{"role": "user", "content": "hello"}],
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        async with r.session.post(r.url + path, json=body) as answer:
            assert answer.status == 200
            await answer.read()
        await r.until(lambda: len(r.requests) == 1)
        samples = await scrape(r)
        counted = tuple(
            total(samples, f"ollamux_{name}_tokens_total", endpoint=path) > 0
            for name in ("prompt", "completion")
        )
        assert counted == TOKENS[path]
        (line,) = r.requests
        assert total(samples, "ollamux_prompt_tokens_total") == (line["prompt_tokens"] or 0)
        assert total(samples, "ollamux_completion_tokens_total") == (line["completion_tokens"] or 0)


@pytest.mark.parametrize(
    ("fault", "outcome", "first"),
    [
        (None, "ok", 1),
        (Fault(FaultKind.STATUS, status=429), "client_error", 0),
        (Fault(FaultKind.STATUS, status=500), "node_error", 0),
        (Fault(FaultKind.DIE), "failed", 0),
        (Fault(FaultKind.DIE, after=2), "broken", 0),
    ],
)
async def test_how_a_request_ended_is_a_label(
    fault: Fault | None, outcome: str, first: int
) -> None:
    async with rig() as r:
        r.nodes[0].fault = fault
        await chat(r)
        await r.until(lambda: len(r.requests) == 1)
        samples = await scrape(r)
        assert total(samples, "ollamux_requests_total", outcome=outcome) == 1
        assert total(samples, "ollamux_requests_total") == 1
        assert total(samples, "ollamux_time_to_first_token_seconds_count") == first


async def test_a_client_that_left_is_counted_as_such() -> None:
    async with rig() as r:
        r.nodes[0].fault = Fault(FaultKind.HANG)
        task = asyncio.create_task(chat(r))
        await r.nodes[0].until(lambda: r.nodes[0].in_flight == 1)
        task.cancel()
        await r.until(lambda: len(r.requests) == 1)
        samples = await scrape(r)
        assert total(samples, "ollamux_requests_total", outcome="cancelled", node="n1") == 1


# Without a router


CHUNKS = Usage(completion_tokens=5, source=Source.CHUNKS)


def counted(*reports: Report, ended: float) -> Samples:
    metrics = Metrics(list, dict, {}, list)
    for report in reports:
        metrics.requests.count(report, ended)
    return read(metrics.render().decode())


def test_what_loading_has_come_to_is_told_by_node_and_cause() -> None:
    speeds = {MODEL: Speed(2000.0, None, 2.5)}
    learned = [Learned("n1", speeds, Loads(1, 2, 3, 4)), Learned("n2", {}, None)]
    samples = read(Metrics(list, dict, {}, lambda: learned).render().decode())
    told = {
        ("ollamux_cold_loads_total", "absent"): 1,
        ("ollamux_cold_loads_total", "reload"): 2,
        ("ollamux_reloads_total", "num_ctx"): 2,
        ("ollamux_reloads_total", "external"): 3,
    }
    for (name, cause), count in told.items():
        assert value(samples, name, node="n1", cause=cause) == count
    assert value(samples, "ollamux_evictions_total", node="n1") == 4
    place = {"node": "n1", "model": MODEL}
    assert value(samples, "ollamux_node_model_prefill_tokens_per_second", **place) == 2000
    assert value(samples, "ollamux_node_model_load_seconds", **place) == 2.5
    assert not any(name.startswith("ollamux_node_model_decode") for name, _ in samples)
    assert not any(("node", "n2") in labels for _, labels in samples)


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({}, True),
        ({"streamed": False}, False),
        ({"first_at": None}, False),
        ({"ending": Ending.BROKEN}, False),
        ({"continuations": (Continued.CONTINUED,)}, False),
        ({"expected_s": None}, False),
    ],
)
def test_the_first_byte_of_a_whole_stream_is_told_beside_what_was_expected(
    fields: Mapping[str, Any], *, counts: bool
) -> None:
    usual = {"streamed": True, "sent_at": 11.0, "first_at": 12.5, "expected_s": 2.0}
    samples = counted(report(reason="warm", **{**usual, **fields}), ended=20.0)
    for name, seconds in (("first_byte", 1.5), ("first_byte_expected", 2.0)):
        assert total(samples, f"ollamux_{name}_seconds_sum", reason="warm") == seconds * counts


def report(**fields: Any) -> Report:
    usual = {"endpoint": "/api/chat", "model": MODEL, "known": True, "node": "n1"}
    settings = {"id": "1", "client": "", "method": "POST", "started": 10.0}
    return Report(**{**settings, **usual, "ending": Ending.OK, **fields})


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"streamed": True, "first_at": 12.0, "usage": Usage(1, 5)}, 2.0),
        ({"streamed": True, "first_at": 12.0, "usage": Usage(1, 1)}, None),
        ({"streamed": True, "first_at": 12.0, "usage": CHUNKS}, 2.0),
        ({"streamed": True, "first_at": 12.0, "usage": CHUNKS, "ending": Ending.BROKEN}, None),
        ({"first_at": 20.0, "usage": Usage(1, 5, None, 15.0)}, 3.0),
        ({"first_at": 20.0, "usage": Usage(1, 5)}, None),
        ({"first_at": 20.0, "usage": Usage(1, None, None, 15.0)}, None),
        ({}, None),
    ],
)
def test_the_time_per_token_is_measured_or_told_by_the_node(
    fields: Mapping[str, Any], seconds: float | None
) -> None:
    samples = counted(report(**fields), ended=20.0)
    name = "ollamux_time_per_output_token_seconds"
    assert total(samples, f"{name}_sum") == (seconds or 0.0)
    assert total(samples, f"{name}_count") == (seconds is not None)


def test_what_nodes_and_what_the_router_counted_stay_apart() -> None:
    broken = report(usage=CHUNKS, ending=Ending.BROKEN)
    samples = counted(report(usage=Usage(3, 4)), report(usage=CHUNKS), broken, ended=20.0)
    where = {"endpoint": "/api/chat", "model": MODEL, "node": "n1"}
    for name, source, tokens in (
        ("prompt", "node", 3), ("completion", "node", 4), ("completion", "chunks", 10),
    ):  # fmt: skip
        assert value(samples, f"ollamux_{name}_tokens_total", **where, source=source) == tokens
    assert total(samples, "ollamux_prompt_tokens_total", source="chunks") == 0


@pytest.mark.parametrize(("load_s", "cold"), [(None, 0), (0.005, 0), (0.1, 1), (7.5, 1)])
def test_only_cold_loads_are_loads(load_s: float | None, cold: int) -> None:
    samples = counted(report(usage=Usage(load_s=load_s)), ended=20.0)
    assert total(samples, "ollamux_model_load_seconds_count", model=MODEL, node="n1") == cold


def test_attempts_after_the_first_are_retries() -> None:
    samples = counted(report(attempts=1), report(attempts=3), report(attempts=0), ended=20.0)
    assert value(samples, "ollamux_retries_total", endpoint="/api/chat") == 2


def test_what_was_built_is_told() -> None:
    samples = counted(ended=0.0)
    assert total(samples, "ollamux_build_info", version=__version__) == 1
