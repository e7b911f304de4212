"""Merge what several nodes tell of one pull or create into one stream, as a single node has it.

Source: Ollama's progress records, as described in `docs/compatibility.md`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from router.core import wording

_record = msgspec.json.Decoder(dict[str, object]).decode
SUCCESS = "success"


# No model has as many layers, and no node as many words.
_KNOWN_MAX = 2000
_COUNT_MAX = (1 << 63) - 1


@dataclass(slots=True)
class _Part:
    """What one node has told. `running`: its stream goes on; `done`: it has said `success`."""

    said: set[str] = field(default_factory=set)
    layers: dict[str, float] = field(default_factory=dict)  # digest -> share that is there, 0 to 1
    running: bool = True
    done: bool = False

    def says(self, status: str) -> bool:
        """Whether nobody need wait for this node to say it."""
        return not self.running or status in self.said

    def share(self, digest: str) -> float:
        return 1.0 if self.done else self.layers.get(digest, 0.0)


@dataclass(slots=True)
class _Layer:
    """One digest over all nodes, as the client has been told of it."""

    record: Mapping[str, object]
    total: int
    completed: int = 0


class Progress:
    """Merges records by these rules.

    A layer's `total` is its size, and `completed` the mean over the nodes that go on or are
    done, never less than before: the bar moves while any node moves, and is full when all are.
    Any other status is told once: at once while no layer has been seen, after that when every
    node that goes on has said it. `success` is held back: `outcome` says what the end is.
    The records of a node that is alone pass as they are.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self.failures: dict[str, str] = {}
        self._parts = {node: _Part() for node in nodes}
        self._layers: dict[str, _Layer] = {}
        self._held: dict[str, bytes] = {}  # statuses that not all have said yet
        self._told: set[str] = set()

    @property
    def done(self) -> Sequence[str]:
        """The nodes that have said `success`."""
        return [node for node, part in self._parts.items() if part.done]

    def take(self, node: str, line: bytes) -> Iterable[bytes]:
        """Take a record of a node; gives those that the client is to be told now.

        Nothing that comes after a node's `success` or error counts.
        """
        part = self._parts[node]
        if not part.running or not line.strip():
            return ()
        try:
            record = _record(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return self.fail(node, "its progress cannot be read")
        if "error" in record:
            return self.fail(node, str(record["error"]))
        status = str(record.get("status", ""))
        if status == SUCCESS:
            part.running, part.done = False, True
            return self._settled()
        if len(self._parts) == 1:
            return (line if line.endswith(b"\n") else line + b"\n",)
        if len(part.said) + len(part.layers) > _KNOWN_MAX:
            return self.fail(node, "its progress has no end")
        digest = record.get("digest")
        if isinstance(digest, str):
            return self._layer(part, digest, record)
        return self._status(part, status, line)

    def fail(self, node: str, text: str) -> Iterable[bytes]:
        """The node goes no further, for this reason, unless it was done already."""
        part = self._parts[node]
        if not part.running:
            return ()
        part.running = False
        self.failures[node] = text
        return self._settled()

    def end(self, node: str) -> Iterable[bytes]:
        """The node's stream is over, whatever it has said."""
        return self.fail(node, "its progress ended without success")

    def outcome(self) -> bytes:
        """The last record: `success`, or an error that says where it failed and where not."""
        if not self.failures:
            return wording.dumps({"status": SUCCESS}) + b"\n"
        return wording.dumps({"error": told(self.failures, self.done)}) + b"\n"

    def _status(self, part: _Part, status: str, line: bytes) -> Iterable[bytes]:
        part.said.add(status)
        if status in self._told:
            return ()
        self._held.setdefault(status, line if line.endswith(b"\n") else line + b"\n")
        return list(self._ripe((status,)))

    def _ripe(self, statuses: Iterable[str]) -> Iterable[bytes]:
        """Those of the statuses held that are true of every node, or need not wait for that."""
        for status in statuses:
            if not self._layers or all(part.says(status) for part in self._parts.values()):
                self._told.add(status)
                yield self._held.pop(status)

    def _layer(self, part: _Part, digest: str, record: Mapping[str, object]) -> Iterable[bytes]:
        total, completed = _count(record, "total"), _count(record, "completed")
        layer = self._layers.get(digest)
        if layer is None:
            layer = self._layers[digest] = _Layer(record, total)
            fresh = True
        else:
            fresh = layer.total < total
            layer.total = max(layer.total, total)
        part.layers[digest] = min(1.0, completed / total) if total else 0.0
        return self._moved(digest, fresh=fresh)

    def _moved(self, digest: str, *, fresh: bool) -> Iterable[bytes]:
        """The record of a layer, if it has changed: `fresh` tells that it has in any case."""
        layer = self._layers[digest]
        parts = [part for part in self._parts.values() if part.running or part.done]
        if parts:
            share = sum(part.share(digest) for part in parts) / len(parts)
            completed = max(layer.completed, int(layer.total * share))
            fresh = fresh or completed > layer.completed
            layer.completed = completed
        if not fresh:
            return ()
        counts = {"total": layer.total, "completed": layer.completed}
        merged = {**layer.record, **counts}
        # Ollama leaves out what is zero.
        shown = {k: v for k, v in merged.items() if v or k not in counts}
        return (wording.dumps(shown) + b"\n",)

    def _settled(self) -> Iterable[bytes]:
        """What a node's end brings: nobody waits any more for its layers and words."""
        moved = [line for digest in self._layers for line in self._moved(digest, fresh=False)]
        return [*moved, *self._ripe(tuple(self._held))]


def told(failures: Mapping[str, str], done: Sequence[str]) -> str:
    """What is said of a request that failed on some nodes; a node that was alone speaks itself.

    Nodes that failed in the same way are named together.
    """
    if len(failures) == 1 and not done:
        return next(iter(failures.values()))
    alike: dict[str, list[str]] = {}
    for node, text in failures.items():
        alike.setdefault(text, []).append(node)
    parts = [f"{', '.join(nodes)}: {text}" for text, nodes in alike.items()]
    if done:
        parts.append(f"done on {', '.join(done)}")
    return "; ".join(parts)


def _count(record: Mapping[str, object], name: str) -> int:
    value = record.get(name)
    return value if isinstance(value, int) and 0 < value <= _COUNT_MAX else 0
