"""A node's connection that ends at each byte of an answer: the client never notices."""

import contextlib
import itertools
import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.chaos.fleet import Speed
from tests.chaos.link import Cut, Link, linked
from tests.chaos.load import Pace, connect, exchanged
from tests.chaos.orders import Kind
from tests.chaos.scene import Scene, scene
from tests.chaos.verdicts import Outcome, Violation, verdict

pytestmark = pytest.mark.chaos

AT_ONCE = Speed(load_s=0, decode_tps=float("inf"), tokens=(2, 2))
_NUMBER = re.compile("[0-9]+")
# A finished answer whose [DONE] is lost may end in an error: its counts are lost as well.
_AT_THE_END = "behind its end"
_STEPS = {Kind.WHOLE: 1, Kind.CHAT: 1, Kind.OPENAI: 7, Kind.RAW: 7}
_DOORS = 31
_MISSES = 30  # so many answers that were over before the cut: there are no longer ones


async def outcome(s: Scene, kind: Kind, dice: random.Random, at_byte: int) -> str:
    order = s.catalog.order(f"{s.seed}-{at_byte}", kind, dice)
    talk = await connect(s.router.url)
    try:
        answer = await exchanged(talk, order, Pace())
        found = verdict(order, answer)
    except Violation as violation:
        return str(violation)
    finally:
        talk.leave()
    if found is Outcome.RIGHT:
        return found
    if found is Outcome.TOLD and order.openai and b'"finish_reason":"' in answer.body:
        return f"{found} {_AT_THE_END}"
    told = answer.body[-90:].decode(errors="replace")
    return f"{found}: {answer.status} {_NUMBER.sub('0', told)}"


async def cut_everywhere(s: Scene, link: Link, kind: Kind, step: int) -> Mapping[str, int]:
    """Cut one answer after another, each `step` bytes later, until none is so long. Returns what
    clients saw, with the first byte where they did."""
    dice = random.Random(f"{s.seed}/{kind}")
    seen: dict[str, int] = {}
    misses = 0
    for at_byte in itertools.count(dice.randrange(step), step):
        before = link.was_cut
        link.cuts.append(Cut(at_byte, reset=at_byte % 5 == 0))
        seen.setdefault(await outcome(s, kind, dice, at_byte), at_byte)
        misses += link.was_cut == before
        if misses * step >= _MISSES:
            assert at_byte > 300
            break
    return seen


async def test_a_cut_at_any_byte_is_not_noticed(tmp_path: Path, seed: str) -> None:
    """One node, under many addresses: each is another node to the router. So only the first
    attempt is cut, and whatever is tried elsewhere ends well."""
    async with contextlib.AsyncExitStack() as stack:
        s = await stack.enter_async_context(scene(tmp_path, seed, nodes=1, speed=AT_ONCE))
        link = await stack.enter_async_context(linked(s.fleet["n1"], doors=_DOORS))
        s.entries = {url: {"url": url, "slots": 64} for url in link.urls}
        await s.reload()
        await s.all_up()
        for kind, step in _STEPS.items():
            seen = await cut_everywhere(s, link, kind, step)
            assert {key for key in seen if _AT_THE_END not in key} == {Outcome.RIGHT}, (kind, seen)
        await s.quiet()
