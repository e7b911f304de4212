"""The composition root: builds everything, and wires how it starts, changes and stops."""

import asyncio
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web

from router import log
from router.address import Address
from router.admin import Admin, ConfigState, ReloadResult
from router.build import Builds
from router.catalog import Catalog
from router.core.dialect import VIA
from router.core.pool import Pool
from router.core.types import Flip, Health, NodeSpec, Scope
from router.cors import Cors
from router.dispatch import Clock, Dispatch
from router.downstream import Server
from router.fanout import Fanout
from router.fanout import Settings as ManageSettings
from router.gate import Gate
from router.gate import Settings as GateSettings
from router.guard import Guard
from router.ledger import Ledger
from router.log import Report
from router.manage import Manage
from router.metrics import Metrics
from router.prober import Prober
from router.prober import Settings as ProbeSettings
from router.proxy import Proxy
from router.proxy import Settings as ProxySettings
from router.relay import Limits
from router.settings import Config
from router.settings import Manage as ManageEntry
from router.upstream import Upstream

# How long what is left at the end of a drain has to notice that it was cut.
_CUT_S = 0.1
_BACKLOG = 4096


class App:
    """A whole router in this event loop: `async with` it.

    `reload` is what `POST /reload` runs; `changed` is told that a node went up or down. Listening
    addresses of this process are in `clients` and `admins` once started. Raises OSError where an
    address cannot be listened on.
    """

    def __init__(
        self,
        config: Config,
        reload: Callable[[], Awaitable[ReloadResult]],
        changed: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.config = config
        self._changed = changed
        self.clients: Sequence[str] = ()
        self.admins: Sequence[str] = ()
        self.state = ConfigState()
        self.log = log.logger()
        self.pool = Pool(config.topology, clock())
        self._conflicts = self.pool.conflicts()
        self.metrics = Metrics(self.pool.snapshot)
        instance = secrets.token_hex(16)
        self._upstream = Upstream(connect_s=config.timeouts.connect_s)
        fanout = Fanout(
            upstream=self._upstream,
            settings=_manage_settings(config),
            via=(VIA.encode(), instance.encode()),
            clock=clock,
            learn=self._learn,
        )
        proxy = Proxy(
            pool=self.pool,
            dispatch=Dispatch(self.pool, self._flipped, clock),
            upstream=self._upstream,
            fanout=fanout,
            settings=_proxy_settings(config),
            instance=instance,
            clock=clock,
        )
        self._guard = Guard(socket.gethostname())
        self._gate = Gate(
            proxy=proxy,
            catalog=Catalog(self.pool),
            manage=Manage(self.pool, fanout, Builds(self.pool, fanout)),
            settings=_gate_settings(config),
            clock=clock,
            guard=self._guard,
            look=self._look,
            ledger=Ledger(self.metrics.requests, _tell(config)),
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
        token = config.admin.token
        self._admin = Admin(
            pool=self.pool,
            metrics=self.metrics,
            state=self.state,
            reload=reload,
            clock=clock,
            token=None if token is None else token.get_secret_value(),
            loopback=_is_loopback(config.admin.listen),
        )
        self._sites: list[web.TCPSite] = []
        self._record(ok=True)

    async def __aenter__(self) -> Self:
        limits, timeouts = self.config.limits, self.config.timeouts
        self._server = Server(
            self._gate.handle,
            max_header_bytes=limits.max_header_bytes,
            head_timeout_s=timeouts.head_timeout_s,
        )
        self._client_runner = web.ServerRunner(self._server, shutdown_timeout=_CUT_S)
        admin = Server(
            self._guard.before(self._admin.handle),
            max_header_bytes=limits.max_header_bytes,
            head_timeout_s=timeouts.head_timeout_s,
            cancels=False,  # whoever asked for a reload may leave, the reload goes on
        )
        self._admin_runner = web.ServerRunner(admin, shutdown_timeout=_CUT_S)
        try:
            self.clients = await self._listen(self._client_runner, self.config.listen)
            self.admins = await self._listen(self._admin_runner, [self.config.admin.listen])
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def _listen(self, runner: web.BaseRunner, wanted: Sequence[Address]) -> list[str]:
        await runner.setup()
        for address in wanted:
            site = web.TCPSite(runner, address.host, address.port, backlog=_BACKLOG)
            try:
                await site.start()
            except OSError as error:
                # asyncio's own text names the address a second time; a failed look-up has none.
                lookup = isinstance(error, socket.gaierror)
                why = error.strerror if lookup else os.strerror(error.errno or 0).lower()
                raise OSError(error.errno, f"cannot listen on {address}: {why}") from error
            self._guard.watch(runner.addresses)
            if runner is self._client_runner:
                self._sites.append(site)
        return [_url(bound) for bound in runner.addresses]

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client_runner.cleanup()
        await self._admin_runner.cleanup()
        await self._upstream.close()
        self._gate.ledger.settle()

    async def drain(self) -> None:
        """Not ready, no new connections; returns when no request is left."""
        self._admin.draining = True
        self._server.closing = True
        for site in self._sites:
            await site.stop()
        await self._gate.idle()

    def reconfigure(self, config: Config) -> None:
        """Put a new configuration in force, in one step; requests in flight go on."""
        before = {spec.url for spec in self.pool.specs()}
        self.config = config
        self.pool.reconfigure(config.topology, self._gate.clock())
        for url in before - {spec.url for spec in self.pool.specs()}:
            self._upstream.forget(url)
        self._upstream.connect_s = config.timeouts.connect_s
        self._server.reconfigure(
            max_header_bytes=config.limits.max_header_bytes,
            head_timeout_s=config.timeouts.head_timeout_s,
        )
        self._gate.settings = _gate_settings(config)
        self._gate.ledger.tell = _tell(config)
        self._gate.proxy.settings = _proxy_settings(config)
        self._gate.manage.fanout.settings = _manage_settings(config)
        self.prober.reconfigure(_probe_settings(config))
        token = config.admin.token
        self._admin.token = None if token is None else token.get_secret_value()
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
            for node, used in self.pool.unseen(scope):
                group.create_task(self._look_at(node, used))

    async def _look_at(self, node: NodeSpec, used: int) -> None:
        if "ps" in await self.prober.look(node, ("ps",)):
            self.pool.saw(node.url, used)

    def _flipped(self, flip: Flip) -> None:
        say = self.log.info if flip.now is Health.UP else self.log.warning
        say("node " + flip.now.value, node=flip.node, was=flip.was.value, reason=flip.reason)
        if self.pool.probed and not self.pool.any_up:
            self.log.error("no node is up")
        self._changed()

    def _seen(self) -> None:
        """Tell of each name that has come to stand for several digests."""
        before, now = self._conflicts, self.pool.conflicts()
        if now is before:
            return
        self._conflicts = now
        for model in now.keys() - before.keys():
            self.log.warning("model digest conflict", model=model, digests=now[model])


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
    )


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


def _proxy_settings(config: Config) -> ProxySettings:
    return ProxySettings(limits=_limits(config), exact_usage=config.metrics.exact_usage)


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
