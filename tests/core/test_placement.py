"""Where a request may go at all: scopes, placement, marks, versions, digests, candidates."""

import datetime
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.bounds import conflicts
from router.core.lease import Lease
from router.core.node import fits, release
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.types import (
    Digest,
    Model,
    Need,
    NodeSpec,
    Observation,
    Outcome,
    Placement,
    Rejected,
    Scope,
    Sign,
    Wish,
)
from tests.core.build import felt, lease, ready, seen, spec, topology

PREFER = Wish.PREFER


def scope(pool: Pool, text: str) -> Scope:
    found = pool.registry.scope(text)
    assert isinstance(found, Scope), found
    return found


def target(
    pool: Pool, text: str, where: str = "", need: Need = Need.NONE, since: tuple[int, ...] = ()
) -> Target | Rejected:
    inside = scope(pool, where) if where else None
    return pool.registry.resolve(text, inside, need, since)


def found(pool: Pool, wanted: Target | Rejected) -> str:
    """The nodes that may be asked, or `refusal: nodes`."""
    verdict = wanted if isinstance(wanted, Rejected) else pool.registry.eligible(wanted)
    return told(verdict)


def told(verdict: Iterable[NodeSpec] | Rejected) -> str:
    if isinstance(verdict, Rejected):
        names = " ".join(node.name for node in verdict.nodes)
        return f"{verdict.refusal}: {names}".rstrip(": ")
    return " ".join(node.name for node in verdict)


def eligible(pool: Pool, text: str, where: str = "") -> str:
    return found(pool, target(pool, text, where))


def known(target: Target | Rejected) -> Target:
    assert isinstance(target, Target), target
    return target


def two_pools(**settings: object) -> Pool:
    """`front` has one and two, `back` has three; all have `a`, and three has `b`."""
    made = topology([spec("one"), spec("two")], [spec("three")], **settings)  # type: ignore[arg-type]
    return ready(
        made, {"one": ["a:latest"], "two": ["a:latest"], "three": ["a:latest", "b:latest"]}
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", "one"),
        ("ONE", "one"),
        ("one:11434", "one"),
        ("http://one:11434", "one"),
        ("pool-0", "one two"),
        ("Pool-1", "three"),
    ],
)
def test_a_scope_is_a_node_or_a_pool(text: str, expected: str) -> None:
    pool = two_pools()
    assert told(pool.registry.everyone(scope(pool, text))) == expected
    assert scope(pool, text) is scope(pool, text)


@pytest.mark.parametrize("text", ["four", "one:1", "", "a b", "@", "x/y"])
def test_an_unknown_scope_names_the_nodes(text: str) -> None:
    verdict = two_pools().registry.scope(text)
    assert isinstance(verdict, Rejected)
    assert told(verdict) == "unknown-pin: one two three"


def test_a_scope_that_could_be_two_nodes_names_them() -> None:
    nodes = [spec("x", "http://h:1"), spec("y", "https://h:1"), spec("z")]
    verdict = ready(topology(nodes), {}).registry.scope("h:1")
    assert isinstance(verdict, Rejected)
    assert told(verdict) == "ambiguous-pin: x y"


def test_a_scope_is_forgotten_with_the_configuration_that_gave_it() -> None:
    pool = two_pools()
    assert told(pool.registry.everyone(scope(pool, "one"))) == "one"
    pool.reconfigure(topology([spec("two")]), now=0.0)
    assert isinstance(pool.registry.scope("one"), Rejected)


