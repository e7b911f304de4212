"""How much work a request is, as far as its body tells."""

import re
from math import inf

from router.core import prefix
from router.core.work import Priority, Work

_BYTES_PER_TOKEN = 4
_TOKENS_MAX = 262_144  # no model reads more; a larger body is an image
_IMAGE_BYTES = 64 * 1024  # a body that is smaller has none that matters
_IMAGES = (b':"data:', b': "data:', b'"base64"', b'"images"', b'"input_audio"')
_WITH_IMAGES_TOKENS = 2048
_HEAD_BYTES, _TAIL_BYTES = 1024, 4096  # where clients put what is not text
_CUT = b"\0"  # so that what was not together is not taken for one
# Within a JSON string a quote is escaped, so that text can never be taken for one of these.
_NUMBER = re.compile(
    rb'(?<!\\)"(num_ctx|num_predict|max_tokens|max_completion_tokens|max_output_tokens)"\s*:\s*'
    rb"([0-9]{1,9})(?:\.[0-9]*)?(?=[\s,}])"
)


def tokens(body_bytes: int) -> int:
    """How many a body of this size is, as a guess."""
    return min(body_bytes // _BYTES_PER_TOKEN, _TOKENS_MAX)


def work(
    body: bytes | bytearray,
    flow: str = "",
    priority: Priority = Priority.NORMAL,
    deadline: float = inf,
    weight: float = 1.0,
    *,
    answers: bool = True,
    options: bool = True,
    at_least: bool = False,
) -> Work:
    """What is known of a request before it is answered; its tokens are an estimate. `answers`: it
    is for text, which is as long as the model makes it. `options`: it may ask for a context, which
    with `at_least` may be raised."""
    size = len(body)
    num_ctx, most = _limits(body)
    if not options:
        num_ctx = None
    prompt = min(tokens(size), num_ctx or _TOKENS_MAX)
    if size > _IMAGE_BYTES and any(mark in body for mark in _IMAGES):
        prompt = min(prompt, _WITH_IMAGES_TOKENS)
    return Work(
        flow, prompt, prefix.blocks(body) if size >= prefix.BLOCK_BYTES else (),
        most if answers else 0, num_ctx, priority, deadline, weight, size, options and at_least,
    )  # fmt: skip


def _limits(body: bytes | bytearray) -> tuple[int | None, int | None]:
    """The context and the tokens of an answer that a client asks for."""
    edges = body
    if len(body) > _HEAD_BYTES + _TAIL_BYTES:
        edges = body[:_HEAD_BYTES] + _CUT + body[-_TAIL_BYTES:]
    if b"num_" not in edges and b"max_" not in edges:  # quicker than the pattern
        return None, None
    num_ctx = most = None
    for name, number in _NUMBER.findall(edges):
        if name == b"num_ctx":
            num_ctx = int(number) or num_ctx
        else:
            most = int(number) or most
    return num_ctx, most
