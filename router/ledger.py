"""What has ended is counted and told together, once per turn of the event loop."""

import asyncio
from collections.abc import Callable

from router.core import usage
from router.core.usage import Usage
from router.log import Report
from router.tally import Tally


class Ledger:
    """Requests that have ended and are not counted yet.

    Done for many in a row, this work finds its code and its data in the processor's caches; in
    the midst of each request it costs more. `tell` writes a request's line, `learn` is given what
    whole answers told of their nodes, by url, model, flow, place in line and time.
    """

    def __init__(
        self,
        tally: Tally,
        tell: Callable[[Report, float], None] | None = None,
        learn: Callable[[str, str, Usage, str, int, float], None] = lambda *told: None,
    ) -> None:
        self.tell = tell
        self._learn = learn
        self._tally = tally
        self._ended: list[tuple[Report, float]] = []

    def enter(self, report: Report, ended: float) -> None:
        """Take a request that ended at `ended` (monotonic seconds)."""
        if not self._ended:
            asyncio.get_running_loop().call_soon(self.settle)
        self._ended.append((report, ended))

    def settle(self) -> None:
        """Count and tell all that was entered."""
        entries, self._ended = self._ended, []
        for report, ended in entries:
            if report.final or report.chunks:
                told = usage.read(report.final)
                report.usage = usage.counted(told, report.chunks)
                if told.eval_s is not None and not report.continuations:
                    self._learn(report.url, report.model, told, report.flow, report.place, ended)
            self._tally.count(report, ended)
            if self.tell is not None:
                self.tell(report, ended)
