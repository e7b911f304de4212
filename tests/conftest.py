"""What holds for every test: nothing may block the event loop."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> Iterator[BlockBuster]:
    """A call that blocks inside a running event loop raises, if it comes from the router."""
    with blockbuster_ctx("router") as guard:
        yield guard
