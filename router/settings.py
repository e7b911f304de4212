"""All that can be set: the sections of `router.yaml`, each with its defaults and its manual."""

from collections.abc import Iterator, Mapping
from math import inf
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from router.core import names
from router.core.rates import Waits
from router.core.types import (
    Digest,
    NodeSpec,
    NumCtx,
    Placement,
    Policy,
    PoolSpec,
    QueueLimits,
    Resilience,
    Tls,
    Topology,
    Wish,
)
from router.core.waits import ModelWaits
from router.core.work import FlowRule, Priority
from router.values import (
    AT_LEAST_ONE,
    HEADER_KEYS,
    AddressText,
    CaBundle,
    Candidates,
    Count,
    EntryName,
    Flag,
    FlowName,
    FlowWeight,
    Glob,
    Globs,
    HeaderName,
    HeaderValue,
    Listen,
    Network,
    NodeUrl,
    Number,
    Origin,
    Seconds,
    Share,
    Size,
    Slots,
    Spread,
    Token,
    UrlText,
    Weight,
    long_form,
    not_empty,
)


class _Section(BaseModel):
    """A mapping of the file: frozen, without unknown keys, and silent about its texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for key, value in super().__repr_args__():
            if isinstance(value, int | float):
                yield key, value


class TlsEntry(_Section):
    """How an https node is checked."""

    ca: CaBundle | None = Field(
        None, description="PEM bundle to check the node with, instead of the system's"
    )
    verify: Flag = Field(True, description="false accepts any certificate")


class NodeEntry(_Section):
    """One Ollama server; a URL alone stands for `{url: ...}`."""

    name: EntryName | None = Field(
        None, description="what pins, metrics and logs call it; default host:port"
    )
    url: NodeUrl = Field(description="http(s)://host[:port][/prefix]; a bare host:port is http")
    slots: Slots = Field(
        "auto",
        validate_default=True,
        description="what it serves at once per model (OLLAMA_NUM_PARALLEL); auto learns it",
    )
    gpus: tuple[Size, ...] = Field(
        (), description="memory of each of its GPUs, such as 24GiB; default: learned"
    )
    weight: Weight = Field(1.0, description="relative speed")
    models: tuple[Glob, ...] = Field(
        (), description="globs of the models that may be used, !glob excludes; default all"
    )
    labels: dict[str, str] = Field({}, description="free words about the node")
    headers: dict[HeaderName, HeaderValue] = Field(
        {},
        description="set on every request to the node; never shown",
        json_schema_extra=HEADER_KEYS,
    )
    tls: TlsEntry = Field(default_factory=TlsEntry, description="how an https node is checked")
    primary: Flag = Field(
        False, description="its identity at ollama.com stands for all: push, me, signout, user keys"
    )
    cloud: Flag = Field(
        False, description="may be asked for cloud models and web search; none marked: all may"
    )

    @property
    def spec(self) -> NodeSpec:
        url = self.url
        return NodeSpec(
            name=self.name or url.address,
            url=str(url),
            scheme=url.scheme,
            host=url.host,
            port=url.port,
            prefix=url.prefix,
            slots=self.slots or 1,
            auto=self.slots is None,
            gpus=self.gpus,
            weight=self.weight,
            models=self.models,
            labels=self.labels,
            headers=tuple((k, v.get_secret_value()) for k, v in self.headers.items()),
            tls=Tls(self.tls.ca, self.tls.verify),
            primary=self.primary,
            cloud=self.cloud,
        )


_Entry = Annotated[
    NodeEntry, BeforeValidator(long_form("url"), json_schema_input_type=UrlText | NodeEntry)
]
Nodes = Annotated[
    tuple[_Entry, ...], BeforeValidator(not_empty), Field(json_schema_extra=AT_LEAST_ONE)
]


class PoolEntry(_Section):
    """Nodes that can stand in for each other."""

    name: EntryName = Field(description="what metrics and logs call it")
    nodes: Nodes = Field(description="URLs, or mappings with a url")
    policy: Annotated[Policy | None, Field(strict=False)] = Field(
        None, description="how one of its nodes is chosen; default: routing.policy"
    )
    spill_after_s: Seconds | None = Field(
        None,
        description="who has waited for its nodes for so long may have the next pool's, too; "
        "default: never",
    )

    @property
    def spec(self) -> PoolSpec:
        nodes = tuple(node.spec for node in self.nodes)
        return PoolSpec(self.name, nodes, self.policy, self.spill_after_s or inf)


class Admin(_Section):
    """The operator's own listener; an address alone stands for `{listen: ...}`."""

    listen: Listen = Field(
        "127.0.0.1:11436", validate_default=True, description="host:port; keep it private"
    )
    token: Token | None = Field(
        None, description="bearer token that changing verbs need; must be set away from loopback"
    )


