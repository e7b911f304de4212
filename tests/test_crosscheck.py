"""Values that are each right may still contradict each other."""

import pytest

from tests.configs import ITSELF, NODES, TEXT, mistakes, read

HOST_OF = "this is the host of nodes[1]: a pin could mean both"
MODEL = "a model name is expected: name:tag or name:tag@node"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            "{url: h, headers: {A: x, a: y}}",
            "1:34: nodes[0].headers.a: this header stands twice: keep one",
        ),
        ("a, 'http://A:11434/'", "1:12: nodes[1]: the same address as nodes[0]: keep one"),
        (
            "{url: a, name: x}, {url: b, name: X}",
            "1:43: nodes[1].name: the same name as nodes[0]: give it another",
        ),
        ("http://a/x, http://a/y", "1:21: nodes[1]: the same name as nodes[0]: give it another"),
        (
            "a, {url: b, name: 'a:11434'}",
            "1:27: nodes[1].name: the same name as nodes[0]: give it another",
        ),
        ("{url: b, name: A}, a", f"1:24: nodes[0].name: {HOST_OF}"),
        ("{url: b, name: 'a:1'}, {url: 'a:1', name: x}", f"1:24: nodes[0].name: {HOST_OF}"),
        ("127.0.0.1:11435", f"1:9: nodes[0]: {ITSELF} (listen)"),
        ("localhost:11436", f"1:9: nodes[0]: {ITSELF} (admin.listen)"),
    ],
)
def test_a_contradiction_between_nodes_is_told_once(entry: str, expected: str) -> None:
    assert mistakes(f"nodes: [{entry}]") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "listen: [a:1, 'A:1']",
            "2:15: listen[1]: the same address as listen[0]: each needs its own",
        ),
        (
            "listen: 127.0.0.1:11436",
            "2:9: listen: the same address as admin.listen: each needs its own",
        ),
        ("admin: 127.0.0.1:11435", "2:8: admin: the same address as listen: each needs its own"),
        (
            "admin: {listen: '0.0.0.0:11435'}",
            "2:17: admin.listen: the same address as listen: each needs its own",
        ),
        ("listen: 0.0.0.0:11434", f"1:9: nodes[0]: {ITSELF} (listen)"),
        ("listen: ['[::]:11434']", f"1:9: nodes[0]: {ITSELF} (listen[0])"),
        ("listen: localhost:11434", f"1:9: nodes[0]: {ITSELF} (listen)"),
        (
            "pools: [{name: a, nodes: [b]}]",
            "2:1: pools: nodes and pools cannot stand together: use one of them",
        ),
        ("aliases: {a/b/c/d: x}", "2:11: aliases.a/b/c/d: this is no model name"),
        ("aliases: {a: x/}", f"2:14: aliases.a: {MODEL}"),
        ("aliases: {a: 'x@'}", f"2:14: aliases.a: {MODEL}"),
        ("aliases: {a: 'A:latest'}", "2:14: aliases.a: an alias cannot name itself"),
        (
            "aliases: {a: 'b@127.0.0.1', b: c}",
            "2:14: aliases.a: this names an alias: aliases do not chain",
        ),
        (
            "aliases: {a: x, 'A:latest': y}",
            "2:17: aliases.A:latest: this alias stands twice: keep one",
        ),
        ("aliases: {a: 'x@gpu-9'}", "2:14: aliases.a: this pins a node that is not configured"),
        ("aliases: {a: '${TOKEN}/'}", f"2:14: aliases.a: {MODEL}"),
        ("routing: {warm: {a/b/c/d: 1}}", "2:18: routing.warm.a/b/c/d: this is no model name"),
        ("routing: {warm: {'x@gpu-1': 1}}", "2:18: routing.warm.x@gpu-1: this is no model name"),
        (
            "routing: {warm: {x: 1, 'X:latest': 2}}",
            "2:24: routing.warm.X:latest: this model stands twice: keep one",
        ),
        (
            "routing: {warm: {'x:cloud': 1}}",
            "2:18: routing.warm.x:cloud: a cloud model is in no node's memory",
        ),
        (
            "routing: {warm: {A: 1}}\naliases: {a: x}",
            "2:18: routing.warm.A: this is an alias: name the model",
        ),
    ],
)
def test_a_contradiction_between_settings_is_told_once(text: str, expected: str) -> None:
    assert mistakes(NODES + text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "1:1: nodes: missing: give nodes, or pools of them"),
        (
            "pools: [{name: a, nodes: [x]}, {name: A, nodes: [y]}]",
            "1:39: pools[1].name: the same name as pools[0]: give it another",
        ),
        (
            "pools: [{name: a, nodes: [x]}, {name: b, nodes: [x]}]",
            "1:50: pools[1].nodes[0]: the same address as pools[0].nodes[0]: keep one",
        ),
    ],
)
def test_a_contradiction_between_pools_is_told_once(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


def test_a_pin_is_not_judged_while_a_node_cannot_be_read() -> None:
    assert mistakes("nodes: [a, 'b:0']\naliases: {x: 'y@b'}") == [
        "1:12: nodes[1]: a node's port is at least 1, found 'b:0'"
    ]
    assert mistakes("nodes: [a, {name: 5, url: b}]\naliases: {x: 'y@five'}") == [
        f"1:19: nodes[1].name: {TEXT}, found 5"
    ]


@pytest.mark.parametrize("pin", ["GPU-1", "h", "h:11434", "http://h:11434"])
def test_an_alias_may_pin_a_node_by_name_or_address(pin: str) -> None:
    found = read(f"nodes: [{{name: gpu-1, url: 'http://h:11434'}}]\naliases: {{a: 'b@{pin}'}}")
    assert found.aliases == {"a": f"b@{pin}"}


@pytest.mark.parametrize(
    "text",
    [
        "nodes: [127.0.0.1:11434]\nlisten: 10.0.0.5:11434",
        "nodes: [10.0.0.11:11434]\nlisten: 0.0.0.0:11434",
        "nodes: [127.0.0.2:11435]",
        "nodes: [gpu-1:11435]",
        "nodes: [a]\nlisten: ['0.0.0.0:1', '[::]:1']",
        "nodes: [a]\nlisten: 127.0.0.1:0\nadmin: 127.0.0.1:0",
        "nodes: [http://a:1, https://a:2]",
        "nodes: [{name: gpu-1, url: gpu-1}]",
        "nodes: [{name: x, url: http://a/x}, {name: y, url: http://a/y}]",
        "nodes: [{url: a, headers: {}, labels: {}, models: []}]\naliases: {}\nprobe: {}",
        "nodes: &n [a]\naliases: {llama3: 'llama3:8b'}",
    ],
)
def test_what_only_looks_like_a_mistake_is_accepted(text: str) -> None:
    assert read(text).pools[0].name == "default"


NAMED = "nodes: [{url: a, name: x}, b]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "{models: [m], nodes: [x, y]}",
            ["2:38: placement[0].nodes[1]: no such node is configured"],
        ),
        ("{models: [m], pools: [p]}", ["2:35: placement[0].pools[0]: no such pool is configured"]),
        ("{models: [m]}", ["2:13: placement[0]: say where: nodes, labels or pools"]),
        (
            "{models: [m], nodes: [], labels: {}, pools: []}",
            ["2:13: placement[0]: say where: nodes, labels or pools"],
        ),
    ],
)
def test_a_placement_says_where_and_that_exists(text: str, expected: list[str]) -> None:
    assert mistakes(f"{NAMED}placement: [{text}]") == expected


