"""Every setting has a default, a range and words for what does not fit."""

import textwrap
from ipaddress import ip_network
from math import inf
from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError

from router import config
from router.address import Address
from router.core.rates import Waits
from router.core.types import NodeSpec, Policy, QueueLimits, Tls
from router.core.work import FlowRule, Priority
from router.errors import ConfigError
from tests.configs import (
    ENV,
    LEVELS,
    MAPPING,
    NODE_KEYS,
    NODES,
    ROOT_KEYS,
    SECRET,
    TEXT,
    mistakes,
    read,
)

SIZE = "a number of bytes or a size such as 512MiB, 8MB or 64KiB is expected"
NETWORK = "a network such as 10.0.0.0/8 or fd00::/8 is expected, none of its host bits set"
NAME = "a name of letters, digits, _ . : and -, at most 80 of them, is expected"
GLOB = "a glob of model names, with ! in front to exclude, is expected"
HEADER = "a header is plain ASCII on one line (does the variable end in a newline?)"
FLOW = "what the header says, or an address, of at most 200 characters, is expected"
FLOW_KEYS = "accepted: weight, priority"
PRIORITIES = "accepted: 'interactive', 'normal' or 'batch'"
FIXED = "this header belongs to the connection: it cannot be set"
TIMEOUT_KEYS = (
    "accepted: connect_s, first_byte_s, first_byte_min_s, between_records_s, silent_down_s, "
    "models, busy_s, drain_timeout_s, stalled_body_s, head_timeout_s"
)
WAIT_KEYS = "accepted: first_byte_s, first_byte_min_s, between_records_s, silent_down_s"


def test_the_least_file_has_every_default() -> None:
    least = read(NODES)
    assert least.listen == (Address("127.0.0.1", 11435),)
    assert least.admin.listen == Address("127.0.0.1", 11436)
    assert least.admin.token is None
    assert least.trusted == ()
    assert dict(least.probe) == {
        "interval_s": 5,
        "timeout_s": 2,
        "suspect_interval_s": 2,
        "ps_interval_s": 5,
        "tags_interval_s": 15,
        "up_after": 2,
        "down_after": 3,
        "jitter": 0.2,
    }
    assert dict(least.timeouts) == {
        "connect_s": 2,
        "first_byte_s": 600,
        "first_byte_min_s": 60,
        "between_records_s": 600,
        "silent_down_s": 60,
        "models": {},
        "busy_s": 120,
        "drain_timeout_s": 60,
        "stalled_body_s": 60,
        "head_timeout_s": 30,
    }
    assert dict(least.limits) == {
        "max_connections": 16384,
        "max_in_flight": 8192,
        "max_queued": 2048,
        "max_queued_per_flow": 256,
        "max_queued_bytes_per_flow": 256 * 1024 * 1024,
        "max_buffered_bytes": 1 << 30,
        "max_body_bytes": 512 * 1024 * 1024,
        "max_held_bytes": 8 * 1024 * 1024,
        "max_record_bytes": 8_000_000,
        "max_header_bytes": 64 * 1024,
    }
    assert dict(least.log) == {"level": "info", "format": "auto", "requests": True}
    assert len(least.cors.origins) == 17
    assert {"http://localhost:*", "https://0.0.0.0", "app://*"} < set(least.cors.origins)


def test_the_topology_is_all_that_the_core_needs() -> None:
    topology = read("""
        pools:
          - name: h100
            nodes: [gpu-1, gpu-2]
            policy: expected-delay
            spill_after_s: 20
          - {name: overflow, nodes: [{url: "http://gpu-3", name: spare}]}
        aliases: {chat: "llama3:8b", code: "codellama:34b@spare"}
        probe: {up_after: 4, down_after: 5}
        routing: {policy: least-in-flight, warm: {llama3: 2, "Phi:3B": 0}}
    """).topology
    assert [(pool.name, [n.name for n in pool.nodes]) for pool in topology.pools] == [
        ("h100", ["gpu-1:11434", "gpu-2:11434"]),
        ("overflow", ["spare"]),
    ]
    assert [(pool.policy, pool.spill_after_s) for pool in topology.pools] == [
        (Policy.EXPECTED_DELAY, 20.0),
        (None, inf),
    ]
    assert topology.aliases == {"chat": "llama3:8b", "code": "codellama:34b@spare"}
    assert topology.warm == {"llama3:latest": 2, "phi:3b": 0}
    assert (topology.policy, topology.up_after, topology.down_after) == (
        Policy.LEAST_IN_FLIGHT,
        4,
        5,
    )


