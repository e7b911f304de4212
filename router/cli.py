"""The command line: serve, check, schema, demo, nodes, explain, drain, undrain, version."""

import argparse
import contextlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router import __version__, config, daemon, demo, tables
from router.errors import ConfigError
from router.schema import schema

_ADMIN = "http://127.0.0.1:11436"
_TIMEOUT_S = 10
_TOKEN = "OLLAMUX_ADMIN_TOKEN"
_ERROR_MAX_BYTES = 1 << 16
_WAIT_S, _POLL_S = 600.0, 0.2
# What an answer that is none of ours may lead to.
_TROUBLE = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
_FAILED, _REFUSED = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 for a failure, 2 for a refused configuration or usage."""
    args = _parser().parse_args(argv)
    try:
        done: int = args.run(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ollamux", description="One Ollama address in front of every Ollama node you own."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the router")
    serve.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="router.yaml; without it, one node from OLLAMA_API_BASE or OLLAMA_HOST",
    )
    serve.add_argument(
        "--takeover",
        action="store_true",
        help="take the place, and the sockets, of the process that serves this configuration",
    )
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check", help="check a configuration and report every mistake")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=_check)

    schema = commands.add_parser("schema", help="print the configuration's JSON Schema")
    schema.set_defaults(run=_schema)

    trial = commands.add_parser("demo", help="three simulated nodes and a router, on loopback")
    trial.add_argument("--once", action="store_true", help="stop after the first answer")
    trial.set_defaults(run=lambda args: demo.run(once=args.once))

    nodes = commands.add_parser("nodes", help="show the live pool as a table")
    nodes.add_argument("--admin", default=_ADMIN, metavar="URL", help=f"default {_ADMIN}")
    nodes.set_defaults(run=_nodes)

    _explaining(commands)

    drain = _changing(commands, "drain", "give a node no new requests; what runs there finishes")
    drain.add_argument("--wait", action="store_true", help="until nothing is in flight there")
    drain.add_argument(
        "--timeout", type=_seconds, default=_WAIT_S, metavar="SECONDS",
        help=f"how long to wait at most, default {_WAIT_S:g}",
    )  # fmt: skip
    drain.set_defaults(run=_drain)
    _changing(commands, "undrain", "give a node requests again").set_defaults(run=_undrain)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _explaining(commands: Any) -> None:
    text = "say which node a request for a model would get now, and why"
    explain = commands.add_parser(
        "explain",
        help=text,
        description=f"{text}; nothing is sent. The admin token, if one is set, is taken from "
        f"{_TOKEN}.",
    )
    explain.add_argument("model", metavar="MODEL", help="as a client would name it")
    explain.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="default 0")
    explain.add_argument(
        "--num-ctx", type=int, metavar="N", help="context length that is asked for"
    )
    explain.add_argument("--flow", default="", metavar="F", help="whose request it is")
    explain.add_argument("--admin", default=_ADMIN, metavar="URL", help=f"default {_ADMIN}")
    explain.set_defaults(run=_explain)


def _serve(args: argparse.Namespace) -> int:
    try:
        return daemon.serve(args.config, os.environ, take_over=args.takeover)
    except OSError as error:
        print(f"ollamux: {error.strerror or error}", file=sys.stderr)
        return _FAILED


def _check(args: argparse.Namespace) -> int:
    settings = config.load(args.file, os.environ)
    pools = settings.topology.pools
    count = sum(len(pool.nodes) for pool in pools)
    print(f"{args.file}: valid, {count} node(s) in {len(pools)} pool(s)")
    return 0


def _schema(args: argparse.Namespace) -> int:
    print(json.dumps(schema(), indent=2))
    return 0


def _version(args: argparse.Namespace) -> int:
    print(f"ollamux {__version__}")
    return 0


def _nodes(args: argparse.Namespace) -> int:
    url = _base(args.admin)
    try:
        print(tables.nodes(_asked(f"{url}/status")))
    except _TROUBLE as error:
        return _failed(f"no status from {url}: {_why(error)}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    asked = {"model": args.model, "prompt_tokens": args.prompt_tokens, "flow": args.flow}
    if args.num_ctx is not None:
        asked["num_ctx"] = args.num_ctx
    try:
        answer = _asked(
            f"{_base(args.admin)}/explain", "POST", _token(), json.dumps(asked).encode()
        )
        print(tables.explained(answer))
    except _TROUBLE as error:
        return _failed(f"explain {args.model}: {_why(error)}")
    return 0


def _drain(args: argparse.Namespace) -> int:
    url = _base(args.admin)
    try:
        node = _changed(url, "drain", args.node)
        print(f"{node['name']}: drained, {node['in_flight']} in flight")
        return _waited(url, node, args.timeout) if args.wait else 0
    except _TROUBLE as error:
        return _failed(f"drain {args.node}: {_why(error)}")


def _undrain(args: argparse.Namespace) -> int:
    try:
        node = _changed(_base(args.admin), "undrain", args.node)
        print(f"{node['name']}: undrained, {node['state']}")
    except _TROUBLE as error:
        return _failed(f"undrain {args.node}: {_why(error)}")
    return 0


def _waited(url: str, node: Mapping[str, Any], limit_s: float) -> int:
    """Wait until nothing is in flight on a drained node, or it is configured no more."""
    name, deadline = node["name"], time.monotonic() + limit_s
    while node["in_flight"]:
        if not node["draining"]:
            return _failed(f"{name} has been undrained meanwhile")
        if time.monotonic() >= deadline:
            return _failed(f"{name}: {node['in_flight']} in flight after {limit_s:g} s")
        time.sleep(_POLL_S)
        nodes = _asked(f"{url}/status")["nodes"]
        node = next((one for one in nodes if one["url"] == node["url"]), {"in_flight": 0})
    print(f"{name}: nothing in flight")
    return 0


# The admin listener, asked.


def _changing(commands: Any, verb: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        verb,
        help=text,
        description=f"{text}. The admin token, if one is set, is taken from {_TOKEN}.",
    )
    parser.add_argument("node", metavar="NODE", help="its name or address")
    parser.add_argument("--admin", default=_ADMIN, metavar="URL", help=f"default {_ADMIN}")
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"not a number of seconds: {text}")


def _base(admin: str) -> str:
    url = admin.rstrip("/")
    return url if "://" in url else f"http://{url}"


class _Stay(urllib.request.HTTPRedirectHandler):
    """The token is for nobody else."""

    def redirect_request(self, *_: object) -> None:
        return None


def _asked(url: str, method: str = "GET", token: str = "", body: bytes | None = None) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)
    with opener.open(request, timeout=_TIMEOUT_S) as answer:
        return json.load(answer)


def _changed(url: str, verb: str, node: str) -> Mapping[str, Any]:
    """Have a node drained or undrained; gives its entry of `/status`."""
    query = urllib.parse.urlencode({"node": node})
    entry: Mapping[str, Any] = _asked(f"{url}/{verb}?{query}", "POST", _token())
    return entry


def _token() -> str:
    token = os.environ.get(_TOKEN, "")
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise ValueError(f"{_TOKEN} is not plain ASCII without spaces")  # nor to be quoted
    return token


def _why(error: Exception) -> str:
    """In one line: what was said may hold one of whoever answered."""
    said = _said(error) if isinstance(error, urllib.error.HTTPError) else ""
    hint = f" ({_TOKEN})" if isinstance(error, urllib.error.HTTPError) and error.code == 401 else ""
    reason = getattr(error, "reason", None) or error
    return tables.printable(" ".join((said or str(reason)).split())) + hint


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(_ERROR_MAX_BYTES))["error"])
    except _TROUBLE:
        return ""


def _failed(text: str) -> int:
    print(f"ollamux: {text}", file=sys.stderr)
    return _FAILED
