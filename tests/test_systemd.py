"""What is sent to a supervisor, and what is not; what comes from one."""

import os
import socket
from pathlib import Path

import pytest

from router import systemd
from router.systemd import Notifier
from tests.process import Supervisor


@pytest.mark.parametrize("abstract", [False, True])
async def test_sends_states_as_lines_of_one_datagram(tmp_path: Path, abstract: bool) -> None:
    name = f"@ollamux-notify-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with Supervisor(name) as systemd:
        Notifier(systemd.env).send(READY="1", STATUS="3 of 4 nodes up")
        Notifier(systemd.env).reloading()
        ready, reloading = systemd.so_far()
    assert ready == {"READY": "1", "STATUS": "3 of 4 nodes up"}
    assert list(reloading) == ["RELOADING", "MONOTONIC_USEC"]
    assert reloading["MONOTONIC_USEC"].isdigit()


async def test_without_a_supervisor_nothing_happens(tmp_path: Path) -> None:
    Notifier({}).send(READY="1")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).send(READY="1")


@pytest.mark.parametrize(
    ("env", "expected_s"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": ""}, 0.0),
    ],
)
def test_the_watchdog_is_meant_for_this_process_only(
    env: dict[str, str], expected_s: float
) -> None:
    assert Notifier(env).watchdog_s == expected_s


async def test_a_watchdog_that_nobody_wants_is_not_fed() -> None:
    await Notifier({}).feed_watchdog()


# Sockets. That a process serves on them is in test_takeover.py.


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "2"},
        {"LISTEN_FDS": "2"},
        {"LISTEN_PID": str(os.getpid())},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
    ],
)
def test_sockets_that_are_not_for_this_process_are_left_alone(env: dict[str, str]) -> None:
    env["OTHER"] = "stays"
    assert systemd.sockets(env, 11436) == []
    assert env == {"OTHER": "stays"}


@pytest.mark.parametrize(
    ("name", "is_admin_port", "role"),
    [
        ("clients", True, "clients"),
        ("admin", False, "admin"),
        ("ollamux.socket", True, "admin"),
        ("ollamux.socket", False, "clients"),
        (None, False, "clients"),
    ],
)
def test_a_socket_is_for_whom_its_name_says_or_else_its_port(
    name: str | None, is_admin_port: bool, role: str
) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    admin_port = sock.getsockname()[1] + (not is_admin_port)
    given = systemd._given(sock.detach(), name, admin_port)
    with given.sock:
        assert (given.role, given.address) == (role, None)
        assert not given.sock.get_inheritable()
        assert not given.sock.getblocking()


def unbound() -> socket.socket:
    return socket.socket()


def datagrams() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def local() -> socket.socket:
    return socket.socket(socket.AF_UNIX)


@pytest.mark.parametrize("make", [unbound, datagrams, local])
def test_a_socket_that_nobody_could_connect_to_is_refused(make: type[socket.socket]) -> None:
    with make() as sock, pytest.raises(OSError, match="does not listen for TCP: clients"):
        systemd._given(os.dup(sock.fileno()), "clients", 11436)