def test_a_request_of_a_scope_that_has_gone_is_refused() -> None:
    pool = two_pools()
    one, front = scope(pool, "one"), scope(pool, "pool-0")
    pool.reconfigure(topology([spec("four")]), now=0.0)
    pool.observe("http://four:11434", seen("a:latest"), now=0.0)
    assert found(pool, pool.registry.resolve("a", one)) == "no-model"
    assert found(pool, pool.registry.resolve("a", front)) == "no-model"
    assert found(pool, pool.registry.anyone(front, Need.NONE, ())) == "nodes-down"
    assert found(pool, pool.registry.resolve("a", front, Need.PRIMARY)) == "no-model"


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("a", "", "one two"),
        ("a", "pool-0", "one two"),
        ("a", "pool-1", "three"),
        ("a", "two", "two"),
        ("b", "pool-0", "no-model"),
        ("b", "one", "not-on-pin: one"),
        ("a@two", "pool-0", "two"),
        ("a@two", "two", "two"),
        ("a@two:11434", "pool-0", "two"),
        ("a@three", "pool-0", "out-of-scope: three"),
        ("a@one", "two", "out-of-scope: one"),
        ("a@four", "pool-0", "unknown-pin: one two"),
        ("a@sha256:x", "pool-0", "bad-name"),
        ("a b", "pool-0", "bad-name"),
        ("alias", "pool-0", "two"),
        ("alias", "one", "one"),
        ("alias", "pool-1", "three"),
        ("alias@three", "pool-0", "out-of-scope: three"),
    ],
)
def test_what_a_path_leaves(text: str, where: str, expected: str) -> None:
    assert eligible(two_pools(aliases={"alias": "a@two"}), text, where) == expected


def test_a_lease_stays_in_its_scope_through_every_try() -> None:
    pool = two_pools()
    wanted = known(target(pool, "a", "pool-0"))
    first = pool.submit(Attempt(wanted), now=0.0)
    assert isinstance(first, Lease)
    second = pool.submit(Attempt(wanted, {first.node.url}), now=0.0)
    assert isinstance(second, Lease)
    assert {first.node.name, second.node.name} == {"one", "two"}
    last = pool.submit(Attempt(wanted, {first.node.url, second.node.url}), now=0.0)
    assert told(last if isinstance(last, Rejected) else []) == "all-tried: one two"


def test_a_request_without_a_model_stays_in_its_scope() -> None:
    pool = two_pools()
    assert found(pool, pool.registry.anyone(scope(pool, "pool-1"), Need.NONE, ())) == "three"
    assert found(pool, pool.registry.anyone(scope(pool, "two"), Need.NONE, ())) == "two"
    assert found(pool, pool.registry.anyone(None, Need.NONE, ())) == "one two"


def test_a_scope_whose_nodes_are_down_says_so() -> None:
    pool = two_pools()
    for name in ("one", "two"):
        pool.observe(f"http://{name}:11434", felt(Sign.REFUSED), now=0.0)
    assert eligible(pool, "a", "pool-0") == "nodes-down: one two"
    assert eligible(pool, "a", "one") == "pin-down: one"
    assert told(pool.registry.everyone(None)) == "three"


LABELS = {"gpu": "h100", "room": "2"}
NODES = [
    spec("one", labels=LABELS),
    spec("two", labels={"gpu": "h100"}),
    spec("three", labels={"gpu": "a40"}),
]


def placed(*placements: Placement, down: Iterable[str] = (), **has: str) -> Pool:
    """Three nodes in pool-0 and one, four, in pool-1, each with `a` unless told otherwise."""
    made = topology(NODES, [spec("four")], placements=placements)
    keys = {"one": "a", "two": "a", "three": "a", "four": "a"} | has
    present = {name: [f"{key}:latest" for key in text.split()] for name, text in keys.items()}
    return ready(made, present, down)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Placement(("a",), nodes=("two",)), "two"),
        (Placement(("a",), nodes=("TWO", "four")), "two"),
        (Placement(("a:*",), labels={"gpu": "h100"}), "one two"),
        (Placement(("*",), labels=LABELS), "one"),
        (Placement(("A",), pools=("Pool-1",)), "four"),
        (Placement(("a",), nodes=("one",), labels={"gpu": "a40"}), "one three"),
        (Placement(("b", "!a"), nodes=("two",)), "one two three"),
        (Placement(("!a",), nodes=("two",)), "one two three"),
        (Placement(("b",), nodes=("two",)), "one two three"),
        (Placement(("a",), nodes=("two",), wish=PREFER), "two"),
        (Placement(("a",), pools=("pool-1",), wish=PREFER), "four"),
        (Placement(("a",), labels={"gpu": "none"}), "no-model"),
    ],
)
def test_a_placed_model_goes_where_it_may_live(place: Placement, expected: str) -> None:
    assert eligible(placed(place), "a") == expected


