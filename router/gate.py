"""Every request of a client, from arrival to its line in the log."""

import asyncio
import itertools
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from router import downstream, log
from router.catalog import Catalog
from router.core import dialect, retry
from router.core.dialect import VIA, Family, Kind, Route
from router.cors import Cors
from router.dispatch import Clock, Refused
from router.downstream import Network, Reply, Request
from router.errors import ClientError, UpstreamError
from router.log import Ending, Report
from router.metrics import Metrics
from router.proxy import Proxy

Answer = web.StreamResponse | Reply


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of every request; a reload replaces it whole."""

    trusted: tuple[Network, ...]
    cors: Cors
    log: FilteringBoundLogger | None  # for one line per request


@dataclass(slots=True)
class Gate:
    """Answers the client listeners."""

    proxy: Proxy
    catalog: Catalog
    metrics: Metrics
    settings: Settings
    clock: Clock
    active: int = 0
    # Random per process and counted within it: unique, without asking the kernel each time.
    _run: str = field(default_factory=lambda: secrets.token_hex(6))
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _quiet: asyncio.Event = field(default_factory=asyncio.Event)

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        while self.active:
            self._quiet.clear()
            await self._quiet.wait()

    async def handle(self, request: Request) -> Answer:
        """Answer one request; every end of it is counted and logged here, once."""
        report = Report(
            id=downstream.request_id(request) or f"{self._run}-{next(self._numbers):x}",
            client=downstream.client_address(request, self.settings.trusted),
            method=request.method,
            started=self.clock(),
        )
        self.active += 1
        try:
            response = await self._handle(request, report)
            if isinstance(response, web.StreamResponse):
                response.headers.update(self._allowed(request) or {})
            return response
        finally:
            self.active -= 1
            if not self.active:
                self._quiet.set()
            ended = self.clock()
            self.metrics.requests.count(report, ended)
            if self.settings.log is not None:
                log.request(self.settings.log, report, ended)

    async def _handle(self, request: Request, report: Report) -> Answer:
        route: Route | None = None
        try:
            path, query = downstream.target(request)
            route = dialect.find(path)
            if route is not None:
                report.endpoint = route.path
            return await self._answer(request, report, route, path, query)
        except ClientError as error:
            response = self._refuse(report, route, error.status, error.message)
            if request.content.exception() is not None:
                # The rest of a body that could not be read cannot be told from a request.
                response.force_close()
            return response
        except Refused as refused:
            assert route is not None
            report.reason = refused.rejected.refusal.value
            status, message = dialect.refusal(route, refused.model, refused.rejected)
            return self._refuse(report, route, status, message)
        except UpstreamError as error:
            response = self._refuse(report, route, retry.status(error.failure), str(error))
            report.ending = Ending.FAILED
            return response

    async def _answer(
        self, request: Request, report: Report, route: Route | None, path: str, query: str
    ) -> Answer:
        """Refuse loops and foreign origins, then answer by the route's kind."""
        if self.proxy.instance in ",".join(request.headers.getall(VIA, ())):
            message = "this request has passed this router before: a node's url leads back to it"
            raise ClientError(508, message)
        allowed = self._allowed(request)
        if allowed is None:
            return self._sign(web.Response(status=403), report)
        if request.method == "OPTIONS" and "Origin" in request.headers:
            headers = self.settings.cors.preflight()
            return self._sign(web.Response(status=204, headers=headers), report)
        if route is None:
            return self._sign(downstream.no_route(path, query, request.method), report)
        if request.method not in route.methods:
            return self._sign(downstream.wrong_method(route), report)
        if route.kind is Kind.UNBUILT:
            raise ClientError(501, f"ollamux does not serve {route.path} yet: ask a node itself")
        if route.kind is Kind.LOCAL:
            return self._sign(self.catalog.answer(route, path), report)
        extra = "".join(f"{name}: {value}\r\n" for name, value in allowed.items())
        return await self.proxy.relay(request, report, route, query, extra.encode())

    def _allowed(self, request: Request) -> Mapping[str, str] | None:
        """What an answer must say for the page that asks to read it; None if it may not ask."""
        # Not request.host: without the header, it asks the resolver for this machine's name.
        host = request.headers.get("Host", "")
        return self.settings.cors.check(request.headers.get("Origin"), host)

    def _refuse(
        self, report: Report, route: Route | None, status: int, message: str
    ) -> web.StreamResponse:
        report.error = message
        family = Family.NATIVE if route is None else route.family
        response = self._sign(downstream.error(family, status, message), report)
        if status >= 500:
            report.ending = Ending.REJECTED
        return response

    def _sign(self, response: web.StreamResponse, report: Report) -> web.StreamResponse:
        """Put our own headers on an answer that no node gave."""
        report.status = response.status
        report.ending = log.ending(response.status)
        response.headers["X-Ollamux-Request-Id"] = report.id
        if report.node:
            response.headers["X-Ollamux-Node"] = report.node
        if report.sent:
            response.headers["X-Ollamux-Model"] = report.sent
        if report.reason:
            response.headers["X-Ollamux-Reason"] = report.reason
        if report.attempts:
            response.headers["X-Ollamux-Attempts"] = str(report.attempts)
        return response
