"""The admin listener: health, readiness, metrics, status, decisions, reload, drain."""

import hmac
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import hdrs, web

from router import __version__, explain
from router.core import wording
from router.core.pool import Pool
from router.core.types import Ejected, NodeView, Refusal, Rejected
from router.core.work import FlowRule
from router.dispatch import Clock, Decision
from router.errors import ClientError
from router.metrics import CONTENT_TYPE, Metrics


@dataclass(slots=True)
class ConfigState:
    """What is known of the configuration in force, and of the last attempt to replace it."""

    generation: int = 1
    source: str = ""
    taken_at: float = field(default_factory=time.time)
    last_result: str = "ok"
    last_at: float = field(default_factory=time.time)
    mistakes: Sequence[str] = ()
    restart_needed: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """How a reload ended: `result` is `ok`, `unchanged` or `refused`."""

    result: str
    mistakes: Sequence[str] = ()
    changes: Sequence[str] = ()
    restart_needed: Sequence[str] = ()


@dataclass(slots=True)
class Admin:
    """`token` guards what changes anything; without one, only a loopback listener may.

    `reload` runs the daemon's own transaction; `on_drain` is told of a node that was drained or
    undrained. `draining` is set once no new work is wanted. `decisions`: the last ones; `rules`:
    those of flows.
    """

    pool: Pool
    metrics: Metrics
    state: ConfigState
    reload: Callable[[], Awaitable[ReloadResult]]
    clock: Clock
    token: str | None = field(repr=False)
    loopback: bool
    on_drain: Callable[[NodeView], None] = lambda node: None
    draining: bool = False
    decisions: Collection[Decision] = ()
    rules: Mapping[str, FlowRule] = field(default_factory=dict)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. No page in a browser may act here; and what changes anything
        needs the token."""
        if hdrs.ORIGIN in request.headers:
            return _error(403, "requests with an Origin are refused here")
        if request.method not in ("GET", "HEAD"):
            refusal = self._may_change(request.headers.get(hdrs.AUTHORIZATION, ""))
            if refusal is not None:
                return refusal
        found = _ROUTES.get(request.path)
        if found is None:
            return _error(404, "not found")
        methods, answer = found
        if request.method not in methods:
            return _error(405, "method not allowed", ", ".join(methods))
        return await answer(self, request)

    def _may_change(self, authorization: str) -> web.Response | None:
        if self.token is None:
            if self.loopback:
                return None
            return _error(403, "set admin.token: this listener is not on loopback")
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            given.encode(errors="surrogateescape"), self.token.encode()
        ):
            return None
        return _error(401, "the admin token is needed: Authorization: Bearer ...")

    async def _healthz(self, _: web.BaseRequest) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.BaseRequest) -> web.Response:
        if self.draining:
            return web.Response(status=503, text="draining\n")
        up = [node for node in self.pool.registry.snapshot() if node.up and not node.leaving]
        if not up:
            return web.Response(status=503, text="no node is up\n")
        if all(node.draining for node in up):
            names = ", ".join(node.spec.name for node in up)
            return web.Response(status=503, text=f"all nodes that are up are drained: {names}\n")
        return web.Response(text="ready\n")

    async def _metrics(self, _: web.BaseRequest) -> web.Response:
        headers = {hdrs.CONTENT_TYPE: CONTENT_TYPE}
        return web.Response(body=self.metrics.render(), headers=headers)

    async def _status(self, _: web.BaseRequest) -> web.Response:
        return _json(200, self.status())

    async def _decisions(self, _: web.BaseRequest) -> web.Response:
        return _json(200, explain.decisions(self.decisions, self.clock(), time.time()))

    async def _explain(self, request: web.BaseRequest) -> web.Response:
        try:
            asked = await explain.asked(request)
            return _json(200, explain.explain(self.pool, asked, self.clock(), self.rules))
        except ClientError as error:
            return _error(error.status, error.message)

    async def _reload(self, _: web.BaseRequest) -> web.Response:
        done = await self.reload()
        answer = {
            "result": done.result,
            "generation": self.state.generation,
            "changes": done.changes,
            "restart_needed": done.restart_needed,
            "mistakes": done.mistakes,
        }
        return _json(422 if done.result == "refused" else 200, answer)

    async def _drain(self, request: web.BaseRequest) -> web.Response:
        return self._set_draining(request.query.getall("node", []), draining=True)

    async def _undrain(self, request: web.BaseRequest) -> web.Response:
        return self._set_draining(request.query.getall("node", []), draining=False)

    def _set_draining(self, asked: Sequence[str], *, draining: bool) -> web.Response:
        if len(asked) != 1 or not asked[0]:
            return _error(400, "say which node: ?node=NAME")
        before = self.pool.registry.drained
        spec = self.pool.registry.drain(asked[0], draining=draining)
        if isinstance(spec, Rejected):
            return _no_such_node(asked[0], spec)
        [node] = [one for one in self.pool.registry.snapshot() if one.spec.url == spec.url]
        if self.pool.registry.drained != before:
            self.on_drain(node)
        return _json(200, _node(node, self.clock()))

    def status(self) -> Mapping[str, object]:
        """What `/status` shows; times are seconds since 1970."""
        nodes = self.pool.registry.snapshot()
        now = self.clock()
        state = self.state
        return {
            "version": __version__,
            "draining": self.draining,
            "in_flight": self.pool.in_flight,
            "config": {
                "generation": state.generation,
                "source": state.source,
                "taken_at": round(state.taken_at, 3),
                "last_reload": {
                    "result": state.last_result,
                    "at": round(state.last_at, 3),
                    "mistakes": state.mistakes,
                    "restart_needed": state.restart_needed,
                },
            },
            "nodes": [_node(node, now) for node in nodes],
            "models": _models(nodes),
            "warm": {
                one.model: {"wanted": one.wanted, "loaded": len(one.nodes), "nodes": one.nodes}
                for one in self.pool.warm.kept()
            },
            "digest_conflicts": [
                {"model": model, "digests": digests}
                for model, digests in self.pool.registry.conflicts().items()
            ],
        }


def _node(node: NodeView, now: float) -> Mapping[str, object]:
    return {
        "name": node.spec.name,
        "url": node.spec.url,
        "pool": node.pool,
        "state": "leaving" if node.leaving else node.health.value,
        "for_s": round(now - node.since, 1),
        "detail": node.detail,
        "draining": node.draining,
        "ejected": [_ejected(one, now) for one in node.ejected],
        "in_flight": node.in_flight,
        "slots": "auto" if node.spec.auto else node.spec.slots,
        "slots_learned": dict(node.slots),
        "weight": node.spec.weight,
        "labels": dict(node.spec.labels),
        "version": node.version,
        "present": sorted(node.present),
        "resident": sorted(node.resident),
    }


def _ejected(ejected: Ejected, now: float) -> Mapping[str, object]:
    return {
        "model": ejected.model or None,
        "reason": ejected.reason,
        "busy": ejected.busy,
        "trial": ejected.trial,
        "next_trial_s": round(max(0.0, ejected.until - now), 1),
    }


def _no_such_node(asked: str, rejected: Rejected) -> web.Response:
    nodes = ", ".join(f"{node.name} ({node.url})" for node in rejected.nodes)
    if rejected.refusal is Refusal.UNKNOWN_PIN:
        return _error(404, f"no node is named '{asked}'; the nodes are: {nodes}")
    return _error(400, f"'{asked}' stands for several nodes" + (f": {nodes}" if nodes else ""))


def _models(nodes: Sequence[NodeView]) -> Mapping[str, object]:
    """Each model, with the nodes that have it and those that hold it in memory."""
    models: dict[str, dict[str, list[str]]] = {}
    for node in nodes:
        for key in node.present:
            models.setdefault(key, {"nodes": [], "resident": []})["nodes"].append(node.spec.name)
        for key in node.resident:
            models.setdefault(key, {"nodes": [], "resident": []})["resident"].append(node.spec.name)
    return dict(sorted(models.items()))


def _json(status: int, value: object) -> web.Response:
    headers = {hdrs.CONTENT_TYPE: "application/json"}
    return web.Response(status=status, body=wording.dumps(value) + b"\n", headers=headers)


def _error(status: int, message: str, allow: str | None = None) -> web.Response:
    response = _json(status, {"error": message})
    if allow is not None:
        response.headers[hdrs.ALLOW] = allow
    return response


_READ, _CHANGE = ("GET", "HEAD"), ("POST",)
_Answer = Callable[[Admin, web.BaseRequest], Awaitable[web.Response]]
_ROUTES: Mapping[str, tuple[Sequence[str], _Answer]] = {
    "/healthz": (_READ, Admin._healthz),
    "/readyz": (_READ, Admin._readyz),
    "/metrics": (_READ, Admin._metrics),
    "/status": (_READ, Admin._status),
    "/decisions": (_READ, Admin._decisions),
    "/explain": (_CHANGE, Admin._explain),
    "/reload": (_CHANGE, Admin._reload),
    "/drain": (_CHANGE, Admin._drain),
    "/undrain": (_CHANGE, Admin._undrain),
}