def test_the_first_placement_that_fits_wins() -> None:
    first, second = Placement(("a",), nodes=("one",)), Placement(("*",), nodes=("two",))
    assert eligible(placed(first, second), "a") == "one"
    assert eligible(placed(second, first), "a") == "two"


def test_a_node_that_has_a_model_without_its_being_placed_there_is_not_asked() -> None:
    place = Placement(("a",), nodes=("one", "two"))
    assert eligible(placed(place, one="b", two="b"), "a") == "no-model"
    assert eligible(placed(place, one="a b", two="b", down=["one"]), "a") == "nodes-down: one"
    assert eligible(placed(place, down=["one", "two"]), "a") == "nodes-down: one two"
    assert eligible(placed(place), "a@three") == "not-on-pin: three"
    assert eligible(placed(place), "a", "pool-1") == "not-on-pin: four"
    assert eligible(placed(place), "a@two") == "two"


def test_preferred_nodes_come_first_and_the_others_after_them() -> None:
    place = Placement(("a",), nodes=("three",), wish=PREFER)
    assert eligible(placed(place), "a@one") == "one"
    assert eligible(placed(place, three="b"), "a") == "one two"
    assert eligible(placed(place, down=["three"]), "a") == "one two"
    pool = placed(place)
    wanted = known(target(pool, "a"))
    tried = pool.submit(Attempt(wanted, {"http://three:11434"}), now=0.0)
    assert isinstance(tried, Lease)
    assert tried.node.name in ("one", "two")


def test_placement_does_not_hold_for_the_cloud() -> None:
    assert eligible(placed(Placement(("*",), nodes=("two",))), "x:cloud") == "one two three"


def disks(**sizes: int) -> Pool:
    """Nodes with one model each, of this size; `one` may not use any but `a`."""
    specs = [spec(name, models=("a",) if name == "barred" else ()) for name in sizes]
    place = Placement(("p",), nodes=("two", "three"))
    prefer = Placement(("q",), nodes=("two", "three"), wish=PREFER)
    pool = Pool(topology(specs, placements=[place, prefer]), now=0.0)
    for name, size in sizes.items():
        entries: Mapping[str, Mapping[str, object]] = {
            "m:latest": {"size": size},
            "odd:latest": {"size": "?"},
        }
        models = {key: Model(key, key, entry) for key, entry in entries.items()}
        pool.observe(f"http://{name}:11434", Observation(Sign.GOOD, present=models), now=0.0)
    return pool


def homes(pool: Pool, text: str, where: str = "") -> str:
    return told(pool.registry.homes(known(target(pool, text, where))))


def down(pool: Pool, *names: str) -> Pool:
    for name in names:
        pool.observe(f"http://{name}:11434", felt(Sign.REFUSED), now=0.0)
    return pool


def test_a_model_is_brought_to_the_emptiest_disks_first() -> None:
    pool = disks(one=3, two=2, three=1, four=2)
    assert homes(pool, "new") == "three two four one"
    assert homes(pool, "new@two") == "two"
    assert homes(pool, "new", "one") == "one"
    assert homes(pool, "p") == "three two"
    assert homes(pool, "q") == "three two"
    pool.observe("http://one:11434", seen("new:latest"), now=0.0)
    assert homes(pool, "new") == "one three two four"