class Probe(_Section):
    """How nodes are asked whether they are well."""

    interval_s: Seconds = Field(5, description="between two probes of a node that is up or down")
    timeout_s: Seconds = Field(2, description="a probe that takes longer has failed")
    suspect_interval_s: Seconds = Field(2, description="between probes after the first bad one")
    ps_interval_s: Seconds = Field(5, description="between questions what is in memory")
    tags_interval_s: Seconds = Field(15, description="between questions what is on disk")
    up_after: Count = Field(2, description="good probes in a row until a node is up again")
    down_after: Count = Field(3, description="bad probes in a row until a node is down")
    jitter: Share = Field(0.2, description="share of each interval that is left to chance")


class FlowEntry(_Section):
    """What one flow is given beside the others."""

    weight: FlowWeight = Field(1.0, description="share beside others: 2 gets twice as much as 1")
    priority: Literal["interactive", "normal", "batch"] = Field(
        "normal", description="of requests that do not say theirs; after 30 s the next better one"
    )


class Routing(_Section):
    """How a node is chosen."""

    policy: Annotated[Policy, Field(strict=False)] = Field(
        Policy.EXPECTED_DELAY,
        description="least expected delay, or least in flight for its slots and weight",
    )
    digest: Annotated[Digest, Field(strict=False)] = Field(
        Digest.ANY, description="which nodes may be asked where a name has several digests"
    )
    num_ctx: Annotated[NumCtx, Field(strict=False)] = Field(
        NumCtx.AS_SENT,
        description="at_least: raised to the loaded model's context, so that it is not reloaded",
    )
    flow_header: HeaderName | None = Field(
        None, description="names whose a request is, from trusted addresses; default: the address"
    )
    warm: dict[str, Number] = Field(
        {}, description="model: how many replicas of it are kept in memory"
    )
    flows: dict[FlowName, FlowEntry] = Field(
        {},
        description="what the header says, or an address: its weight and priority",
        json_schema_extra={"additionalProperties": False},
    )

    @property
    def rules(self) -> Mapping[str, FlowRule]:
        """Those of the flows that have one of their own, by name."""
        return {
            name: FlowRule(entry.weight, Priority[entry.priority.upper()])
            for name, entry in self.flows.items()
        }


class BreakerEntry(_Section):
    """When requests are kept away from what fails, and when it is tried again."""

    resets: Count = Field(3, description="broken connections in a row that eject a node")
    answers: Count = Field(
        5, description="answers of 5xx in a row that eject a model on a node; 503 is none"
    )
    good_share: Share = Field(
        0.8, description="so does a smaller share of good answers, of at least that many"
    )
    window_s: Seconds = Field(30, description="over so long")
    back_off_s: Seconds = Field(1, description="until the first trial; doubled after each")
    back_off_max_s: Seconds = Field(60, description="the longest time between two trials")
    jitter: Share = Field(0.5, description="share of that time that is left to chance")
    panic_share: Share = Field(
        0.34, description="with fewer of a model's nodes left, ejected ones are tried too"
    )
    slow_start_s: Seconds = Field(
        30, description="until a node that returns gets its full share of requests"
    )


class RetryEntry(_Section):
    """How often a request that has failed goes to another node."""

    other_nodes: Number = Field(2, description="at most so many without a new record")
    budget: Share = Field(
        0.2, description="share of all requests in flight that may be tried again after an answer"
    )
    budget_least: Number = Field(20, description="so many may be at any rate,")
    budget_s: Seconds = Field(10, description="within so long")


class Continuation(_Section):
    """Whether another node finishes a stream whose node has died."""

    enabled: Flag = Field(True, description="false ends such streams with an error")
    models: Globs = Field(("*",), description="globs of the models whose answers may be continued")


class PlacementEntry(_Section):
    """Where some models may live."""

    models: Globs = Field(description="globs of model names")
    nodes: tuple[EntryName, ...] = Field((), description="nodes by name")
    labels: dict[str, str] = Field({}, description="nodes that have all of these labels")
    pools: tuple[EntryName, ...] = Field((), description="all nodes of these pools")
    wish: Annotated[Wish, Field(strict=False)] = Field(
        Wish.REQUIRE, description="require: never elsewhere; prefer: elsewhere where these fail"
    )

    @property
    def placement(self) -> Placement:
        return Placement(self.models, self.nodes, self.labels, self.pools, self.wish)


class Verb(_Section):
    """Whether clients may do something to the models on nodes."""

    allow: Flag = Field(True, description="false answers 403")


class SpreadVerb(Verb):
    """A verb that brings models to nodes."""

    to: Spread = Field("all", description="how many nodes get the model: all, one, or a number")


