"""What counts as the same transcript, and what does not."""

from typing import Any

import pytest

from tests.clients.pair import DATES, pair
from tests.clients.transcript import comparable, play, step
from tests.rig import MODEL

_HEX = "0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"created": 1, "eval_duration": 5}, {"created": 2, "eval_duration": 6}),
        ({"created_at": "2026-08-01T10:00:00Z"}, {"created_at": "2026-08-01T10:00:01Z"}),
        ({"id": "chatcmpl-17"}, {"id": "chatcmpl-230"}),
        ({"id": f"msg_resp_{_HEX}"}, {"id": f"msg_resp_{_HEX[::-1]}"}),
        (
            [{"digest": "a", "status": "pulling a", "completed": one} for one in (1, 5, 9)],
            [{"digest": "a", "status": "pulling a", "completed": one} for one in (3, 9)],
        ),
        (
            [{"digest": one, "status": "pulling"} for one in "aabb"],
            [{"digest": one, "status": "pulling"} for one in "abab"],
        ),
        (
            [{"model": "a", "expires_at": "x"}, {"model": "b", "expires_at": "y"}],
            [{"model": "b", "expires_at": "z"}, {"model": "a", "expires_at": "x"}],
        ),
    ],
)
def test_what_two_ollamas_may_tell_differently_is_taken_out(one: Any, other: Any) -> None:
    assert comparable(one) == comparable(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"created": 1}, {"created": "1"}),
        ({"created": 1}, {"created": None}),
        ({"created": 1}, {}),
        ({"eval_count": 1}, {"eval_count": 2}),
        ({"modified_at": DATES[0]}, {"modified_at": DATES[1]}),
        (["chatcmpl-1", "chatcmpl-1"], ["chatcmpl-1", "chatcmpl-2"]),
        ([{"digest": "a", "status": "s", "completed": 9}], [{"digest": "a", "status": "s"}]),
        ([{"model": "a"}, {"model": "b"}], [{"model": "b"}, {"model": "a"}]),
    ],
)
def test_what_is_not_in_the_list_must_be_the_same(one: Any, other: Any) -> None:
    assert comparable(one) != comparable(other)


class _Client:
    def answer(self, value: int) -> int:
        if value < 0:
            raise ValueError(value)
        return value


async def test_a_call_that_fails_unasked_is_no_transcript() -> None:
    told = await play(_Client(), [step("answer", value=1)], threaded=True)
    assert told == [[0, "answer", [1], None]]
    with pytest.raises(AssertionError, match=r"step 0, answer: ValueError\(-1\)"):
        await play(_Client(), [step("answer", value=-1)], threaded=True)
    with pytest.raises(AssertionError, match="step 0"):
        await play(_Client(), [step("answer", value=1, raises="ValueError")], threaded=True)


async def test_node_and_router_have_addresses_of_their_own() -> None:
    async with pair() as (node, router):
        assert node != router
        assert MODEL not in node + router
