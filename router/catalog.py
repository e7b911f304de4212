"""Answers from the pool's own knowledge: tags, ps, version, models."""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from aiohttp import hdrs, web

from router.core import dialect
from router.core.dialect import Family, Route
from router.core.pool import NodeView, Pool
from router.core.types import Model, Refusal, Rejected
from router.dispatch import Refused
from router.errors import ClientError

_JSON = "application/json; charset=utf-8"
_EPOCH = "1970-01-01T00:00:00Z"


class Catalog:
    """Lists what the nodes that are up have. Rebuilt when the pool's revision moves."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._built: dict[str, tuple[int, bytes]] = {}

    def answer(self, route: Route, path: str) -> web.Response:
        """Answer a local route. Raises Refused for a model that cannot be had, ClientError else."""
        match route.path:
            case "/":
                text = {hdrs.CONTENT_TYPE: "text/plain; charset=utf-8"}
                return web.Response(body=b"Ollama is running", headers=text)
            case "/api/version":
                return _json(dialect.dumps({"version": self._version()}), route)
            case "/api/tags":
                return _json(self._cached(path, self._tags), route)
            case "/api/ps":
                return _json(self._cached(path, self._ps), route)
            case "/v1/models":
                return _json(self._cached(path, self._models), route)
            case _:
                return _json(self._model(path.rpartition("/")[2]), route)

    def _cached(self, path: str, build: Callable[[], bytes]) -> bytes:
        revision = self._pool.revision
        built = self._built.get(path)
        if built is None or built[0] != revision:
            built = self._built[path] = (revision, build())
        return built[1]

    def _up(self) -> list[NodeView]:
        return [node for node in self._pool.snapshot() if node.up and not node.leaving]

    def _version(self) -> str:
        """The lowest: clients choose features by it, and the highest would promise too much."""
        versions = [node.version for node in self._up() if node.version]
        if not versions:
            raise ClientError(503, "no node is up")
        return min(versions, key=version_key)

    def _present(self) -> dict[str, Model]:
        """One entry per name, the newest of them, newest name first."""
        return _latest((node.present for node in self._up()), "modified_at")

    def _tags(self) -> bytes:
        return dialect.dumps({"models": _entries(self._present().values())})

    def _ps(self) -> bytes:
        """One entry per name, as a single server has: the one that stays longest."""
        found = _latest((node.resident for node in self._up()), "expires_at")
        return dialect.dumps({"models": _entries(found.values())})

    def _models(self) -> bytes:
        data = [_openai(_name(model), model) for model in self._present().values()]
        return dialect.dumps({"object": "list", "data": data})

    def _model(self, asked: str) -> bytes:
        """One model by any name that a request may use for it: alias, prefix and pin too."""
        target = self._pool.resolve(asked)
        if isinstance(target, Rejected):
            raise Refused(target, asked)
        found = self._pool.eligible(target)
        if isinstance(found, Rejected):
            raise Refused(found, target.sent)
        assert target.model is not None  # a resolved name
        for node in self._up():
            model = node.present.get(target.model.key)
            if model is not None and node.spec in found:
                return dialect.dumps(_openai(asked, model))
        raise Refused(Rejected(Refusal.NO_MODEL), target.sent)


def version_key(version: str) -> tuple[tuple[int, ...], bool]:
    """Order of versions by their numbers; `0.33.0-rc2` comes before `0.33.0`."""
    numbers, mark, _ = version.partition("-")
    return tuple(int(n) if n.isdigit() else 0 for n in numbers.split(".")), not mark


def _json(body: bytes, route: Route) -> web.Response:
    kind = _JSON if route.family is Family.NATIVE else "application/json"
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: kind})


def _entries(models: Iterable[Model]) -> list[Mapping[str, object]]:
    return [model.entry for model in models]


def _name(model: Model) -> str:
    return str(model.entry.get("name", model.key))


def _openai(name: str, model: Model) -> Mapping[str, object]:
    parts = _name(model).split("/")
    owner = parts[-2] if len(parts) > 1 else "library"
    created = int(_moment(model, "modified_at").timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def _latest(lists: Iterable[Mapping[str, Model]], field: str) -> dict[str, Model]:
    """Of each name the entry with the latest `field`, latest first, by name among equals."""
    found: dict[str, Model] = {}
    for models in lists:
        for key, model in models.items():
            if key not in found or _moment(model, field) > _moment(found[key], field):
                found[key] = model
    order = sorted(found)
    order.sort(key=lambda key: _moment(found[key], field), reverse=True)
    return {key: found[key] for key in order}


def _moment(model: Model, field: str) -> datetime:
    """A time of an entry. Go writes nanoseconds, which Python reads since 3.11; a year past
    9999 or rubbish counts as the beginning of time."""
    try:
        moment = datetime.fromisoformat(str(model.entry.get(field, _EPOCH)))
    except ValueError:
        moment = datetime.fromisoformat(_EPOCH)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
