"""The routing benchmark: traces are read and thinned as said, and the world keeps its books."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.routing.baselines import BASELINES
from bench.routing.experiment import (
    ROUTERS,
    Case,
    Sample,
    Served,
    curve,
    figures,
    quantiles,
    requests,
    run,
)
from bench.routing.fleet import CARDS, COPIES, MODELS, Layout, fleet, view
from bench.routing.generate import TRACES, generate
from bench.routing.goodput import good, highest
from bench.routing.report import as_json, tables
from bench.routing.routers import Ask, Decision, Final, Loaded, ModelView, NodeView, Router
from bench.routing.scenario import FLOOD, SCENARIOS, Change
from bench.routing.trace import Row, Trace, duration_s, read, thin
from bench.routing.workload import Request, workload
from bench.routing.world import World
from router.sim.models import GB, SimModel, SimSpec

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,1396,0
"""
MODEL = SimModel("m:1", size_bytes=GB, load_s=2.0, prefill_tps=1000.0, decode_tps=100.0)
SPEC = SimSpec(models=(MODEL,), default_num_ctx=4096, block_tokens=512, handover_s=0.0)
SLOTS = (1, 4, 1)
VIEW = [
    NodeView(name, slots, (24 * GB,), rank, (ModelView("m:1", GB, "8B", "d"),))
    for name, slots, rank in zip("abc", SLOTS, (2, 3, 1), strict=True)
]


def _mooncake(*records: tuple[int, int, int, list[int]]) -> str:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(keys, one, strict=True))) + "\n" for one in records)


def _written(folder: Path, text: str) -> Trace:
    path = folder / "trace"
    path.write_text(text)
    return read(path)


def _request(number: int, at: float, model: str = "m:1", **row: int) -> Request:
    tokens = {"prompt_tokens": 1000, "answer_tokens": 100, **row}
    ask = Ask(number, at, "team", model, tokens["prompt_tokens"], ())
    return Request(ask, Row(at, number, tokens["prompt_tokens"], tokens["answer_tokens"], ()))


def _loaded(model: str) -> Loaded:
    return Loaded(model, GB, 4096, math.inf, "d")


def _chosen(router: Router, count: int) -> list[int | None]:
    found: list[int | None] = []
    for number in range(count):
        router.arrive(_request(number, 0.0).ask, 0.0)
        found += [decision.node for decision in router.take(0.0)]
    return found


def test_an_azure_row_is_a_session_of_its_own_that_shares_nothing(tmp_path: Path) -> None:
    first, second = _written(tmp_path, AZURE)
    assert (first.at, first.prompt_tokens, first.answer_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.314579)
    assert second.answer_tokens == 1
    assert (len(first.blocks), len(second.blocks)) == (0, 2)
    assert first.session != second.session


def test_turns_belong_together_by_what_they_share_beyond_the_first_block(tmp_path: Path) -> None:
    text = _mooncake(
        (0, 1500, 9, [0, 1, 2]), (0, 1500, 9, [0, 3, 4]), (9000, 2600, 9, [0, 1, 2, 5, 6]),
        (9000, 600, 9, [0, 7]), (12_000, 2600, 9, [0, 1, 2, 5, 8]),
    )  # fmt: skip
    rows = {row.blocks: row for row in _written(tmp_path, text)}
    session = rows[0, 1].session
    assert [row.session == session for row in rows.values()].count(True) == 3
    assert rows[0, 1, 2, 5, 8].session == session
    assert len({row.session for row in rows.values()}) == 3


