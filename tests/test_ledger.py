"""What has ended is counted and told once, in order, in the next turn of the loop."""

import asyncio

from prometheus_client import CollectorRegistry, generate_latest

from router.ledger import Ledger
from router.log import Ending, Report
from router.tally import Tally


def report(name: str, final: bytes = b"", chunks: int = 0) -> Report:
    known = Report(name, "10.0.0.1", "POST", 1.0, "/api/chat", "m", "m", known=True, node="n1")
    known.ending, known.final, known.chunks = Ending.OK, final, chunks
    return known


async def test_all_that_ended_in_a_turn_is_counted_and_told_in_order() -> None:
    told: list[tuple[str, float]] = []
    tally = Tally()
    ledger = Ledger(tally)
    ledger.tell = lambda report, ended: told.append((report.id, ended))
    ledger.enter(report("a"), 2.0)
    ledger.enter(report("b"), 3.0)
    assert told == []
    await asyncio.sleep(0)
    assert told == [("a", 2.0), ("b", 3.0)]
    ledger.enter(report("c"), 4.0)
    await asyncio.sleep(0)
    assert told[2:] == [("c", 4.0)]
    registry = CollectorRegistry()
    registry.register(tally)
    total = 'ollamux_requests_total{endpoint="/api/chat",model="m",node="n1",outcome="ok"} 3.0'
    assert total in generate_latest(registry).decode()


async def test_token_counts_are_read_from_the_last_records_else_chunks_count() -> None:
    ledger = Ledger(Tally())
    whole = report("a", b'{"done":true,"prompt_eval_count":7,"eval_count":3}\n', chunks=9)
    broken = report("b", b'{"done":false}\n', chunks=4)
    ledger.enter(whole, 2.0)
    ledger.enter(broken, 2.0)
    ledger.settle()
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 3)
    assert (broken.usage.prompt_tokens, broken.usage.completion_tokens) == (None, 4)
