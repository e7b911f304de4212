"""Mistakes between values that may each be right: names, addresses, listeners, aliases."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from router import yamlfile
from router.address import Address, Url
from router.core import names
from router.core.types import NodeSpec
from router.settings import Admin, Config
from router.yamlfile import Document

_OWN_ADDRESS = "the router itself listens there and would call itself"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What can be read of a node, however much else is wrong with it."""

    path: yamlfile.Path
    entry: Mapping[str, object]
    url: Url | None
    name: str | None

    @property
    def spec(self) -> NodeSpec | None:
        url = self.url
        if url is None or self.name is None:
            return None
        return NodeSpec(self.name, str(url), url.scheme, url.host, url.port, url.prefix)

    def __str__(self) -> str:
        return yamlfile.spelled(self.path)


def check(document: Document, value: dict[str, object]) -> None:
    """Note what is wrong between settings that may each be right."""
    if "nodes" in value and "pools" in value:
        document.refuse_key(("pools",), "nodes and pools cannot stand together: use one of them")
    elif "nodes" not in value and "pools" not in value:
        document.refuse_key(("nodes",), "missing: give nodes, or pools of them")
    _check_pools(document, value)
    nodes = list(_seen(value))
    _check_names(document, nodes)
    for node in nodes:
        _check_node(document, node)
    _check_primary(document, nodes)
    _check_listeners(document, nodes, list(_listeners(value)))
    _check_aliases(document, nodes, _mapping(value.get("aliases")))
    _check_warm(document, value)
    _check_placements(document, nodes, value)


def own_address(text: str) -> str | None:
    """What is wrong with a node's URL if the router itself listens there by default."""
    url = _url(text)
    if url and any(address.reached_by(url) for _, address in _listeners({})):
        return _OWN_ADDRESS
    return None


