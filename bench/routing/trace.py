"""Recorded arrivals: Azure's CSV and Mooncake's JSONL as rows, and thinning by session."""

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

BLOCK_TOKENS = 512
_BUCKET_S = 3.0


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace: seconds since its beginning, the conversation it belongs to, and
    the true lengths in tokens. `blocks` are the prompt's whole pieces of 512 tokens: equal leading
    ones mean an equal beginning."""

    at: float
    session: int
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...]


Trace = Sequence[Row]


def read(path: Path) -> Trace:
    """A trace in either format, told by its first character. Raises OSError, ValueError or
    KeyError for a file that is neither."""
    text = path.read_text()
    lines = text.splitlines()
    rows = _mooncake(lines) if text.startswith("{") else _azure(lines)
    return sorted(rows, key=lambda row: row.at)


def duration_s(trace: Trace) -> float:
    """From the first arrival to the last."""
    return trace[-1].at - trace[0].at


def _azure(lines: Iterable[str]) -> list[Row]:
    """The trace tells of no conversations: every row is one of its own, and shares nothing."""
    rows = []
    start: datetime | None = None
    for number, record in enumerate(csv.DictReader(lines)):
        # Seven digits of a second, of which `datetime` reads six.
        at = datetime.fromisoformat(record["TIMESTAMP"][:26])
        start = start or at
        prompt = max(int(record["ContextTokens"]), 1)
        answer = max(int(record["GeneratedTokens"]), 1)
        rows.append(Row((at - start).total_seconds(), number, prompt, answer, own(number, prompt)))
    return rows


def own(number: int, prompt_tokens: int) -> tuple[int, ...]:
    """Blocks that nobody else has."""
    return tuple(-(number << 12) - place - 1 for place in range(prompt_tokens // BLOCK_TOKENS))


def _mooncake(lines: Iterable[str]) -> list[Row]:
    roll = random.Random(0).random
    sessions: dict[int, int] = {}
    rows = []
    for line in lines:
        record: Mapping[str, object] = json.loads(line)
        rows.append(_turn(record, sessions, _BUCKET_S * roll()))
    return rows


def _turn(record: Mapping[str, object], sessions: dict[int, int], jitter_s: float) -> Row:
    stamp, hashes = record["timestamp"], record["hash_ids"]
    prompt, answer = record["input_length"], record["output_length"]
    if not (isinstance(stamp, int) and isinstance(prompt, int) and isinstance(answer, int)):
        raise ValueError("a record's timestamp and lengths are whole numbers")
    if not isinstance(hashes, list):
        raise ValueError("a record's hash_ids are a list")
    whole = tuple(hashes[: prompt // BLOCK_TOKENS])
    session = _session(hashes, sessions)
    return Row(stamp / 1000 + jitter_s, session, prompt, max(answer, 1), whole)


def _session(hashes: Sequence[int], sessions: dict[int, int]) -> int:
    """The conversation with which it shares most. The first block is the same for everybody (the
    service's system prompt), so it tells nothing."""
    later = hashes[1:]
    known = next((sessions[key] for key in reversed(later) if key in sessions), None)
    session = len(sessions) if known is None else known
    if known is None:
        sessions[-session - 1] = session
    for key in later:
        sessions.setdefault(key, session)
    return session


def thin(trace: Trace, per_hour: float, seed: int) -> Trace:
    """Whole sessions at random, at their original times, until the rate is `per_hour`. A trace
    that has less is returned as it is."""
    wanted = round(per_hour * duration_s(trace) / 3600)
    sizes: dict[int, int] = {}
    for row in trace:
        sizes[row.session] = sizes.get(row.session, 0) + 1
    order = list(sizes)
    random.Random(seed).shuffle(order)
    kept: set[int] = set()
    count = 0
    for session in order:
        if count >= wanted:
            break
        kept.add(session)
        count += sizes[session]
    return [row for row in trace if row.session in kept]