def test_a_model_is_brought_only_where_it_may_live() -> None:
    pool = down(disks(one=1, two=2, three=3), "three")
    assert homes(pool, "p") == "two"
    assert homes(pool, "p@one") == "not-placed: one"
    assert homes(pool, "p@three") == "pin-down: three"
    assert homes(down(pool, "two"), "p") == "nodes-down: two three"
    assert homes(pool, "q") == "one"
    assert homes(pool, "new@nobody") == "unknown-pin: one two three"
    assert homes(disks(barred=1), "b") == "not-placed: barred"


def test_a_stub_of_the_cloud_is_brought_to_the_nodes_that_may_ask_it() -> None:
    pool = ready(topology([spec("one"), spec("two", cloud=True)]), {})
    assert homes(pool, "x:cloud") == "two"
    assert homes(pool, "x") == "one two"


def holders(pool: Pool, text: str, where: str = "") -> str:
    return told(pool.registry.holders(known(target(pool, text, where))))


def test_the_holders_of_a_model_are_all_nodes_that_have_it() -> None:
    pool = placed(Placement(("a",), nodes=("two",)), three="b")
    assert holders(pool, "a") == "one two four"
    assert holders(pool, "a@one") == "one"
    assert holders(pool, "a", "pool-0") == "one two"
    assert holders(pool, "x:cloud") == "no-model"
    assert holders(pool, "nope") == "no-model"
    assert holders(pool, "b@one") == "not-on-pin: one"
    assert holders(pool, "a@nobody") == "unknown-pin: one two three four"
    assert holders(down(pool, "three"), "b") == "nodes-down: three"
    assert holders(pool, "b@three") == "pin-down: three"
    assert told(pool.registry.holders(Target())) == "no-model"


CLOUDY = [spec("one"), spec("two", cloud=True), spec("three", primary=True)]


def marked(*specs: NodeSpec) -> Pool:
    names = [node.name for node in specs]
    return ready(topology(specs[:2], specs[2:]), {name: ["a:latest"] for name in names})


@pytest.mark.parametrize(
    ("text", "where", "need", "expected"),
    [
        ("x:cloud", "", Need.NONE, "two"),
        ("x:cloud", "pool-0", Need.NONE, "two"),
        ("x:cloud", "pool-1", Need.NONE, "unmarked: three"),
        ("x:cloud@one", "", Need.NONE, "unmarked: one"),
        ("x:cloud@two", "", Need.NONE, "two"),
        ("a", "", Need.NONE, "one two"),
        ("a", "", Need.PRIMARY, "three"),
        ("x:cloud", "", Need.PRIMARY, "three"),
        ("a@one", "", Need.PRIMARY, "one"),
        ("a", "one", Need.PRIMARY, "one"),
        ("a", "pool-0", Need.PRIMARY, "unmarked: one two"),
        ("nope", "", Need.PRIMARY, "no-model"),
    ],
)
def test_marks_say_who_is_asked(text: str, where: str, need: Need, expected: str) -> None:
    pool = marked(*CLOUDY)
    assert found(pool, target(pool, text, where, need)) == expected


def test_without_marks_any_node_does_for_the_cloud_and_one_node_is_its_own_primary() -> None:
    pool = marked(spec("one"), spec("two"))
    assert eligible(pool, "x:cloud") == "one two"
    assert found(pool, pool.registry.anyone(None, Need.CLOUD, ())) == "one two"
    assert found(pool, pool.registry.anyone(None, Need.PRIMARY, ())) == "unmarked: one two"
    assert found(pool, pool.registry.anyone(None, Need.ANY, ())) == "one two"
    alone = marked(spec("one"))
    assert found(alone, alone.registry.anyone(None, Need.PRIMARY, ())) == "one"
    down(alone, "one")
    assert found(alone, alone.registry.anyone(None, Need.PRIMARY, ())) == "nodes-down: one"


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("0.33.0-rc2", (0, 33, 0)),
        ("0.14", (0, 14, 0)),
        ("1", (1, 0, 0)),
        ("0.14.0.1", (0, 14, 0, 1)),
        ("0.0.0", ()),
        ("", ()),
        ("dev", ()),
    ],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


