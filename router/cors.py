"""Cross-origin requests: Ollama's own rules, applied here so that nodes never see an Origin."""

import re
from collections.abc import Mapping, Sequence

METHODS = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
HEADERS = ",".join((
    "Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "X-Request-Id",
    "OpenAI-Beta", "x-stainless-arch", "x-stainless-async", "x-stainless-custom-poll-interval",
    "x-stainless-helper-method", "x-stainless-lang", "x-stainless-os",
    "x-stainless-package-version", "x-stainless-poll-helper", "x-stainless-retry-count",
    "x-stainless-runtime", "x-stainless-runtime-version", "x-stainless-timeout",
))  # fmt: skip
MAX_AGE_S = 43200


class Cors:
    """`origins` are patterns in which `*` stands for anything."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = "*" in origins
        patterns = (re.escape(origin.lower()).replace(r"\*", ".*") for origin in origins)
        self._allowed = re.compile("|".join(patterns) or r"(?!)")

    def check(self, origin: str | None, host: str) -> Mapping[str, str] | None:
        """Headers that the answer needs (none for a request of the same origin), or None where
        the origin is not allowed."""
        if not origin or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower()):
            return {}
        if self._any:
            return {"Access-Control-Allow-Origin": "*"}
        if self._allowed.fullmatch(origin.lower()) is None:
            return None
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}

    @staticmethod
    def preflight() -> Mapping[str, str]:
        """What a preflight is told besides the origin."""
        return {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": HEADERS,
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
