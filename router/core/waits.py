"""How long nodes may be silent, for each model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from router.core.node import fits
from router.core.rates import Waits

_REMEMBERED = 1024  # names come from clients


@dataclass(frozen=True)
class ModelWaits:
    """`default` for all models but those that fit the glob of one of `rows`."""

    default: Waits
    rows: tuple[tuple[str, Waits], ...] = ()

    @cached_property
    def of(self) -> Callable[[str], Waits]:
        """The waits of a canonical name: the first row that it fits decides."""
        return lru_cache(_REMEMBERED)(self._found)

    def _found(self, key: str) -> Waits:
        return next((waits for glob, waits in self.rows if fits(key, (glob,))), self.default)
