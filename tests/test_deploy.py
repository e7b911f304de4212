"""What is shipped beside the code names only what exists: options, ports, keys, metrics."""

import configparser
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from router import cli, config
from router.settings import Config
from tests.process import ROOT
from tests.rig import rig

DEPLOY = ROOT / "deploy"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHIPPED = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
ALLOWED_TO_BE_NO_METRIC = {"ollamux_", "ollamux_alias_of"}


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


@cache
def compose() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(text("compose.yaml"))
    return value


@cache
def unit() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[method-assign, assignment]
    parsed.read_string(text("ollamux.service"))
    return parsed


def shipped_config() -> Config:
    """deploy/config/router.yaml. Raises ConfigError."""
    return config.load(DEPLOY / "config" / "router.yaml", {})


def instruction(name: str) -> list[str]:
    """The arguments of every such line of the Dockerfile."""
    joined = text("Dockerfile").replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", joined, re.MULTILINE)


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(\d+)s?", duration)
    assert found is not None
    return int(found[1])


def parses(argv: list[str]) -> bool:
    try:
        cli._parser().parse_args(argv)
    except SystemExit as stopped:
        return stopped.code == 0
    return True


def commands(document: str) -> list[list[str]]:
    """Every `ollamux ...` of a code span, code block or comment, without what a shell adds."""
    found = re.findall(r"(?:^|[`#\s/])ollamux +([a-z]+(?: +[^`|;)\n]*)?)", document, re.MULTILINE)
    known = ("serve", "check", "schema", "demo", "nodes", "version")
    lines = [re.split(r"  |  #| says | & | > ", line)[0] for line in found]
    return [shlex.split(line) for line in lines if line.split()[0] in known]


def drain_s() -> float:
    return config.parse(b"nodes: [n1]", "f", {}).timeouts.drain_timeout_s


# Dockerfile


def test_the_image_copies_what_exists() -> None:
    for line in instruction("COPY"):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        if "--from" not in line:
            assert [one for one in sources if not (ROOT / one).exists()] == []


def test_the_image_has_two_stages_and_does_not_run_as_root() -> None:
    assert len(instruction("FROM")) == 2
    assert instruction("USER") == ["10001"]


def test_the_image_runs_a_real_command_with_a_configuration_that_it_holds() -> None:
    entry, command = yaml.safe_load(instruction("ENTRYPOINT")[0]), instruction("CMD")
    argv = yaml.safe_load(command[-1])
    assert entry == ["ollamux"]
    assert parses(argv)
    [(source, target)] = [
        line.split() for line in instruction("COPY") if line.startswith("deploy/")
    ]
    inside = Path(argv[-1]).relative_to(target)
    assert (ROOT / source / inside).exists()


def test_the_image_exposes_the_ports_of_its_configuration() -> None:
    settings = shipped_config()
    ports = [*(address.port for address in settings.listen), settings.admin.listen.port]
    assert [int(port) for port in instruction("EXPOSE")[0].split()] == ports
    assert f"127.0.0.1:{settings.admin.listen.port}/healthz" in text("Dockerfile")


# compose.yaml


def test_the_composition_publishes_the_ports_of_its_configuration() -> None:
    settings = shipped_config()
    ports = [*(address.port for address in settings.listen), settings.admin.listen.port]
    published = [line.rpartition(":")[2] for line in compose()["services"]["ollamux"]["ports"]]
    assert [int(port) for port in published] == ports


def test_the_composition_builds_and_mounts_what_exists() -> None:
    build = compose()["services"]["ollamux"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (DEPLOY / source).exists()


def test_the_nodes_of_the_configuration_are_services_with_as_many_slots() -> None:
    services = compose()["services"]
    [pool] = shipped_config().topology.pools
    assert len(pool.nodes) == 2
    for node in pool.nodes:
        service = services[node.host]
        assert service["image"] == "ollama/ollama"
        assert int(service["environment"]["OLLAMA_NUM_PARALLEL"]) == node.slots
        assert node.port == 11434
        assert node.host in services["ollamux"]["depends_on"]


def test_the_composition_waits_longer_than_a_drain() -> None:
    assert seconds(compose()["services"]["ollamux"]["stop_grace_period"]) > drain_s()


def test_the_configuration_is_mounted_where_the_image_reads_it() -> None:
    argv = yaml.safe_load(instruction("CMD")[-1])
    mounts = dict(volume.split(":")[:2] for volume in compose()["services"]["ollamux"]["volumes"])
    assert mounts["./config"] == str(Path(argv[-1]).parent)


# ollamux.service


def test_the_unit_runs_a_real_command() -> None:
    program, *argv = shlex.split(unit()["Service"]["ExecStart"])
    assert Path(program).name == "ollamux"
    assert parses(argv)


def test_the_unit_uses_what_the_process_offers() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert seconds(service["WatchdogSec"]) >= 10


def test_the_unit_waits_longer_than_a_drain() -> None:
    assert seconds(unit()["Service"]["TimeoutStopSec"]) > drain_s()


def test_the_unit_may_talk_to_what_it_needs() -> None:
    families = unit()["Service"]["RestrictAddressFamilies"].split()
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= set(families)


# ollamux.socket


def test_the_sockets_are_those_that_the_process_would_open_itself() -> None:
    listen = re.findall(r"^ListenStream=(.*)$", text("ollamux.socket"), re.MULTILINE)
    settings = config.parse(b"nodes: [n1]", "f", {})
    assert listen == [*map(str, settings.listen), str(settings.admin.listen)]
    # Named, both would be for the same.
    assert "FileDescriptorName" not in text("ollamux.socket")


# prometheus.yml and the documents


def test_prometheus_asks_the_admin_port_of_the_service() -> None:
    value = yaml.safe_load(text("prometheus.yml"))
    [job] = value["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in compose()["services"]
    assert int(port) == shipped_config().admin.listen.port


async def test_every_metric_that_is_named_anywhere_exists() -> None:
    async with rig() as r:
        families = list(text_string_to_metric_families(await r.metrics()))
    exist = {family.name for family in families}
    for family in families:
        if family.type == "counter":
            exist.add(f"{family.name}_total")
        if family.type == "histogram":
            exist |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    for path in (*SHIPPED, *DOCUMENTS):
        named = set(re.findall(r"\bollamux_[a-z_]+(?!\*)", path.read_text()))
        assert named - exist - ALLOWED_TO_BE_NO_METRIC == set(), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_every_command_of_a_document_parses(path: Path) -> None:
    for argv in commands(path.read_text()):
        plain = [word.strip("[]") for word in argv]
        assert parses(plain), argv


def test_every_command_of_the_example_parses() -> None:
    found = commands((ROOT / "router.yaml").read_text())
    assert ["serve", "--config", "router.yaml"] in found
    assert all(parses(argv) for argv in found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_every_target_that_a_document_names_is_in_the_makefile(path: Path) -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    named = set(re.findall(r"(?:`|^|\s\s)make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named <= targets


def test_the_readme_names_what_a_newcomer_needs() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in ("demo", "test", "run", "check"):
        assert f"make {target}" in readme


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_makefile_lists_its_targets_as_phony() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == set(TARGET.findall(makefile))
