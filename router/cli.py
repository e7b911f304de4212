"""The command line: serve, check, schema, demo, nodes, version."""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router import __version__, config, daemon, demo
from router.errors import ConfigError
from router.schema import schema

_ADMIN = "http://127.0.0.1:11436"
_TIMEOUT_S = 10
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

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _serve(args: argparse.Namespace) -> int:
    try:
        return daemon.serve(args.config, os.environ)
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
    url = args.admin.rstrip("/")
    url = url if "://" in url else f"http://{url}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/status", timeout=_TIMEOUT_S) as answer:
            status = json.load(answer)
        print(_table(status))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        told = " ".join(str(reason).split())  # it may hold a line of whoever answered
        print(f"ollamux: no status from {url}: {told}", file=sys.stderr)
        return _FAILED
    return 0


_COLUMNS = ("NODE", "STATE", "IN FLIGHT", "SLOTS", "VERSION", "PRESENT", "RESIDENT", "URL")


def _table(status: Mapping[str, Any]) -> str:
    rows = [_COLUMNS, *(_row(node) for node in status["nodes"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _row(node: Mapping[str, Any]) -> tuple[str, ...]:
    state = node["state"] if node["state"] == "up" else f"{node['state']} ({node['detail']})"
    return (
        node["name"],
        state,
        str(node["in_flight"]),
        str(node["slots"]),
        node["version"] or "-",
        str(len(node["present"])),
        ", ".join(node["resident"]) or "-",
        node["url"],
    )
