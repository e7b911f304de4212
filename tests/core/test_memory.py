"""What nodes may have in memory since anybody looked."""

from collections.abc import Iterable

from router.core.policy import Target
from router.core.pool import Pool
from router.core.types import NodeSpec, Outcome, Scope
from tests.core.build import attempt, lease, ready, seen, spec, topology

M = "llama3:8b"
HAS = {"a": [M], "b": [M], "c": []}


def pool_of_three(down: Iterable[str] = ()) -> Pool:
    return ready(topology([spec("a"), spec("b"), spec("c")]), HAS, down)


def names(specs: Iterable[NodeSpec]) -> list[str]:
    return [one.name for one in specs]


def holding(pool: Pool, text: str = M) -> list[str]:
    target = pool.resolve(text)
    assert isinstance(target, Target)
    return names(pool.holding(target))


def unseen(pool: Pool, scope: Scope | None = None) -> list[str]:
    return names(node for node, _ in pool.unseen(scope))


def looked(pool: Pool) -> None:
    for node, used in pool.unseen(None):
        pool.saw(node.url, used)


def test_a_node_is_unseen_from_the_beginning_of_a_request_and_again_from_its_end() -> None:
    pool = pool_of_three()
    assert unseen(pool) == []
    wanted = attempt(pool, f"{M}@a")
    pool.submit(wanted, now=0.0)
    assert unseen(pool) == ["a"]
    looked(pool)
    assert unseen(pool) == []
    pool.leave(wanted, Outcome(), 1.0)
    assert unseen(pool) == ["a"]
    assert unseen(pool, Scope("b", frozenset(["http://b:11434"]))) == []
    looked(pool)
    pool.saw("http://gone:1", 5)
    assert unseen(pool) == []


def test_what_happens_during_a_look_is_not_seen_by_it() -> None:
    pool = pool_of_three()
    pool.submit(attempt(pool, f"{M}@a"), now=0.0)
    ((node, used),) = pool.unseen(None)
    pool.submit(attempt(pool, f"{M}@a"), now=0.0)
    pool.saw(node.url, used)
    assert unseen(pool) == ["a"]


def test_the_model_may_be_where_it_was_listed_and_where_it_was_used_since() -> None:
    pool = pool_of_three()
    assert holding(pool) == []
    pool.observe("http://b:11434", seen(M, resident=[M]), 1.0)
    assert holding(pool) == ["b"]
    assert unseen(pool) == ["b"], "asking is to free it"
    pool.submit(attempt(pool, f"{M}@a"), now=0.0)
    assert holding(pool) == ["a", "b"]
    assert holding(pool, f"{M}@b") == ["b"]
    assert holding(pool, f"{M}@nowhere") == []


def test_a_node_that_is_down_holds_nothing() -> None:
    pool = pool_of_three(down=["b"])
    pool.observe("http://b:11434", seen(M, sign=None, resident=[M]), 1.0)
    assert holding(pool) == []
    assert names(pool.holding(Target())) == []
    assert lease(pool, M).node.name == "a"
