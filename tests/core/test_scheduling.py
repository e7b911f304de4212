"""The pool that schedules, whatever happens: slots hold, nobody waits in vain, books balance."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from router.core.lease import Lease, Lost, Queued
from router.core.names import parse, split_pin
from router.core.node import Node
from router.core.policy import Attempt, Target
from router.core.pool import Pool
from router.core.queue import Waiting
from router.core.types import (
    Failure,
    FailureKind,
    Model,
    NodeSpec,
    Observation,
    Outcome,
    Policy,
    PoolSpec,
    Refusal,
    Rejected,
    Sign,
    Topology,
)
from router.core.usage import Usage
from router.core.work import Priority, Work
from tests.core.quickly import agrees

GB = 10**9
SIZES = {"a:latest": 3 * GB, "b:latest": 4 * GB, "c:latest": 9 * GB}
KEYS = list(SIZES)
URLS = [f"http://10.0.0.{i}:11434" for i in range(1, 4)]
NAMES = ["ada", "bob", "cyd"]


def node_spec(name: str, url: str, slots: int, gpus: Sequence[int], *, auto: bool) -> NodeSpec:
    host = url.removeprefix("http://").removesuffix(":11434")
    return NodeSpec(
        name, url, "http", host, 11434, slots=slots, auto=auto, gpus=tuple(gb * GB for gb in gpus)
    )


@st.composite
def topologies(draw: st.DrawFn, *, least: int = 0) -> Topology:
    urls = URLS[: draw(st.integers(least, 3))]
    specs = [
        node_spec(
            name, url, draw(st.integers(1, 3)), draw(st.sampled_from([(), (12,), (6, 6)])),
            auto=draw(st.sampled_from([False, False, True])),
        )
        for name, url in zip(NAMES, urls, strict=False)
    ]  # fmt: skip
    first, second = draw(st.sampled_from([(3, 3), (3, 3), (1, 3), (1, 2)]))
    pools = [
        PoolSpec(
            f"pool-{i}", tuple(part), draw(st.sampled_from([None, None, *Policy])),
            draw(st.sampled_from([inf, 1.0, 10.0])),
        )
        for i, part in enumerate([specs[:first], specs[first:second], specs[second:]])
    ]  # fmt: skip
    return Topology(tuple(pools), policy=Policy.EXPECTED_DELAY, up_after=1, down_after=1)


def listing(keys: Iterable[str]) -> Mapping[str, Model]:
    return {
        key: Model(key, "", {"name": key, "size": SIZES[key], "size_vram": SIZES[key]})
        for key in keys
    }


works = st.builds(
    Work,
    flow=st.sampled_from("xxxyz"),
    prompt_tokens=st.sampled_from([0, 100, 5000]),
    blocks=st.sampled_from([(), (1,), (1, 2, 3), (1, 4)]),
    max_tokens=st.sampled_from([None, None, 0, 10, 2000]),
    num_ctx=st.sampled_from([None, None, None, 4096, 8192]),
    priority=st.sampled_from(Priority),
)


class SchedulingMachine(RuleBasedStateMachine):
    """Nodes are what the tests say of them; what is loaded where is asked of the scheduler."""

    @initialize(topology=topologies(least=1))
    def start(self, topology: Topology) -> None:
        self.now = 1000.0
        self.specs: dict[str, NodeSpec] = {}
        self.leases: dict[Attempt, Lease] = {}
        self.outright: set[Attempt] = set()  # those that went where nobody waits for a turn
        self.begun: set[Attempt] = set()
        self.waiting: dict[Attempt, float] = {}
        self.pool = Pool(topology, self.now)
        self.configured(topology)
        for url in self.specs:
            self.pool.observe(url, Observation(Sign.GOOD, "", listing(KEYS)), self.now)

    def configured(self, topology: Topology) -> None:
        self.specs = {spec.url: spec for pool in topology.pools for spec in pool.nodes}

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self.pool.registry.nodes

    def on(self, url: str, key: str) -> int:
        return sum(
            lease.node.url == url and key_of(attempt) == key and attempt not in self.outright
            for attempt, lease in self.leases.items()
        )

    # What happens.

    @rule(
        text=st.sampled_from(["a", "b", "c", "a", "a@ada", "c@bob"]), work=works,
        patience_s=st.sampled_from([inf, inf, inf, 0.0, 5.0]), answered=st.booleans(),
    )  # fmt: skip
    def submit(self, text: str, work: Work, patience_s: float, answered: bool) -> None:
        name, pin = split_pin(text)
        late = Work(
            work.flow, work.prompt_tokens, work.blocks, work.max_tokens, work.num_ctx,
            work.priority, self.now + patience_s,
        )  # fmt: skip
        attempt = Attempt(
            Target(parse(name), pin, name), answered=URLS[0] if answered else "", work=late
        )
        assert agrees(self.pool, attempt, self.now)
        verdict = self.pool.submit(attempt, self.now)
        if isinstance(verdict, Lease):
            self.leased(verdict)
        elif isinstance(verdict, Queued):
            self.waiting[attempt] = self.now
            told = verdict.expected_s < inf and self.pool.registry.has_served(key_of(attempt))
            assert not told or late.deadline >= self.now + verdict.expected_s
        else:
            assert verdict.refusal is not Refusal.LATE or patience_s < inf
        self.settle()

    @rule(text=st.sampled_from(["a", "b", "c"]), work=works, size=st.integers(2, 8))
    def burst(self, text: str, work: Work, size: int) -> None:
        for _ in range(size):
            self.submit(text, work, inf, answered=False)

    def leased(self, lease: Lease) -> None:
        attempt, url, key = lease.attempt, lease.node.url, key_of(lease.attempt)
        self.leases[attempt] = lease
        assert self.nodes[url].open
        if not self.nodes[url].schedules:
            self.outright.add(attempt)
            return
        before = self.on(url, key) - 1
        memory = self.pool._scheduler.scores.memories[self.nodes[url]]
        spec = self.specs[url]
        sure = memory.learned(key).sure
        most = sure + max(1, sure // 2) if spec.auto else spec.slots
        assert before < most, "slots hold"

    def settle(self) -> None:
        """At once those get a node that what has happened is for; after a while, all others."""
        self.take()
        self.now += 0.3
        self.take()

    def take(self) -> None:
        while given := self.pool.granted(self.now):
            for one in given:
                del self.waiting[one.attempt]
                if isinstance(one, Lost):
                    verdict = self.pool.registry.eligible_now(one.attempt, self.now)
                    assert isinstance(verdict, Rejected)
                    assert verdict.refusal is one.rejected.refusal
                else:
                    self.leased(one)

    @rule(pick=st.integers(0, 100))
    def begin(self, pick: int) -> None:
        left = [one for one in self.leases if one not in self.begun]
        if left:
            attempt = left[pick % len(left)]
            self.begun.add(attempt)
            self.pool.began(attempt, self.now)
            self.settle()

    @rule(
        pick=st.integers(0, 100),
        kind=st.sampled_from([None, None, None, None, *FailureKind]),
        told=st.sampled_from([True, True, False]),
        waited_s=st.sampled_from([0.0, 3.0]),
    )
    def end(self, pick: int, kind: FailureKind | None, told: bool, waited_s: float) -> None:
        if self.leases:
            attempt = list(self.leases)[pick % len(self.leases)]
            failure = None if kind is None else Failure(kind)
            if failure is None and told:
                self.pool.began(attempt, self.now)
            self.ended(attempt, Outcome(failure, told), waited_s)
            self.settle()

    def ended(self, attempt: Attempt, outcome: Outcome, waited_s: float = 0.0) -> None:
        lease = self.leases.pop(attempt)
        self.outright.discard(attempt)
        self.begun.discard(attempt)
        self.pool.leave(attempt, outcome, self.now)
        if outcome.failure is None and outcome.told:
            told = Usage(100, 50, 2.0, 5.0, 1.0, total_s=8.0 + waited_s)
            key, flow = key_of(attempt), attempt.work.flow
            self.pool.learn(lease.node.url, key, told, flow, lease.place, self.now)

    @rule(pick=st.integers(0, 100))
    def give_up(self, pick: int) -> None:
        """A client that waits leaves; nothing is left of it."""
        if self.waiting:
            attempt = list(self.waiting)[pick % len(self.waiting)]
            del self.waiting[attempt]
            assert not self.pool.leave(attempt, Outcome(told=False), self.now)
            self.settle()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 20.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    @rule(url=st.sampled_from(URLS), keys=st.sets(st.sampled_from(KEYS)))
    def look(self, url: str, keys: set[str]) -> None:
        """What a node has in memory: what answers is there, what else may be."""
        busy = {key_of(one) for one in self.begun if self.leases[one].node.url == url}
        seen = Observation(resident=listing([*busy, *(keys - busy)]), wall=self.now)
        self.pool.observe(url, seen, self.now)
        self.settle()

    @rule(url=st.sampled_from(URLS))
    def die(self, url: str) -> None:
        """All that it had in flight fails, before and after it is known to be down."""
        self.now += 0.1
        held = [one for one, lease in self.leases.items() if lease.node.url == url]
        for attempt in held[:1]:
            self.ended(attempt, Outcome(Failure(FailureKind.RESET)))
            self.settle()
        self.pool.observe(url, Observation(Sign.REFUSED), self.now)
        for attempt in [one for one, lease in self.leases.items() if lease.node.url == url]:
            self.ended(attempt, Outcome(Failure(FailureKind.RESET)))
        self.settle()

    @rule(url=st.sampled_from(URLS))
    def live(self, url: str) -> None:
        self.pool.observe(url, Observation(Sign.GOOD, "", listing(KEYS), {}), self.now)
        self.settle()

    @rule(url=st.sampled_from(URLS), draining=st.booleans())
    def drain(self, url: str, draining: bool) -> None:
        self.pool.registry.drain(url, draining=draining)
        self.settle()

    @rule(topology=topologies())
    def reconfigure(self, topology: Topology) -> None:
        self.pool.reconfigure(topology, self.now)
        self.configured(topology)
        for url in self.specs:
            self.live(url)
        self.settle()

    # What always holds.

    @invariant()
    def books_balance(self) -> None:
        queue = self.pool._scheduler.queue
        assert self.pool.waiting == len(self.waiting) == len(queue)
        assert self.pool.in_flight == len(self.leases)
        assert {one.attempt for one in queue} == set(self.waiting)
        leases = self.pool._leases.items()
        placed = {one for one, held in leases if held.placed is not None}
        assert placed == set(self.leases) - self.outright
        assert self.pool._paid <= set(self.waiting)
        paid = sum(held.paid for held in self.pool._leases.values())
        assert self.pool._budget.running == paid + len(self.pool._paid)
        flows = queue.flows.values()
        waits = Counter(attempt.work.flow for attempt in self.waiting)
        assert {flow.name: flow.waiting for flow in flows if flow.waiting} == waits
        held = Counter((one.work.flow, key_of(one)) for one in placed)
        assert {(f.name, key): n for f in flows for key, n in f.held.items()} == held

    @invariant()
    def whoever_works_there_is_known(self) -> None:
        for node, memory in self.pool._scheduler.scores.memories.items():
            known = {run for one in memory.loaded.values() for run in one.runs}
            held = {one for one, lease in self.leases.items() if lease.node.url == node.spec.url}
            assert held - self.outright <= known <= held
            assert memory.loading is None or memory.loaded[memory.loading.key] is memory.loading

    @invariant()
    def nobody_waits_for_what_is_gone(self) -> None:
        for one in self.pool._scheduler.queue:
            verdict = self.pool.registry.eligible_now(one.attempt, self.now)
            if isinstance(verdict, Rejected) and self.pool._scheduler._shares.may(one):
                assert self.pool._hopes(verdict, self.now)

    @invariant()
    def no_slot_is_free_for_one_that_waits(self) -> None:
        for one in list(self.pool._scheduler.queue):
            for node in self.free_for(one):
                assert self.is_better_elsewhere(one, node)

    @invariant()
    def nobody_waits_who_may_go_where_nobody_does(self) -> None:
        nodes_of = self.pool._nodes_of(self.now)
        assert not any(nodes_of.now(attempt).outright for attempt in self.waiting)

    def free_for(self, one: Waiting) -> Iterable[Node]:
        """The nodes that could answer it now, as far as anybody can see from outside."""
        scheduler = self.pool._scheduler
        nodes = self.pool._nodes_of(self.now)(one.attempt)
        asked = [other.attempt.work for other in scheduler.queue.by_key[one.key]]
        if not scheduler._shares.may(one):
            return
        for node in nodes:
            memory = scheduler.scores.memories[node]
            loaded = memory.loaded.get(node.runner(one.key))
            if loaded is None or loaded.ready is not None or loaded.key in memory.leaving:
                continue
            if any(loaded.differs(work) for work in asked):
                continue  # it is to be loaded anew
            if len(loaded.runs) < memory.slots(loaded.key, node.spec):
                yield node

    def is_better_elsewhere(self, one: Waiting, node: Node) -> bool:
        scheduler = self.pool._scheduler
        scheduler.scores.begin()
        nodes = self.pool._nodes_of(self.now)(one.attempt)
        best = scheduler._best(one, nodes, self.now)
        return best is not None and best[0].node is not node

    def teardown(self) -> None:
        """When nodes keep ending what they have, all that can be answered is; nothing is left."""
        if "pool" not in self.__dict__:
            return
        for url in self.specs:
            self.pool.registry.drain(url, draining=False)
            self.live(url)
        rounds = 0
        while self.leases or self.waiting:
            rounds += 1
            assert rounds < 200, (self.waiting, self.leases)
            self.now += 61.0
            self.settle()
            for attempt in list(self.leases):
                self.pool.began(attempt, self.now)
                self.ended(attempt, Outcome())
            self.settle()
            for attempt in list(self.waiting):
                if not self.pool._nodes_of(self.now)(attempt):
                    del self.waiting[attempt]
                    self.pool.leave(attempt, Outcome(told=False), self.now)
        self.books_balance()
        scheduler = self.pool._scheduler
        assert not scheduler.queue.by_key
        for node, memory in scheduler.scores.memories.items():
            assert node in self.nodes.values()
            assert not memory.wanted
            assert not memory.leaving


def key_of(attempt: Attempt) -> str:
    assert attempt.target.model is not None
    return attempt.target.model.key


TestSchedulingMachine = SchedulingMachine.TestCase
TestSchedulingMachine.settings = settings(max_examples=100, stateful_step_count=40)
