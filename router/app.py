"""The composition root: builds everything, and wires how it starts, changes and stops."""

import asyncio
import ipaddress
import random
import resource
import secrets
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from router import flows, log
from router.address import Address
from router.admin import Admin, ConfigState, ReloadResult
from router.admission import Cause, Rooms
from router.build import Builds
from router.catalog import Catalog
from router.core.dialect import VIA
from router.core.pool import Pool
from router.core.types import (
    Ejection,
    Failure,
    FailureKind,
    Flip,
    Health,
    NodeSpec,
    NodeView,
    Scope,
)
from router.cors import Cors
from router.dispatch import Clock, Dispatch
from router.downstream import Server
from router.fanout import Fanout
from router.fanout import Settings as ManageSettings
from router.gate import Gate
from router.gate import Settings as GateSettings
from router.guard import Guard
from router.keep import Keep
from router.ledger import Ledger
from router.listeners import Listener, Listeners
from router.log import Report
from router.manage import Manage
from router.metrics import Metrics
from router.passage import Means
from router.passage import Settings as PassageSettings
from router.prober import Prober
from router.prober import Settings as ProbeSettings
from router.proxy import Proxy
from router.relay import Limits
from router.settings import Config
from router.settings import Manage as ManageEntry
from router.upstream import Upstream
from router.warmer import Warmer

# How long what is left at the end of a drain has to notice that it was cut.
_CUT_S = 0.1
# What probes should look at once a request has met one of these.
_LOOK_AGAIN = {
    FailureKind.MISSING: "tags",
    FailureKind.RESET: "version",
    FailureKind.CONNECT: "version",
    FailureKind.FIRST_BYTE_TIMEOUT: "version",
    FailureKind.STALLED: "version",
}
# How long a connection without a request is kept once its answers are to be its last.
_IDLE_S = 30.0