class Manage(_Section):
    """What clients may do to the models on nodes, and how many nodes it goes to."""

    pull: SpreadVerb = Field(default_factory=SpreadVerb, description="fetch a model")
    create: SpreadVerb = Field(default_factory=SpreadVerb, description="make a model, with blobs")
    delete: Verb = Field(default_factory=Verb, description="on every node that has it")
    copy_verb: Verb = Field(
        default_factory=Verb, alias="copy", description="on every node that has it"
    )
    push: Verb = Field(default_factory=Verb, description="from the primary node")


class MetricsEntry(_Section):
    """What is measured."""

    exact_usage: Flag = Field(
        True, description="ask nodes for the token counts of OpenAI streams that carry none"
    )


class ModelTimeouts(_Section):
    """Other limits for some models; what is left out is as for all."""

    first_byte_s: Seconds | None = Field(None, description="instead of the one for all models")
    first_byte_min_s: Seconds | None = Field(None, description="instead of the one for all models")
    between_records_s: Seconds | None = Field(None, description="instead of the one for all models")
    silent_down_s: Seconds | None = Field(None, description="instead of the one for all models")


class Timeouts(_Section):
    """Limits of waiting, in seconds. A request as a whole has none."""

    connect_s: Seconds = Field(2, description="to connect to a node")
    first_byte_s: Seconds = Field(
        600, description="to a node's first byte: loads are slow; later the least if not streamed"
    )
    first_byte_min_s: Seconds = Field(
        60, description="the least to a stream's first byte, once the node's speed is known"
    )
    between_records_s: Seconds = Field(600, description="between two records of an answer")
    silent_down_s: Seconds = Field(
        60, description="the most in both places, for a node that fails its probes too"
    )
    models: dict[Glob, ModelTimeouts] = Field(
        {},
        description="glob of model names: other limits; the first that fits counts",
        json_schema_extra={"additionalProperties": False},
    )
    busy_s: Seconds = Field(
        120, description="for a turn, or where all nodes with the model say that they are busy"
    )
    drain_timeout_s: Seconds = Field(60, description="for requests in flight at shutdown")
    stalled_body_s: Seconds = Field(60, description="for a client to send more of a body")
    head_timeout_s: Seconds = Field(30, description="for a client to send a request's head")

    @property
    def waits(self) -> ModelWaits:
        """How long a node may be silent, for each model."""
        rows = tuple((glob, self._waits(entry)) for glob, entry in self.models.items())
        return ModelWaits(self._waits(ModelTimeouts()), rows)

    def _waits(self, entry: ModelTimeouts) -> Waits:
        return Waits(
            first_byte_s=entry.first_byte_s or self.first_byte_s,
            first_byte_min_s=entry.first_byte_min_s or self.first_byte_min_s,
            between_s=entry.between_records_s or self.between_records_s,
            silent_down_s=entry.silent_down_s or self.silent_down_s,
        )


class Limits(_Section):
    """Limits of number and of size: a number of bytes, or a text such as 8MiB."""

    max_connections: Count = Field(
        16384, description="of clients; fewer where the process may not have so many descriptors"
    )
    max_in_flight: Count = Field(
        8192, description="requests being answered: more are told to come back"
    )
    max_queued: Count = Field(
        2048, description="requests that wait for a node: more are told to come back"
    )
    max_queued_per_flow: Count = Field(256, description="of these, so many of one flow")
    max_queued_bytes_per_flow: Size = Field(
        "256MiB", validate_default=True, description="bodies of these; one may wait at any size"
    )
    # Room for two of the largest bodies.
    max_buffered_bytes: Size = Field(
        "1GiB", validate_default=True, description="bodies and kept texts of all requests together"
    )
    max_body_bytes: Size = Field(
        "512MiB", validate_default=True, description="a request's body: images are large"
    )
    max_held_bytes: Size = Field(
        "8MiB", validate_default=True, description="what is held back of an unstreamed answer"
    )
    max_record_bytes: Size = Field(
        "8MB", validate_default=True, description="one record of a streamed answer"
    )
    max_header_bytes: Size = Field(
        "64KiB", validate_default=True, description="all header fields of a request"
    )

    @property
    def queue(self) -> QueueLimits:
        return QueueLimits(
            self.max_queued, self.max_queued_per_flow, self.max_queued_bytes_per_flow
        )


