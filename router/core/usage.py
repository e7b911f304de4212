"""Token counts and durations out of a final record, without decoding it.

Ollama, OpenAI and Anthropic all put them at the end of the object. Inside a JSON string a quote
is escaped, so text that a model writes can never be taken for one of these fields.
"""

import re
from dataclasses import dataclass

_TAIL_BYTES = 2048
_COUNT = re.compile(
    rb'"(prompt_eval_count|eval_count|load_duration|eval_duration|prompt_tokens|completion_tokens'
    rb'|input_tokens|output_tokens)":\s*([0-9]{1,18})\b'
)
_PROMPT = (b"prompt_eval_count", b"prompt_tokens", b"input_tokens")
_COMPLETION = (b"eval_count", b"completion_tokens", b"output_tokens")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a final record told; None for what it did not. Durations in seconds."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    load_s: float | None = None
    eval_s: float | None = None


def read(record: bytes) -> Usage:
    """Look at the end of a record, or of several; the last value of each field wins."""
    found = {match[1]: int(match[2]) for match in _COUNT.finditer(record[-_TAIL_BYTES:])}
    if not found:
        return Usage()
    return Usage(
        prompt_tokens=_first(found, _PROMPT),
        completion_tokens=_first(found, _COMPLETION),
        load_s=_seconds(found, b"load_duration"),
        eval_s=_seconds(found, b"eval_duration"),
    )


def _first(found: dict[bytes, int], keys: tuple[bytes, ...]) -> int | None:
    return next((found[key] for key in keys if key in found), None)


def _seconds(found: dict[bytes, int], key: bytes) -> float | None:
    return found[key] / 1e9 if key in found else None
