"""Which release of Ollama a simulated node claims to be, and so what it knows."""

from typing import NamedTuple


class Release(NamedTuple):
    """A version without what follows its three numbers."""

    major: int
    minor: int
    patch: int


def release(version: str) -> Release:
    """The release that a version text such as "0.33.0-rc2" names; what is no number is 0."""
    numbers = [_number(part) for part in version.split(".")[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return Release(major, minor, patch)


def _number(part: str) -> int:
    digits = part.partition("-")[0]
    return int(digits) if digits.isdecimal() else 0