def test_how_many_may_wait_is_said_in_the_limits() -> None:
    assert read(NODES).topology.queue == QueueLimits()
    limits = "{max_queued: 9, max_queued_per_flow: 4, max_queued_bytes_per_flow: 1KiB}"
    assert read(NODES + f"limits: {limits}").topology.queue == QueueLimits(9, 4, 1024)


def test_flows_are_told_by_what_the_header_says_or_by_an_address() -> None:
    assert read(NODES).routing.rules == {}
    found = read("""
        nodes: [h]
        routing:
          flows:
            team-a: {weight: 2, priority: batch}
            Ada Lovelace: {priority: interactive}
            2001:DB8:0::7: {weight: 0.5}
            10.0.0.7: {}
    """)
    assert found.routing.rules == {
        "team-a": FlowRule(2.0, Priority.BATCH),
        "Ada Lovelace": FlowRule(1.0, Priority.INTERACTIVE),
        "2001:db8::7": FlowRule(0.5, Priority.NORMAL),
        "10.0.0.7": FlowRule(),
    }


def test_everything_said_about_a_node_reaches_its_spec(tmp_path: Path) -> None:
    bundle = tmp_path / "lab.pem"
    trustme.CA().cert_pem.write_to_path(bundle)
    text = """
        nodes:
          - name: gpu-1
            url: https://10.0.0.11:11434/ollama
            slots: 4
            weight: 2
            models: ["llama3*", "!*:70b"]
            labels: {gpu: h100}
            headers: {Authorization: "Bearer ${TOKEN}"}
            tls: {ca: lab.pem, verify: false}
    """
    file = tmp_path / "router.yaml"
    file.write_text(textwrap.dedent(text))
    assert config.load(file, ENV).pools[0].nodes[0] == NodeSpec(
        name="gpu-1",
        url="https://10.0.0.11:11434/ollama",
        scheme="https",
        host="10.0.0.11",
        port=11434,
        prefix="/ollama",
        slots=4,
        weight=2.0,
        models=("llama3*", "!*:70b"),
        labels={"gpu": "h100"},
        headers=(("Authorization", f"Bearer {SECRET}"),),
        tls=Tls(str(bundle), verify=False),
    )


def test_short_and_long_forms_mean_the_same() -> None:
    short = read(NODES + "listen: localhost:1\nadmin: '[::1]:0'")
    long = read("""
        nodes: [{url: "http://127.0.0.1:11434", slots: auto}]
        listen: ["localhost:1"]
        admin: {listen: "[::1]:0"}
    """)
    assert short == long
    assert str(short.admin.listen) == "[::1]:0"
    assert str(short.listen[0]) == "localhost:1"


def test_variables_stand_wherever_a_value_may() -> None:
    found = read("""
        nodes: [{url: "http://${HOST}:${FOUR}", slots: "${FOUR}", weight: "${FOUR}"}]
        admin: {listen: 127.0.0.1:0, token: "${FOUR}"}
        limits: {max_body_bytes: "${SIZE}", max_held_bytes: "${FOUR}"}
        log: {requests: "${NO}"}
        timeouts: {connect_s: "${FOUR}"}
    """)
    (spec,) = found.pools[0].nodes
    assert (spec.url, spec.slots, spec.weight) == ("http://gpu-7:4", 4, 4.0)
    assert found.admin.token is not None
    assert found.admin.token.get_secret_value() == "4"
    assert (found.limits.max_body_bytes, found.limits.max_held_bytes) == (1 << 20, 4)
    assert found.log.requests is False
    assert found.timeouts.connect_s == 4.0


def test_a_model_has_the_limits_of_the_first_glob_that_it_fits_and_else_those_for_all() -> None:
    waits = read("""
        nodes: [h]
        timeouts:
          first_byte_min_s: 30
          models:
            "*:70b": {first_byte_s: 1800, first_byte_min_s: 300}
            llama3*: {between_records_s: "${FOUR}", silent_down_s: 5}
            "*": {}
    """).timeouts.waits
    assert waits.of("mistral:7b") == Waits(600, 30, 600, 60)
    assert waits.of("llama3:70b") == Waits(1800, 300, 600, 60)
    assert waits.of("llama3:8b") == Waits(600, 30, 4, 5)
    assert read(NODES).timeouts.waits.of("llama3:70b") == Waits(600, 60, 600, 60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("'17'", 17),
        ("17B", 17),
        ("64KiB", 65536),
        ("8 MB", 8_000_000),
        ("2gib", 2 << 30),
    ],
)
def test_a_size_is_a_number_of_bytes_or_a_text(text: str, expected: int) -> None:
    assert read(NODES + f"limits: {{max_held_bytes: {text}}}").limits.max_held_bytes == expected