def aged(**versions: str) -> Pool:
    pool = Pool(topology([spec(name) for name in versions]), now=0.0)
    for name, version in versions.items():
        pool.observe(f"http://{name}:11434", seen("a:latest", version=version), now=0.0)
    return pool


@pytest.mark.parametrize(
    ("text", "since", "expected"),
    [
        ("a", (0, 14, 0), "new odd"),
        ("a", (0, 13, 3), "old new odd"),
        ("a", (0, 13, 4), "new odd"),
        ("a", (0, 99, 0), "odd"),
        ("a", (), "old new odd"),
        ("a@old", (0, 14, 0), "too-old: old"),
        ("a@odd", (0, 14, 0), "odd"),
        ("b", (0, 14, 0), "no-model"),
    ],
)
def test_only_nodes_that_know_the_endpoint_are_asked(
    text: str, since: tuple[int, ...], expected: str
) -> None:
    pool = aged(old="0.13.3", new="0.14.0", odd="0.0.0")
    assert found(pool, target(pool, text, since=since)) == expected


def test_where_all_that_have_the_model_are_too_old_their_versions_are_told() -> None:
    pool = aged(one="0.12.0", two="0.13.5-rc1", three="0.14.0")
    pool.observe("http://three:11434", seen("b:latest"), now=0.0)
    verdict = pool.submit(Attempt(known(target(pool, "a", since=(0, 14, 0)))), now=0.0)
    assert isinstance(verdict, Rejected)
    assert told(verdict) == "too-old: one two"
    assert verdict.versions == ("0.12.0", "0.13.5-rc1")
    assert found(down(pool, "three"), target(pool, "b", since=(0, 14, 0))) == "nodes-down: three"
    assert found(pool, pool.registry.anyone(None, Need.ANY, (1, 0, 0))) == "too-old: one two three"


def test_a_node_that_was_updated_is_asked() -> None:
    pool = aged(one="0.13.0")
    assert found(pool, target(pool, "a", since=(0, 14, 0))) == "too-old: one"
    pool.observe("http://one:11434", seen("a:latest", version="0.14.1"), now=0.0)
    assert found(pool, target(pool, "a", since=(0, 14, 0))) == "one"


def digests(rule: Digest, *words: str, down: str = "") -> Pool:
    """Nodes from words such as `one:x3`: the digest and the day of `a:latest` there."""
    pairs = [word.split(":") for word in words]
    pool = Pool(topology([spec(name) for name, _ in pairs], digest=rule), now=0.0)
    for name, has in pairs:
        entry = {"modified_at": f"2026-01-0{has[1:]}T00:00:00Z"}
        models = {"a:latest": Model("a:latest", has[:1].strip("-"), entry)} if has else {}
        sign = Sign.BAD if name == down else Sign.GOOD
        pool.observe(f"http://{name}:11434", Observation(sign, present=models), now=0.0)
    return pool


@pytest.mark.parametrize(
    ("rule", "words", "expected"),
    [
        (Digest.ANY, "one:x1 two:x2 three:y3", "one two three"),
        (Digest.MAJORITY, "one:x1 two:x2 three:y3", "one two"),
        (Digest.NEWEST, "one:x1 two:x2 three:y3", "three"),
        (Digest.MAJORITY, "one:x1 two:y2", "two"),
        (Digest.MAJORITY, "one:x1 two:x2", "one two"),
        (Digest.MAJORITY, "one:x1 two:y2 three:", "two"),
        (Digest.MAJORITY, "one:x1 two:-2", "one two"),
        (Digest.NEWEST, "one:x2 two:y2 three:y1 four:z1", "one"),
        (Digest.MAJORITY, "one: two:", "no-model"),
    ],
)
def test_which_digest_is_asked(rule: Digest, words: str, expected: str) -> None:
    assert eligible(digests(rule, *words.split()), "a") == expected