def test_arrivals_are_spread_over_their_bucket_the_same_way_each_time(tmp_path: Path) -> None:
    text = _mooncake(*((3000 * (n // 9), 600, 5, [0, n + 1]) for n in range(90)))
    rows = _written(tmp_path, text)
    assert rows == _written(tmp_path, text)
    assert len({row.at for row in rows}) == 90
    assert rows == sorted(rows, key=lambda row: row.at)
    assert all(0 <= row.at < 30 for row in rows)


def test_a_file_of_neither_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        _written(tmp_path, "a,b\n1,2\n")


@pytest.mark.parametrize("look", TRACES)
def test_what_is_made_up_has_the_published_statistics(look: str) -> None:
    rows = generate(TRACES[look], 4000, 1)
    assert len(rows) == pytest.approx(4000, rel=0.2)
    prompts = sorted(row.prompt_tokens for row in rows)
    median = {"mooncake": 6909, "azure": 1020}[look]
    assert prompts[len(prompts) // 2] == pytest.approx(median, rel=0.25)
    assert rows == generate(TRACES[look], 4000, 1) != generate(TRACES[look], 4000, 2)


def test_a_made_up_turn_begins_with_the_one_before_it() -> None:
    last: dict[int, Row] = {}
    turns = 0
    for row in generate(TRACES["mooncake"], 500, 1):
        before = last.get(row.session)
        last[row.session] = row
        if before is not None:
            turns += 1
            assert row.blocks[: len(before.blocks)] == before.blocks
    assert turns > 100


def test_thinning_keeps_whole_sessions_at_their_times() -> None:
    whole = generate(TRACES["mooncake"], 2000, 1)
    thinned = thin(whole, 500, 3)
    kept = {row.session for row in thinned}
    assert thinned == [row for row in whole if row.session in kept]
    assert len(thinned) == pytest.approx(500, abs=50)
    assert thin(whole, 500, 3) == thinned != thin(whole, 500, 4)
    assert thin(whole, 9999, 3) == whole


def test_a_session_keeps_its_team_and_its_model() -> None:
    asked = workload(generate(TRACES["mooncake"], 1000, 1), 1)
    of: dict[int, tuple[str, str]] = {}
    for one in asked:
        who = (one.ask.flow, one.ask.model)
        assert of.setdefault(one.row.session, who) == who
    assert len({model for _, model in of.values()}) == len(MODELS)


def test_the_router_is_told_an_estimate_and_a_limit_that_holds() -> None:
    asked = workload(generate(TRACES["azure"], 1000, 1), 1)
    errors = [math.log(one.ask.prompt_tokens / one.row.prompt_tokens) for one in asked]
    assert 0.2 < math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.3
    limits = [(one.ask.max_tokens, one.row.answer_tokens) for one in asked]
    said = [(limit, true) for limit, true in limits if limit is not None]
    assert 0.3 < len(said) / len(limits) < 0.5
    assert all(true <= limit < 2 * true for limit, true in said if true > 1)


def test_chained_hashes_are_equal_as_far_as_the_prompts_are() -> None:
    rows = [Row(0.0, 0, 2000, 1, (0, 1, 2)), Row(1.0, 0, 2000, 1, (0, 9, 2))]
    one, other = (request.ask.blocks for request in workload(rows, 1))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False]


def test_every_model_has_three_copies_or_all_that_fit() -> None:
    everywhere, three = fleet(Layout.EVERYWHERE, 1), fleet(Layout.THREE, 1)
    for model in MODELS:
        fits = sum(any(one.name == model.name for one in spec.models) for spec in everywhere)
        copies = sum(any(one.name == model.name for one in spec.models) for spec in three)
        assert copies == min(fits, COPIES) >= 1
    assert fleet(Layout.THREE, 1) == three != fleet(Layout.THREE, 2)
    assert [node.priority for node in view(everywhere)] != list(range(len(CARDS)))


def test_only_the_first_minutes_are_sent_and_they_are_those_of_the_whole_hour() -> None:
    whole = requests(Case("azure", 300), 1)
    first = requests(Case("azure", 300, minutes=10), 1)
    assert 20 < len(first) < 80
    assert first == whole[: len(first)]


def test_two_requests_take_what_they_take_by_hand() -> None:
    """Load 2 s, prompt 1 s, answer 1 s; the second waits for the only slot from 1 to 4."""
    specs = [SPEC]
    seen = [NodeView("a", 1, (24 * GB,), 1, (ModelView("m:1", GB, "8B", "d"),))]
    router = BASELINES["least-in-flight"](seen, 1)
    done = World(specs, router, [_request(0, 0.0), _request(1, 1.0)]).run()
    assert [one.first_s for one in done.outcomes] == pytest.approx([3.0, 4.0])
    assert [one.total_s for one in done.outcomes] == pytest.approx([4.0, 5.0])
    assert [one.loaded_s for one in done.outcomes] == pytest.approx([2.0, 1.0])
    assert (done.loads, done.decisions) == (1, 2)


class _Recorder:
    """Sends each request half a second after it came, and keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, float]] = []
        self.finals: list[Final] = []
        self._waiting: list[Ask] = []

    def arrive(self, ask: Ask, now: float) -> None:
        self.heard.append(("arrive", now))
        self._waiting.append(ask)

    def first(self, ask: Ask, now: float) -> None:
        self.heard.append(("first", now))

    def ended(self, ask: Ask, final: Final, now: float) -> None:
        self.heard.append(("ended", now))
        self.finals.append(final)

    def looked(self, node: int, loaded: Sequence[Loaded], now: float) -> None:
        self.heard += [("loaded", now) for _ in loaded]

    def take(self, now: float) -> Sequence[Decision]:
        due = [ask for ask in self._waiting if now >= ask.at + 0.5]
        self._waiting = [ask for ask in self._waiting if ask not in due]
        return [Decision(ask, 0 if ask.model == "m:1" else None) for ask in due]

    def wake_at(self) -> float | None:
        return self._waiting[0].at + 0.5 if self._waiting else None


def test_a_router_hears_what_http_tells_and_is_woken_when_it_wants() -> None:
    router = _Recorder()
    done = World([SPEC], router, [_request(0, 1.0)]).run()
    assert [what for what, _ in router.heard] == ["arrive", "loaded", "first", "ended"]
    assert [at for _, at in router.heard] == pytest.approx([1.0, 4.0, 4.5, 5.5])
    assert router.finals == [Final(1000, 1.0, 100, 1.0, 2.0, 4.0)]
    assert done.outcomes[0].first_s == pytest.approx(3.5)


def test_a_refused_request_has_no_times_and_ends_the_run() -> None:
    done = World([SPEC], _Recorder(), [_request(0, 1.0, "nobody's")]).run()
    assert (done.outcomes[0].node, done.outcomes[0].first_s) == (None, None)


def test_a_busy_node_ends_a_request_with_no_numbers() -> None:
    other = replace(MODEL, name="m:2", digest="", weights="")
    spec = replace(SPEC, models=(MODEL, other), max_queue=0)
    seen = [NodeView("a", 1, (24 * GB,), 1, tuple(
        ModelView(one.name, GB, "8B", one.digest) for one in spec.models
    ))]  # fmt: skip
    router = BASELINES["random"](seen, 1)
    done = World([spec], router, [_request(0, 0.0), _request(1, 0.5, "m:2")]).run()
    assert [one.first_s for one in done.outcomes] == [pytest.approx(3.0), None]


def test_a_slow_node_is_slow_from_then_on() -> None:
    router = BASELINES["random"](VIEW[:1], 1)
    asked = [_request(0, 0.0), _request(1, 10.0)]
    done = World([SPEC], router, asked, [Change(10.0, 0, 6.0)]).run()
    assert [one.first_s for one in done.outcomes] == pytest.approx([3.0, 6.0])


def test_a_prompt_beyond_the_context_is_cut_and_its_beginning_unknown() -> None:
    row = Row(0.0, 0, 8192, 100, tuple(range(16)))
    asked = [Request(_request(n, 10.0 * n).ask, replace(row, at=10.0 * n)) for n in range(2)]
    done = World([SPEC], BASELINES["random"](VIEW[:1], 1), asked).run()
    cut = [one.first_s for one in done.outcomes]
    assert cut == pytest.approx([2 + 4.096, 0.001])
    grown = replace(asked[1].row, blocks=tuple(range(17)), prompt_tokens=8704)
    asked[1] = Request(asked[1].ask, grown)
    done = World([SPEC], BASELINES["random"](VIEW[:1], 1), asked).run()
    assert done.outcomes[1].first_s == pytest.approx(4.096)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_seed_gives_the_same_run_and_every_request_ends(router: str) -> None:
    case = Case("mooncake", 150, Layout.THREE, router=router)
    sample = run(case, 1)
    assert sample._replace(router_s=0.0) == run(case, 1)._replace(router_s=0.0)
    assert all(one.first_s <= one.total_s < math.inf for one in sample.served)
    assert sample.served != run(case, 2).served


@pytest.mark.parametrize(
    ("router", "warm", "nodes"),
    [
        ("round-robin", (), [0, 1, 2, 0]),
        ("least-in-flight", (), [0, 1, 2, 1]),
        ("tiers", (), [2, 0, 1, 1]),
        ("warm-first", (1,), [1, 1, 1, 1]),
        ("warm-first", (), [0, 1, 2, 1]),
        ("warm-and-free", (0,), [0, 1, 2, 1]),
        ("warm-and-free", (1,), [1, 1, 1, 1]),
    ],
)
def test_a_baseline_chooses(router: str, warm: Sequence[int], nodes: Sequence[int]) -> None:
    """Of nodes with 1, 4 and 1 slots; the third is the fastest, then the first."""
    one = BASELINES[router](VIEW, 1)
    for node in warm:
        one.looked(node, [_loaded("m:1")], 0.0)
    assert _chosen(one, 4) == nodes


def test_a_baseline_gives_a_slot_back_and_refuses_what_no_node_has() -> None:
    router = BASELINES["tiers"](VIEW, 1)
    ask = _request(0, 0.0).ask
    for now in (0.0, 1.0):
        router.arrive(ask, now)
        assert router.take(now) == [Decision(ask, 2)]
        router.ended(ask, Final(), now)
    other = replace(ask, model="nobody's")
    router.arrive(other, 2.0)
    assert router.take(2.0) == [Decision(other, None)]


def test_a_flood_is_one_team_within_a_minute() -> None:
    trace = generate(TRACES["azure"], 200, 1)
    asked = SCENARIOS["flood"].requests(trace, 1)
    flood = [one.ask for one in asked if one.ask.flow == FLOOD]
    assert len(flood) == 300
    assert all(1200 <= ask.at < 1260 for ask in flood)
    assert [one.ask.number for one in asked] == list(range(len(asked)))
    assert [one.ask.at for one in asked] == sorted(one.ask.at for one in asked)
    assert duration_s(trace) > 3000


def test_one_model_is_on_every_node() -> None:
    models = SCENARIOS["one-model"].models
    assert [len(spec.models) for spec in fleet(Layout.EVERYWHERE, 1, models)] == [1] * len(CARDS)


def test_figures_are_pooled_without_the_flood_and_count_the_refused_as_for_ever() -> None:
    served = [Served("t", "llama3.3:70b", float(n), n + 1.0) for n in range(1, 20)]
    served += [Served("t", "qwen3:4b", math.inf, math.inf), Served(FLOOD, "qwen3:4b", 99, 99)]
    samples = [Sample(served[:10], 3, 1800, 10, 1e-3), Sample(served[10:], 1, 1800, 10, 1e-3)]
    found = figures(Case("azure", 20), samples)
    assert (found.requests, found.refused, found.loads_per_hour) == (20, 1, 4)
    assert (found.first.p50, found.first.p99, found.soon) == (11, math.inf, 0.5)
    assert found.decision_us == pytest.approx(100)
    assert found.classes["70B"].p50 == 10
    assert "| least-in-flight | 11 / 19 / inf |" in tables([found])
    assert "| 10 / 18 / 19 |" in tables([found])
    assert b"null" in as_json([found])


def test_what_comes_after_the_quantiles_is_the_whole_distribution_and_each_minute() -> None:
    served = [Served("t", "qwen3:4b", n, n, at=30.0 * n) for n in range(1, 6)]
    served.append(Served("t", "qwen3:4b", 9.0, 9.0, at=400.0))
    found = figures(Case("azure", 20), [Sample(served, 0, 1800, 6, 0.0)])
    assert (found.curve[0], found.curve[100], found.curve[-1]) == (1, 3, 9)
    assert len(curve([1.0])) == len(found.curve) == 201
    assert found.minutes == [1, 3, 5, None, None, None, 9]


def test_quantiles_of_one_time_are_that_time() -> None:
    assert quantiles([2.0]).p99 == 2.0


@pytest.mark.parametrize(
    ("limit", "low", "high"),
    [(1000, 970, 1000), (2600, 2530, 2600), (100, 0, 0), (1e9, 9000, 10_000)],
)
def test_goodput_is_the_highest_rate_that_is_good_enough(
    limit: float, low: float, high: float
) -> None:
    assert low <= highest(lambda rate: 100 < rate <= limit) <= high
    assert highest(lambda rate: 2100 < rate < 2300) > 2100, "one that is bad ends no search"


def test_a_rate_is_good_enough_where_nine_of_ten_begin_soon() -> None:
    """The seeds are pooled: which of them is first does not matter."""
    case = Case("azure", 300, router="least-in-flight")
    pooled = figures(case, [run(case, seed) for seed in (1, 2)])
    assert 0.5 < pooled.soon < 0.9
    assert not good(case, (1, 2))
    assert good(case, (1, 2), 0.5)
    assert good(replace(case, router="ollamux"), (1, 2))