def test_trusted_networks_are_networks() -> None:
    found = read(NODES + "trusted: [10.0.0.0/8, 192.0.2.1, 'fd00::/8']").trusted
    assert found == (ip_network("10.0.0.0/8"), ip_network("192.0.2.1/32"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("17", f"1:9: nodes[0]: {MAPPING}, found 17"),
        ("", "1:8: nodes: a list of at least one is expected"),
        ("{name: a}", "1:9: nodes[0].url: missing: it has no default"),
        (
            "{url: h, slts: 3}",
            f"1:18: nodes[0].slts: unknown key (did you mean slots?); {NODE_KEYS}",
        ),
        ("{url: h, 'x y': 3}", f"1:18: nodes[0].?: unknown key; {NODE_KEYS}"),
        ("{url: 5}", f"1:15: nodes[0].url: {TEXT}, found 5"),
        ("{url: h, name: on}", f"1:24: nodes[0].name: {TEXT}, found on, which YAML reads as true"),
        ("{url: h, name: 'a@b'}", f"1:24: nodes[0].name: {NAME}"),
        ("{url: h, name: a/b}", f"1:24: nodes[0].name: {NAME}, found 'a/b'"),
        ("{url: h, name: ''}", f"1:24: nodes[0].name: {NAME}, found ''"),
        (f"{{url: h, name: {'a' * 81}}}", f"1:24: nodes[0].name: {NAME}, found '{'a' * 40}...'"),
        ("{url: h, slots: 0}", "1:25: nodes[0].slots: at least 1 is expected, found 0"),
        ("{url: h, slots: 1.5}", "1:25: nodes[0].slots: a whole number is expected, found 1.5"),
        (
            "{url: h, slots: yes}",
            "1:25: nodes[0].slots: a whole number is expected, found yes, which YAML reads as true",
        ),
        (
            "{url: h, slots: many}",
            "1:25: nodes[0].slots: a whole number or auto is expected, found 'many'",
        ),
        ("{url: h, slots: '${TOKEN}'}", "1:25: nodes[0].slots: a whole number or auto is expected"),
        ("{url: h, weight: 0}", "1:26: nodes[0].weight: more than 0 is expected, found 0"),
        (
            "{url: h, weight: .inf}",
            "1:26: nodes[0].weight: a finite number is expected, found .inf",
        ),
        (
            "{url: h, weight: .nan}",
            "1:26: nodes[0].weight: a finite number is expected, found .nan",
        ),
        ("{url: h, weight: '2'}", "1:26: nodes[0].weight: a number is expected, found '2'"),
        ("{url: h, weight: '${TOKEN}'}", "1:26: nodes[0].weight: a number is expected"),
        ("{url: h, models: llama3}", "1:26: nodes[0].models: a list is expected, found 'llama3'"),
        ("{url: h, models: ['!']}", f"1:27: nodes[0].models[0]: {GLOB}, found '!'"),
        ("{url: h, labels: {a: 1}}", f"1:30: nodes[0].labels.a: {TEXT}, found 1"),
        ("{url: h, labels: [a]}", f"1:26: nodes[0].labels: {MAPPING}"),
        ("{url: h, headers: x}", f"1:27: nodes[0].headers: {MAPPING}"),
        (
            "{url: h, headers: {'Bearer x': y}}",
            "1:28: nodes[0].headers.?: this is no name of an HTTP header",
        ),
        ("{url: h, headers: {Host: y}}", f"1:28: nodes[0].headers.Host: {FIXED}"),
        (
            "{url: h, headers: {content-length: y}}",
            f"1:28: nodes[0].headers.content-length: {FIXED}",
        ),
        ("{url: h, headers: {A: 5}}", f"1:31: nodes[0].headers.A: {TEXT}"),
        ('{url: h, headers: {A: "x\\r\\ny"}}', f"1:31: nodes[0].headers.A: {HEADER}"),
        ('{url: h, headers: {A: "x\\0"}}', f"1:31: nodes[0].headers.A: {HEADER}"),
        ("{url: h, headers: {A: '${NL}'}}", f"1:31: nodes[0].headers.A: {HEADER}"),
        (
            "{url: 'https://h', tls: {ca: /no/such.pem}}",
            "1:38: nodes[0].tls.ca: there is no such file, found '/no/such.pem'",
        ),
        (
            "{url: 'https://h', tls: {ca: \"\\0\"}}",
            "1:38: nodes[0].tls.ca: there is no such file, found '\\x00'",
        ),
        (
            "{url: 'https://h', tls: {verify: 1}}",
            "1:42: nodes[0].tls.verify: true or false is expected, found 1",
        ),
        (
            "{url: 'https://h', tls: {key: 1}}",
            "1:34: nodes[0].tls.key: unknown key; accepted: ca, verify",
        ),
    ],
)
def test_a_mistake_in_a_node_is_told_once(entry: str, expected: str) -> None:
    assert mistakes(f"nodes: [{entry}]") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("listen: 11435", "2:9: listen: a list is expected, found 11435"),
        ("listen: []", "2:9: listen: a list of at least one is expected"),
        ("admin: 5", f"2:8: admin: {MAPPING}, found 5"),
        ("admin: {token: 12345}", f"2:16: admin.token: {TEXT}"),
        (
            "admin: {token: 'a b'}",
            "2:16: admin.token: a token is plain ASCII without spaces, and not empty",
        ),
        (
            "admin: {tokn: x}",
            "2:9: admin.tokn: unknown key (did you mean token?); accepted: listen, token",
        ),
        ("trusted: 10.0.0.0/8", "2:10: trusted: a list is expected, found '10.0.0.0/8'"),
        ("trusted: [10.0.0.1/8]", f"2:11: trusted[0]: {NETWORK}, found '10.0.0.1/8'"),
        ("trusted: [10]", f"2:11: trusted[0]: {TEXT}, found 10"),
        ("aliases: x", f"2:10: aliases: {MAPPING}, found 'x'"),
        ("aliases: {a: 1}", f"2:14: aliases.a: {TEXT}, found 1"),
        ("probe: {interval_s: 0}", "2:21: probe.interval_s: more than 0 is expected, found 0"),
        ("probe: {interval_s: 5s}", "2:21: probe.interval_s: a number is expected, found '5s'"),
        (
            "probe: {interval_s: 1e9}",
            "2:21: probe.interval_s: at most 31536000 is expected, found 1e9",
        ),
        ("probe: {up_after: 0}", "2:19: probe.up_after: at least 1 is expected, found 0"),
        ("probe: {jitter: 1}", "2:17: probe.jitter: less than 1 is expected, found 1"),
        ("probe: [5]", f"2:8: probe: {MAPPING}"),
        ("probe:", "2:7: probe: is empty: give a value or remove it"),
        (
            "routing: {policy: random}",
            "2:19: routing.policy: accepted: 'expected-delay' or 'least-in-flight', found 'random'",
        ),
        ("routing: {warm: [x]}", f"2:17: routing.warm: {MAPPING}"),
        ("routing: {warm: {x: -1}}", "2:21: routing.warm.x: at least 0 is expected, found -1"),
        ("routing: {flows: {' a': {}}}", f"2:19: routing.flows.?: {FLOW}"),
        (f"routing: {{flows: {{{'a' * 201}: {{}}}}}}", f"2:19: routing.flows.?: {FLOW}"),
        ("routing: {flows: [a]}", f"2:18: routing.flows: {MAPPING}"),
        (
            "routing: {flows: {a: {weight: 0}}}",
            "2:31: routing.flows.a.weight: at least 0.001 is expected, found 0",
        ),
        (
            "routing: {flows: {a: {weight: 1001}}}",
            "2:31: routing.flows.a.weight: at most 1000 is expected, found 1001",
        ),
        (
            "routing: {flows: {a: {priority: low}}}",
            f"2:33: routing.flows.a.priority: {PRIORITIES}, found 'low'",
        ),
        (
            "routing: {flows: {tls: {wight: 2}}}",
            f"2:25: routing.flows.tls.wight: unknown key (did you mean weight?); {FLOW_KEYS}",
        ),
        (
            "limits: {max_queued: 0}",
            "2:22: limits.max_queued: at least 1 is expected, found 0",
        ),
        ("timeouts: {total_s: 5}", f"2:12: timeouts.total_s: unknown key; {TIMEOUT_KEYS}"),
        (
            "timeouts: {models: {'llama3*': {first_bite_s: 5}}}",
            "2:33: timeouts.models.llama3*.first_bite_s: unknown key (did you mean first_byte_s?); "
            + WAIT_KEYS,
        ),
        (
            "timeouts: {models: {tls: {connect_s: 5}}}",
            f"2:27: timeouts.models.tls.connect_s: unknown key; {WAIT_KEYS}",
        ),
        (
            "timeouts: {models: {llama3: {silent_down_s: 0}}}",
            "2:45: timeouts.models.llama3.silent_down_s: more than 0 is expected, found 0",
        ),
        (
            "timeouts: {models: {llama3: {between_records_s: 5m}}}",
            "2:49: timeouts.models.llama3.between_records_s: a number is expected, found '5m'",
        ),
        ("timeouts: {models: {a b: {}}}", f"2:21: timeouts.models.?: {GLOB}"),
        ("timeouts: {models: {'!': {}}}", f"2:21: timeouts.models.?: {GLOB}"),
        ("timeouts: {models: {llama3: 5}}", f"2:29: timeouts.models.llama3: {MAPPING}, found 5"),
        ("timeouts: {models: [llama3]}", f"2:20: timeouts.models: {MAPPING}"),
        (
            "timeouts: {models: {llama3: {first_byte_s: }}}",
            "2:43: timeouts.models.llama3.first_byte_s: is empty: give a value or remove it",
        ),
        ("limits: {max_body_bytes: 5TB}", f"2:26: limits.max_body_bytes: {SIZE}, found '5TB'"),
        ("limits: {max_body_bytes: 1IB}", f"2:26: limits.max_body_bytes: {SIZE}, found '1IB'"),
        (
            "limits: {max_body_bytes: 0KB}",
            "2:26: limits.max_body_bytes: at least 1 is expected, found '0KB'",
        ),
        (
            "limits: {max_body_bytes: 9999GiB}",
            "2:26: limits.max_body_bytes: at most 1099511627776 is expected, found '9999GiB'",
        ),
        ("limits: {max_body_bytes: '${TOKEN}'}", f"2:26: limits.max_body_bytes: {SIZE}"),
        ("log: {level: off}", f"2:14: log.level: {LEVELS}, found off, which YAML reads as false"),
        ("log: {format: '${TOKEN}'}", "2:15: log.format: accepted: 'auto', 'json' or 'console'"),
        ("log: {requests: 'yes'}", "2:17: log.requests: true or false is expected, found 'yes'"),
        (
            "cors: {origins: [localhost]}",
            "2:18: cors.origins[0]: * or scheme://host[:port] is expected, found 'localhost'",
        ),
        ("prob: {}", f"2:1: prob: unknown key (did you mean probe?); {ROOT_KEYS}"),
        ("nodes: [b]", "2:1: nodes: this key stands twice, first in line 1: keep one"),
        ("log: {level: '${NOPE}'}", "2:14: log.level: the environment has no variable NOPE"),
    ],
)
def test_a_mistake_in_a_setting_is_told_once(text: str, expected: str) -> None:
    assert mistakes(NODES + text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pools: []", "1:8: pools: a list of at least one is expected"),
        ("pools: [{nodes: [a]}]", "1:9: pools[0].name: missing: it has no default"),
        ("pools: [{name: a}]", "1:9: pools[0].nodes: missing: it has no default"),
        (
            "pools: [{name: a, nodes: []}]",
            "1:26: pools[0].nodes: a list of at least one is expected",
        ),
        ("pools: [a]", f"1:9: pools[0]: {MAPPING}, found 'a'"),
        ("pools: {a: b}", "1:8: pools: a list is expected"),
    ],
)
def test_a_mistake_in_the_pools_is_told_once(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


def test_a_ca_bundle_is_read_before_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    (tmp_path / "none.pem").write_text("nothing")
    for name, expected in [
        ("none.pem", "this file holds no PEM certificate"),
        ("x" * 300, "this file cannot be read: File name too long"),
        (".", "there is no such file"),
    ]:
        text = f"nodes: [{{url: 'https://h', tls: {{ca: {name}}}}}]"
        with pytest.raises(ConfigError) as caught:
            config.parse(text.encode(), str(file), {})
        assert f"nodes[0].tls.ca: {expected}" in str(caught.value)


def test_a_configuration_is_frozen() -> None:
    found = read(NODES)
    with pytest.raises(ValidationError):
        found.listen = ()  # type: ignore[misc]
    with pytest.raises(ValidationError):
        found.log.level = "debug"  # type: ignore[misc]
