"""What reads a whole body, and may take a while, beside the event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from router.core.dialect import QUICK_BYTES

_Found = TypeVar("_Found")


async def beside(body: bytes | bytearray | memoryview, read: Callable[[], _Found]) -> _Found:
    """What `read` makes of the body: in a thread, if it is large."""
    return read() if len(body) <= QUICK_BYTES else await asyncio.to_thread(read)
