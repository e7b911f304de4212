"""Answers from the router's own knowledge: tags, ps, version, models."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from aiohttp import hdrs, web

from router.core import wording
from router.core.dialect import Asked, Family, Route
from router.core.policy import Target
from router.core.registry import Registry
from router.core.types import Model, NodeView, Refusal, Rejected, Scope
from router.dispatch import Refused
from router.errors import ClientError

_JSON = "application/json; charset=utf-8"
_CHANGED, _EXPIRES = "modified_at", "expires_at"
_FALLBACKS: Mapping[str, object] = {
    "/api/status": {"cloud": {"disabled": False, "source": "none"}},
    "/api/experimental/model-recommendations": {"recommendations": []},
}
ALIAS_OF = "ollamux_alias_of"  # of an alias's entry: the model that it stands for now


class Catalog:
    """Lists what the nodes that are up have. Rebuilt when the registry's revision moves; what a
    path with a pin asks for is built each time."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._built: dict[str, tuple[int, bytes]] = {}

    def answer(self, asked: Asked) -> web.Response:
        """Answer a local route. Raises Refused for a model that cannot be had, ClientError else."""
        route, scope = asked.route, asked.scope
        match route.path:
            case "/":
                text = {hdrs.CONTENT_TYPE: "text/plain; charset=utf-8"}
                return web.Response(body=b"Ollama is running", headers=text)
            case "/api/version":
                return _json(wording.dumps({"version": self._version(scope)}), route)
            case "/api/tags":
                return _json(self._cached(asked, self._tags), route)
            case "/api/ps":
                return _json(self._cached(asked, self._ps), route)
            case "/v1/models":
                return _json(self._cached(asked, self._models), route)
            case _:
                return _json(self._model(asked.path.rpartition("/")[2], scope), route)

    def fallback(self, route: Route) -> web.Response:
        """Answer what any node would, where none is up."""
        return _json(wording.dumps(_FALLBACKS[route.path]), route)

    def _cached(self, asked: Asked, build: Callable[[Scope | None], bytes]) -> bytes:
        if asked.scope is not None:
            self._check(asked.scope, running=asked.path == "/api/ps")
            return build(asked.scope)
        revision = self._registry.revision
        built = self._built.get(asked.path)
        if built is None or built[0] != revision:
            built = self._built[asked.path] = (revision, build(None))
        return built[1]

    def _check(self, scope: Scope, *, running: bool) -> None:
        """Raises Refused where none of the nodes that a path pins is up, or none takes requests
        and it is not asked what is `running`."""
        up = self._up(scope)
        if not up:
            nodes = tuple(node for node in self._registry.specs() if node.url in scope.urls)
            refusal = Refusal.PIN_DOWN if len(nodes) == 1 else Refusal.NODES_DOWN
            raise Refused(Rejected(refusal, nodes))
        if not running and all(node.draining for node in up):
            raise Refused(Rejected(Refusal.DRAINED, tuple(node.spec for node in up)))

    def _up(self, scope: Scope | None) -> list[NodeView]:
        nodes = [node for node in self._registry.snapshot() if node.up and not node.leaving]
        return nodes if scope is None else [n for n in nodes if n.spec.url in scope.urls]

    def _version(self, scope: Scope | None) -> str:
        """The lowest: clients choose features by it, and the highest would promise too much."""
        versions = [node.version for node in self._up(scope) if node.version]
        if not versions:
            raise ClientError(503, "no node is up")
        return min(versions, key=version_key)

    def _present(self, scope: Scope | None) -> Iterable[Model]:
        """One entry per name, the newest of them, newest name first. An alias stands for itself,
        and for a model of its own name, which nobody can ask for."""
        found = _latest(self._registry.listed(scope), _CHANGED)
        for alias in self._registry.aliases:
            found.pop(alias, None)
            target = self._registry.resolve(alias, scope)
            model = None if isinstance(target, Rejected) else self._had(target, scope)
            if isinstance(model, Model):
                own = {"name": alias, "model": alias, ALIAS_OF: _name(model)}
                found[alias] = Model(alias, model.digest, {**model.entry, **own})
        return _ordered(found, _CHANGED)

    def _tags(self, scope: Scope | None) -> bytes:
        return wording.dumps({"models": _entries(self._present(scope))})

    def _ps(self, scope: Scope | None) -> bytes:
        """One entry per name, as a single server has: the one that stays longest."""
        found = _latest((node.resident for node in self._up(scope)), _EXPIRES)
        return wording.dumps({"models": _entries(_ordered(found, _EXPIRES))})

    def _models(self, scope: Scope | None) -> bytes:
        data = [_openai(_name(model), model) for model in self._present(scope)]
        return wording.dumps({"object": "list", "data": data})

    def _model(self, asked: str, scope: Scope | None) -> bytes:
        """One model by any name that a request may use for it: alias, prefix and pin too."""
        target = self._registry.resolve(asked, scope)
        if isinstance(target, Rejected):
            raise Refused(target, asked)
        model = self._had(target, scope)
        if isinstance(model, Rejected):
            raise Refused(model, target.sent)
        return wording.dumps(_openai(asked, model))

    def _had(self, target: Target, scope: Scope | None) -> Model | Rejected:
        """The newest entry of this model on the nodes that a request for it may go to now."""
        found = self._registry.eligible(target)
        if isinstance(found, Rejected):
            return found
        assert target.model is not None  # a resolved name
        key = target.model.key
        had = [
            node.present[key]
            for node in self._up(scope)
            if key in node.present and node.spec in found
        ]
        newest = max(had, key=lambda model: model.moment(_CHANGED), default=None)
        return Rejected(Refusal.NO_MODEL) if newest is None else newest


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
    created = int(model.moment(_CHANGED).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def _latest(lists: Iterable[Mapping[str, Model]], field: str) -> dict[str, Model]:
    """Of each name the entry with the latest `field`."""
    found: dict[str, Model] = {}
    for models in lists:
        for key, model in models.items():
            if key not in found or model.moment(field) > found[key].moment(field):
                found[key] = model
    return found


def _ordered(found: Mapping[str, Model], field: str) -> Sequence[Model]:
    """Latest first, by name among equals."""
    order = sorted(found)
    order.sort(key=lambda key: found[key].moment(field), reverse=True)
    return [found[key] for key in order]
