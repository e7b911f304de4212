"""Progress of several nodes in one stream: what a client is told, and when."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.progress import Progress, told

LAYER = "sha256:aa"


def line(status: str, **fields: Any) -> bytes:
    return json.dumps({"status": status, **fields}).encode() + b"\n"


def layer(completed: int, total: int = 100, digest: str = LAYER) -> bytes:
    return line("pulling aa", digest=digest, total=total, completed=completed)


def said(records: Any) -> list[Any]:
    return [json.loads(record) for record in records]


def counts(records: Any) -> list[int]:
    return [record.get("completed", 0) for record in said(records)]


def end(progress: Progress) -> Any:
    return json.loads(progress.outcome())


def test_a_node_alone_is_passed_on_byte_for_byte() -> None:
    progress = Progress(["a"])
    odd = b'{"status":"pulling aa",  "digest":"sha256:aa","new":1}\n'
    assert list(progress.take("a", odd)) == [odd]
    assert list(progress.take("a", odd[:-1])) == [odd]
    assert list(progress.take("a", line("success"))) == []
    assert end(progress) == {"status": "success"}
    assert progress.done == ["a"]


def test_a_status_is_told_once() -> None:
    progress = Progress(["a", "b"])
    assert said(progress.take("a", line("pulling manifest"))) == [{"status": "pulling manifest"}]
    assert list(progress.take("b", line("pulling manifest"))) == []


def test_a_status_behind_the_layers_waits_for_every_node() -> None:
    progress = Progress(["a", "b"])
    progress.take("a", layer(100))
    assert list(progress.take("a", line("verifying"))) == []
    assert list(progress.take("a", b'{"status":"writing"}')) == []
    assert said(progress.take("b", line("verifying"))) == [{"status": "verifying"}]
    assert said(progress.fail("b", "gone")) == [
        {"status": "pulling aa", "digest": LAYER, "total": 100, "completed": 100},
        {"status": "writing"},
    ]


def test_completed_is_the_mean_and_zero_is_left_out() -> None:
    progress = Progress(["a", "b"])
    first = {"status": "pulling aa", "digest": LAYER, "total": 100}
    assert said(progress.take("a", line("pulling aa", digest=LAYER, total=100))) == [first]
    assert said(progress.take("a", layer(50))) == [{**first, "completed": 25}]
    assert said(progress.take("b", layer(100))) == [{**first, "completed": 75}]
    assert said(progress.take("a", layer(100))) == [{**first, "completed": 100}]


def test_what_changes_nothing_is_not_told() -> None:
    progress = Progress(["a", "b"])
    progress.take("a", layer(50))
    assert list(progress.take("a", layer(50))) == []
    assert list(progress.take("a", layer(10))) == []


def test_a_size_that_grows_is_told() -> None:
    progress = Progress(["a", "b"])
    progress.take("a", line("pulling aa", digest=LAYER))
    assert [one.get("total") for one in said(progress.take("a", layer(0, total=7)))] == [7]


def test_a_node_that_is_done_has_every_layer() -> None:
    progress = Progress(["a", "b"])
    progress.take("a", layer(100))
    assert counts(progress.take("b", line("success"))) == [100]


def test_success_comes_once_at_the_end_of_all() -> None:
    progress = Progress(["a", "b"])
    assert list(progress.take("a", line("success"))) == []
    assert list(progress.take("a", line("more"))) == []
    assert list(progress.end("a")) == []
    assert list(progress.take("b", line("success"))) == []
    assert end(progress) == {"status": "success"}
    assert progress.done == ["a", "b"]


def test_an_error_names_where_it_failed_and_where_not() -> None:
    progress = Progress(["a", "b", "c", "d"])
    progress.take("a", line("success"))
    progress.take("b", b'{"error":"no space"}')
    progress.take("c", b'{"error":"no space"}')
    progress.end("d")
    assert end(progress) == {
        "error": "b, c: no space; d: its progress ended without success; done on a"
    }


def test_the_error_of_a_node_alone_is_its_own() -> None:
    progress = Progress(["a"])
    progress.take("a", b'{"error":"no such model"}\n')
    assert end(progress) == {"error": "no such model"}


def test_the_first_failure_of_a_node_counts() -> None:
    progress = Progress(["a", "b"])
    progress.fail("a", "first")
    progress.fail("a", "second")
    assert progress.failures == {"a": "first"}


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'"text"', b"\xff", b"[" * 20000])
def test_what_cannot_be_read_fails_its_node(bad: bytes) -> None:
    progress = Progress(["a", "b"])
    progress.take("a", bad)
    assert progress.failures == {"a": "its progress cannot be read"}


def test_blank_lines_are_nothing() -> None:
    progress = Progress(["a"])
    assert list(progress.take("a", b"")) == []
    assert list(progress.take("a", b" \n")) == []
    assert not progress.failures


def test_odd_counts_are_zero() -> None:
    progress = Progress(["a", "b"])
    odd = line("pulling aa", digest=LAYER, total="x", completed=-1)
    assert said(progress.take("a", odd)) == [{"status": "pulling aa", "digest": LAYER}]


def test_a_layer_is_not_told_again_when_all_nodes_have_failed() -> None:
    progress = Progress(["a"])
    assert list(progress.fail("a", "gone")) == []
    both = Progress(["a", "b"])
    both.take("a", layer(10))
    both.fail("a", "gone")
    assert list(both.fail("b", "gone")) == []


def test_failures_alike_are_told_together() -> None:
    assert told({"a": "x", "b": "y", "c": "x"}, []) == "a, c: x; b: y"


_DIGESTS = ("sha256:aa", "sha256:bb")


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """The records of three nodes, in any order that keeps each node's own."""
    queues = []
    for node in "abc":
        lines = [(node, line("pulling manifest"))]
        for digest in _DIGESTS:
            steps = sorted(draw(st.lists(st.integers(0, 100), max_size=4)))
            lines += [(node, layer(step, digest=digest)) for step in steps]
        last = draw(st.sampled_from([line("success"), b'{"error":"x"}']))
        queues.append([*lines, (node, line("writing")), (node, last)])
    order = draw(
        st.permutations(list(itertools.chain(*([i] * len(q) for i, q in enumerate(queues)))))
    )
    taken = [iter(queue) for queue in queues]
    return [next(taken[i]) for i in order]


