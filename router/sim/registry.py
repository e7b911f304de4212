"""Models from and to the registry: pull and push."""

from dataclasses import replace
from datetime import UTC, datetime

from router.sim import names
from router.sim.exchange import Exchange
from router.sim.models import SimModel, at_once
from router.sim.names import Name
from router.sim.progress import Failed, Progress, report
from router.sim.recipe import BLOBS
from router.sim.request import Fields, Refused, parse

_STUB_BYTES = 384
_MANIFESTS = BLOBS.replace("blobs", "manifests")


async def pull(exchange: Exchange) -> None:
    """POST /api/pull. A client that leaves cancels it."""
    fields = parse(exchange.body)
    asked = model_or_name(fields).strip()
    name = names.parse(names.stub(asked))
    if name is None:
        raise Refused(400, "invalid model name")

    async def job(progress: Progress) -> None:
        await bring(progress, name)

    await report(exchange, fields, job)


async def push(exchange: Exchange) -> None:
    """POST /api/push. The name is judged only once the stream runs."""
    fields = parse(exchange.body)
    asked = model_or_name(fields)
    if not asked:
        raise Refused(400, "model is required")

    async def job(progress: Progress) -> None:
        await _send(progress, asked)

    await report(exchange, fields, job)


def model_or_name(fields: Fields) -> str:
    """The model a management request is about, as it was spelled."""
    return fields.text("model") or fields.text("name")


async def bring(progress: Progress, name: Name) -> SimModel:
    """Put the registry's model of that name on the shelf. Raises Failed when it has none."""
    machine = progress.exchange.machine
    await progress.say("pulling manifest")
    model = machine.spec.published(name) or _stub(progress.exchange, name)
    if model is None:
        raise Failed("pull model manifest: file does not exist")
    for layer in model.layers:
        if machine.shelf.blob(layer.digest) is None:
            await progress.move("pulling", layer)
        else:
            size = layer.size
            known = {"digest": layer.digest, "total": size, "completed": size}
            await progress.say(f"pulling {layer.short}", **known)
    await progress.say("verifying sha256 digest")
    await progress.say("writing manifest")
    pulled = replace(model, modified_at=datetime.now(UTC))
    machine.shelf.put(pulled, name)
    return pulled


def _stub(exchange: Exchange, name: Name) -> SimModel | None:
    """The entry that a pull of a cloud model leaves: no weights, only where it runs."""
    sourced = names.split_source(str(name))
    if sourced is None or sourced.source != "cloud" or exchange.machine.spec.cloud_disabled:
        return None
    return at_once(str(name), size_bytes=_STUB_BYTES, remote_model=sourced.base)


async def _send(progress: Progress, asked: str) -> None:
    machine = progress.exchange.machine
    await progress.say("retrieving manifest")
    name = names.parse(asked)
    model = machine.shelf.at(name) if name is not None else None
    if name is None or model is None:
        await progress.say("couldn't retrieve manifest")
        where = f"{_MANIFESTS}/{'/'.join(name) if name else asked}"
        raise Failed(f"open {where}: no such file or directory")
    if not machine.account.user:
        raise Failed("you are not authorized to push to this namespace")
    for layer in model.layers:
        await progress.move("pushing", layer)
    await progress.say("pushing manifest")
