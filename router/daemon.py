"""Process life: start, takeover, signals, reload, drain, and what the supervisor is told."""

import asyncio
import gc
import resource
import signal
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from pathlib import Path

from router import __version__, config, log, systemd, takeover, watch
from router.admin import ReloadResult
from router.app import App
from router.changes import Changes, changes
from router.errors import ConfigError
from router.listeners import Listener
from router.settings import Config
from router.systemd import Notifier
from router.takeover import Handover, Predecessor, Succession

_ALONE = Succession()


class Daemon:
    """One router process. `path` None: the configuration comes from the environment.

    `seen`: the bytes at `path` before `settings` was read from there.
    """

    def __init__(
        self,
        path: Path | None,
        env: Mapping[str, str],
        settings: Config,
        seen: bytes | None = None,
        succession: Succession = _ALONE,
    ) -> None:
        self._path = path
        self._env = env
        self._started = settings
        self._seen = seen
        self._notifier = Notifier(env)
        self._succession = succession
        self._before = succession.before
        self._ending = asyncio.Event()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._hangup = asyncio.Event()
        self._asked = 0
        self._answered = 0
        self._done = ReloadResult("ok")
        self._app = App(settings, self.reload, self._tell, given=succession.listeners)
        self._app.state.source = str(path) if path else "environment"
        if self._before is not None:
            self._app.take_state(self._before.state)

    async def run(self) -> int:
        """Serve until told to stop; returns the exit code. Raises OSError from listening."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped)
        # Never left to its default, which would end the process in the middle of a drain.
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        try:
            await self._serve()
        except BaseExceptionGroup as failed:
            # Half a router looks alive and is not: whoever supervises it starts a whole one.
            self._app.log.exception("a task failed, ending", exc_info=_only(failed))
            return 1
        self._app.log.info("stopped")
        return 0

    async def _serve(self) -> None:
        async with self._app as app:
            app.log.info(
                "listening", version=__version__, clients=app.clients, admin=app.admins,
                config=app.state.source,
            )  # fmt: skip
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(job()) for job in self._jobs()]
                await self._ending.wait()
                await self._drain()
                for task in tasks:
                    task.cancel()

    def _jobs(self) -> list[Callable[[], Coroutine[None, None, None]]]:
        jobs = [
            self._app.prober.run, self._app.warmer.run, self._begin, self._obey,
            self._notifier.feed_watchdog,
        ]  # fmt: skip
        return [*jobs, self._follow] if self._path is not None else jobs

    async def _begin(self) -> None:
        """Ready after the first look at every node, whatever it found. From then on another
        process may take over."""
        await self._app.prober.looked.wait()
        await self._app.accept()
        if self._before is not None:
            state = await self._before.relieve()
            if state != self._before.state:
                self._app.take_state(state)
            self._app.log.info("taken over", of=self._before.pid)
        self._app.log.info("ready", **self._count())
        if self._ready:
            self._notifier.send(READY="1", STATUS=self._status())
        await self._stand_by()

    async def _stand_by(self) -> None:
        """Wait for a process that takes over. Where none could come, all else goes on."""
        app, meeting = self._app, self._succession.meeting
        if meeting is not None:
            relieved = self._relieved_by
            await Handover(meeting, lambda: app.listeners, app.state_out, relieved).run()
        elif self._succession.last:
            app.log.warning("no process can take over", reason=self._succession.last)

    async def _relieved_by(self, pid: int) -> None:
        """Another process serves: finish what is here."""
        await self._app.hand_over()
        self._app.log.info("handed over", to=pid)
        self._ending.set()

    def _count(self) -> dict[str, int]:
        nodes = self._app.pool.registry.snapshot()
        return {"nodes": len(nodes), "up": sum(node.up for node in nodes)}

    def _status(self) -> str:
        refused = ", configuration refused" if self._done.mistakes else ""
        return "{up} of {nodes} nodes up{refused}".format(**self._count(), refused=refused)

    def _tell(self) -> None:
        """Keep the supervisor's line true when a node goes or comes."""
        if self._ready:
            self._notifier.send(STATUS=self._status())

    async def _follow(self) -> None:
        assert self._path is not None
        async for _ in watch.changes(self._path, self._seen):
            await self.reload()

    async def _obey(self) -> None:
        """Reload on SIGHUP; once more if another came meanwhile, as it may mean newer bytes."""
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            await self.reload()

    def _stopped(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()
        self._ending.set()

    async def _drain(self) -> None:
        """Finish what is here. After a takeover, connections may stay until they have been idle
        for a while: their clients do not know yet. A signal ends that, a second one everything.
        """
        limit_s = self._app.config.timeouts.drain_timeout_s
        self._app.log.info("stopping", in_flight=self._app.pool.in_flight, limit_s=limit_s)
        self._notifier.send(STOPPING="1", STATUS="finishing requests")
        until = asyncio.get_running_loop().time() + limit_s
        if not self._stop.is_set():
            await _within(self._app.deserted(), until, self._stop)
        if not await _within(self._app.drain(), until, self._hurry):
            self._app.log.warning("requests cut off", in_flight=self._app.pool.in_flight)

    async def reload(self) -> ReloadResult:
        """Read the configuration again and put it in force, or refuse it whole."""
        self._asked += 1
        mine = self._asked
        if self._ready:
            self._notifier.reloading()
        mistakes: list[str] = []
        try:
            new = await asyncio.to_thread(config.load, self._path, self._env)
        except ConfigError as error:
            new, mistakes = self._app.config, error.mistakes
        if mine > self._answered:  # else overtaken while it read: the newer answer holds for it
            self._answered = mine
            self._done = self._settle(new, mistakes)
            self._app.reloaded(self._done)
            self._log_reload(self._done)
        if self._ready:
            self._notifier.send(READY="1", STATUS=self._status())
        return self._done

    @property
    def _ready(self) -> bool:
        """A reload tells the supervisor READY at its end, which must be no lie."""
        return self._app.prober.looked.is_set() and not self._ending.is_set()

    def _settle(self, new: Config, mistakes: list[str]) -> ReloadResult:
        """Swap, if there are no mistakes and there is a difference."""
        old = self._app.config
        if new.log != old.log:
            log.setup(new.log.level, new.log.format)
        if new != old:
            self._app.reconfigure(new)
        return ReloadResult(
            "refused" if mistakes else "unchanged" if new == old else "ok",
            mistakes=mistakes,
            changes=_lines(changes(old, new)),
            restart_needed=changes(self._started, new).restart,
        )

    def _log_reload(self, done: ReloadResult) -> None:
        say = self._app.log
        if done.result == "refused":
            say.error("reload refused, nothing changed", mistakes=done.mistakes)
            return
        say.info(f"reload {done.result}", changes=done.changes)
        if done.restart_needed:
            say.warning("takes a restart", settings=done.restart_needed)


async def _within(work: Coroutine[None, None, None], until: float, sooner: asyncio.Event) -> bool:
    """Whether `work` came to its end before `until`, by the loop's clock, and before `sooner`."""
    left_s = until - asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as group:
        done = group.create_task(work)
        hurried = group.create_task(sooner.wait())
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait((done, hurried), timeout=max(left_s, 0.0), return_when=first)
        finished = done.done()
        done.cancel()
        hurried.cancel()
    return finished


def _only(failed: BaseExceptionGroup) -> BaseException:
    """What failed, out of the groups around it, if it is but one thing."""
    one: BaseException = failed
    while isinstance(one, BaseExceptionGroup) and len(one.exceptions) == 1:
        one = one.exceptions[0]
    return one


def _lines(difference: Changes) -> list[str]:
    return [
        *(f"node added: {url}" for url in difference.added),
        *(f"node removed: {url}" for url in difference.removed),
        *(f"node changed: {url}" for url in difference.changed),
        *(f"setting changed: {name}" for name in difference.settings),
    ]


def serve(path: Path | None, env: MutableMapping[str, str], *, take_over: bool = False) -> int:
    """Run a router until it is told to stop; returns the exit code.

    Raises ConfigError for a refused configuration, and OSError where it cannot listen, or where
    there is nobody to take over from.
    """
    # Before the load, so that a change of the file in between is not missed.
    seen = None if path is None else watch.read(path)
    settings = config.load(path, env)
    log.setup(settings.log.level, settings.log.format)
    _raise_descriptor_limit()
    _spare_the_collector()
    succession = _succession(path, env, settings, take_over=take_over)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(Daemon(path, env, settings, seen, succession).run())
    finally:
        if succession.meeting is not None:
            succession.meeting.close()


def _succession(
    path: Path | None, env: MutableMapping[str, str], settings: Config, *, take_over: bool
) -> Succession:
    given = systemd.sockets(env, settings.admin.listen.port)
    if take_over:
        before = takeover.ask(takeover.meeting_point(env, path))
        return Succession([*given, *_beside(given, before)], before, before.meeting)
    try:
        return Succession(given, None, takeover.meet(takeover.meeting_point(env, path)))
    except OSError as error:
        return Succession(given, last=(error.strerror or str(error)).lower())


def _beside(given: Sequence[Listener], before: Predecessor) -> list[Listener]:
    """What the other process gives for roles that systemd gives no socket for: that one may have
    come from there, too."""
    roles = {one.role for one in given}
    return [one for one in before.listeners if one.role not in roles]


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it exists."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _raise_descriptor_limit() -> None:
    """A stream takes two descriptors, and the usual soft limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _spare_the_collector() -> None:
    """What is there now lives as long as the process: the collector need not walk it again and
    again. Requests leave no cycles behind, so it may also look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
