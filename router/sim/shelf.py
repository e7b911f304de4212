"""The models on a simulated node's disk, found by the names that requests use."""

from dataclasses import replace

from router.sim import names
from router.sim.account import Account
from router.sim.models import SimModel
from router.sim.names import Name
from router.sim.recipe import Layer
from router.sim.request import Refused


class Shelf:
    """Looks models up as a node does: `x` is `x:latest`, the case of letters does not matter.

    Holds their blobs, too: those of its models, and those that were uploaded.
    """

    def __init__(self, models: tuple[SimModel, ...], account: Account) -> None:
        """Raises ValueError for a model whose name is none, or two models of the same name."""
        self._account = account
        self._models: dict[str, SimModel] = {}
        self._uploads: dict[str, int] = {}
        for model in models:
            name = names.parse(model.name)
            if name is None or _key(name) in self._models:
                raise ValueError(f"not a model's name, or a second time: {model.name!r}")
            self._models[_key(name)] = model

    def newest_first(self) -> list[SimModel]:
        """All models, as `/api/tags` lists them."""
        by_name = sorted(self._models.values(), key=lambda model: model.name)
        return sorted(by_name, key=lambda model: model.modified_at, reverse=True)

    def find(self, asked: str, *, exact_case: bool = False) -> SimModel | None:
        """The model a request names, None when it is not here. Raises Refused for a non-name."""
        sourced = names.split_source(asked.strip())
        if sourced is None:
            raise Refused(400, "invalid model name")
        if sourced.source == "cloud":
            return self._cloud(asked.strip(), sourced.base)
        name = names.parse(sourced.base)
        if name is None:
            raise Refused(400, "invalid model name")
        model = self.at(name)
        if model is None or (exact_case and model.name != str(name)):
            return None
        return None if sourced.source == "local" and model.remote_model else model

    def at(self, name: Name) -> SimModel | None:
        """The model kept under that very name."""
        return self._models.get(_key(name))

    def put(self, model: SimModel, name: Name) -> None:
        """Keep `model` as `name`. One of that name is replaced; its spelling stays."""
        there = self.at(name)
        self._models[_key(name)] = replace(model, name=there.name if there else str(name))

    def drop(self, name: Name) -> bool:
        """Take a model away with the blobs that were its alone; False when it is not here."""
        model = self._models.pop(_key(name), None)
        if model is None:
            return False
        kept = {layer.digest for one in self._models.values() for layer in one.layers}
        for layer in model.layers:
            if layer.digest not in kept:
                self._uploads.pop(layer.digest, None)
        return True

    def blob(self, digest: str) -> Layer | None:
        """The blob of a digest ("sha256:" and 64 hex), None when it is not here."""
        if digest in self._uploads:
            return Layer(digest, self._uploads[digest])
        layers = (layer for model in self._models.values() for layer in model.layers)
        return next((layer for layer in layers if layer.digest == digest), None)

    def upload(self, blob: Layer) -> None:
        """Remember that a blob is here. Its bytes are not kept."""
        self._uploads[blob.digest] = blob.size

    def _cloud(self, asked: str, base: str) -> SimModel | None:
        """A model that runs elsewhere, unless one is kept under that very name."""
        self._account.require_cloud("remote model is unavailable")
        name = names.parse(names.stub(asked))
        listed = self.at(name) if name is not None else None
        if listed is None:
            return self._account.reach(base)
        if listed.remote_model:
            self._account.require_user()
        return listed


def _key(name: Name) -> str:
    return str(name).lower()
