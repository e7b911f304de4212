"""Models made on the node: create, copy, delete."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from router.sim import blobs, names
from router.sim.exchange import Exchange
from router.sim.models import SimModel, at_once
from router.sim.names import Name
from router.sim.progress import Failed, Progress, report
from router.sim.recipe import Layer, Recipe, blob_path
from router.sim.registry import bring, model_or_name
from router.sim.request import Fields, Refused, parse


async def create(exchange: Exchange) -> None:
    """POST /api/create. Blanks around the name are not taken off."""
    fields = parse(exchange.body)
    name = names.parse(model_or_name(fields))
    if name is None:
        raise Refused(400, "invalid model name")

    async def job(progress: Progress) -> None:
        await _build(progress, fields, name)

    await report(exchange, fields, job)


async def copy(exchange: Exchange) -> None:
    """POST /api/copy."""
    fields = parse(exchange.body)
    source, destination = (_named(fields, role) for role in ("source", "destination"))
    shelf = exchange.machine.shelf
    model = shelf.at(source)
    if model is None:
        raise Refused(404, f"model {json.dumps(fields.text('source'))} not found")
    shelf.put(replace(model, modified_at=datetime.now(UTC)), destination)
    await exchange.empty(200)


async def delete(exchange: Exchange) -> None:
    """DELETE /api/delete. What is loaded stays loaded."""
    asked = model_or_name(parse(exchange.body))
    name = names.parse(names.stub(asked.strip()))
    if name is None:
        raise Refused(400, f"name {json.dumps(asked)} is invalid")
    if not exchange.machine.shelf.drop(name):
        raise Refused(404, f"model '{asked}' not found")
    await exchange.empty(200)


def _named(fields: Fields, role: str) -> Name:
    asked = fields.text(role)
    name = names.parse(asked)
    if name is None:
        raise Refused(400, f"{role} {json.dumps(asked)} is invalid")
    return name


async def _build(progress: Progress, fields: Fields, name: Name) -> None:
    shelf = progress.exchange.machine.shelf
    base = await _base(progress, fields)
    adapters = [blob.digest for blob in _blobs(progress, fields.texts("adapters"))]
    _blobs(progress, fields.texts("draft_files"))
    recipe = _recipe(base.recipe, fields, adapters)
    parts = (base.weights, recipe)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    model = replace(base, recipe=recipe, digest=digest, modified_at=datetime.now(UTC))
    for layer in model.layers:
        known = layer.digest in adapters or shelf.blob(layer.digest) is not None
        verb = "using existing layer" if known else "creating new layer"
        await progress.say(f"{verb} {layer.digest}")
    await progress.say("writing manifest")
    shelf.put(model, name)


async def _base(progress: Progress, fields: Fields) -> SimModel:
    """What the new model is made from: one that is here or can be pulled, or uploaded files."""
    asked = fields.text("from")
    if asked:
        name = names.parse(asked)
        if name is None:
            raise Failed("invalid model name", 400)
        found = progress.exchange.machine.shelf.find(asked)
        return found or await bring(progress, name)
    files = fields.texts("files")
    if not files:
        raise Failed("neither 'from' or 'files' was specified", 400)
    await progress.say("parsing GGUF")
    weights, *rest = _blobs(progress, files)
    size = weights.size + sum(one.size for one in rest)
    return at_once("created", size_bytes=size, weights=weights.digest.removeprefix("sha256:"))


def _blobs(progress: Progress, files: Mapping[str, str]) -> list[Layer]:
    """The blobs of uploaded files. Raises Failed for one that is not here."""
    found = []
    for text in files.values():
        digest = blobs.canonical(text)
        if digest is None:
            raise Failed("invalid digest format", 400)
        blob = progress.exchange.machine.shelf.blob(digest)
        if blob is None:
            raise Failed(f"open {blob_path(digest)}: no such file or directory")
        found.append(blob)
    return found


def _recipe(base: Recipe, fields: Fields, adapters: list[str]) -> Recipe:
    """The base's instructions with those of the request over them."""
    given = {key: _frozen(value) for key, value in fields.mapping("parameters").items()}
    parameters = {**dict(base.parameters), **given}
    messages = [(one.text("role"), one.text("content")) for one in fields.objects("messages")]
    return Recipe(
        system=fields.text("system") or base.system,
        template=fields.text("template") or base.template,
        license=_license(fields.get("license")) or base.license,
        parameters=tuple(sorted(parameters.items())),
        messages=tuple(messages) or base.messages,
        adapters=tuple(adapters) or base.adapters,
    )


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _license(value: object) -> str:
    texts = value if isinstance(value, list) else [value]
    return "\n".join(one for one in texts if isinstance(one, str))
