"""What a reload changes, in words that hold no values."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import BaseModel

from router.core.types import PoolSpec
from router.settings import Config


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload changes. Nodes stand by URL, settings by dotted name; never a value.

    `restart`: the settings that stay as they were until the process starts again.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.settings)


def changes(old: Config, new: Config) -> Changes:
    """What is different in `new`. A node that moved to another pool has changed."""
    before = {spec.url: (pool.name, spec) for pool in old.pools for spec in pool.nodes}
    after = {spec.url: (pool.name, spec) for pool in new.pools for spec in pool.nodes}
    settings = [
        name
        for key in Config.model_fields
        if key not in ("nodes", "pool_entries")
        for name in _differing(dict(old)[key], dict(new)[key], key)
    ]
    if [_kind(pool) for pool in old.pools] != [_kind(pool) for pool in new.pools]:
        settings.append("pools")
    return Changes(
        added=tuple(url for url in after if url not in before),
        removed=tuple(url for url in before if url not in after),
        changed=tuple(url for url in after if url in before and before[url] != after[url]),
        settings=tuple(settings),
        restart=tuple(name for name in settings if name in ("listen", "admin.listen")),
    )


def _kind(pool: PoolSpec) -> PoolSpec:
    """All that is said of a pool but its nodes."""
    return replace(pool, nodes=())


def _differing(old: object, new: object, path: str) -> Iterator[str]:
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        old, new = dict(old), dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differing(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path
