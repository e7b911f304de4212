"""Which nodes may be asked, and which of them is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.names import parse, split_pin
from router.core.node import Node
from router.core.policy import Eligible, Target, eligible, pick
from router.core.types import Reason, Refusal
from tests.core import build
from tests.core.build import spec


def target(text: str) -> Target:
    left, pin = split_pin(text)
    return Target(parse(left), pin, left)


def some(*words: str) -> list[Node]:
    """Nodes from words such as `+one:a,b`: up or down, the name, what it has."""
    nodes = []
    for word in words:
        name, _, has = word[1:].partition(":")
        keys = [f"{model}:latest" for model in has.split(",") if model]
        nodes.append(build.node(spec(name), *keys, up=word[0] == "+"))
    return nodes


def verdict(pools: list[list[Node]], wanted: Target, *tried: str) -> str:
    """`reason: nodes` or `refusal: nodes`."""
    found = eligible(pools, wanted, {f"http://{name}:11434" for name in tried})
    if isinstance(found, Eligible):
        names = [node.spec.name for node in found.nodes]
        return f"{found.reason}: {' '.join(names)}"
    return f"{found.refusal}: {' '.join(spec.name for spec in found.nodes)}".rstrip(": ")


ONE_POOL = [some("+one:a,b", "+two:a", "-three:a,c", "-four:d", "+five:")]


@pytest.mark.parametrize(
    ("text", "tried", "expected"),
    [
        ("a", "", "least-in-flight: one two"),
        ("A:LATEST", "", "least-in-flight: one two"),
        ("a", "one", "only-node: two"),
        ("a", "one two", "all-tried: one two three"),
        ("b", "", "only-node: one"),
        ("b", "one", "all-tried: one"),
        ("b", "two", "only-node: one"),
        ("c", "", "nodes-down: three"),
        ("d", "", "nodes-down: four"),
        ("d", "four", "nodes-down: four"),
        ("e", "", "no-model"),
        ("a:8b", "", "no-model"),
        ("x:cloud", "", "least-in-flight: one two five"),
        ("x:cloud", "one two five", "all-tried: one two three four five"),
        ("a:local", "", "least-in-flight: one two"),
    ],
)
def test_nodes_that_are_up_and_have_the_model(text: str, tried: str, expected: str) -> None:
    assert verdict(ONE_POOL, target(text), *tried.split()) == expected


POOLS = [some("+one:a,c", "-two:b"), some("+three:a,b", "+four:b,d"), some("+five:a,d", "-six:e")]


@pytest.mark.parametrize(
    ("text", "tried", "expected"),
    [
        ("a", "", "only-node: one"),
        ("a", "one", "later-pool: three"),
        ("a", "one three", "later-pool: five"),
        ("a", "one three five", "all-tried: one three five"),
        ("b", "", "later-pool: three four"),
        ("b", "three", "later-pool: four"),
        ("b", "three four", "all-tried: two three four"),
        ("d", "", "later-pool: four"),
        ("d", "four", "later-pool: five"),
        ("e", "", "nodes-down: six"),
        ("f", "", "no-model"),
        ("x:cloud", "", "only-node: one"),
        ("a@five", "", "pinned: five"),
    ],
)
def test_pools_are_tried_in_their_order(text: str, tried: str, expected: str) -> None:
    assert verdict(POOLS, target(text), *tried.split()) == expected


def test_a_request_without_a_model_goes_to_any_node_that_is_up() -> None:
    assert verdict(ONE_POOL, Target()) == "least-in-flight: one two five"
    assert verdict([some("-one:a", "-two:")], Target()) == "nodes-down: one two"


def test_nobody_knows_what_nodes_have_that_are_all_down() -> None:
    assert verdict([some("-one:a"), some("-two:")], target("b")) == "nodes-down: one two"
    assert verdict([some("-one:a"), some("-two:")], target("a")) == "nodes-down: one"


def test_a_node_that_was_never_probed_is_not_asked() -> None:
    fresh = Node(spec("one"), "default", now=0.0)
    assert verdict([[fresh]], target("a")) == "nodes-down: one"
    assert verdict([[fresh]], target("a@one")) == "pin-down: one"
    assert verdict([[fresh, *some("+two:a")]], target("a")) == "only-node: two"


def test_without_nodes_there_is_nobody_to_name() -> None:
    assert verdict([], target("a")) == "nodes-down"
    assert verdict([[]], target("a@one")) == "unknown-pin"


PINNED = [
    [
        build.node(spec("gpu-1", "http://10.0.0.11:11434"), "a:latest"),
        build.node(spec("gpu-2", "http://10.0.0.12:11434"), "a:latest", up=False),
    ],
    [
        build.node(spec("twin-1", "http://twin:9000"), "a:latest"),
        build.node(spec("twin-2", "https://twin:9000"), "a:latest"),
        build.node(spec("few", "http://few:1", models=("b*",)), "a:latest", "b:latest"),
    ],
]
EVERYONE = "gpu-1 gpu-2 twin-1 twin-2 few"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a@gpu-1", "pinned: gpu-1"),
        ("a@GPU-1", "pinned: gpu-1"),
        ("a@10.0.0.11", "pinned: gpu-1"),
        ("a@http://10.0.0.11:11434", "pinned: gpu-1"),
        ("a@twin-2", "pinned: twin-2"),
        ("a@https://twin:9000", "pinned: twin-2"),
        ("a@gpu-2", "pin-down: gpu-2"),
        ("b@gpu-2", "pin-down: gpu-2"),
        ("b@gpu-1", "not-on-pin: gpu-1"),
        ("a:8b@gpu-1", "not-on-pin: gpu-1"),
        ("a@few", "not-on-pin: few"),
        ("b@few", "pinned: few"),
        ("x:cloud@gpu-1", "pinned: gpu-1"),
        ("a@gpu-3", f"unknown-pin: {EVERYONE}"),
        ("e@gpu-3", f"unknown-pin: {EVERYONE}"),
        ("a@10.0.0.11:8080", f"unknown-pin: {EVERYONE}"),
        ("a@https://10.0.0.11:11434", f"unknown-pin: {EVERYONE}"),
        ("a@localhost", f"unknown-pin: {EVERYONE}"),
        ("a@[::1]", f"unknown-pin: {EVERYONE}"),
        ("a@twin:9000", "ambiguous-pin: twin-1 twin-2"),
        ("a@sha256:abc", "bad-name"),
        ("a@gpu-1:cloud", "bad-name"),
    ],
)
def test_a_pin_is_strict(text: str, expected: str) -> None:
    assert verdict(PINNED, target(text)) == expected


def test_a_pinned_node_that_failed_is_down_for_this_request() -> None:
    found = eligible(PINNED, target("a@gpu-1"), {"http://10.0.0.11:11434"})
    assert not isinstance(found, Eligible)
    assert found.refusal is Refusal.PIN_DOWN


def test_the_only_node_that_may_be_asked_is_pinned_when_it_is_pinned() -> None:
    found = eligible([some("+one:a")], target("a@one"), ())
    assert isinstance(found, Eligible)
    assert found.reason is Reason.PINNED


@pytest.mark.parametrize(
    ("nodes", "chosen"),
    [
        ([(0, 1, 1.0)], 0),
        ([(1, 1, 1.0), (0, 1, 1.0)], 1),
        ([(2, 1, 1.0), (3, 4, 1.0)], 1),
        ([(2, 1, 1.0), (3, 1, 2.0)], 1),
        ([(2, 2, 1.0), (1, 1, 1.0), (2, 4, 1.0)], 2),
        ([(3, 1, 4.0), (1, 2, 1.0)], 1),
        ([(1, 1, 0.5), (1, 1, 1.0)], 1),
    ],
    ids=str,
)
def test_least_in_flight_for_its_size(nodes: list[tuple[int, int, float]], chosen: int) -> None:
    made = [
        build.node(spec(f"n{i}", slots=slots, weight=weight), in_flight=in_flight)
        for i, (in_flight, slots, weight) in enumerate(nodes)
    ]
    assert pick(made) is made[chosen]


def test_among_equals_the_one_whose_turn_is_longest_ago() -> None:
    one, two, three = some("+one:a", "+two:a", "+three:a")
    one.turn, two.turn, three.turn = 7, 5, 6
    assert pick([one, two, three]) is two
    two.in_flight = 1
    assert pick([one, two, three]) is three


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0])),
        min_size=1,
    )
)
def test_nobody_is_less_loaded_than_the_one_picked(nodes: list[tuple[int, int, float]]) -> None:
    made = [
        build.node(spec(f"n{i}", slots=slots, weight=weight), in_flight=in_flight)
        for i, (in_flight, slots, weight) in enumerate(nodes)
    ]
    assert pick(made).load == min(node.load for node in made)