class App:
    """A whole router in this event loop: `async with` it.

    `reload` is what `POST /reload` runs; `changed` is told that a node went up or down. `given`
    are sockets that listen already: nothing is accepted on them before `accept`. Listening
    addresses of this process are in `clients` and `admins` once started. Raises OSError where an
    address cannot be listened on.
    """

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Awaitable[ReloadResult]],
        changed: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
        given: Sequence[Listener] = (),
    ) -> None:
        self.config = config
        self._changed = changed
        self.clients: Sequence[str] = ()
        self.admins: Sequence[str] = ()
        self.state = ConfigState()
        self.log = log.logger()
        self.pool = Pool(config.topology, clock(), random.random)
        pool, registry = self.pool, self.pool.registry
        self._conflicts = registry.conflicts()
        self.refusals: Counter[str] = Counter({cause.value: 0 for cause in Cause})
        self.metrics = Metrics(
            registry.snapshot, pool.queued, self.refusals, pool.learned, pool.warm.kept
        )
        instance = secrets.token_hex(16)
        self._upstream = Upstream(connect_s=config.timeouts.connect_s)
        via = (VIA.encode(), instance.encode())
        fanout = Fanout(
            upstream=self._upstream,
            settings=_manage_settings(config),
            via=via,
            clock=clock,
            learn=self._learn,
        )
        self._means = Means(
            pool=self.pool,
            dispatch=Dispatch(
                self.pool, self._flipped, clock, self._failed, self.metrics.wait, self._loaded
            ),
            upstream=self._upstream,
            keep=Keep(config.limits.max_buffered_bytes),
            settings=_passage_settings(config),
            via=via,
            clock=clock,
        )
        proxy = Proxy(
            pool=self.pool, means=self._means, fanout=fanout, instance=instance, clock=clock
        )
        self._guard = Guard(socket.gethostname())
        self._gate = Gate(
            proxy=proxy,
            catalog=Catalog(registry),
            manage=Manage(registry, fanout, Builds(registry, fanout), self._means.keep),
            settings=_gate_settings(config),
            clock=clock,
            guard=self._guard,
            look=self._look,
            ledger=Ledger(self.metrics.requests, _tell(config), self.pool.learn),
            refusals=self.refusals,
        )
        self.prober = Prober(
            pool=self.pool,
            upstream=self._upstream,
            metrics=self.metrics,
            settings=_probe_settings(config),
            instance=instance,
            on_flip=self._flipped,
            on_seen=self._seen,
            clock=clock,
        )
        self.warmer = Warmer(
            dispatch=self._means.dispatch,
            upstream=self._upstream,
            waits=config.timeouts.waits,
            via=via,
            look=self._look_for_warm,
            log=self.log,
            clock=clock,
        )
        token = config.admin.token
        self._admin = Admin(
            pool=self.pool,
            metrics=self.metrics,
            state=self.state,
            reload=reload,
            clock=clock,
            token=None if token is None else token.get_secret_value(),
            loopback=_is_loopback(config.admin.listen),
            on_drain=self._drained,
            decisions=self._means.dispatch.decisions,
            rules=config.routing.rules,
        )
        self._given = given
        self._record(ok=True)

    async def __aenter__(self) -> Self:
        limits, timeouts = self.config.limits, self.config.timeouts
        rooms = _rooms(self.config)
        self._server = Server(
            self._gate.handle,
            max_header_bytes=limits.max_header_bytes,
            head_timeout_s=timeouts.head_timeout_s,
            room=rooms.clients,
            refusals=self.refusals,
        )
        self._client_runner = web.ServerRunner(self._server, shutdown_timeout=_CUT_S)
        self._admin_server = Server(
            self._guard.before(self._admin.handle),
            max_header_bytes=limits.max_header_bytes,
            head_timeout_s=timeouts.head_timeout_s,
            room=rooms.admins,
            cancels=False,  # whoever asked for a reload may leave, the reload goes on
        )
        self._admin_runner = web.ServerRunner(self._admin_server, shutdown_timeout=_CUT_S)
        self._fronts = (
            Listeners("clients", self._server, self._guard.watch),
            Listeners("admin", self._admin_server, self._guard.watch),
        )
        try:
            await self._listen()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def _listen(self) -> None:
        clients, admins = self._fronts
        for runner in (self._client_runner, self._admin_runner):
            await runner.setup()
        used = [
            *await clients.open(self.config.listen, self._given),
            *await admins.open([self.config.admin.listen], self._given),
        ]
        self.clients = [_url(bound) for bound in clients.addresses]
        self.admins = [_url(bound) for bound in admins.addresses]
        for one in self._given:
            if one not in used:
                one.sock.close()

    @property
    def listeners(self) -> list[Listener]:
        """What this process listens on, for another one to take over."""
        return [one for front in self._fronts for one in front.all()]

    async def accept(self) -> None:
        """Accept on the sockets that were given, too: from now on this process can serve."""
        for front in self._fronts:
            await front.accept()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for front in self._fronts:
            await front.stop()
        await self._client_runner.cleanup()
        await self._admin_runner.cleanup()
        await self._upstream.close()
        self._gate.ledger.settle()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._gate.active > 0

    async def hand_over(self) -> None:
        """Another process serves at these addresses: no new connections here, and every answer
        is the last of its connection."""
        self.warmer.stop()
        for front in self._fronts:
            front.server.closing = True
            await front.stop()

    async def deserted(self) -> None:
        """Wait until every connection has gone; what is idle for 30 s is closed."""
        async with asyncio.TaskGroup() as group:
            for front in self._fronts:
                group.create_task(front.server.deserted(_IDLE_S))

    async def drain(self) -> None:
        """Not ready, no new connections; returns when no request is left.

        Open connections are not waited for: nobody else serves who comes instead.
        """
        self.warmer.stop()
        self._admin.draining = True
        self._server.closing = True
        await self._fronts[0].stop()
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(self._server.deserted(_IDLE_S))
            await self._gate.idle()
            leaving.cancel()

    def state_out(self) -> dict[str, Any]:
        """What the process that takes over must know beside the configuration, as JSON."""
        return {"drained": self.pool.registry.drained}

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_out` of the process before this one gave."""
        drained = state.get("drained")
        if isinstance(drained, list):
            self.pool.registry.keep_drained([url for url in drained if isinstance(url, str)])

    def reconfigure(self, config: Config) -> None:
        """Put a new configuration in force, in one step; requests in flight go on."""
        before = {spec.url for spec in self.pool.registry.specs()}
        self.config = config
        self.pool.reconfigure(config.topology, self._gate.clock())
        for url in before - {spec.url for spec in self.pool.registry.specs()}:
            self._upstream.forget(url)
        self._means.dispatch.stir()
        self._upstream.connect_s = config.timeouts.connect_s
        self._server.reconfigure(
            max_header_bytes=config.limits.max_header_bytes,
            head_timeout_s=config.timeouts.head_timeout_s,
            room=_rooms(config).clients,
        )
        self._gate.settings = _gate_settings(config)
        self._gate.ledger.tell = _tell(config)
        self._means.settings = _passage_settings(config)
        self._means.keep.reconfigure(config.limits.max_buffered_bytes)
        self._gate.manage.fanout.settings = _manage_settings(config)
        self.prober.reconfigure(_probe_settings(config))
        self.warmer.reconfigure(config.timeouts.waits)
        token = config.admin.token
        self._admin.token = None if token is None else token.get_secret_value()
        self._admin.rules = config.routing.rules
        self.state.generation += 1

    def reloaded(self, done: ReloadResult) -> None:
        """Record how an attempt to replace the configuration ended."""
        self.metrics.reloads.labels(done.result).inc()
        self.state.last_result = done.result
        self.state.last_at = time.time()
        self.state.mistakes = done.mistakes
        self.state.restart_needed = done.restart_needed
        if done.result == "ok":
            self.state.taken_at = self.state.last_at
        self._record(ok=done.result != "refused")

    def _record(self, *, ok: bool) -> None:
        if ok:
            self.metrics.last_success.set(self.state.last_at)
        self.metrics.reload_ok.set(ok)
        self.metrics.generation.set(self.state.generation)

    async def _learn(self, nodes: Sequence[NodeSpec]) -> None:
        """Ask nodes what they have now, so that the listings show what a request has changed."""
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                group.create_task(self.prober.look(node, ("tags",)))

    async def _look(self, scope: Scope | None) -> None:
        """See which models nodes have in memory, where requests may have changed that."""
        async with asyncio.TaskGroup() as group:
            for node, used in self.pool.registry.unseen(scope):
                group.create_task(self._look_at(node, used))

    async def _look_at(self, node: NodeSpec, used: int) -> None:
        if "ps" in await self.prober.look(node, ("ps",)):
            self.pool.registry.saw(node.url, used)

    async def _look_for_warm(self, node: NodeSpec) -> None:
        await self.prober.look(node, ("ps",))

    def _failed(self, node: NodeSpec, failure: Failure) -> None:
        """Look at a node again at once where a request has met what probes should know of."""
        if failure.kind in _LOOK_AGAIN:
            self.prober.hurry(node.url, _LOOK_AGAIN[failure.kind])

    def _loaded(self, url: str) -> None:
        """See with which context a node has loaded a model: others shall not reload it."""
        self.prober.hurry(url, "ps")

    def _doubt(self, flip: Flip) -> None:
        """Give a node that fails its probes less time to be silent."""
        for node in self.pool.registry.specs():
            if node.name == flip.node and isinstance(flip.now, Health):
                self._upstream.doubt(node.url, down=flip.now is Health.DOWN)

    def _flipped(self, flip: Flip) -> None:
        self._doubt(flip)
        self.warmer.stir()
        if flip.now in (Health.UP, Ejection.CLOSED):
            self._means.dispatch.stir()
        if isinstance(flip.now, Ejection):
            self.metrics.breaker(flip)
            _tell_breaker(self.log, flip)
            return
        say = self.log.info if flip.now is Health.UP else self.log.warning
        say("node " + flip.now.value, node=flip.node, was=flip.was.value, reason=flip.reason)
        if self.pool.registry.probed and not self.pool.registry.any_up:
            self.log.error("no node is up")
        self._changed()

    def _drained(self, node: NodeView) -> None:
        event = "node drained" if node.draining else "node undrained"
        self.log.info(event, node=node.spec.name, in_flight=node.in_flight)
        self._means.dispatch.stir()
        self.warmer.stir()

    def _seen(self) -> None:
        """Give nodes to those that wait, as a look may have shown room; tell of each name that has
        come to stand for several digests."""
        self._means.dispatch.settle()
        self.warmer.stir()
        before, now = self._conflicts, self.pool.registry.conflicts()
        if now is before:
            return
        self._conflicts = now
        for model in now.keys() - before.keys():
            self.log.warning("model digest conflict", model=model, digests=now[model])


def _tell_breaker(say: FilteringBoundLogger, flip: Flip) -> None:
    what, about = "node", {"node": flip.node}
    if flip.model:
        what, about = "model", {**about, "model": flip.model}
    if flip.now is Ejection.OPEN:
        say.warning(f"{what} ejected", **about, reason=flip.reason, retry_s=round(flip.retry_s, 1))
    else:
        event = "on trial" if flip.now is Ejection.TRIAL else "readmitted"
        say.info(f"{what} {event}", **about)


def _is_loopback(address: Address) -> bool:
    if address.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False


def _url(bound: tuple[str, int]) -> str:
    host = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    return f"http://{host}:{bound[1]}"


def _gate_settings(config: Config) -> GateSettings:
    return GateSettings(
        trusted=tuple(config.trusted),
        cors=Cors(config.cors.origins),
        barred=_barred(config.manage),
        max_in_flight=config.limits.max_in_flight,
    )


def _rooms(config: Config) -> Rooms:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Rooms.of(config.limits.max_connections, descriptors)


def _barred(manage: ManageEntry) -> frozenset[str]:
    verbs = {
        "/api/pull": manage.pull,
        "/api/create": manage.create,
        "/api/blobs/:digest": manage.create,
        "/api/delete": manage.delete,
        "/api/copy": manage.copy_verb,
        "/api/push": manage.push,
    }
    return frozenset(path for path, verb in verbs.items() if not verb.allow)


def _limits(config: Config) -> Limits:
    limits, timeouts = config.limits, config.timeouts
    return Limits(
        held_bytes=limits.max_held_bytes,
        record_bytes=limits.max_record_bytes,
        body_bytes=limits.max_body_bytes,
        stalled_body_s=timeouts.stalled_body_s,
        first_byte_s=timeouts.first_byte_s,
        between_s=timeouts.between_records_s,
    )


def _manage_settings(config: Config) -> ManageSettings:
    pull, create = config.manage.pull.to, config.manage.create.to
    return ManageSettings(
        limits=_limits(config),
        pull_to=None if pull == "all" else pull,
        create_to=None if create == "all" else create,
    )


def _passage_settings(config: Config) -> PassageSettings:
    return PassageSettings(
        limits=_limits(config),
        exact_usage=config.metrics.exact_usage,
        waits=config.timeouts.waits,
        busy_s=config.timeouts.busy_s,
        resilience=config.topology.resilience,
        continues=config.continuation.models if config.continuation.enabled else (),
        flows=flows.Settings(
            config.routing.flow_header,
            tuple(config.trusted),
            config.timeouts.busy_s,
            config.routing.rules,
        ),
    )


def _tell(config: Config) -> Callable[[Report, float], None] | None:
    return log.requests() if config.log.requests else None


def _probe_settings(config: Config) -> ProbeSettings:
    probe = config.probe
    return ProbeSettings(
        timeout_s=probe.timeout_s,
        interval_s=probe.interval_s,
        suspect_s=probe.suspect_interval_s,
        ps_s=probe.ps_interval_s,
        tags_s=probe.tags_interval_s,
        jitter=probe.jitter,
    )
