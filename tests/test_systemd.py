"""What is sent to a supervisor, and what is not."""

import os
from pathlib import Path

import pytest

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
