"""How a simulated node is told to misbehave."""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from router.sim import names


class FaultKind(enum.StrEnum):
    """What goes wrong. A record is one NDJSON line or event; an unstreamed answer is one record."""

    HANG = "hang"  # nothing at all, until released; the scheduler never sees the request
    STATUS = "status"  # `status` with `body`, or with the dialect's error for `message`
    DIE = "die"  # the connection breaks after `after` records; with `partial` inside the next
    STALL = "stall"  # nothing more after `after` records, until released
    GARBAGE = "garbage"  # `body` as it is instead of an HTTP response
    SLOW = "slow"  # every duration of the request times `factor`
    ERROR = "error"  # after `after` records what the API sends when a runner fails in mid-stream
    END = "end"  # a clean end after `after` records, without the final one
    CUT = "cut"  # the connection breaks after `at_byte` bytes of the response, headers included


@dataclass(frozen=True, slots=True)
class Fault:
    """One instruction. With `path` None it meets every inference request, with "*" every request,
    and one that ends in "*" stands for all paths that begin so.

    `times` None means until it is taken away. `reset` breaks a connection with RST, else it is
    closed as the kernel closes those of a killed process.
    """

    kind: FaultKind
    path: str | None = None
    model: str | None = None
    times: int | None = None
    after: int = 0
    partial: bool = False
    status: int = 500
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    message: str = "the runner was told to fail"
    factor: float = 1.0
    at_byte: int = 0
    reset: bool = False

    def meets(self, path: str, model: str | None, *, inference: bool) -> bool:
        """It applies to a request for `path` (without query) that names `model`."""
        if self.path is None and not inference:
            return False
        if self.path is not None and not _fits(self.path, path):
            return False
        return self.model is None or _same(self.model, model)


def _fits(wanted: str, path: str) -> bool:
    if wanted.endswith("*"):
        return path.startswith(wanted[:-1])
    return path == wanted


def _same(wanted: str, asked: str | None) -> bool:
    found = names.parse(asked.strip()) if asked else None
    return found is not None and str(found).lower() == str(names.parse(wanted)).lower()


def from_json(value: Mapping[str, object]) -> Fault:
    """A fault as `POST /sim/fault` takes it: the fields by name. Raises ValueError."""
    known = {one.name for one in fields(Fault)}
    unknown = value.keys() - known
    if unknown or "kind" not in value:
        raise ValueError(f"a fault needs kind, and knows {sorted(known)}; got {sorted(value)}")
    settings = dict(value)
    headers = settings.pop("headers", {})
    pairs = headers.items() if isinstance(headers, dict) else ()
    kind = FaultKind(str(settings.pop("kind")))
    return Fault(kind, headers=tuple((str(a), str(b)) for a, b in pairs), **settings)  # type: ignore[arg-type]


class Faults:
    """The instructions in force, in order; the first one that meets a request is followed."""

    def __init__(self) -> None:
        self._armed: list[tuple[Fault, int | None]] = []

    def __len__(self) -> int:
        """Instructions in force."""
        return len(self._armed)

    def __iter__(self) -> Iterator[Fault]:
        """Those in force, in order."""
        return iter([fault for fault, _ in self._armed])

    def add(self, fault: Fault) -> None:
        """Put `fault` behind those in force."""
        self._armed.append((fault, fault.times))

    def clear(self) -> None:
        """Behave again."""
        self._armed.clear()

    def take(self, path: str, model: str | None, *, inference: bool) -> Fault | None:
        """The fault for this request, if any; counts as one of its times."""
        for at, (fault, left) in enumerate(self._armed):
            if not fault.meets(path, model, inference=inference):
                continue
            if left == 1:
                del self._armed[at]
            elif left is not None:
                self._armed[at] = (fault, left - 1)
            return fault
        return None
