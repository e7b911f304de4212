"""The prompt cache of one loaded model: which beginnings of prompts need no evaluation."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence


class PromptCache:
    """Remembers prompts as chains of blocks, at most `max_blocks` of them, oldest ends first.

    A block's key covers everything before it, so two prompts share keys exactly as far as they
    share their beginning.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._keys: OrderedDict[int, None] = OrderedDict()

    def common(self, blocks: Sequence[Hashable]) -> int:
        """How many leading blocks are known from an earlier prompt."""
        count = 0
        for key in _chain(blocks):
            if key not in self._keys:
                break
            count += 1
        return count

    def remember(self, blocks: Sequence[Hashable]) -> None:
        """Hold these blocks as the newest conversation.

        The end of a conversation is entered before its beginning: a beginning may be shared, and
        is worth nothing once an earlier part of it is gone.
        """
        for key in reversed(list(_chain(blocks))):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._max_blocks:
            self._keys.popitem(last=False)


def _chain(blocks: Sequence[Hashable]) -> Iterator[int]:
    key = 0
    for block in blocks:
        key = hash((key, block))
        yield key
