"""When the watcher says that a file has changed."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router import watch
from tests.process import overwrite, remove, watches, write


def make(folder: Path) -> None:
    folder.mkdir()


async def told(changes: AsyncIterator[None]) -> None:
    async with asyncio.timeout(60):
        await anext(changes)


def test_reads_bytes_or_tells_that_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert watch.read(path) is None
    assert watch.read(tmp_path) is None
    write(path, b"one")
    assert watch.read(path) == b"one"


async def test_bytes_that_differ_at_the_start_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"new")
    await told(watch.changes(path, b"old", poll_s=3600))


@pytest.mark.parametrize("folder", ["etc", "node_modules", ".git"])
async def test_events_tell_without_any_poll(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "file"
    make(path.parent)
    write(path, b"one")
    changes = watch.changes(path, b"one", poll_s=3600)
    for change in (write, overwrite):
        waiting = asyncio.create_task(told(changes))
        while not watches(os.getpid()):  # noqa: ASYNC110 - nothing tells of a change
            await asyncio.sleep(0)
        change(path, change.__name__.encode())
        await waiting


async def test_each_change_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"one")
    changes = watch.changes(path, b"one", poll_s=0.05)
    write(path, b"two")
    await told(changes)
    overwrite(path, b"three")
    await told(changes)
    remove(path)
    await told(changes)
    write(path, b"three")
    await told(changes)
    # Only events and polls that find the same bytes are left.
    rest = asyncio.create_task(told(changes))
    write(path, b"three")
    write(tmp_path / "another", b"four")
    await asyncio.wait([rest], timeout=0.5)
    assert not rest.done()
    rest.cancel()
    await asyncio.gather(rest, return_exceptions=True)


async def test_a_directory_that_is_gone_is_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "later" / "file"
    changes = watch.changes(path, None, poll_s=0.02)
    waiting = asyncio.create_task(told(changes))
    await asyncio.wait([waiting], timeout=0.05)
    make(path.parent)
    write(path, b"one")
    await waiting
    remove(path)
    path.parent.rmdir()
    await told(changes)
