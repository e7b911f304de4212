"""What a reload changes is told by names, never by values."""

import pytest

from router.changes import Changes, changes
from tests.configs import NODES, read

OLD = """
pools:
  - {name: a, nodes: [one, {url: two, headers: {A: "x"}}, three]}
  - {name: b, nodes: [four]}
aliases: {chat: llama3, code: codellama}
"""
NEW = """
pools:
  - {name: b, nodes: [four, one]}
  - {name: a, nodes: [{url: two, headers: {A: "y"}}, five]}
aliases: {chat: llama4, talk: llama3}
listen: 127.0.0.1:1
admin: {listen: 127.0.0.1:2, token: "${TOKEN}"}
probe: {interval_s: 9, jitter: 0.2}
"""


def test_changes_say_what_a_reload_does() -> None:
    assert changes(read(OLD), read(NEW)) == Changes(
        added=("http://five:11434",),
        removed=("http://three:11434",),
        changed=("http://one:11434", "http://two:11434"),
        settings=(
            "listen",
            "admin.listen",
            "admin.token",
            "aliases.chat",
            "aliases.code",
            "aliases.talk",
            "probe.interval_s",
            "pools",
        ),
        restart=("listen", "admin.listen"),
    )


def test_no_change_is_false_and_any_change_is_true() -> None:
    assert not changes(read(OLD), read(OLD))
    assert changes(read(OLD), read(NEW))
    assert changes(read(NODES), read(NODES + "log: {level: debug}"))


def test_a_renamed_node_is_changed_not_replaced() -> None:
    found = changes(read("nodes: [a]"), read("nodes: [{url: a, name: b}]"))
    assert found == Changes(changed=("http://a:11434",))


@pytest.mark.parametrize("said", ["policy: expected-delay", "spill_after_s: 20"])
def test_what_is_said_of_a_pool_is_a_setting(said: str) -> None:
    pools = "pools: [{name: a, nodes: [b]%s}]"
    found = changes(read(pools % ""), read(pools % f", {said}"))
    assert found == Changes(settings=("pools",))
