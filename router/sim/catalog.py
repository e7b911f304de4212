"""What a node tells about itself and its models: version, tags, ps, show, the OpenAI list."""

from urllib.parse import unquote

from router.sim import gojson, names
from router.sim.account import REMOTE_HOST
from router.sim.exchange import Exchange
from router.sim.models import SimModel
from router.sim.native import JSON
from router.sim.request import Refused, parse

_TELLS_ABILITIES = (0, 30, 0)
_TELLS_CONTEXT = (0, 10, 0)


async def root(exchange: Exchange) -> None:
    """HEAD, GET /."""
    await exchange.plain("Ollama is running")


async def version(exchange: Exchange) -> None:
    """HEAD, GET /api/version."""
    await exchange.whole({"version": exchange.machine.spec.version}, content_type=JSON)


async def tags(exchange: Exchange) -> None:
    """HEAD, GET /api/tags."""
    abilities = exchange.machine.spec.release >= _TELLS_ABILITIES
    models = [_tag(model, abilities=abilities) for model in exchange.machine.shelf.newest_first()]
    await exchange.whole({"models": models}, content_type=JSON)


def _tag(model: SimModel, *, abilities: bool) -> dict[str, object]:
    details = _details(model)
    value: dict[str, object] = {
        "name": model.name,
        "model": model.name,
        "modified_at": gojson.timestamp(model.modified_at),
        "size": model.size_bytes,
        "digest": model.digest,
        "details": details,
        **_remote(model),
    }
    if abilities:
        details["context_length"] = model.context_length
        details["embedding_length"] = model.embedding_length
        value["capabilities"] = list(model.capabilities)
    return value


async def ps(exchange: Exchange) -> None:
    """GET /api/ps."""
    spec = exchange.machine.spec
    memory = spec.memory_bytes
    models = [
        {
            "name": one.model.name,
            "model": one.model.name,
            "size": one.reserved_bytes,
            "digest": one.model.digest,
            "details": _details(one.model),
            "expires_at": gojson.in_s(left_s),
            "size_vram": min(one.reserved_bytes, memory),
            **({"context_length": one.num_ctx} if spec.release >= _TELLS_CONTEXT else {}),
        }
        for one, left_s in exchange.machine.driver.resident()
    ]
    await exchange.whole({"models": models}, content_type=JSON)


async def show(exchange: Exchange) -> None:
    """POST /api/show."""
    fields = parse(exchange.body)
    asked = fields.text("model") or fields.text("name")
    if not asked.strip():
        raise Refused(400, "model is required")
    model = _find(exchange, asked)
    info = {
        "general.architecture": model.family,
        "general.basename": model.name.partition(":")[0],
        "general.parameter_count": model.size_bytes * 2,
        f"{model.family}.context_length": model.context_length,
        f"{model.family}.embedding_length": model.embedding_length,
    }
    value: dict[str, object] = {
        "modelfile": model.recipe.modelfile(model.weights),
        "template": "{{ .Prompt }}",
        "details": _details(model),
        "model_info": info,
        "capabilities": list(model.capabilities),
        "modified_at": gojson.timestamp(model.modified_at),
        **_remote(model),
        **model.recipe.shown(),
    }
    if system := fields.text("system"):
        value["system"] = system
    await exchange.whole(value, content_type=JSON)


async def openai_list(exchange: Exchange) -> None:
    """GET /v1/models."""
    models = exchange.machine.shelf.newest_first()
    value = {"object": "list", "data": [_openai_entry(model, model.name) for model in models]}
    await exchange.whole(value)


async def openai_one(exchange: Exchange) -> None:
    """GET /v1/models/{model}; the id is echoed as asked."""
    asked = unquote(exchange.path.rpartition("/")[2])
    await exchange.whole(_openai_entry(_find(exchange, asked), asked))


def _find(exchange: Exchange, asked: str) -> SimModel:
    """Raises a 404 with the normalised name, as show does."""
    model = exchange.machine.shelf.find(asked)
    if model is None:
        sourced = names.split_source(asked.strip())
        raise Refused(404, f"model '{names.parse(sourced.base) if sourced else asked}' not found")
    return model


def _remote(model: SimModel) -> dict[str, object]:
    """Where a model runs that does not run here."""
    if not model.remote_model:
        return {}
    return {"remote_model": model.remote_model, "remote_host": REMOTE_HOST}


def _details(model: SimModel) -> dict[str, object]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.family,
        "families": [model.family],
        "parameter_size": model.parameter_size,
        "quantization_level": model.quantization,
    }


def _openai_entry(model: SimModel, identity: str) -> dict[str, object]:
    name = names.parse(model.name)
    return {
        "id": identity,
        "object": "model",
        "created": int(model.modified_at.timestamp()),
        "owned_by": name.namespace if name else "library",
    }
