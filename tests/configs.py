"""Reads configurations that tests spell out, and tells their mistakes."""

import textwrap
from collections.abc import Mapping

import pytest

from router import config
from router.core.types import NodeSpec
from router.errors import ConfigError
from router.settings import Config

SECRET = "hunter2-sesame"
ENV = {"TOKEN": SECRET, "FOUR": "4", "HOST": "gpu-7", "SIZE": "1MiB", "NO": "false", "NL": "x\n"}
NODES = "nodes: [http://127.0.0.1:11434]\n"

# Words of mistakes that more than one test file meets.
TEXT = "a text is expected (numbers, on and off in quotes)"
MAPPING = "a mapping (key: value) is expected"
HOSTPORT = "host:port is expected, with an IPv6 address in brackets"
ITSELF = "the router itself listens there and would call itself"
LEVELS = "accepted: 'debug', 'info', 'warning' or 'error'"
ROOT_KEYS = (
    "accepted: listen, admin, trusted, nodes, pools, aliases, probe, routing, breaker, retry, "
    "continuation, timeouts, limits, log, cors, placement, manage, metrics"
)
NODE_KEYS = "accepted: name, url, slots, gpus, weight, models, labels, headers, tls, primary, cloud"


def read(text: str, env: Mapping[str, str] = ENV) -> Config:
    return config.parse(textwrap.dedent(text).encode(), "r.yaml", env)


def mistakes(text: str, env: Mapping[str, str] = ENV) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, env)
    return [line.removeprefix("r.yaml:") for line in caught.value.mistakes]


def node(text: str) -> NodeSpec:
    (pool,) = read(f"nodes: [{text}]").pools
    (spec,) = pool.nodes
    return spec
