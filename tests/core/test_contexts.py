"""Raising the context that a native request asks for: which bytes change, and for whom."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import dialect
from router.core.edits import raise_context, with_context
from router.core.lease import Lease
from router.core.memory import Loads
from router.core.names import parse
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.rates import Speed
from router.core.types import (
    Model,
    NodeSpec,
    NumCtx,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Sign,
    Topology,
)
from router.core.usage import Usage
from router.core.work import Work

RAISED: dict[str, tuple[str, str]] = {
    "no options": ('{"model":"m"}', '{"model":"m","options":{"num_ctx":8192}}'),
    "blanks at the end": (
        ' {"model" : "m" \t}\r\n', ' {"model" : "m","options":{"num_ctx":8192} \t}\r\n',
    ),
    "null": ('{"options": null ,"a":1}', '{"options": {"num_ctx":8192} ,"a":1}'),
    "empty": ('{"options":{ },"a":1}', '{"options":{"num_ctx":8192 },"a":1}'),
    "another option": (
        '{"options":{"seed" : [1] },"a":1}', '{"options":{"seed" : [1],"num_ctx":8192 },"a":1}',
    ),
    "smaller": ('{"options":{"num_ctx" : 2048 }}', '{"options":{"num_ctx" : 8192 }}'),
    "smaller, in the middle": (
        '{"options":{"a":1,"num_ctx":8191,"b":2},"c":3}',
        '{"options":{"a":1,"num_ctx":8192,"b":2},"c":3}',
    ),
    "a fraction": ('{"options":{"num_ctx":2048.0}}', '{"options":{"num_ctx":8192}}'),
    "nothing": ('{"options":{"num_ctx":0}}', '{"options":{"num_ctx":8192}}'),
    "less than nothing": ('{"options":{"num_ctx":-1}}', '{"options":{"num_ctx":8192}}'),
    "a context of null": ('{"options":{"num_ctx":null}}', '{"options":{"num_ctx":8192}}'),
    "the words deeper and in text": (
        '{"a":[{"options":{"num_ctx":1}}],"b":"\\"options\\":{\\"num_ctx\\":1","c":1}',
        '{"a":[{"options":{"num_ctx":1}}],"b":"\\"options\\":{\\"num_ctx\\":1","c":1,"options":{"num_ctx":8192}}',
    ),
    "one at the top, which is none": (
        '{"num_ctx":1,"options":{}}', '{"num_ctx":1,"options":{"num_ctx":8192}}',
    ),
    "a key as Go matches it": ('{"OPTIONS":{"a":1}}', '{"OPTIONS":{"a":1,"num_ctx":8192}}'),
    "something behind the object": (
        '{"a":1}{"options":1}', '{"a":1,"options":{"num_ctx":8192}}{"options":1}',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), RAISED.values(), ids=RAISED)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_smaller_context_or_none_is_raised(
    body: str, expected: str, kind: type[bytes | bytearray]
) -> None:
    whole = kind(body.encode())
    assert b"".join(with_context((whole,), 8192)) == expected.encode()
    view = memoryview(whole)
    assert b"".join(with_context((view[:5], view[5:]), 8192)) == expected.encode()
    assert b"".join(with_context((view,), 8192)) == expected.encode()


@pytest.mark.parametrize(
    "body",
    [
        # enough
        '{"options":{"num_ctx":8192}}',
        '{"options":{"num_ctx":8192.0,"a":1}}',
        '{"options":{"num_ctx":131072}}',
        # a node may read something else out of it
        '{"options":{"num_ctx":"2048"}}',
        '{"options":{"num_ctx":true}}',
        '{"options":{"num_ctx":1e3}}',
        '{"options":{"num_ctx":[1]}}',
        '{"options":{"num_ctx":1,"num_ctx":2}}',
        '{"options":{"Num_Ctx":1}}',
        '{"options":{"num\\u005fctx":1}}',
        '{"options":{"a":{"num_ctx":1},"num_ctx":2}}',
        '{"options":{},"Options":{}}',
        '{"options":[]}',
        '{"options":"x"}',
        '{"options":{"a"}}',
        # and what is no request
        "", "{", "[]", "null", "{}", "\0", '{"options":{"num_ctx":1}',
    ],
)  # fmt: skip
def test_what_asks_for_enough_or_oddly_stays_as_it_is(body: str) -> None:
    assert raise_context(body.encode(), 8192) is None
    pieces = (body.encode(),)
    assert with_context(pieces, 8192) is pieces


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
_others = st.dictionaries(st.sampled_from(["seed", "stop", "temperature", ""]), _values)
_asked = st.none() | st.integers(-5, 20_000)


@given(
    st.dictionaries(st.sampled_from(["model", "messages", "stream"]), _values, min_size=1),
    st.none() | _others, _asked, st.booleans(), st.sampled_from([None, 1]),
)  # fmt: skip
def test_whatever_else_it_says_it_says_still(
    fields: dict[str, Any], options: dict[str, Any] | None, asked: int | None,
    first: bool, indent: int | None,
) -> None:  # fmt: skip
    if options is not None and asked is not None:
        options = {"num_ctx": asked, **options} if first else {**options, "num_ctx": asked}
    body = {"options": options, **fields} if first else {**fields, "options": options}
    sent = b"".join(with_context((json.dumps(body, indent=indent).encode(),), 8192))
    wanted = max(8192, (options or {}).get("num_ctx", 0))
    assert json.loads(sent) == {**body, "options": {**(options or {}), "num_ctx": wanted}}


def test_only_native_requests_to_a_model_have_options() -> None:
    having = {route.path for route in dialect.ROUTES if route.options}
    assert having == {"/api/chat", "/api/generate", "/api/embed", "/api/embeddings"}


_LETTERS = ["options", "Options", "num_ctx", "a", "{", "}", '"', ":", ",", "1", "9000", " ", "null"]


@given(st.lists(st.sampled_from(_LETTERS), max_size=20).map("".join))
def test_of_no_text_two_bytes_change_that_are_not_the_context(body: str) -> None:
    sent = b"".join(with_context((body.encode(),), 8192)).decode()
    assert sent == body or "8192" in sent


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["options", "OPTIONS", "model", "x"]),
            st.sampled_from(["{}", '{"num_ctx":1}', '{"num_ctx":1,"a":"options"}', "null", '"m"']),
        ),
        max_size=3,
    ),
    st.sampled_from(["", " "]),
)
def test_what_is_cut_and_what_is_scanned_agree(fields: list[tuple[str, str]], blank: str) -> None:
    body = "{" + ",".join(f'"{key}"{blank}:{blank}{value}{blank}' for key, value in fields) + "}"
    # What follows the object has it scanned.
    assert raise_context(body.encode(), 8192) == raise_context(body.encode() + b"{}", 8192)


# The context that a lease finds

M = "m:latest"
NODE = NodeSpec("a", "http://a:1", "http", "a", 1, slots=4)


def pool(policy: Policy, *, num_ctx: NumCtx = NumCtx.AT_LEAST, told: object = None) -> Pool:
    """One node that has a model, loaded with this context if one is told."""
    made = Pool(Topology((PoolSpec("p", (NODE,)),), policy=policy, num_ctx=num_ctx), 0.0)
    listed = {M: Model(M, "", {})}
    resident = {} if told is None else {M: Model(M, "", {"context_length": told})}
    made.observe(NODE.url, Observation(Sign.GOOD, "", listed, resident), 0.0)
    return made


def leased(made: Pool, name: str = "m", **work: Any) -> Lease:
    attempt = Attempt(Target(parse(name), None, name), work=Work(**work))
    verdict = made.submit(attempt, 1.0)
    assert isinstance(verdict, Lease)
    return verdict


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize(
    ("told", "context"),
    [(8192, 8192), (None, None), (0, None), (-1, None), ("8192", None), (2**60, None)],
)
def test_a_lease_finds_the_context_that_the_node_tells(
    policy: Policy, told: object, context: int | None
) -> None:
    made = pool(policy, told=told)
    assert made.context(leased(made)) == context


def test_what_has_to_be_loaded_first_has_no_context_yet_and_then_the_one_asked_for() -> None:
    made = pool(Policy.EXPECTED_DELAY)
    first = leased(made, num_ctx=4096, at_least=True)
    assert made.context(first) is None
    assert made.began(first.attempt, 2.0) == NODE.url, "somebody should look"
    assert made.began(first.attempt, 3.0) == ""
    made.leave(first.attempt, Outcome(), 3.0)
    assert made.context(leased(made, at_least=True)) == 4096
    assert made.context(leased(made, num_ctx=2048, at_least=True)) == 4096


def test_what_asks_for_more_finds_nothing_that_would_do() -> None:
    made = pool(Policy.EXPECTED_DELAY, told=4096)
    assert made.context(leased(made, num_ctx=8192, at_least=True)) is None


def test_a_cloud_model_has_no_context() -> None:
    cloud = NodeSpec("c", "http://c:1", "http", "c", 1, cloud=True)
    for policy in Policy:
        made = Pool(Topology((PoolSpec("p", (cloud,)),), policy=policy), 0.0)
        made.observe(cloud.url, Observation(Sign.GOOD, "", {}, {}), 0.0)
        assert made.context(leased(made, "m:cloud")) is None


def test_what_a_node_has_shown_is_told_of_the_models_that_it_has() -> None:
    for policy in Policy:
        made = pool(policy)
        attempt = leased(made).attempt
        made.learn(NODE.url, M, Usage(100, 50, 2.0, 5.0, 0.5))
        made.leave(attempt, Outcome(), 3.0)
        [learned] = made.learned()
        assert learned.speeds == {M: Speed(200.0, 10.0, 2.0)}
        plans = policy is Policy.EXPECTED_DELAY
        assert learned.loads == (Loads(absent=1) if plans else None)
        made.observe(NODE.url, Observation(present={}), 4.0)
        assert made.learned()[0].speeds == {}


def test_of_very_many_models_those_in_memory_are_told_first() -> None:
    made = pool(Policy.LEAST_IN_FLIGHT)
    names = [f"m{number:03}" for number in range(101)]
    listed = {f"{name}:latest": Model(f"{name}:latest", "", {}) for name in names}
    last = {key: one for key, one in listed.items() if "m100" in key}
    made.observe(NODE.url, Observation(present=listed, resident=last), 0.0)
    for name in names:
        made.leave(leased(made, name).attempt, Outcome(), 1.0)
    [learned] = made.learned()
    assert [*listed][-1] in learned.speeds
    assert set(learned.speeds) == {*listed} - {"m099:latest"}


@pytest.mark.parametrize("num_ctx", list(NumCtx))
def test_nobody_has_to_look_after_a_load_where_nothing_is_raised(num_ctx: NumCtx) -> None:
    made = pool(Policy.EXPECTED_DELAY, num_ctx=num_ctx)
    assert made.at_least is (num_ctx is NumCtx.AT_LEAST)
    assert bool(made.began(leased(made).attempt, 2.0)) is made.at_least
