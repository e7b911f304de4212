"""The nouns that the core and its shell share, all of them frozen."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf

import msgspec

UNTOLD_BYTES = 5e9  # taken for the size of a model whose size nobody has told
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOST = 1 << 60  # a number that a node tells is no size or length


@dataclass(frozen=True, slots=True)
class Tls:
    """How to check an https node. `ca`: path of a PEM bundle, None for the system's."""

    ca: str | None = None
    verify: bool = True


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One Ollama server, as configured. Its identity is its `url`: a renamed node keeps its state.

    `url` is `scheme://host[:port][/prefix]` without a trailing slash, host in lower case,
    IPv6 in brackets; `host` has no brackets and `port` is always filled in. `auto`: how many
    `slots` a model has is learned, from one on. `gpus`: the memory of each in bytes, none where
    that is not told.
    """

    name: str
    url: str
    scheme: str
    host: str
    port: int
    prefix: str = ""
    slots: int = 1
    auto: bool = False
    weight: float = 1.0
    models: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: Tls = Tls()
    primary: bool = False
    cloud: bool = False
    authority: str = field(init=False, repr=False, compare=False)  # what it is told in `Host`

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        authority = host if self.port == default else f"{host}:{self.port}"
        object.__setattr__(self, "authority", authority)


class Wish(enum.StrEnum):
    """How much a placement means."""

    REQUIRE = "require"  # never elsewhere
    PREFER = "prefer"  # elsewhere only where these cannot be asked


@dataclass(frozen=True, slots=True)
class Placement:
    """Where models may live: those whose name fits a glob, on nodes that are named, or have all
    of the labels, or are in one of the pools."""

    models: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    pools: tuple[str, ...] = ()
    wish: Wish = Wish.REQUIRE


class Digest(enum.StrEnum):
    """Which nodes may be asked for a model whose name stands for several digests."""

    ANY = "any"
    MAJORITY = "majority"  # those with the digest that most nodes have
    NEWEST = "newest"  # those with the digest that was modified last


class Policy(enum.StrEnum):
    """How a node is chosen among those that are eligible."""

    EXPECTED_DELAY = "expected-delay"
    LEAST_IN_FLIGHT = "least-in-flight"


class NumCtx(enum.StrEnum):
    """What becomes of the context that a request asks a native endpoint for."""

    AS_SENT = "as_sent"
    AT_LEAST = "at_least"  # raised to that of the loaded model, where it is smaller or missing


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Nodes that can stand in for each other. `policy`: None for that of all pools.
    `spill_after_s`: who has waited for them for so long may have those of the next pool, too."""

    name: str
    nodes: tuple[NodeSpec, ...]
    policy: Policy | None = None
    spill_after_s: float = inf


