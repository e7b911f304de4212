"""How the records of a node that goes on with an answer are made to follow those of the first."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.core import edits, peek, usage
from router.core.dialect import Family
from router.core.edits import Splice
from router.core.peek import Span

_DATA = b"data:"
_NOTHING = frozenset((b"", b"null", b'""', b"[]", b"{}"))
_KEPT = frozenset(("id", "created", "system_fingerprint"))
_ENDED = re.compile(rb'"done":\s*true')
# How nearly every chunk goes on behind its head, with and without who speaks.
_CHOICES = b',"choices":['
_TEXT = b'"choices":[{"index":0,"delta":{"content":"'
_SPOKEN = b'"choices":[{"index":0,"delta":{"role":"assistant","content":"'
_EVENT_END = re.compile(rb"(\r?\n\r?\n)")


@dataclass(slots=True)
class Stitch:
    """Makes another node's records follow the `tokens` that were relayed before. `head`: what
    names the first stream, as JSON; `role`: the client was told who speaks.

    What cannot be read passes as it is: nothing is raised."""

    family: Family
    tokens: int
    head: Mapping[str, bytes] = field(repr=False)
    role: bool
    _said: bytes = field(default=b"", init=False, repr=False)  # how the last chunk began,
    _shown: bytes = field(default=b"", init=False, repr=False)  # and what was made of that

    def feed(self, records: bytes) -> bytes:
        """Whole records as the client is to see them; b"" where nothing is left of them."""
        if self.family is Family.NATIVE:
            if not self.tokens or _ENDED.search(records) is None:
                return records
            return b"".join(map(self._line, records.splitlines(keepends=True)))
        parts = _EVENT_END.split(records)
        pairs = zip(map(self._event, parts[::2]), (*parts[1::2], b""), strict=True)
        return b"".join(event + end for event, end in pairs if event is not None)

    def _line(self, line: bytes) -> bytes:
        try:
            fields = peek.top_level(line)
            if line[slice(*fields.get("done", (0, 0)))] != b"true":
                return line
            splices = self._counts(line, fields, "prompt_eval_count", "eval_count")
        except peek.Unreadable:
            return line
        if "eval_count" not in fields:
            end = max(end for _, end in fields.values())
            splices.append(Splice(end, end, b',"eval_count":%d' % self.tokens))
        return b"".join(edits.spliced(line, splices))

    def _event(self, event: bytes) -> bytes | None:
        """None for an event that only says once more who speaks."""
        if self._said and event.startswith(self._said):
            quick = self._quick(event[len(self._said) :])
            if quick is not None:
                return quick
        if not event.startswith(_DATA):
            return event
        splices: list[Splice] = []
        says = True
        try:
            for name, span in peek.entries(event, len(_DATA)):
                if name in _KEPT and name in self.head:
                    splices.append(Splice(*span, self.head[name]))
                elif name == "usage" and event[span[0]] == ord("{"):
                    counts = dict(peek.entries(event, span[0]))
                    names = ("prompt_tokens", "completion_tokens", "total_tokens")
                    splices += self._counts(event, counts, *names)
                elif name == "choices" and b"{" in event[slice(*span)]:
                    at = span[0] + 1
                    self._learn(event[: event.rfind(_CHOICES, 0, at) + 1], splices)
                    says = not self.role or _unspoken(event, at, splices)
        except peek.Unreadable:
            return event
        return b"".join(edits.spliced(event, splices)) if says else None

    def _learn(self, start: bytes, splices: list[Splice]) -> None:
        """Chunks of one second begin alike."""
        if start and len(splices) == len(_KEPT & self.head.keys()):
            self._said, self._shown = start, b"".join(edits.spliced(start, splices))

    def _quick(self, rest: bytes) -> bytes | None:
        """What is made of a chunk that begins like the last and holds nothing but text. To read
        one takes twenty times as long, and a node may leave hundreds of streams behind."""
        if self.role and rest.startswith(_SPOKEN) and not rest.startswith(b'"', len(_SPOKEN)):
            rest = _TEXT + rest[len(_SPOKEN) :]
        if b'"role"' in rest or usage.USAGE in rest:
            return None
        return self._shown + rest

    def _counts(
        self, data: bytes, fields: Mapping[str, Span], prompt: str, completion: str, total: str = ""
    ) -> list[Splice]:
        """The counts of the whole answer. Its second prompt held what was relayed before."""
        known = [name for name in (prompt, completion) if name in fields]
        told = {name: peek.number(data, fields[name]) for name in known}
        if prompt in told:
            told[prompt] = max(0, told[prompt] - self.tokens)
        if completion in told:
            told[completion] += self.tokens
        if total in fields:
            told[total] = sum(told.values())
        return [Splice(*fields[name], b"%d" % number) for name, number in told.items()]


def _unspoken(event: bytes, at: int, splices: list[Splice]) -> bool:
    """Take out of the choice at `at` who speaks; says whether it tells anything else."""
    choice = dict(peek.entries(event, at))
    if "delta" not in choice:
        return True
    start = choice["delta"][0]
    delta = list(peek.entries(event, start))
    names = [name for name, _ in delta]
    if "role" not in names:
        return True
    index = names.index("role")
    first, end = start + 1, delta[index][1][1]
    if index:
        first = delta[index - 1][1][1]  # the comma before it goes with it
    elif len(delta) > 1:
        end = event.index(b",", end) + 1
    splices.append(Splice(first, end, b""))
    told = [span for name, span in delta if name != "role"]
    told.append(choice.get("finish_reason", (0, 0)))
    return any(event[slice(*span)] not in _NOTHING for span in told)
