"""A body that goes to several nodes in one pass, and what the body of a create tells."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from router.build import Branch, recipe, tee
from router.core import dialect

ONE, TWO = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


class Source:
    """Pieces on demand; `given` counts them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.given = 0

    def __aiter__(self) -> "Source":
        return self

    async def __anext__(self) -> bytes:
        if self.given == self.count:
            raise StopAsyncIteration
        self.given += 1
        return b"%d" % self.given


async def drink(branch: Branch) -> list[bytes]:
    return [piece async for piece in branch]


async def test_every_branch_gets_every_piece() -> None:
    branches = [Branch(), Branch()]
    async with asyncio.TaskGroup() as group:
        taken = [group.create_task(drink(branch)) for branch in branches]
        await tee(Source(5), branches)
    assert [task.result() for task in taken] == [[b"1", b"2", b"3", b"4", b"5"]] * 2


async def test_the_slowest_branch_sets_the_pace() -> None:
    quick, slow = Branch(), Branch()
    source = Source(100)
    async with asyncio.TaskGroup() as group:
        group.create_task(tee(source, [quick, slow]))
        taken = group.create_task(drink(quick))
        for _ in range(50):
            await asyncio.sleep(0)
        assert source.given <= 2
        assert await drink(slow) == await taken


async def test_a_branch_that_leaves_holds_nobody_up() -> None:
    leaving, other = Branch(), Branch()
    async with asyncio.TaskGroup() as group:
        group.create_task(tee(Source(10), [leaving, other]))
        taken = group.create_task(drink(other))
        assert await anext(leaving) == b"1"
        for _ in range(20):
            await asyncio.sleep(0)
        leaving.leave()
    assert len(taken.result()) == 10


async def test_nothing_more_is_read_when_all_have_left() -> None:
    source, branch = Source(10), Branch()
    branch.leave()
    await tee(source, [branch])
    assert source.given == 1


async def test_what_the_source_raises_comes_out() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"1"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await tee(broken(), [Branch()])


CREATE = dialect.find("/api/create")


@pytest.mark.parametrize(
    ("body", "digests", "base"),
    [
        (b'{"model":"m","from":"llama3"}', [], "llama3"),
        (b'{"model":"m","From":"llama3"}', [], "llama3"),
        (b'{"files":{"a":"%s","b":"%s"}}' % (ONE.encode(), TWO.encode()), [ONE, TWO], ""),
        (b'{"adapters":{"a":"%s"},"draft_files":{"a":"%s"}}' % ((ONE.encode(),) * 2), [ONE], ""),
        (b'{"files":{"a":"sha256:1","b":7},"adapters":[1]}', [], ""),
        (b'{"files":{"a":"%s"}, "files":null}' % ONE.encode(), [], ""),
        (b'{"files":{"a":}}', [], ""),
        (b"nothing", [], ""),
    ],
)
def test_the_body_of_a_create_tells_its_blobs_and_its_base(
    body: bytes, digests: list[str], base: str
) -> None:
    assert CREATE is not None
    found = recipe(CREATE, body)
    assert list(found.digests) == digests
    assert found.base.model == base