def _items(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _url(value: object) -> Url | None:
    try:
        return Url.parse(value)
    except ValueError:
        return None


def _seen(value: dict[str, object]) -> Iterator[_Seen]:
    lists: list[tuple[yamlfile.Path, object]] = [(("nodes",), value.get("nodes"))]
    for number, pool in enumerate(_items(value.get("pools"))):
        lists.append((("pools", number, "nodes"), _mapping(pool).get("nodes")))
    for path, entries in lists:
        for number, short in enumerate(_items(entries)):
            entry = _mapping({"url": short} if isinstance(short, str) else short)
            url = _url(entry.get("url"))
            name = entry.get("name", url and url.address)
            yield _Seen((*path, number), entry, url, name if isinstance(name, str) else None)


def _check_pools(document: Document, value: dict[str, object]) -> None:
    first: dict[str, int] = {}
    for number, pool in enumerate(_items(value.get("pools"))):
        name = _mapping(pool).get("name")
        if isinstance(name, str) and first.setdefault(name.lower(), number) != number:
            twin = f"pools[{first[name.lower()]}]"
            document.refuse(("pools", number, "name"), f"the same name as {twin}: give it another")


def _check_names(document: Document, nodes: list[_Seen]) -> None:
    """No two nodes may answer to one pin: every name, host and address means one node."""
    urls: dict[Url, _Seen] = {}
    called: dict[str, _Seen] = {}
    hosts: dict[str, list[_Seen]] = {}
    for node in nodes:
        if node.url:
            hosts.setdefault(node.url.host, []).append(node)
            hosts.setdefault(node.url.address, []).append(node)
    for node in nodes:
        same = urls.setdefault(node.url, node) if node.url else node
        if same is not node:
            document.refuse((*node.path, "url"), f"the same address as {same}: keep one")
        twin = called.setdefault(node.name.lower(), node) if node.name else node
        explicit = (*node.path, "name" if "name" in node.entry else "url")
        if twin is not node and (same is node or "name" in node.entry):
            document.refuse(explicit, f"the same name as {twin}: give it another")
        elif twin is node and node.name and "name" in node.entry:
            others = (other for other in hosts.get(node.name.lower(), ()) if other is not node)
            if other := next(others, None):
                document.refuse(explicit, f"this is the host of {other}: a pin could mean both")


def _check_node(document: Document, node: _Seen) -> None:
    first: dict[str, str] = {}
    for key in _mapping(node.entry.get("headers")):
        if first.setdefault(key.lower(), key) != key:
            document.refuse_key((*node.path, "headers", key), "this header stands twice: keep one")


def _check_primary(document: Document, nodes: list[_Seen]) -> None:
    marked = [node for node in nodes if yamlfile.typed(node.entry.get("primary")) is True]
    for node in marked[1:]:
        text = f"{marked[0]} is primary already: only one can be"
        document.refuse((*node.path, "primary"), text)


def _default(model: type[BaseModel], field: str) -> object:
    default: object = model.model_fields[field].default
    return default


def _listeners(value: dict[str, object]) -> Iterator[tuple[yamlfile.Path, Address]]:
    listen = value.get("listen", _default(Config, "listen"))
    admin = value.get("admin", {})
    admin = {"listen": admin} if isinstance(admin, str) else _mapping(admin)
    found: list[tuple[yamlfile.Path, object]] = [(("listen",), listen)]
    found.extend((("listen", number), text) for number, text in enumerate(_items(listen)))
    found.append((("admin", "listen"), admin.get("listen", _default(Admin, "listen"))))
    for path, text in found:
        with contextlib.suppress(ValueError):
            yield path, Address.parse(text)


def _check_listeners(
    document: Document, nodes: list[_Seen], listeners: list[tuple[yamlfile.Path, Address]]
) -> None:
    for number, (path, address) in enumerate(listeners):
        for earlier, other in listeners[:number]:
            if address.takes(other):
                inside, outside = (path, earlier) if document.nearest(path) else (earlier, path)
                text = f"the same address as {yamlfile.spelled(outside)}: each needs its own"
                document.refuse(inside, text)
        for node in nodes:
            if node.url and address.reached_by(node.url):
                text = f"{_OWN_ADDRESS} ({yamlfile.spelled(path)})"
                document.refuse((*node.path, "url"), text)


def _check_aliases(document: Document, nodes: list[_Seen], aliases: dict[str, object]) -> None:
    first: dict[str, str] = {}
    for alias in aliases:
        key = _key(alias)
        if key is None:
            document.refuse_key(("aliases", alias), "this is no model name")
        elif first.setdefault(key, alias) != alias:
            document.refuse_key(("aliases", alias), "this alias stands twice: keep one")
    for alias, value in aliases.items():
        path = ("aliases", alias)
        if isinstance(value, str):
            targets: list[tuple[yamlfile.Path, object]] = [(path, value)]
        else:
            targets = [((*path, number), one) for number, one in enumerate(_items(value))]
        for where, target in targets:
            wrong = isinstance(target, str) and _wrong_target(target, _key(alias), first, nodes)
            if wrong:
                document.refuse(where, wrong)


def _check_warm(document: Document, value: dict[str, object]) -> None:
    aliases = {_key(alias) for alias in _mapping(value.get("aliases"))}
    first: dict[str, str] = {}
    for name in _mapping(_mapping(value.get("routing")).get("warm")):
        key, wrong = _key(name), ""
        if key is None:
            wrong = "this is no model name"
        elif names.parse(name).cloud:
            wrong = "a cloud model is in no node's memory"
        elif key in aliases:
            wrong = "this is an alias: name the model"
        elif first.setdefault(key, name) != name:
            wrong = "this model stands twice: keep one"
        if wrong:
            document.refuse_key(("routing", "warm", name), wrong)


def _check_placements(document: Document, nodes: list[_Seen], value: dict[str, object]) -> None:
    called = {node.name.lower() for node in nodes if node.name}
    pools = {"default"} if "nodes" in value else set()
    for pool in _items(value.get("pools")):
        pools.add(str(_mapping(pool).get("name")).lower())
    # With a node that cannot be read yet, nobody knows what it is called.
    known = [("nodes", called)] if len(called) == len(nodes) else []
    for number, entry in enumerate(_items(value.get("placement"))):
        place = _mapping(entry)
        if place and not any(place.get(key) for key in ("nodes", "labels", "pools")):
            document.refuse(("placement", number), "say where: nodes, labels or pools")
        for key, names_there in (*known, ("pools", pools)):
            for at, name in enumerate(_items(place.get(key))):
                if isinstance(name, str) and name.lower() not in names_there:
                    text = f"no such {key[:-1]} is configured"
                    document.refuse(("placement", number, key, at), text)


def _key(name: str) -> str | None:
    try:
        return names.parse(name).key
    except names.BadName:
        return None


def _wrong_target(
    target: str, own: str | None, aliases: Iterable[str], nodes: list[_Seen]
) -> str | None:
    try:
        bare, pin = names.split_pin(target)
        key = names.parse(bare).key
    except names.BadName:
        return "a model name is expected: name:tag or name:tag@node"
    if key == own:
        return "an alias cannot name itself"
    if key in aliases:
        return "this names an alias: aliases do not chain"
    specs = [spec for node in nodes if (spec := node.spec)]
    # With a node that cannot be read yet, nobody knows whom the pin means.
    readable = bool(specs) and len(specs) == len(nodes)
    if pin and readable and not names.pinned(pin, specs):
        return "this pins a node that is not configured"
    return None
