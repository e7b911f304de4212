"""A process whose clock runs faster, so that an hour of a trace passes in minutes.

python -m bench.routing.hurry SPEED MODULE [ARGUMENT ...]

Every interval and every limit of the program becomes that many times shorter, also those that
cannot be set: what is changed is its monotonic clock and how long its event loop waits. The loop is
asyncio's own, since uvloop has a clock that cannot be changed.
"""

import runpy
import selectors
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def hurried(speed: float) -> Iterator[None]:
    """Inside, `time.monotonic` and the waits of new event loops run so many times faster."""
    real = time.monotonic

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            return super().select(timeout and timeout / speed)

    with (
        patch.object(time, "monotonic", lambda: speed * real()),
        patch.object(selectors, "DefaultSelector", Selector),
        patch.dict(sys.modules, {"uvloop": None}),
    ):
        yield


def main() -> None:
    speed, module, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    with hurried(float(speed)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