def test_a_digest_counts_only_on_nodes_that_can_be_asked() -> None:
    words = ["one:x1", "two:x2", "three:y3"]
    assert eligible(digests(Digest.NEWEST, *words, down="three"), "a") == "one two"
    assert eligible(digests(Digest.MAJORITY, *words, down="one"), "a") == "three"
    assert eligible(digests(Digest.MAJORITY, *words), "a@three") == "three"
    assert eligible(digests(Digest.MAJORITY, *words), "a", "three") == "three"


def test_a_conflict_lasts_while_nodes_that_are_up_disagree() -> None:
    pool = digests(Digest.ANY, "one:x1", "two:x2", "three:y3")
    now = pool.registry.conflicts()
    assert now == {"a:latest": {"x": ["one", "two"], "y": ["three"]}}
    assert pool.registry.conflicts() is now
    assert not down(pool, "three").registry.conflicts()
    unknown = digests(Digest.ANY, "one:x1", "two:-2", "three:y3")
    assert unknown.registry.conflicts() == {"a:latest": {"x": ["one"], "y": ["three"]}}


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "x", "y"]), max_size=3),
        max_size=4,
    )
)
def test_a_conflict_is_two_digests_of_one_name(nodes: list[dict[str, str]]) -> None:
    listed = [
        (str(number), {key: Model(key, digest, {}) for key, digest in has.items()})
        for number, has in enumerate(nodes)
    ]
    expected = {
        key: {has[key] for has in nodes if has.get(key)}
        for key in "abc"
        if len({has[key] for has in nodes if has.get(key)}) > 1
    }
    told = conflicts(listed)
    assert {key: set(who) for key, who in told.items()} == expected
    for key, who in told.items():
        for digest, names in who.items():
            assert all(nodes[int(name)][key] == digest for name in names)


ALIASES: Mapping[str, str | tuple[str, ...]] = {"best": ("big", "b", "a@two"), "one": "big"}


@pytest.mark.parametrize(
    ("text", "where", "sent", "expected"),
    [
        ("best", "", "b", "three"),
        ("BEST:latest", "", "b", "three"),
        ("best", "pool-0", "a", "two"),
        ("best", "one", "a", "one"),
        ("best@one", "", "a", "one"),
        ("best@four", "", "big", "unknown-pin: one two three"),
        ("one", "", "big", "no-model"),
    ],
)
def test_an_alias_is_the_first_of_its_models_that_can_be_had(
    text: str, where: str, sent: str, expected: str
) -> None:
    pool = two_pools(aliases=ALIASES)
    wanted = known(target(pool, text, where))
    assert (wanted.sent, found(pool, wanted)) == (sent, expected)


def test_an_alias_moves_on_when_its_model_can_no_longer_be_had() -> None:
    pool = two_pools(aliases=ALIASES)
    assert lease(pool, "best").node.name == "three"
    assert known(target(down(pool, "three"), "best")).sent == "a"
    assert known(target(down(pool, "two"), "best")).sent == "big"
    assert eligible(pool, "best") == "no-model"


def test_an_alias_is_refused_as_its_first_model_is() -> None:
    nodes = [spec("one", cloud=True), spec("two")]
    pool = ready(topology(nodes, aliases={"c": ("x:cloud@two", "b"), "bad": "a b"}), {})
    assert eligible(pool, "c") == "unmarked: two"
    assert eligible(pool, "bad") == "bad-name"
    assert list(pool.registry.aliases) == ["c:latest", "bad:latest"]


