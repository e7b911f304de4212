"""What a simulated model says: a pure function of the model, the messages and nothing else.

Two nodes with the same model give the same answer, and an answer that was cut off can be checked
to have been continued: see `router.sim.prompt` for what counts as a beginning of an answer.
No token holds a line break.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping

# About every fifth word is not plain ASCII, or is something that Go's JSON writer escapes.
_WORDS = (
    "the", "router", "sends", "each", "call", "to", "one", "node", "and", "waits", "until",
    "a", "slot", "is", "free", "again", "while", "others", "load", "their", "model", "from",
    "disk", "with", "care", "so", "nobody", "notices", "it", "café", "über", "naïve", "漢字",
    "🦙", "fjord", "<b>", "R&D", "x\u2028y", "don't", '"quoted"', "back\\slash", "Größe",
)  # fmt: skip
CHARS_PER_TOKEN = 4


def _digest(*parts: str) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "replace")
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.digest()


def _numbers(seed: bytes) -> Iterator[int]:
    block = seed
    while True:
        block = hashlib.sha256(block).digest()
        yield from (int.from_bytes(block[at : at + 4], "big") for at in range(0, 32, 4))


def token_count(text: str) -> int:
    """Tokens of a prompt text."""
    return math.ceil(len(text) / CHARS_PER_TOKEN)


def words(model: str, prompt: str, bounds: tuple[int, int], *, about: str = "") -> list[str]:
    """Tokens of the answer to `prompt`, at least one; joined they are its text.

    `bounds` are the fewest and the most tokens. `about` sets apart texts of another kind to the
    same prompt (thinking, for one).
    """
    numbers = _numbers(_digest(model, prompt, about))
    low, high = bounds
    count = max(1, low + next(numbers) % (high - low + 1))
    chosen = [_WORDS[next(numbers) % len(_WORDS)] for _ in range(count)]
    return [word if at == 0 else f" {word}" for at, word in enumerate(chosen)]


def instance(schema: object, seed: str) -> object:
    """A value that fits the simple parts of a JSON schema: type, properties, items, enum."""
    if not isinstance(schema, Mapping):
        return {"answer": " ".join(_pick(seed, at) for at in range(4))}
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return choices[0]
    kind = schema.get("type", "object")
    simple: dict[object, object] = {"integer": 7, "number": 1.5, "boolean": True, "null": None}
    if kind == "string":
        return _pick(seed, 0)
    if kind == "array":
        return [instance(schema.get("items", {"type": "string"}), seed)]
    if kind in simple:
        return simple[kind]
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {str(name): instance(part, f"{seed}.{name}") for name, part in properties.items()}


def _pick(seed: str, at: int) -> str:
    return _WORDS[_digest(seed, str(at))[0] % len(_WORDS)]


def pieces(text: str) -> list[str]:
    """Cut a given text (JSON, for one) into tokens."""
    return [text[at : at + CHARS_PER_TOKEN] for at in range(0, len(text), CHARS_PER_TOKEN)]


def after(tokens: list[str], given: str) -> list[str] | None:
    """What is left of an answer behind its beginning `given`; None if it does not begin so."""
    text = "".join(tokens)
    if not text.startswith(given):
        return None
    at = len(given)
    for index, token in enumerate(tokens):
        if at < len(token):
            return [token[at:], *tokens[index + 1 :]]
        at -= len(token)
    return []


def vector(model: str, text: str, length: int) -> list[float]:
    """A unit vector for a text, in numbers of at most seven decimals."""
    numbers = _numbers(_digest(model, text, "vector"))
    raw = [next(numbers) / 2**31 - 1 for _ in range(length)]
    norm = math.sqrt(sum(one * one for one in raw)) or 1.0
    return [round(one / norm, 7) for one in raw]


def context_ids(text: str) -> list[int]:
    """Token numbers for the `context` field of generate: one for each token of `text`."""
    return [sum(map(ord, piece)) * 31 % 128_000 for piece in pieces(text)]