@dataclass(frozen=True, slots=True)
class Resilience:
    """When traffic is kept away from what fails, for how long, and how often it is tried again.

    `resets`: failed connections in a row that eject a node; `answers`: answers of 5xx in a row, or
    a share of good ones under `good_share` over `window_s` with at least as many, that eject a
    model on it. Ejected for `back_off_s`, twice as long each time up to `back_off_max_s`, varied
    by `jitter` (a share). Under `panic_share` of a model's nodes, ejected ones are tried too. A
    node that returns gets its full share of requests after `slow_start_s`. A request goes to
    at most `other_nodes` after the first; what was answered goes elsewhere only while such retries
    are under `budget` (a share of what is in flight), or under `budget_least` in `budget_s`.
    """

    resets: int = 3
    answers: int = 5
    good_share: float = 0.8
    window_s: float = 30.0
    back_off_s: float = 1.0
    back_off_max_s: float = 60.0
    jitter: float = 0.5
    panic_share: float = 0.34
    slow_start_s: float = 30.0
    other_nodes: int = 2
    budget: float = 0.2
    budget_least: int = 20
    budget_s: float = 10.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait for nodes: so many requests in all, so many of one flow, and so many bytes
    of their bodies, unless it is one alone."""

    in_all: int = 2048
    of_flow: int = 256
    flow_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Topology:
    """All that the core needs of a configuration. Pools are tried in their order, and so are the
    models that an alias stands for. `policy`: of pools that have none of their own; `warm`: how
    many replicas of a model, by its canonical name, are kept in memory."""

    pools: tuple[PoolSpec, ...]
    aliases: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    placements: tuple[Placement, ...] = ()
    policy: Policy = Policy.EXPECTED_DELAY
    digest: Digest = Digest.ANY
    num_ctx: NumCtx = NumCtx.AS_SENT
    warm: Mapping[str, int] = field(default_factory=dict)
    up_after: int = 2
    down_after: int = 3
    resilience: Resilience = Resilience()
    queue: QueueLimits = QueueLimits()


class Scope(msgspec.Struct, frozen=True):
    """The nodes that a path such as `/@gpu-1/api/chat` leaves: its `text`, and their urls."""

    text: str
    urls: frozenset[str]


class Need(enum.Enum):
    """What an endpoint needs of a node, beside a model."""

    NONE = "none"
    PRIMARY = "primary"  # the identity that stands for all
    CLOUD = "cloud"  # that it may be asked for what ollama.com does
    ANY = "any"  # nothing: where no node is up, the router has an answer of its own


class FailureKind(enum.StrEnum):
    """What went wrong between the router and a node."""

    REFUSED = "refused"  # nobody listens there
    BUSY = "busy"  # it answered that it takes no more
    ANSWERED = "answered"  # it answered that it failed
    ASTRAY = "astray"  # it answered something else than it was asked to go on with, or not all
    MISSING = "missing"  # it answered that it does not have a model that it had
    OURS = "ours"  # the router itself has no descriptor, port or memory left for a connection
    CONNECT = "connect"  # no route, no name, TLS refused, connect limit passed
    RESET = "reset"  # the connection ended before the answer was whole
    GARBAGE = "garbage"  # what came back is not HTTP, or is framed wrongly
    FIRST_BYTE_TIMEOUT = "first-byte-timeout"
    STALLED = "stalled"  # nothing between two records for too long


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt: what happened, and what is known of how far it had come.

    `sent`: at least one byte of the request left for the node. `reused`: it went out on a
    connection that had carried a request before. `received`: at least one byte came back.
    `detail` is for logs and error texts and never holds bytes of a request or a secret.
    `status` is that of the answer, where there was one.
    """

    kind: FailureKind
    sent: bool = False
    reused: bool = False
    received: bool = False
    detail: str = ""
    status: int = 0


class Sign(enum.StrEnum):
    """What one look at a node said about its health."""

    GOOD = "good"
    BAD = "bad"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of a node's `/api/tags` (present) or `/api/ps` (resident).

    `key` is the canonical name; `entry` is the node's own JSON object, whole. `size_bytes`: on
    its disk, or in its memory; 0 where that is not told.
    """

    key: str
    digest: str
    entry: Mapping[str, object]
    size_bytes: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size_bytes", self.number("size"))

    @property
    def context(self) -> int | None:
        """The tokens that a resident model's context has, where the node tells it."""
        return int(self.number("context_length")) or None

    def moment(self, field: str) -> datetime:
        """A time of the entry. Go writes nanoseconds, which Python reads since 3.11; a year past
        9999 or rubbish counts as the beginning of time."""
        try:
            moment = datetime.fromisoformat(str(self.entry.get(field)))
        except ValueError:
            return _EPOCH
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)

    def number(self, field: str) -> float:
        """A size or length of the entry; 0 where that is not told, or is none."""
        told = self.entry.get(field)
        return float(told) if isinstance(told, (int, float)) and 0 < told < _MOST else 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """What a probe learned. None means that it was not asked, or gave no usable answer. `wall`:
    when, as a timestamp, where the times of what is resident matter."""

    sign: Sign | None = None
    version: str | None = None
    present: Mapping[str, Model] | None = None
    resident: Mapping[str, Model] | None = None
    detail: str = ""
    wall: float = 0.0


class Health(enum.StrEnum):
    """What the probes say of a node."""

    UNKNOWN = "unknown"  # not probed yet
    UP = "up"
    DOWN = "down"


class Ejection(enum.StrEnum):
    """Whether real traffic is kept away from a node, or from one model on it."""

    CLOSED = "closed"  # it is not
    OPEN = "open"
    TRIAL = "trial"  # but for one lease, which decides


