"""Uploads: is a blob here, and take one. Digest and size are kept, never the bytes."""

import hashlib
import json
import re
from urllib.parse import unquote

from router.sim.exchange import Exchange
from router.sim.recipe import Layer
from router.sim.request import Refused

PREFIX = "/api/blobs/"
_DIGEST = re.compile("sha256[:-][0-9a-fA-F]{64}")


async def head(exchange: Exchange) -> None:
    """HEAD /api/blobs/:digest."""
    digest = _asked(exchange)
    if exchange.machine.shelf.blob(digest) is None:
        raise Refused(404, f"blob {json.dumps(digest)} not found")
    await exchange.empty(200)


async def post(exchange: Exchange) -> None:
    """POST /api/blobs/:digest. The body of one that is here already is not read."""
    digest = _asked(exchange)
    shelf = exchange.machine.shelf
    if shelf.blob(digest) is not None:
        await exchange.empty(200)
        return
    state = hashlib.sha256()
    async for piece in exchange.pieces():
        state.update(piece)
    found = Layer(f"sha256:{state.hexdigest()}", exchange.seen.received)
    shelf.upload(found)
    if found.digest != digest:
        expected, got = json.dumps(digest), json.dumps(found.digest)
        raise Refused(400, f"digest mismatch, expected {expected}, got {got}")
    await exchange.empty(201)


def canonical(text: str) -> str | None:
    """A digest as "sha256:" and 64 hex, None for what is none."""
    if not _DIGEST.fullmatch(text):
        return None
    return text.replace("-", ":").lower()


def _asked(exchange: Exchange) -> str:
    digest = canonical(unquote(exchange.path.removeprefix(PREFIX)))
    if digest is None:
        raise Refused(400, "invalid digest format")
    return digest
