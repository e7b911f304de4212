"""An address has one form, and what is none is told."""

from typing import Any

import pytest

from tests.configs import HOSTPORT, NODES, SECRET, mistakes, node

HOSTNAME = "this is no host name (letters, digits, - and dots; IDNs as punycode)"
PATH = "the path must be plain: no empty parts, no dots alone, no spaces"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:11434", ("http://127.0.0.1:11434", "127.0.0.1", 11434, "")),
        ("http://GPU-1/", ("http://gpu-1", "gpu-1", 80, "")),
        ("http://gpu-1:80", ("http://gpu-1", "gpu-1", 80, "")),
        ("HTTPS://gpu-1:443/a/b/", ("https://gpu-1/a/b", "gpu-1", 443, "/a/b")),
        ("https://gpu-1:80", ("https://gpu-1:80", "gpu-1", 80, "")),
        ("gpu-1", ("http://gpu-1:11434", "gpu-1", 11434, "")),
        ("gpu-1.lab.:99/x%20y", ("http://gpu-1.lab.:99/x%20y", "gpu-1.lab.", 99, "/x%20y")),
        ("'http://[FE80:0::1]:8080'", ("http://[fe80::1]:8080", "fe80::1", 8080, "")),
        ("'[::1]'", ("http://[::1]:11434", "::1", 11434, "")),
    ],
)
def test_a_node_has_one_form_of_its_address(text: str, expected: tuple[Any, ...]) -> None:
    spec = node(text)
    assert (spec.url, spec.host, spec.port, spec.prefix) == expected
    assert spec.name == (f"[{spec.host}]" if ":" in spec.host else spec.host) + f":{spec.port}"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("ftp://h", "1:9: nodes[0]: an http or https URL is expected, found 'ftp://h'"),
        (
            f"'http://u:{SECRET}@h'",
            "1:9: nodes[0]: a URL holds no user or password here: use headers",
        ),
        (f"'http://h?k={SECRET}'", "1:9: nodes[0]: a URL has no query and no fragment here"),
        (
            "'http://h#x'",
            "1:9: nodes[0]: a URL has no query and no fragment here, found 'http://h#x'",
        ),
        ("{url: 'http://'}", f"1:15: nodes[0].url: {HOSTPORT}, found 'http://'"),
        ("'http://h:x'", f"1:9: nodes[0]: {HOSTPORT}, found 'http://h:x'"),
        ("'http://::1'", f"1:9: nodes[0]: {HOSTPORT}, found 'http://::1'"),
        ("'http://[1.2]'", "1:9: nodes[0]: this is no IP address, found 'http://[1.2]'"),
        ("http://1.2.3", "1:9: nodes[0]: this is no IP address, found 'http://1.2.3'"),
        ("http://a..b", f"1:9: nodes[0]: {HOSTNAME}, found 'http://a..b'"),
        ("http://bücher", f"1:9: nodes[0]: {HOSTNAME}, found 'http://bücher'"),
        ("'a:65536'", "1:9: nodes[0]: a port is at most 65535, found 'a:65536'"),
        ("'a:0'", "1:9: nodes[0]: a node's port is at least 1, found 'a:0'"),
        ("http://h//x", f"1:9: nodes[0]: {PATH}, found 'http://h//x'"),
        ("http://h/../x", f"1:9: nodes[0]: {PATH}, found 'http://h/../x'"),
        ("'http://h/a b'", f"1:9: nodes[0]: {PATH}, found 'http://h/a b'"),
    ],
)
def test_a_mistake_in_the_address_of_a_node_is_told_once(entry: str, expected: str) -> None:
    assert mistakes(f"nodes: [{entry}]") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "listen: localhost",
            "2:9: listen: a port is missing: host:port is expected, found 'localhost'",
        ),
        ("listen: [a:1, ':2']", f"2:15: listen[1]: {HOSTPORT}, found ':2'"),
    ],
)
def test_a_mistake_in_an_address_to_listen_on_is_told_once(text: str, expected: str) -> None:
    assert mistakes(NODES + text) == [expected]