class Log(_Section):
    """What is logged; prompts and keys never are."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least that is logged"
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto is console on a terminal, else json"
    )
    requests: Flag = Field(True, description="one line per request")


_OLLAMA_ORIGINS = (
    *(f"{scheme}://localhost{port}" for scheme in ("http", "https") for port in ("", ":*")),
    *(f"{scheme}://127.0.0.1{port}" for scheme in ("http", "https") for port in ("", ":*")),
    *(f"{scheme}://0.0.0.0{port}" for scheme in ("http", "https") for port in ("", ":*")),
    *(f"{app}://*" for app in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
)


class Cors(_Section):
    """Which web pages may call the router from a browser."""

    origins: tuple[Origin, ...] = Field(
        _OLLAMA_ORIGINS,
        description="scheme://host[:port], * for any text; replaces Ollama's own list",
    )


class Config(_Section):
    """All that can be set. An instance stands for a configuration that was checked whole."""

    listen: Annotated[
        tuple[Listen, ...],
        BeforeValidator(not_empty),
        BeforeValidator(
            lambda value: (value,) if isinstance(value, str) else value,
            json_schema_input_type=AddressText
            | Annotated[tuple[AddressText, ...], Field(min_length=1)],
        ),
    ] = Field(
        "127.0.0.1:11435", validate_default=True, description="where clients connect; or a list"
    )
    admin: Annotated[
        Admin, BeforeValidator(long_form("listen"), json_schema_input_type=AddressText | Admin)
    ] = Field(default_factory=Admin, description="health, metrics and verbs of the operator")
    trusted: tuple[Network, ...] = Field(
        (), description="networks whose word is believed: X-Forwarded-For, flow_header, priority"
    )
    nodes: Nodes = Field((), description="short form of one pool called default")
    pool_entries: Annotated[
        tuple[PoolEntry, ...], BeforeValidator(not_empty), Field(json_schema_extra=AT_LEAST_ONE)
    ] = Field((), alias="pools", description="tried in this order, instead of nodes")
    aliases: dict[str, Candidates] = Field(
        {}, description="name: model, or model@node to pin it; a list: the first that can be had"
    )
    probe: Probe = Field(
        default_factory=Probe, description="how nodes are asked whether they are well"
    )
    routing: Routing = Field(default_factory=Routing, description="how a node is chosen")
    breaker: BreakerEntry = Field(
        default_factory=BreakerEntry, description="when requests are kept away from what fails"
    )
    retry: RetryEntry = Field(
        default_factory=RetryEntry, description="how often a failed request goes elsewhere"
    )
    continuation: Continuation = Field(
        default_factory=Continuation, description="another node finishes what one has begun"
    )
    timeouts: Timeouts = Field(
        default_factory=Timeouts, description="limits of waiting, in seconds"
    )
    limits: Limits = Field(
        default_factory=Limits, description="limits of size, in bytes or as 8MiB"
    )
    log: Log = Field(default_factory=Log, description="what is logged; prompts and keys never are")
    cors: Cors = Field(default_factory=Cors, description="which web pages may call from a browser")
    placement: tuple[PlacementEntry, ...] = Field(
        (), description="where models may live; without, wherever they are"
    )
    manage: Manage = Field(
        default_factory=Manage, description="what clients may do to the models on nodes"
    )
    metrics: MetricsEntry = Field(default_factory=MetricsEntry, description="what is measured")

    @property
    def pools(self) -> tuple[PoolSpec, ...]:
        if self.nodes:
            return (PoolSpec("default", tuple(node.spec for node in self.nodes)),)
        return tuple(pool.spec for pool in self.pool_entries)

    @property
    def topology(self) -> Topology:
        return Topology(
            pools=self.pools,
            aliases=self.aliases,
            placements=tuple(entry.placement for entry in self.placement),
            policy=self.routing.policy,
            digest=self.routing.digest,
            num_ctx=self.routing.num_ctx,
            warm={names.parse(name).key: count for name, count in self.routing.warm.items()},
            up_after=self.probe.up_after,
            down_after=self.probe.down_after,
            queue=self.limits.queue,
            resilience=Resilience(**self.breaker.model_dump(), **self.retry.model_dump()),
        )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield "pools", len(self.pools)
        yield "nodes", sum(len(pool.nodes) for pool in self.pools)


MODELS: dict[str, type[BaseModel]] = {
    "": Config,
    "nodes": NodeEntry,
    "pools": PoolEntry,
    "tls": TlsEntry,
    "admin": Admin,
    "probe": Probe,
    "routing": Routing,
    "flows": FlowEntry,
    "breaker": BreakerEntry,
    "retry": RetryEntry,
    "continuation": Continuation,
    "timeouts": Timeouts,
    "models": ModelTimeouts,
    "limits": Limits,
    "log": Log,
    "cors": Cors,
    "placement": PlacementEntry,
    "manage": Manage,
    "pull": SpreadVerb,
    "create": SpreadVerb,
    "delete": Verb,
    "copy": Verb,
    "push": Verb,
    "metrics": MetricsEntry,
}
