"""Reading a request's fields the way a node does, and refusing it in the node's words."""

import math
import re
from collections.abc import Mapping

from router.sim import gojson
from router.sim.gojson import BadJson

_DURATION = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+")
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}


class Refused(Exception):
    """The node answers with `status` and `message`.

    `extra` are further fields of a native error; `native` forces that dialect on any path.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        extra: Mapping[str, object] | None = None,
        native: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.extra = extra or {}
        self.native = native


def parse(body: bytes) -> "Fields":
    """The fields of a request body. Raises Refused(400)."""
    if not body:
        raise Refused(400, "missing request body")
    try:
        return Fields(gojson.decode_object(body))
    except BadJson as error:
        raise Refused(400, str(error)) from None


class Fields:
    """A JSON object with getters that insist on types; null counts as absent."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        """The field is there, and not null."""
        return self._fields.get(name) is not None

    def get(self, name: str) -> object:
        """The value as it is; None when absent."""
        return self._fields.get(name)

    def text(self, name: str) -> str:
        """A string, empty when absent."""
        value = self._typed(name, (str,), "string")
        return str(value) if value is not None else ""

    def flag(self, name: str, *, default: bool) -> bool:
        """A nullable boolean."""
        value = self._typed(name, (bool,), "bool")
        return default if value is None else bool(value)

    def number(self, name: str, status: int = 400) -> int | None:
        """An integer, or None; `status` is what a wrong type is answered with."""
        value = self._typed(name, (int, float), "int", status)
        if isinstance(value, bool):
            raise Refused(status, _mismatch(value, name, "int"))
        return int(value) if isinstance(value, int | float) else None

    def items(self, name: str) -> list[object]:
        """An array, empty when absent."""
        value = self._typed(name, (list,), "[]")
        return value if isinstance(value, list) else []

    def part(self, name: str) -> "Fields":
        """An object, empty when absent."""
        value = self._typed(name, (dict,), "map[string]interface {}")
        return Fields(value if isinstance(value, dict) else {})

    def mapping(self, name: str) -> dict[str, object]:
        """An object as it is, its keys in their own case; empty when absent."""
        value = self._typed(name, (dict,), "map[string]interface {}")
        return dict(value) if isinstance(value, dict) else {}

    def texts(self, name: str) -> dict[str, str]:
        """An object of strings, empty when absent."""
        found = {}
        for key, value in self.mapping(name).items():
            if not isinstance(value, str):
                raise Refused(400, _mismatch(value, name, "string"))
            found[key] = value
        return found

    def objects(self, name: str) -> list["Fields"]:
        """An array of objects, with field names in lower case."""
        found = []
        for one in self.items(name):
            if not isinstance(one, dict):
                raise Refused(400, _mismatch(one, name, "object"))
            found.append(Fields(gojson.fold(one)))
        return found

    def keep_alive_s(self) -> float | None:
        """Seconds; below 0 for ever; None when absent."""
        value = self.get("keep_alive")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise Refused(400, _mismatch(value, "keep_alive", "api.Duration"))
        return duration_s(value) if isinstance(value, str) else float(value)

    def _typed(
        self, name: str, types: tuple[type, ...], wanted: str, status: int = 400
    ) -> object | None:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, types):
            raise Refused(status, _mismatch(value, name, wanted))
        return value


def _mismatch(value: object, name: str, wanted: str) -> str:
    found = gojson.kind(value)
    return f"json: cannot unmarshal {found} into Go struct field Request.{name} of type {wanted}"


def duration_s(text: str) -> float:
    """A Go duration such as "1h30m" in seconds. Raises Refused(400)."""
    if text in ("0", "+0", "-0"):
        return 0.0
    if not _DURATION.fullmatch(text):
        unit = re.fullmatch(r"[+-]?[\d.]*\d[\d.]*", text)
        problem = "missing unit in duration" if unit else "invalid duration"
        raise Refused(400, f'time: {problem} "{text}"')
    seconds = math.fsum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))
    return -seconds if text.startswith("-") else seconds
