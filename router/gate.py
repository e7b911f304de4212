"""Every request of a client, from arrival to its line in the log."""

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from aiohttp import web

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
_ROUTED = Kind.ROUTED  # a look-up in the module is a third of the price of one in the enum
_NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of every request; a reload replaces it whole."""

    trusted: tuple[Network, ...]
    cors: Cors
    log: Callable[[Report, float], None] | None  # writes one line per request


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
            return await self._answer(request, report)
        finally:
            self.active -= 1
            if not self.active:
                self._quiet.set()
            ended = self.clock()
            self.metrics.requests.count(report, ended)
            if self.settings.log is not None:
                self.settings.log(report, ended)

    async def _answer(self, request: Request, report: Report) -> Answer:
        route: Route | None = None
        allowed: Mapping[str, str] | None = _NO_HEADERS
        try:
            path, query = downstream.target(request)
            route = dialect.find(path)
            if route is not None:
                report.endpoint = route.path
            allowed = self._allowed(request)
            answer = self._answer_here(request, route, path, query, allowed)
            if answer is None:
                assert route is not None
                assert allowed is not None
                extra = "".join(f"{name}: {value}\r\n" for name, value in allowed.items())
                return await self.proxy.relay(request, report, route, query, extra.encode())
        except ClientError as error:
            answer = self._refuse(report, route, error.status, error.message)
            if request.content.exception() is not None:
                # The rest of a body that could not be read cannot be told from a request.
                answer.force_close()
        except Refused as refused:
            assert route is not None
            report.reason = refused.rejected.refusal.value
            status, message = dialect.refusal(route, refused.model, refused.rejected)
            answer = self._refuse(report, route, status, message)
        except UpstreamError as error:
            answer = self._refuse(report, route, retry.status(error.failure), str(error))
            report.ending = Ending.FAILED
        else:
            self._sign(answer, report)
        answer.headers.update(allowed or {})
        return answer

    def _answer_here(
        self,
        request: Request,
        route: Route | None,
        path: str,
        query: str,
        allowed: Mapping[str, str] | None,
    ) -> web.StreamResponse | None:
        """Refuse loops and foreign origins, then answer what needs no node; None for the rest."""
        passed = request.headers.getall(VIA, None)
        if passed is not None and self.proxy.instance in ",".join(passed):
            message = "this request has passed this router before: a node's url leads back to it"
            raise ClientError(508, message)
        if allowed is None:
            return web.Response(status=403)
        if request.method == "OPTIONS" and "Origin" in request.headers:
            return web.Response(status=204, headers=self.settings.cors.preflight())
        if route is None:
            return downstream.no_route(path, query, request.method)
        if request.method not in route.methods:
            return downstream.wrong_method(route)
        if route.kind is _ROUTED:
            return None
        if route.kind is Kind.UNBUILT:
            raise ClientError(501, f"ollamux does not serve {route.path} yet: ask a node itself")
        return self.catalog.answer(route, path)

    def _allowed(self, request: Request) -> Mapping[str, str] | None:
        """What an answer must say for the page that asks to read it; None if it may not ask."""
        origin = request.headers.get("Origin")
        if origin is None:
            return _NO_HEADERS
        # Not request.host: without the header, it asks the resolver for this machine's name.
        return self.settings.cors.check(origin, request.headers.get("Host", ""))

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
