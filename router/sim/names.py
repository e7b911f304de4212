"""Model names as a node reads them: grammar, defaults, source suffixes."""

import re
from typing import NamedTuple

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_DEFAULT_HOST = "registry.ollama.ai"
_DEFAULT_NAMESPACE = "library"


class Name(NamedTuple):
    """A valid name with its defaults filled in."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """The listing form: default host and namespace hidden, tag always shown."""
        tail = f"{self.model}:{self.tag}"
        if self.host.lower() != _DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{tail}"
        return tail if self.namespace.lower() == _DEFAULT_NAMESPACE else f"{self.namespace}/{tail}"


def parse(text: str) -> Name | None:
    """The name `text` stands for, or None when it is no name."""
    path, tag = text.rpartition("://")[2], "latest"
    colon = path.rfind(":")
    if colon > path.rfind("/"):
        path, tag = path[:colon], path[colon + 1 :]
    parts = path.split("/")
    if len(parts) > 3:
        return None
    defaults = [_DEFAULT_HOST, _DEFAULT_NAMESPACE]
    host, namespace, model = defaults[: 3 - len(parts)] + parts
    name = Name(host, namespace, model, tag)
    return name if _valid(name) else None


def _valid(name: Name) -> bool:
    grammar = (_HOST, _NAMESPACE, _PART, _PART)
    return all(rule.fullmatch(part) for rule, part in zip(grammar, name, strict=True))


class Sourced(NamedTuple):
    """A name without its source suffix. `source` is "cloud", "local" or "" when none is given."""

    base: str
    source: str


def split_source(text: str) -> Sourced | None:
    """Take `:cloud`, `:local` or a tag's `-cloud` off; None when a name carries both."""
    base, colon, last = text.rpartition(":")
    if not colon or "/" in last:
        return Sourced(text, "")
    marker = last.lower()
    if marker not in ("cloud", "local"):
        if marker.endswith("-cloud"):
            return Sourced(text[: -len("-cloud")], "cloud")
        return Sourced(text, "")
    inner = split_source(base)
    if inner is None or inner.source not in ("", marker):
        return None
    return Sourced(inner.base, marker)


def stub(text: str) -> str:
    """The name under which a node keeps a cloud model: `x:tag:cloud` is `x:tag-cloud`."""
    base, _, last = text.rpartition(":")
    tagged = ":" in base.rpartition("/")[2]
    return f"{base}-cloud" if tagged and last.lower() == "cloud" else text
