"""What a model is asked: messages or a raw prompt, as one text, and what was answered already.

A trailing assistant message is continued, not answered. A raw prompt is cut behind its last
answer marker (`MARKERS`), failing that behind its last line break, failing that at its end: what
follows the cut is the beginning of the answer. Answers hold neither markers nor line breaks, so a
prompt with a part of its answer behind it is cut at the same place as the prompt alone.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from router.sim.text import CHARS_PER_TOKEN, token_count

MARKERS = (
    "[/INST]",
    "<|assistant|>",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>model\n",
)
_IMAGE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `calls` is the JSON text of its tool calls, `images` are base64."""

    role: str
    content: str = ""
    thinking: str = ""
    calls: str = ""
    images: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The turn as the model reads it. Earlier thinking is not shown to a model again."""
        marks = "".join(f"<|image {zlib.crc32(one.encode()):08x}|>" for one in self.images)
        return f"<|{self.role}|>{self.content}{marks}{self.calls}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` decides the answer; `given` and `given_thinking` are beginnings of it.

    `request` is the content of the last message if a user wrote it; `extra_tokens` are tokens that
    stand for something else than text.
    """

    text: str
    given: str = ""
    given_thinking: str = ""
    request: str = ""
    extra_tokens: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens the model has to read."""
        return token_count(self.text + self.given) + self.extra_tokens

    def blocks(self, block_tokens: int, answer: str = "") -> list[str]:
        """The whole pieces of the prompt (and of an answer behind it) that a cache compares."""
        text = self.text + self.given + answer
        step = block_tokens * CHARS_PER_TOKEN
        return [text[at : at + step] for at in range(0, len(text) - step + 1, step)]


def of_messages(messages: Sequence[Message], *, context: Sequence[object] = ()) -> Prompt:
    """The prompt of a chat. `context` are the token numbers of an earlier generate."""
    begun = messages[-1] if messages else None
    if begun is None or begun.role != "assistant" or begun.calls:
        begun = None
    else:
        messages = messages[:-1]
    before = f"<|context {zlib.crc32(json.dumps(list(context)).encode()):08x}|>" if context else ""
    last = messages[-1] if messages else None
    return Prompt(
        text=before + "".join(map(str, messages)) + "<|assistant|>",
        given=begun.content if begun else "",
        given_thinking=begun.thinking if begun else "",
        request=last.content if last and last.role == "user" else "",
        extra_tokens=len(context) + _IMAGE_TOKENS * sum(len(one.images) for one in messages),
    )


def of_raw(prompt: str, *, images: int = 0) -> Prompt:
    """A prompt that its client has put through the template itself."""
    cut = max((prompt.rfind(one) + len(one) for one in MARKERS if one in prompt), default=0)
    cut = cut or prompt.rfind("\n") + 1 or len(prompt)
    return Prompt(prompt[:cut], given=prompt[cut:], extra_tokens=_IMAGE_TOKENS * images)