@pytest.mark.parametrize(
    "text",
    ["{models: [m], nodes: [X, 'b:11434'], pools: [Default]}", "{models: [m], labels: {gpu: h}}"],
)
def test_a_placement_names_nodes_and_pools_in_any_case(text: str) -> None:
    (placement,) = read(f"{NAMED}placement: [{text}]").topology.placements
    assert placement.models == ("m",)


def test_a_placement_may_name_a_pool_of_the_list() -> None:
    pools = "pools: [{name: front, nodes: [a]}]\n"
    wrong = "2:35: placement[0].pools[0]: no such pool is configured"
    assert read(f"{pools}placement: [{{models: [m], pools: [FRONT]}}]").topology.placements
    assert mistakes(f"{pools}placement: [{{models: [m], pools: [default]}}]") == [wrong]


def test_a_placement_is_not_blamed_for_a_node_that_cannot_be_read() -> None:
    text = "nodes: [{url: 'ftp://a'}, b]\nplacement: [{models: [m], nodes: [y]}]"
    assert [mistake for mistake in mistakes(text) if "placement" in mistake] == []


def test_only_one_node_is_primary() -> None:
    assert read("nodes: [{url: a, primary: true}, {url: b, primary: false}]").nodes[0].primary
    assert mistakes("nodes: [{url: a, primary: true}, b, {url: c, primary: true}]") == [
        "1:55: nodes[2].primary: nodes[0] is primary already: only one can be"
    ]
