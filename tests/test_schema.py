"""The JSON Schema, and the example, say what the router accepts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from router import config
from router.changes import Changes, changes
from router.schema import schema
from tests.configs import NODES, mistakes, read

HERE = Path(__file__).parent.parent


def fits(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """Validate by the part of JSON Schema that the shipped schema uses."""
    if "$ref" in rule:
        target = root["$defs"][rule["$ref"].removeprefix("#/$defs/")]
        return fits(value, target, root)
    if "anyOf" in rule:
        return any(fits(value, option, root) for option in rule["anyOf"])
    choices = [all(key in value for key in option["required"]) for option in rule.get("oneOf", [])]
    if choices and sum(choices) != 1:
        return False
    return {"object": fits_object, "array": fits_array}.get(rule["type"], fits_scalar)(
        value, rule, root
    )


def fits_array(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    long_enough = isinstance(value, list) and len(value) >= rule.get("minItems", 0)
    return long_enough and all(fits(item, rule["items"], root) for item in value)


def fits_scalar(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    types = {"string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float)}
    if type(value) not in types[rule["type"]]:
        return False
    if isinstance(value, str):
        allowed = rule.get("enum", [rule.get("const", value)])
        return value in allowed and re.search(rule.get("pattern", ""), value) is not None
    return rule["type"] == "boolean" or fits_range(value, rule)


def fits_object(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    if not isinstance(value, dict):
        return False
    return all(key in value for key in rule.get("required", [])) and all(
        isinstance(found := rule_of(key, rule), dict) and fits(item, found, root)
        for key, item in value.items()
    )


def rule_of(key: str, rule: dict[str, Any]) -> Any:
    """What holds for the value of this key; False where it may not stand."""
    if key in (known := rule.get("properties", {})):
        return known[key]
    if not re.search(rule.get("propertyNames", {}).get("pattern", ""), key):
        return False
    patterns = rule.get("patternProperties", {}).items()
    return next((of for name, of in patterns if re.search(name, key)), rule["additionalProperties"])


def fits_range(value: float, rule: dict[str, Any]) -> bool:
    return bool(
        rule.get("minimum", value) <= value <= rule.get("maximum", value)
        and value > rule.get("exclusiveMinimum", value - 1)
        and value < rule.get("exclusiveMaximum", value + 1)
    )


def test_the_shipped_schema_is_what_the_code_says() -> None:
    shipped = HERE / "router" / "router.schema.json"
    assert json.loads(shipped.read_text()) == schema()
    assert shipped.read_text() == json.dumps(schema(), indent=2) + "\n"


def test_every_setting_has_its_line_of_manual_in_the_schema() -> None:
    made = schema()
    for rule in [made, *made["$defs"].values()]:
        for key, setting in rule.get("properties", {}).items():
            assert 10 < len(setting["description"]) < 90, key


@pytest.mark.parametrize(
    "text",
    [
        NODES,
        "nodes: [a, {url: 'https://h/x', slots: auto, tls: {verify: false}}]\nlisten: a:1",
        "pools: [{name: a, nodes: ['${HOST}']}]\nadmin: {listen: '[::1]:0', token: x}",
        NODES + "listen: ['127.0.0.1:${FOUR}', 'a:1']\nadmin: 127.0.0.1:0",
        NODES + "limits: {max_body_bytes: 8MB, max_held_bytes: 5}\nlog: {requests: '${NO}'}",
        NODES + "probe: {interval_s: 0.5, up_after: '${FOUR}'}\nrouting: {policy: least-in-flight}",
        NODES + "aliases: {a: b}\ntrusted: [10.0.0.0/8]\ncors: {origins: ['*', 'https://a:*']}",
        NODES + "timeouts: {models: {'llama3*': {first_byte_s: 9, silent_down_s: '${FOUR}'}}}",
        NODES + "routing: {flows: {a b: {weight: '${FOUR}'}, '::1': {priority: batch}}}",
        "nodes: [{url: h, slots: '${FOUR}', headers: {X-A: b}, labels: {a: b}, models: ['!a*']}]",
    ],
)
def test_an_editor_accepts_what_the_router_accepts(text: str) -> None:
    assert read(text).pools
    assert fits(yaml.safe_load(text), schema(), schema())


@pytest.mark.parametrize(
    "text",
    [
        "nodes: []",
        "nodes: [5]",
        "nodes: [ftp://h]",
        "nodes: [{name: a}]",
        "nodes: [{url: h, slots: 0}]",
        "nodes: [{url: h, slots: many}]",
        "nodes: [{url: h, weight: 0}]",
        "nodes: [{url: h, name: a/b}]",
        "nodes: [{url: h, headers: {'a b': c}}]",
        "nodes: [{url: h, models: ['!']}]",
        NODES + "pools: [{name: a, nodes: [b]}]",
        NODES + "listen: 5",
        NODES + "listen: []",
        NODES + "listen: localhost",
        NODES + "admin: {token: 5}",
        NODES + "x: 5",
        NODES + "probe: {jitter: 1}",
        NODES + "probe: {up_after: 1.5}",
        NODES + "limits: {max_body_bytes: 8TB}",
        NODES + "log: {level: loud}",
        NODES + "log: {requests: 'x'}",
        NODES + "routing: {policy: x}",
        NODES + "routing: {flows: {a: {weight: 0}}}",
        NODES + "routing: {flows: {a: {priority: low}}}",
        NODES + "routing: {flows: {' a': {}}}",
        NODES + "limits: {max_queued: 0}",
        NODES + "cors: {origins: [x]}",
        NODES + "timeouts: null",
        NODES + "timeouts: {models: {'!': {}}}",
        NODES + "timeouts: {models: {a: {first_bite_s: 5}}}",
        NODES + "timeouts: {models: {a: {first_byte_s: 0}}}",
    ],
)
def test_an_editor_refuses_what_the_router_refuses(text: str) -> None:
    assert mistakes(text)
    assert not fits(yaml.safe_load(text), schema(), schema())


def example() -> str:
    return (HERE / "router.yaml").read_text()


def test_the_example_is_valid_and_fronts_a_local_ollama() -> None:
    text = example()
    found = config.parse(text.encode(), "router.yaml", {})
    assert found == read(NODES)
    assert fits(yaml.safe_load(text), schema(), schema())
    first = text.splitlines()[0]
    shipped = first.removeprefix("# yaml-language-server: $schema=")
    assert (HERE / shipped).is_file()


def test_the_example_shows_every_section_with_its_defaults() -> None:
    kept = re.sub(
        r"(?m)^# (listen: \[|admin: \{|trusted: \[1|pools|aliases|placement).*\n(#   .*\n)*",
        "",
        example(),
    )
    plain = re.sub(r"(?m)^# ((?:[a-z]+:|  [a-z_]+:|    -)(?: .*)?)$", r"\1", kept)
    shown = yaml.safe_load(plain)
    assert set(shown) == set(schema()["properties"]) - {"pools", "aliases", "placement"}
    for key in ("probe", "routing", "timeouts", "limits", "log", "cors"):
        rule = schema()["$defs"][key.capitalize()]
        rules = rule["properties"]
        for name in ("flow_header", "flows"):  # are none by default
            rules.pop(name, None)
        assert shown[key] == {k: v.get("default", {}) for k, v in rules.items()}
    assert changes(config.parse(plain.encode(), "r.yaml", {}), read(NODES)) == Changes()


def test_the_example_shows_every_key_of_a_node() -> None:
    block = example().partition("about a node:\n")[2].partition("\n\n")[0]
    entry = yaml.safe_load(re.sub(r"(?m)^  # ", "", block))
    assert set(entry[0]) == set(schema()["$defs"]["NodeEntry"]["properties"])