def test_lists_hold_what_may_be_had() -> None:
    place = Placement(("a",), nodes=("one",))
    pool = placed(place, two="a b", three="b")
    assert [sorted(models) for models in pool.registry.listed(None)] == [
        ["a:latest"], ["b:latest"], ["b:latest"], []
    ]  # fmt: skip
    assert [sorted(models) for models in pool.registry.listed(scope(pool, "two"))] == [["b:latest"]]
    plain = down(two_pools(), "two")
    assert [sorted(models) for models in plain.registry.listed(None)] == [
        ["a:latest"], ["a:latest", "b:latest"]
    ]  # fmt: skip


def test_lists_hold_the_digest_that_is_asked() -> None:
    pool = digests(Digest.MAJORITY, "one:x1", "two:x2", "three:y3")
    assert [list(models) for models in pool.registry.listed(None)] == [
        ["a:latest"],
        ["a:latest"],
        [],
    ]


def test_stubs_that_nobody_may_ask_for_are_not_listed() -> None:
    nodes = [spec("one"), spec("two", cloud=True), spec("three")]
    places = [Placement(("nothing",), nodes=("one",))]
    pool = ready(topology(nodes, placements=places), {"one": ["x:cloud"], "two": ["x:cloud"]})
    assert [list(models) for models in pool.registry.listed(None)] == [[], ["x:cloud"], []]
    assert [list(models) for models in pool.registry.listed(scope(pool, "one"))] == [[]]


def test_what_limits_a_request_is_read_once_per_change() -> None:
    pool = placed(Placement(("a",), nodes=("one",)))
    first = target(pool, "a")
    assert target(pool, "a") is first
    assert target(pool, "a", "pool-0") is target(pool, "a", "pool-0")
    pool.observe("http://two:11434", seen("b:latest"), now=0.0)
    assert target(pool, "a") is not first


def test_a_client_cannot_have_long_names_remembered() -> None:
    pool = two_pools()
    long = f"a{' ' * 1000}"
    assert eligible(pool, long) == "one two"
    assert target(pool, long) is not target(pool, long)


def test_a_pool_without_rules_sets_no_bounds() -> None:
    pool = two_pools()
    assert known(target(pool, "a", since=(9, 9, 9))).bounds is None, "no version is known"
    assert known(target(pool, "x:cloud")).bounds is None
    anyone = pool.registry.anyone
    assert anyone(None, Need.NONE, (0, 14, 0)) is anyone(None, Need.NONE, ())


def test_a_lease_of_a_bounded_request_is_given_back_as_any() -> None:
    pool = placed(Placement(("a",), nodes=("one",)))
    held = lease(pool, "a")
    pool.leave(held.attempt, Outcome(), 0.0)
    assert pool.in_flight == 0


@pytest.mark.parametrize(
    ("stamp", "year"),
    [
        ("2026-01-01T00:00:00.123456789Z", 2026),
        ("2026-01-01T00:00:00", 2026),
        ("12026-01-01T00:00:00Z", 1970),
        (None, 1970),
    ],
)
def test_a_time_that_cannot_be_read_is_the_beginning_of_time(stamp: object, year: int) -> None:
    moment = Model("a", "", {"modified_at": stamp}).moment("modified_at")
    assert (moment.year, moment.tzinfo) == (year, datetime.UTC)


@pytest.mark.parametrize(
    ("told", "taken"),
    [(7, 7.0), (7.5, 7.5), (0, 0.0), (-7, 0.0), (1e300, 0.0), ("7", 0.0), (None, 0.0)],
)
def test_a_size_that_can_be_none_counts_as_not_told(told: object, taken: float) -> None:
    assert Model("a", "", {"size": told}).size_bytes == taken


@pytest.mark.parametrize(
    ("globs", "expected"),
    [((), True), (("a",), True), (("A*",), True), (("b",), False), (("!a",), False),
     (("*", "!a:latest"), False), (("!b",), True)],
)  # fmt: skip
def test_globs(globs: tuple[str, ...], expected: bool) -> None:
    assert fits("a:latest", globs) is expected