@dataclass(frozen=True, slots=True)
class Flip:
    """A node's health changed, or a breaker of its; `reason` says why, for the log. `model` is set
    where it is about one model on the node, `retry_s` is the time to the next trial."""

    node: str
    was: Health | Ejection
    now: Health | Ejection
    reason: str
    model: str = ""
    retry_s: float = 0.0


class Reason(enum.StrEnum):
    """Why a node was chosen."""

    PINNED = "pinned"
    ONLY = "only-node"
    LEAST_IN_FLIGHT = "least-in-flight"
    LATER_POOL = "later-pool"
    WARM = "warm"  # the model is loaded there, and has a free slot
    CACHED = "cached"  # and so is the beginning of the prompt
    LOAD = "load"  # to load it there is quicker than to wait elsewhere


class Refusal(enum.StrEnum):
    """Why no node was chosen."""

    BAD_NAME = "bad-name"
    UNKNOWN_PIN = "unknown-pin"
    AMBIGUOUS_PIN = "ambiguous-pin"
    PIN_DOWN = "pin-down"
    NOT_ON_PIN = "not-on-pin"
    NO_MODEL = "no-model"
    NODES_DOWN = "nodes-down"
    ALL_TRIED = "all-tried"
    DRAINED = "drained"  # all that could be asked get no new leases
    BUSY = "busy"  # all that could be asked have said that they take no more for now
    LATE = "late"  # no node had room before its deadline
    FULL = "queue-full"  # as many wait as may
    CROWDED = "flow-full"  # as many of its flow wait as may
    BUDGET = "retry-budget"  # too much is being tried again already
    OUT_OF_SCOPE = "out-of-scope"  # the model's name pins a node that the path leaves out
    NOT_PLACED = "not-placed"  # no node may have the model
    UNMARKED = "unmarked"  # no node is primary, or may be asked for the cloud
    TOO_OLD = "too-old"


@dataclass(frozen=True, slots=True)
class Rejected:
    """No lease. `nodes` are those that the refusal is about, with their names and addresses;
    `versions` are theirs, where those are the reason. `until`: when it may be worth asking again
    (monotonic seconds), where that is known; `after_s`: in how many seconds a client may come
    again."""

    refusal: Refusal
    nodes: tuple[NodeSpec, ...] = ()
    versions: tuple[str, ...] = ()
    until: float | None = None
    after_s: float | None = None


class Kept(msgspec.Struct, frozen=True):
    """A model of which so many replicas are `wanted` in memory, and the nodes that have it there
    and take requests for it."""

    model: str
    wanted: int
    nodes: tuple[str, ...] = ()


class Weighed(msgspec.Struct, frozen=True):
    """What a node would cost a request, in seconds: `wait_s` for a slot, `load_s` for a load with
    what it drives out, `answer_s` for the answer's beginning; all None where that is not weighed.
    `barred`: why it may not have it; empty where it may. `reason`: why it would be chosen;
    `now`: at once, `later`: a request may wait for it."""

    node: NodeSpec
    barred: str = ""
    wait_s: float | None = None
    load_s: float | None = None
    answer_s: float | None = None
    reason: Reason | None = None
    now: bool = False
    later: bool = False

    @property
    def total_s(self) -> float | None:
        if self.wait_s is None or self.load_s is None or self.answer_s is None:
            return None
        return self.wait_s + self.load_s + self.answer_s


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended: `failure` None means that the node answered as it should, or that
    nothing can be told, as the client left before (`told` is False)."""

    failure: Failure | None = None
    told: bool = True


@dataclass(frozen=True, slots=True)
class Ejected:
    """What is kept away from, of a node: all of it, or one `model`. `until` is monotonic: the next
    request after that is the trial. `busy`: it said that it takes no more, which is no failure."""

    reason: str
    until: float
    model: str = ""
    trial: bool = False
    busy: bool = False


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as it was when the snapshot was taken. `leaving`: no longer configured. `slots`: how
    many each model has, where that is learned."""

    spec: NodeSpec
    pool: str
    health: Health
    since: float
    detail: str
    suspect: bool
    leaving: bool
    draining: bool
    ejected: tuple[Ejected, ...]
    in_flight: int
    version: str
    present: Mapping[str, Model]
    resident: Mapping[str, Model]
    slots: Mapping[str, int] = field(default_factory=dict)

    @property
    def up(self) -> bool:
        return self.health is Health.UP
