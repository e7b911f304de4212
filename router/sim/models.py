"""What a simulated node is made of: its models, its limits, and a few models by name."""

import hashlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from router.sim import names
from router.sim.names import Name
from router.sim.recipe import Layer, Recipe, layer_of
from router.sim.versions import Release, release

GB = 1_000_000_000
# Room for one token of context, as a fraction of the weights: 115 KB for a model of 4.7 GB.
CONTEXT_SHARE = 1 / 40_000
COMPLETION = ("completion", "tools", "thinking")
_PLAIN = Recipe()
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model on a node's disk, and how fast that node runs it.

    `name` is spelled as `/api/tags` lists it; a missing tag means `latest`. `digest` (64 hex) and
    `weights` (what a runner is keyed by: names that share it share one runner) follow from the
    name when left empty. `load_s` is the time of a load, `prefill_tps` and `decode_tps` are tokens
    per second; `math.inf` makes them take no time. `slots` overrides the node's `num_parallel`.
    `remote_model` is set for one that runs at ollama.com: its name there.
    """

    name: str
    size_bytes: int = 5 * GB
    digest: str = ""
    weights: str = ""
    family: str = "llama"
    parameter_size: str = "8B"
    quantization: str = "Q4_K_M"
    context_length: int = 8192
    embedding_length: int = 32
    load_s: float = 2.0
    prefill_tps: float = 2000.0
    decode_tps: float = 60.0
    embedding: bool = False
    can_embed: bool = True
    slots: int | None = None
    modified_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    capabilities: tuple[str, ...] = ()
    recipe: Recipe = _PLAIN
    remote_model: str = ""

    def __post_init__(self) -> None:
        """Fill in what follows from the rest."""
        name = self.name if ":" in self.name.rpartition("/")[2] else f"{self.name}:latest"
        object.__setattr__(self, "name", name)
        digest = self.digest or hashlib.sha256(name.lower().encode()).hexdigest()
        object.__setattr__(self, "digest", digest)
        object.__setattr__(self, "weights", self.weights or digest)
        capabilities = self.capabilities or (("embedding",) if self.embedding else COMPLETION)
        object.__setattr__(self, "capabilities", capabilities)

    @property
    def layers(self) -> list[Layer]:
        """The blobs it is made of, the weights first."""
        config = layer_of(f"{self.family} {self.parameter_size} {self.quantization}")
        weights = self.weights
        if not _DIGEST.fullmatch(weights):
            weights = hashlib.sha256(weights.encode()).hexdigest()
        return [Layer(f"sha256:{weights}", self.size_bytes), *self.recipe.layers, config]


def at_once(
    name: str, *, size_bytes: int = GB, weights: str = "", remote_model: str = ""
) -> SimModel:
    """A model that loads and answers without taking time."""
    return SimModel(
        name,
        size_bytes=size_bytes,
        weights=weights,
        load_s=0.0,
        prefill_tps=math.inf,
        decode_tps=math.inf,
        remote_model=remote_model,
    )


@dataclass(frozen=True, slots=True)
class SimSpec:
    """One node: models on disk, scheduler settings, memory, and the size of its answers.

    `keep_alive_s` below 0 means for ever. `answer_tokens` bounds the length of an answer (both
    ends included). `cache_tokens` bounds the prompt cache of one loaded model, `block_tokens` is
    the step in which prompts are compared. `contention` lengthens a job by this share for every
    other model that is busy when the job starts; of `gpus`, each takes a model for itself before
    any is shared, and they share what is left over. `handover_s` is the `load_duration` a warm
    request reports; no time passes for it. With `check_host` the node refuses foreign `Host` and
    `Origin` headers, as one bound to loopback does. With `refuse_overflow` a chat longer than its
    context is answered 400 instead of being cut.

    `library` is what a pull may bring besides the presets. A pull or push moves `transfer_bps`
    bytes per second and tells of each layer in `transfer_records` steps. `user` is who the node is
    to ollama.com, empty for one that nobody signed in; with `cloud_disabled` it does not talk to
    it. `version` decides which endpoints there are.
    """

    models: tuple[SimModel, ...] = ()
    num_parallel: int = 1
    max_loaded: int = 3
    max_queue: int = 512
    memory_bytes: int = 24 * GB
    keep_alive_s: float = 300.0
    version: str = "0.33.0"
    warm: tuple[str, ...] = ()
    answer_tokens: tuple[int, int] = (16, 48)
    default_num_ctx: int = 4096
    cache_tokens: int = 65_536
    block_tokens: int = 16
    contention: float = 0.0
    gpus: int = 1
    handover_s: float = 0.002
    check_host: bool = False
    refuse_overflow: bool = False
    origins: tuple[str, ...] = ()
    library: tuple[SimModel, ...] = ()
    transfer_bps: float = math.inf
    transfer_records: int = 4
    user: str = "sim"
    cloud_disabled: bool = False

    @property
    def release(self) -> Release:
        """The release it claims to be."""
        return release(self.version)

    def published(self, name: Name) -> SimModel | None:
        """The model that a pull of `name` brings, None when the registry has none."""
        wanted = str(name).lower()
        for model in (*self.library, *PRESETS.values()):
            if str(names.parse(model.name)).lower() == wanted:
                return model
        return None

    def slots(self, model: SimModel) -> int:
        """How many requests of `model` run at once."""
        if model.embedding:
            return 1
        return self.num_parallel if model.slots is None else model.slots

    def num_ctx(self, model: SimModel, wanted: int | None) -> int:
        """The context one slot really gets: clamped to what the model was trained for."""
        asked = wanted or model.recipe.num_ctx or self.default_num_ctx
        return min(asked, model.context_length)

    def reserved_bytes(self, model: SimModel, num_ctx: int) -> int:
        """Memory a load of `model` takes: its weights, and context for every slot."""
        context = CONTEXT_SHARE * num_ctx * self.slots(model)
        return int(model.size_bytes * (1 + context))


def _preset(name: str, gb: float, parameters: str, family: str, decode_tps: float) -> SimModel:
    return SimModel(
        name=name,
        size_bytes=int(gb * GB),
        family=family,
        parameter_size=parameters,
        context_length=32_768,
        load_s=1 + gb / 2,
        prefill_tps=decode_tps * 30,
        decode_tps=decode_tps,
    )


# Speeds are plausible settings for one 24 GB GPU, not measurements.
PRESETS: dict[str, SimModel] = {
    model.name: model
    for model in (
        _preset("qwen2.5:0.5b", 0.4, "494M", "qwen2", 220),
        _preset("llama3.2:3b", 2.0, "3.2B", "llama", 130),
        _preset("llama3:8b", 4.7, "8.0B", "llama", 75),
        _preset("qwen2.5:14b", 9.0, "14.8B", "qwen2", 42),
        _preset("qwen2.5:32b", 20.0, "32.8B", "qwen2", 20),
        _preset("llama3:70b", 40.0, "70.6B", "llama", 9),
        SimModel(
            name="nomic-embed-text",
            size_bytes=int(0.27 * GB),
            family="nomic-bert",
            parameter_size="137M",
            quantization="F16",
            context_length=2048,
            embedding_length=768,
            load_s=0.5,
            prefill_tps=20_000,
            embedding=True,
        ),
    )
}
