"""Model names as Ollama reads them, and the pin (`model@node`) that ollamux adds to them.

Source of the rules: Ollama's own name parser, as described in `docs/compatibility.md`.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from router.core.types import NodeSpec

_SCHEME = re.compile(r"[A-Za-z]+://")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_DEFAULT_HOST = "registry.ollama.ai"
_DEFAULT_NAMESPACE = "library"
_PIN = re.compile(
    r"(?:(https?)://)?(?:\[([0-9A-Fa-f:.%]+)\]|([^\s@/\\?#\[\]:]+))(?::([0-9]{1,5}))?"
)
_PORTS = {None: 11434, "http": 80, "https": 443}
_PREFIX = "ollama/"


class BadName(ValueError):
    """The text is no model name; Ollama answers it with 400 `invalid model name`."""


@dataclass(frozen=True, slots=True)
class Name:
    """A model's name: `text` as written (trimmed), `key` as nodes list it, in lower case.

    `source` is "cloud" or "local" where the text carries such a marker, else empty. A cloud
    name is served by ollama.com through any node, so no node need have it.
    """

    text: str
    key: str
    source: str = ""
    cloud: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cloud", self.source == "cloud")


@dataclass(frozen=True, slots=True)
class Pin:
    """The node that a request must go to: by its name, or by host and port.

    `host` is None where the text can only be a node's name. `scheme` None matches any.
    """

    text: str
    scheme: str | None = None
    host: str | None = None
    port: int = 0


def parse(text: str) -> Name:
    """Read a model name without a pin. Raises BadName."""
    text = text.strip()
    bare, source = _source(text)
    if source and _source(bare)[1]:
        raise BadName(text)
    key = shortest(bare).lower()
    if source == "cloud":
        # So a node lists the stub of a pulled cloud model: `x:cloud`, `x:20b-cloud`.
        tagged = ":" in bare.rpartition("/")[2]
        key = f"{key}-cloud" if tagged else f"{key.removesuffix(':latest')}:cloud"
    return Name(text, key, source)


def _source(text: str) -> tuple[str, str]:
    """(text without its marker, source): `:cloud`, `:local`, or the ending `-cloud` of a tag."""
    head, colon, last = text.rpartition(":")
    marker = last.lower() if colon else ""
    if marker in ("cloud", "local"):
        return head, marker
    if marker.endswith("-cloud") and "/" not in marker:
        return text[: -len("-cloud")], "cloud"
    return text, ""


def shortest(text: str) -> str:
    """The name as Ollama shows it: with its tag, without the host and namespace that are usual;
    in the case in which it was written. Raises BadName."""
    scheme = _SCHEME.match(text)
    parts = text[scheme.end() if scheme else 0 :].split("/")
    model, colon, tag = parts[-1].partition(":")
    if not colon:
        tag = "latest"
    namespace = parts[-2] if len(parts) > 1 else _DEFAULT_NAMESPACE
    host = parts[-3] if len(parts) > 2 else _DEFAULT_HOST
    valid = (
        len(parts) <= 3
        and _PART.fullmatch(model)
        and _PART.fullmatch(tag)
        and _NAMESPACE.fullmatch(namespace)
        and _HOST.fullmatch(host)
    )
    if not valid:
        raise BadName(text)
    short = f"{model}:{tag}"
    if host.lower() != _DEFAULT_HOST:
        return f"{host}/{namespace}/{short}"
    return short if namespace.lower() == _DEFAULT_NAMESPACE else f"{namespace}/{short}"


def without_prefix(text: str) -> str | None:
    """`llama3:8b` for `ollama/llama3:8b`, as some gateways write it; None without the prefix."""
    return text[len(_PREFIX) :] if text[: len(_PREFIX)].lower() == _PREFIX else None


def split_pin(text: str) -> tuple[str, Pin | None]:
    """Split `model@node` at the first `@` behind a leading scheme.

    The left side is not checked here. Raises BadName where the right side cannot be a pin:
    user info, path, query and fragment are refused, so first and last `@` mean the same.
    """
    text = text.strip()
    scheme = _SCHEME.match(text)
    at = text.find("@", scheme.end() if scheme else 0)
    if at < 0:
        return text, None
    left, right = text[:at].strip(), text[at + 1 :].strip()
    if not left or not right or "@" in right:
        raise BadName(text)
    return left, pin(right)


def pin(text: str) -> Pin:
    """Read what stands right of the `@`. Raises BadName."""
    match = _PIN.fullmatch(text)
    if match is None:
        if "://" in text or not _PART.fullmatch(text.replace(":", ".")):
            raise BadName(text)
        return Pin(text)
    scheme, v6, host, port = match.groups()
    number = int(port) if port else _PORTS[scheme]
    if not 0 < number < 65536:
        raise BadName(text)
    return Pin(text, scheme, _host(v6) if v6 else host.lower(), number)


def _host(v6: str) -> str:
    try:
        return str(ipaddress.IPv6Address(v6))
    except ValueError:
        raise BadName(v6) from None


def pinned(pin: Pin, specs: Iterable[NodeSpec]) -> list[NodeSpec]:
    """The nodes that a pin names: one by its name, else all with that host and port."""
    specs = list(specs)
    wanted = pin.text.lower()
    return [spec for spec in specs if spec.name.lower() == wanted] or [
        spec
        for spec in specs
        if pin.host == spec.host and pin.port == spec.port and pin.scheme in (None, spec.scheme)
    ]
