"""The routing benchmark on sockets: the same requests as in virtual time, and a clock that runs."""

import asyncio
import json
import math
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from bench.routing.experiment import Case, Figures, Sample, Served, figures, requests
from bench.routing.fleet import CARDS, NUM_CTX, Layout, fleet, view
from bench.routing.hurry import hurried
from bench.routing.replay import body, client, content
from bench.routing.report import agreement
from bench.routing.routers import Ask
from bench.routing.sockets import run
from bench.routing.stage import Contender, Setting, config, contender
from bench.routing.trace import Row
from bench.routing.workload import Request
from router.config import load
from router.core.types import Policy
from router.sim import SimModel, SimNode, SimSpec
from router.sim.prompt import Message, Prompt, of_messages

QUICK = SimModel("m:1", load_s=0.0, prefill_tps=math.inf, decode_tps=math.inf)
FAST = Setting(speed=100.0)
SHORT = Case("azure", 600, minutes=0.5)


def _row(prompt_tokens: int, *blocks: int, answer_tokens: int = 10) -> Row:
    return Row(1.5, 7, prompt_tokens, answer_tokens, blocks)


def _read(row: Row) -> Prompt:
    return of_messages([Message("user", content(row))])


def _common(one: Row, other: Row) -> int:
    pairs = zip(_read(one).blocks(512), _read(other).blocks(512), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@pytest.mark.parametrize("tokens", [6, 511, 512, 515, 3000, NUM_CTX, 126_000])
def test_a_node_reads_as_many_tokens_as_the_trace_tells_or_the_context_holds(tokens: int) -> None:
    row = _row(tokens, *range(tokens // 512))
    assert _read(row).tokens == min(tokens, NUM_CTX)


def test_prompts_are_the_same_text_as_far_as_they_have_the_same_hashes() -> None:
    one = _row(2000, 0, 11, 12)
    assert _common(one, _row(2600, 0, 11, 12, 3, 4)) == 3
    assert _common(one, _row(2600, 0, 11, 2, 3, 4)) == 2
    assert _common(one, _row(2600, 1, 11, 12, 3, 4)) == 0
    assert _common(one, replace(one, at=2.5)) == 3


def test_a_prompt_beyond_the_context_loses_its_beginning() -> None:
    whole = NUM_CTX // 512
    long = _row(NUM_CTX + 600, *range(whole + 1))
    assert _common(long, _row(NUM_CTX - 600, *range(1, whole))) == whole - 2
    assert _common(long, _row(NUM_CTX - 600, *range(whole - 1))) == 0


@pytest.mark.parametrize(("limit", "tokens"), [(None, 77), (128, 77), (1, 1), (None, 1)])
async def test_a_node_answers_with_the_true_length_which_no_router_is_told(
    limit: int | None, tokens: int
) -> None:
    ask = Ask(0, 0.0, "team", "m:1", 1000, (), limit)
    sent = body(Request(ask, _row(1000, answer_tokens=tokens)))
    assert json.loads(sent)["options"] == ({"num_predict": limit} if limit else {})
    async with (
        SimNode(SimSpec((QUICK,))) as node,
        client(10) as session,
        session.post(f"{node.url}/api/chat", data=sent) as answer,
    ):
        last = json.loads((await answer.read()).splitlines()[-1])
    assert (last["prompt_eval_count"], last["eval_count"]) == (1000, tokens)
    assert last["done_reason"] == "stop"


def test_the_router_is_told_what_virtual_time_tells_it(tmp_path: Path) -> None:
    nodes = view(fleet(Layout.EVERYWHERE, 1))
    urls = [f"http://127.0.0.1:{12_000 + place}" for place in range(len(nodes))]
    file = tmp_path / "router.yaml"
    file.write_text(json.dumps(config(nodes, urls, 12_100, "expected-delay")))
    topology = load(file, {}).topology
    assert topology.policy is Policy.EXPECTED_DELAY
    told = [(one.name, one.url, one.slots, one.gpus) for one in topology.pools[0].nodes]
    assert told == [
        (node.name, url, node.slots, node.gpus) for node, url in zip(nodes, urls, strict=True)
    ]
    assert [name for name, *_ in told] == [card.name for card in CARDS]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x=http://127.0.0.1:9/", Contender("x", url="http://127.0.0.1:9")),
        ("x=run --port {port} --url=http://a", Contender("x", "run --port {port} --url=http://a")),
    ],
)
def test_another_router_is_a_command_or_an_address(text: str, wanted: Contender) -> None:
    assert contender(text) == wanted


@pytest.mark.parametrize("text", ["", "x", "x=", "=run"])
def test_another_router_needs_a_name_and_something_to_run(text: str) -> None:
    with pytest.raises(ValueError, match="not NAME=COMMAND or NAME=URL"):
        contender(text)


def test_in_a_hurry_a_day_passes_at_once_and_afterwards_the_clock_is_as_before() -> None:
    before = time.monotonic

    async def day() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.sleep(86_400)
        return loop.time() - started

    with hurried(1e6):
        assert asyncio.run(day()) >= 86_400
    assert time.monotonic is before


def test_all_requests_are_answered_through_the_real_router() -> None:
    sample = run(replace(SHORT, router="ollamux-least-in-flight"), 1, FAST)
    asked = requests(SHORT, 1)
    assert [one.model for one in sample.served] == [one.ask.model for one in asked]
    assert all(0 < one.first_s <= one.total_s < math.inf for one in sample.served)
    assert sample.loads >= 1


def test_another_router_is_started_by_its_command() -> None:
    command = f"{sys.executable} -m bench.routing.hurry 100 router serve --config {{config}}"
    sample = run(SHORT, 1, FAST, Contender("another", command))
    assert all(one.total_s < math.inf for one in sample.served)


def test_agreement_is_told_in_percent() -> None:
    virtual, real = _figures(10.0), _figures(11.0)
    assert agreement(virtual, real) == (
        "least-in-flight, against virtual time (p50 / p90 / p99): "
        "first token +10.0% / +10.0% / +10.0%, end +5.0% / +5.0% / +5.0%"
    )


def _figures(first_s: float) -> Figures:
    served = [Served("team", "qwen3:4b", first_s, first_s + 10)]
    return figures(Case("azure", 20), [Sample(served, 1, 60, 1, 0.0)])
