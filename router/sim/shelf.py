"""The models on a simulated node's disk, found by the names that requests use."""

from router.sim import names
from router.sim.models import SimModel
from router.sim.request import Refused

_SIGN_IN = "https://ollama.com/connect?name=sim&key=c2lt"


class Shelf:
    """Looks models up as a node does: `x` is `x:latest`, the case of letters does not matter."""

    def __init__(self, models: tuple[SimModel, ...]) -> None:
        """Raises ValueError for a model whose name is none, or two models of the same name."""
        self._models: dict[str, SimModel] = {}
        for model in models:
            name = names.parse(model.name)
            if name is None or str(name).lower() in self._models:
                raise ValueError(f"not a model's name, or a second time: {model.name!r}")
            self._models[str(name).lower()] = model

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
            return self._cloud(asked.strip())
        name = names.parse(sourced.base)
        if name is None:
            raise Refused(400, "invalid model name")
        model = self._models.get(str(name).lower())
        if model is not None and exact_case and model.name != str(name):
            return None
        return model

    def _cloud(self, asked: str) -> SimModel:
        """A model that would run elsewhere: here only if the node lists it under that very name."""
        name = names.parse(asked)
        model = self._models.get(str(name).lower())
        if model is None:
            extra = {"signin_url": _SIGN_IN}
            raise Refused(401, "unauthorized", extra=extra, native=True)
        return model
