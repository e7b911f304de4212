"""Which beginnings of prompts a loaded model may still have in its cache."""

from collections.abc import Sequence

BLOCK_BYTES = 2048
BLOCK_TOKENS = 512
_HASHED_BYTES = 256 * 1024
_BLOCKS_MAX = 4096  # of one model on one node: two million tokens


def blocks(text: bytes | bytearray | memoryview) -> Sequence[int]:
    """Hashes of the beginnings of a prompt, one for each whole block."""
    found: list[int] = []
    last = 0
    for start in range(0, min(len(text), _HASHED_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        last = hash((last, bytes(text[start : start + BLOCK_BYTES])))
        found.append(last)
    return found


class Prefixes:
    """The blocks that were sent to one model on one node since it was loaded, the latest last."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def common(self, wanted: Sequence[int]) -> int:
        """How many of a prompt's blocks it has, from the first on."""
        known = self._known
        for count, block in enumerate(wanted):
            if block not in known:
                return count
        return len(wanted)

    def remember(self, sent: Sequence[int]) -> None:
        """Take a prompt's blocks; the oldest make room, of one prompt the last ones first: they are
        worth nothing without those before them."""
        known = self._known
        for block in reversed(sent):
            known.pop(block, None)
            known[block] = None
        while len(known) > _BLOCKS_MAX:
            del known[next(iter(known))]
