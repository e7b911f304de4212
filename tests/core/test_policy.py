"""Which nodes may be asked, and which of them is."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.bounds import Bounds
from router.core.names import parse, split_pin
from router.core.node import Node
from router.core.policy import Eligible, Target, eligible, pick
from router.core.types import Failure, FailureKind, Outcome, Reason, Refusal
from tests.core import build
from tests.core.build import RULES, spec


def target(text: str) -> Target:
    left, pin = split_pin(text)
    return Target(parse(left), pin, left)


def some(*words: str) -> list[Node]:
    """Nodes from words such as `+one:a,b`: a mark, the name, what it has.

    The mark: up `+`, down `-`, drained `~`, ejected `!`, ejected and drained `?`; for `a` alone
    ejected `x` or full `b`, or ejected and full `X`; on trial `t`. Whoever is ejected is so until
    60, whoever is full until 10.
    """
    nodes = []
    for word in words:
        name, _, has = word[1:].partition(":")
        keys = [f"{model}:latest" for model in has.split(",") if model]
        node = build.node(spec(name), *keys, up=word[0] != "-")
        _trouble(node, word[0])
        nodes.append(node)
    return nodes


def _trouble(node: Node, mark: str) -> None:
    kinds = {"!": "r", "?": "r", "x": "x", "b": "b", "X": "xb", "t": "x"}.get(mark, "")
    kind_of = {"r": FailureKind.RESET, "x": FailureKind.ANSWERED, "b": FailureKind.BUSY}
    for kind in kinds:
        rules = replace(RULES, resets=1, answers=1, back_off_s=10.0 if kind == "b" else 60.0)
        terms = build.ground(rules)
        terms.turn = node.turn + 1
        node.lease("a:latest", terms, 0.0)
        node.leave("a:latest", terms.turn, Outcome(Failure(kind_of[kind])), terms, 0.0)
    if mark == "t":
        terms.turn += 1
        node.lease("a:latest", terms, 60.0)
    node.drain(draining=mark in "~?")


def verdict(pools: list[list[Node]], wanted: Target, *tried: str, now: float = 0.0) -> str:
    """`reason: nodes` or `refusal: nodes`."""
    found = eligible(pools, wanted, {f"http://{name}:11434" for name in tried}, RULES, now)
    if isinstance(found, Eligible):
        names = [node.spec.name for node in found.nodes]
        return f"{found.reason}: {' '.join(names)}"
    said = f"{found.refusal}: {' '.join(spec.name for spec in found.nodes)}".rstrip(": ")
    return said if found.until is None else f"{said} until {found.until:g}"


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


# Who is kept away


@pytest.mark.parametrize(
    ("words", "tried", "expected"),
    [
        ("+one:a !two:a +three:a", "", "least-in-flight: one three"),
        ("+one:a xtwo:a +three:a", "", "least-in-flight: one three"),
        ("+one:a btwo:a +three:a", "", "least-in-flight: one three"),
        ("+one:a ttwo:a +three:a", "", "least-in-flight: one three"),
        ("+one:a ~two:a +three:a", "", "least-in-flight: one three"),
        ("+one:a !two:a", "", "only-node: one"),
        # who is kept away is no help for who has tried all others
        ("+one:a !two:a +three:a", "one three", "all-tried: one two three"),
        # drained
        ("~one:a +two:b", "", "drained: one"),
        ("~one:a -two:a", "", "drained: one"),
        ("~one:a +two:a", "two", "all-tried: one two"),
        ("~one: +two:b", "", "no-model"),
        # full: wait for it, unless it was tried
        ("bone:a", "", "busy: one until 10"),
        ("bone:a btwo:a -three:a ~four:a", "", "busy: one two until 10"),
        ("bone:a +two:a", "two", "busy: one until 10"),
        ("bone:a +two:a", "one two", "all-tried: one two"),
        ("bone:a +two:a", "one", "only-node: two"),
        # panic: under 34 % of those that have the model are left, so the ejected are tried
        ("!one:a", "", "only-node: one"),
        ("!one:a !two:a", "", "least-in-flight: one two"),
        ("!one:a !two:a +three:a", "", "least-in-flight: one two three"),
        ("!one:a xtwo:a ttwo:a -three:a", "", "least-in-flight: one two two"),
        ("!one:a !two:a +three:a +four:a", "", "least-in-flight: three four"),
        ("!one:a !two:a !three:a +four:a", "", "least-in-flight: one two three four"),
        # whoever does not have the model counts for nothing
        ("!one:a +two:b +three:b +four:b", "", "only-node: one"),
        # whoever is down counts, and is never tried; whoever is drained is neither
        ("!one:a +two:a -three:a -four:a", "", "least-in-flight: one two"),
        ("!one:a +two:a -three:a", "", "least-in-flight: one two"),
        ("!one:a +two:a ~three:a ~four:a", "", "only-node: two"),
        ("!one:a ?two:a", "", "only-node: one"),
        ("?one:a -two:a", "", "drained: one"),
        # whoever is full is never tried, nor whoever is ejected and full
        ("bone:a !two:a !three:a", "", "least-in-flight: two three"),
        ("Xone:a !two:a !three:a", "", "least-in-flight: two three"),
        ("Xone:a Xtwo:a", "", "busy: one two until 10"),
        ("bone:a btwo:a +three:a", "", "only-node: three"),
    ],
)
def test_who_is_kept_away(words: str, tried: str, expected: str) -> None:
    assert verdict([some(*words.split())], target("a"), *tried.split()) == expected


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        ("+one:a !two:a +three:a", 59.9, "least-in-flight: one three"),
        ("+one:a !two:a +three:a", 60.0, "least-in-flight: one two three"),
        ("+one:a xtwo:a", 60.0, "least-in-flight: one two"),
        ("+one:a ttwo:a", 59.9, "only-node: one"),
        ("+one:a ttwo:a", 1e9, "least-in-flight: one two"),  # a trial that tells nothing for long
        ("bone:a +two:a", 9.9, "only-node: two"),
        ("bone:a +two:a", 10.0, "least-in-flight: one two"),
        ("bone:a", 10.0, "only-node: one"),
        ("+one:a ttwo:a ~three:a", inf, "least-in-flight: one two"),
        ("bone:a xtwo:a +three:a", inf, "least-in-flight: one two three"),
    ],
)
def test_for_how_long(words: str, at: float, expected: str) -> None:
    """What breakers say is left out for good by one who asks for the end of time."""
    assert verdict([some(*words.split())], target("a"), now=at) == expected


def test_another_model_is_no_concern_of_a_breaker() -> None:
    nodes = some("xone:a,b", "btwo:a,b", "!three:a,b", "+four:a,b")
    assert verdict([nodes], target("b")) == "least-in-flight: one two four"
    assert verdict([nodes], Target()) == "least-in-flight: one two four"


def test_later_pools_are_asked_before_an_ejected_node_of_the_first() -> None:
    pools = [some("!one:a"), some("+two:a")]
    assert verdict(pools, target("a")) == "later-pool: two"
    pools = [some("!one:a", "!two:a"), some("+three:a", "!four:a")]
    assert verdict(pools, target("a")) == "least-in-flight: one two"


def test_ejected_nodes_that_are_preferred_are_asked_after_the_others() -> None:
    """A single one would always be less than 34 % of its kind."""
    nodes = some("!one:a", "+two:a", "+three:a")
    everyone = frozenset(node.spec.url for node in nodes)
    wanted = Target(parse("a"), bounds=Bounds(everyone, preferred=frozenset([nodes[0].spec.url])))
    assert verdict([nodes], wanted) == "least-in-flight: two three"
    assert verdict([nodes], wanted, now=60.0) == "only-node: one"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("!one:a", "pinned: one"),
        ("xone:a", "pinned: one"),
        ("tone:a", "pinned: one"),
        ("bone:a", "busy: one until 10"),
        ("Xone:a", "busy: one until 10"),
        ("~one:a", "drained: one"),
        ("?one:a", "drained: one"),
        ("~one:b", "not-on-pin: one"),
        ("-one:a", "pin-down: one"),
    ],
)
def test_a_pin_passes_breakers_but_neither_drain_nor_a_full_node(word: str, expected: str) -> None:
    assert verdict([some(word, "+two:a")], target("a@one")) == expected


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("good", range(11))
def test_panic_begins_under_the_configured_share(share: float, good: int) -> None:
    nodes = [some(f"{'+' if i < good else '!'}n{i}:a")[0] for i in range(10)]
    found = eligible([nodes], target("a"), (), replace(RULES, panic_share=share), 0.0)
    if isinstance(found, Eligible):
        assert len(found.nodes) == (10 if good < share * 10 else good)
    else:
        assert (share, good) == (0.0, 0)


def test_a_pinned_node_that_failed_is_down_for_this_request() -> None:
    found = eligible(PINNED, target("a@gpu-1"), {"http://10.0.0.11:11434"}, RULES, 0.0)
    assert not isinstance(found, Eligible)
    assert found.refusal is Refusal.PIN_DOWN


def test_the_only_node_that_may_be_asked_is_pinned_when_it_is_pinned() -> None:
    found = eligible([some("+one:a")], target("a@one"), (), RULES, 0.0)
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
    assert pick(made, RULES, 0.0) is made[chosen]


def test_among_equals_the_one_whose_turn_is_longest_ago() -> None:
    one, two, three = some("+one:a", "+two:a", "+three:a")
    one.turn, two.turn, three.turn = 7, 5, 6
    assert pick([one, two, three], RULES, 0.0) is two
    two.in_flight = 1
    assert pick([one, two, three], RULES, 0.0) is three


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
    chosen = pick(made, RULES, 0.0)
    assert chosen.load(0.0, 30.0) == min(node.load(0.0, 30.0) for node in made)
