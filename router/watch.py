"""Notice that the configuration file has other bytes than before."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import watchfiles

_SETTLED_MS = 200
_POLL_S = 5.0


async def changes(path: Path, seen: bytes | None, poll_s: float = _POLL_S) -> AsyncIterator[None]:
    """Yield each time the file's bytes differ from those `seen` last; None: there is no file.

    Its directory is watched, so that an editor that replaces the file, and the swapped link of
    a Kubernetes ConfigMap, count. Events only say when to look: the bytes decide, and where no
    events arrive they are looked at every `poll_s` seconds.
    """
    async for _ in _moments(path.parent, poll_s):
        now = await asyncio.to_thread(read, path)
        if now != seen:
            seen = now
            yield


async def _moments(directory: Path, poll_s: float) -> AsyncIterator[None]:
    yield
    while True:
        try:
            async for _ in watchfiles.awatch(
                directory,
                watch_filter=None,
                step=_SETTLED_MS,
                rust_timeout=int(poll_s * 1000),
                yield_on_timeout=True,
                recursive=False,
            ):
                yield
        except (OSError, watchfiles._rust_notify.WatchfilesRustInternalError):
            # The directory is gone, or no more watches are to be had: look without them.
            await asyncio.sleep(poll_s)
            yield


def read(path: Path) -> bytes | None:
    """The bytes of the file, None where it cannot be read.

    Anything but a regular file counts as missing: opening a pipe would wait for ever.
    """
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None