@given(runs())
def test_bars_never_go_back_and_are_full_if_all_went_well(run: list[tuple[str, bytes]]) -> None:
    progress = Progress(["a", "b", "c"])
    records = [record for node, one in run for record in said(progress.take(node, one))]
    for digest in _DIGESTS:
        told = [one.get("completed", 0) for one in records if one.get("digest") == digest]
        assert told == sorted(told)
        if told and progress.done:
            assert told[-1] == 100
    statuses = [one["status"] for one in records if "digest" not in one]
    assert len(statuses) == len(set(statuses))
    assert set(statuses) == {"pulling manifest", "writing"}


@pytest.mark.parametrize("huge", [1 << 63, 10**400])
def test_counts_that_no_client_can_hold_are_none(huge: int) -> None:
    progress = Progress(["a", "b"])
    assert counts(progress.take("a", layer(huge, huge))) == [0]
    assert counts(progress.take("b", layer(50))) == [25]
    assert list(progress.take("a", layer(huge))) == []


@pytest.mark.parametrize("digest", [False, True])
def test_a_node_whose_progress_has_no_end_is_given_up(digest: bool) -> None:
    progress = Progress(["a", "b"])
    said(progress.take("a", layer(1)))
    for number in range(3000):
        record = layer(1, digest=str(number)) if digest else line(f"status {number}")
        said(progress.take("a", record))
    said(progress.take("b", line("success")))
    assert end(progress) == {"error": "a: its progress has no end; done on b"}
