"""Every request of a client, from arrival to its line in the log."""

import asyncio
import itertools
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from aiohttp import hdrs, web
from multidict import istr

from router import answers, downstream, log
from router.admission import Cause, Overload
from router.catalog import Catalog
from router.core import dialect, retry, wording
from router.core.dialect import VIA, Asked, Family, Kind, Route
from router.core.types import Need, Refusal, Rejected, Scope
from router.cors import Cors
from router.dispatch import Clock, Refused
from router.downstream import Network, Reply, Request
from router.errors import ClientError, UpstreamError
from router.guard import Guard
from router.ledger import Ledger
from router.log import Ending, Report
from router.manage import Manage
from router.proxy import Proxy

Answer = web.StreamResponse | Reply
_ROUTED, _LOCAL = (
    Kind.ROUTED,
    Kind.LOCAL,
)  # a look-up in the module is a third of the price of one in the enum
_NOBODY = (Refusal.NODES_DOWN, Refusal.ALL_TRIED, Refusal.DRAINED)
_NO_HEADERS: Mapping[str, str] = {}
_VIA = istr(VIA)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of every request; a reload replaces it whole."""

    trusted: tuple[Network, ...]
    cors: Cors
    barred: frozenset[str]  # the paths of routes that clients may not use
    max_in_flight: int


@dataclass(slots=True)
class Gate:
    """Answers the client listeners. `refusals` are counted by their cause."""

    proxy: Proxy
    catalog: Catalog
    manage: Manage
    settings: Settings
    clock: Clock
    guard: Guard
    look: Callable[[Scope | None], Awaitable[None]]  # at what nodes have in memory, if it changed
    ledger: Ledger
    refusals: Counter[str] = field(default_factory=Counter)
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
            downstream.request_id(request) or f"{self._run}-{next(self._numbers):x}",
            downstream.client_address(request, self.settings.trusted),
            request.method,
            self.clock(),
        )
        self.active += 1
        try:
            return await self._answer(request, report)
        finally:
            self.active -= 1
            if not self.active:
                self._quiet.set()
            self.ledger.enter(report, self.clock())

    async def _answer(self, request: Request, report: Report) -> Answer:
        route: Route | None = None
        allowed: Mapping[str, str] | None = _NO_HEADERS
        try:
            path, query = downstream.target(request)
            pin = None
            if path[1:2] == "@":
                pin, path = _split(path)
            route = dialect.find(path)
            if route is not None:
                report.endpoint = route.path
            allowed = self._allowed(request)
            answer = self._turned_away(request, route, path, query, allowed)
            if answer is None:
                assert route is not None
                assert allowed is not None
                asked = Asked(route, path, query, None if pin is None else self._scope(pin))
                if route.kind is not _LOCAL:
                    forward = self.proxy.relay if route.kind is _ROUTED else self.manage.handle
                    return await forward(request, report, asked, _lines(allowed))
                answer = await self._listed(asked)
            elif pin is not None:
                _lead_back(answer, pin)
        except ClientError as error:
            answer = self._mistaken(request, report, route, error)
        except Refused as refused:
            assert route is not None
            answer = self._refused(report, route, refused)
        except UpstreamError as error:
            answer = self._refuse(report, route, retry.status(error.failure), str(error))
            report.ending, report.error = Ending.FAILED, error.logged
        else:
            self._sign(answer, report)
        answer.headers.update(allowed or {})
        return answer

    async def _listed(self, asked: Asked) -> web.StreamResponse:
        if asked.route.path == "/api/ps":
            await self.look(asked.scope)
        return self.catalog.answer(asked)

    def _scope(self, pin: str) -> Scope:
        scope = self.proxy.pool.registry.scope(pin)
        if isinstance(scope, Rejected):
            raise Refused(scope)
        return scope

    def _turned_away(
        self,
        request: Request,
        route: Route | None,
        path: str,
        query: str,
        allowed: Mapping[str, str] | None,
    ) -> web.StreamResponse | None:
        """Refuse loops, foreign origins, what is no endpoint, and what is too much; None for the
        rest."""
        passed = request.headers.getall(_VIA, None)
        if passed is not None and self.proxy.instance in ",".join(passed):
            message = "this request has passed this router before: a node's url leads back to it"
            raise ClientError(508, message)
        if allowed is None or not self.guard.admits(request):
            return web.Response(status=403)
        if request.method == "OPTIONS" and hdrs.ORIGIN in request.headers:
            return web.Response(status=204, headers=self.settings.cors.preflight())
        if route is None:
            return answers.no_route(path, query, request.method)
        if request.method not in route.methods:
            return answers.wrong_method(route)
        if route.path in self.settings.barred:
            raise ClientError(403, f"the configuration of ollamux does not allow {route.path}")
        if self.active > self.settings.max_in_flight and route.kind is not _LOCAL:
            raise Overload(Cause.IN_FLIGHT)
        return None

    def _allowed(self, request: Request) -> Mapping[str, str] | None:
        """What an answer must say for the page that asks to read it; None if it may not ask."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None:
            return _NO_HEADERS
        # Not request.host: without the header, it asks the resolver for this machine's name.
        return self.settings.cors.check(origin, request.headers.get(hdrs.HOST, ""))

    def _refused(self, report: Report, route: Route, refused: Refused) -> web.StreamResponse:
        """Answer where no node could be asked."""
        refusal = refused.rejected.refusal
        if route.need is Need.ANY and refusal in _NOBODY:
            return self._sign(self.catalog.fallback(route), report)
        report.reason = refusal.value
        status, message = wording.refusal(route, refused.model, refused.rejected)
        after_s = refused.rejected.after_s
        retry_s = answers.RETRY_S if after_s is None else after_s
        return self._refuse(report, route, status, message, retry_s)

    def _mistaken(
        self, request: Request, report: Report, route: Route | None, error: ClientError
    ) -> web.StreamResponse:
        known = None if error.native else route
        last = error.last or request.content.exception() is not None
        if isinstance(error, Overload):
            last = last or not request.content.is_eof()
            self.refusals[error.cause] += 1
            report.reason = error.cause.value
        answer = self._refuse(report, known, error.status, error.message)
        if last:
            # The rest of a body that could not be read cannot be told from a request.
            answer.force_close()
        return answer

    def _refuse(
        self,
        report: Report,
        route: Route | None,
        status: int,
        message: str,
        retry_s: float = answers.RETRY_S,
    ) -> web.StreamResponse:
        report.error = message
        family = Family.NATIVE if route is None else route.family
        error = answers.error(family, status, message, retry_s=retry_s)
        response = self._sign(error, report)
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


def _lines(headers: Mapping[str, str]) -> bytes:
    if not headers:
        return b""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


def _split(path: str) -> tuple[str, str]:
    """(pin, rest) of `/@pin/rest`; a pin alone asks for the root."""
    pin, _, rest = path[2:].partition("/")
    return pin, "/" + rest


def _lead_back(answer: web.StreamResponse, pin: str) -> None:
    """A redirect stays behind the pin that it was asked for."""
    if hdrs.LOCATION in answer.headers:
        answer.headers[hdrs.LOCATION] = f"/@{quote(pin)}{answer.headers[hdrs.LOCATION]}"
