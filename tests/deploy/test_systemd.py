"""config/deploy/broker.service: systemd reads it, and it fits the broker's own times."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from broker.config import Server

UNIT = Path(__file__).parents[2] / "config" / "deploy" / "broker.service"
INSTALLED = "/opt/broker/.venv/bin/broker"


def values(key: str) -> list[str]:
    """What the unit sets ``key`` to."""
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")]


def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not here (Debian: apt-get install systemd)")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(INSTALLED, sys.executable))  # it wants to find the program
    done = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_command_is_one_of_the_broker() -> None:
    commands = [line.split() for line in values("ExecStart") + values("ExecStartPre")]
    assert {(words[0], words[1]) for words in commands} == {
        (INSTALLED, "serve"),
        (INSTALLED, "check-config"),
    }


def test_there_is_time_to_drain() -> None:
    (seconds,) = values("TimeoutStopSec")
    supervisor = 5  # seconds that it gives its workers beyond that
    assert float(seconds) > Server().drain_timeout + Server().close_timeout + supervisor
    assert values("KillMode") == ["mixed"]
    assert values("RestartPreventExitStatus") == ["2"]


def test_what_is_written_has_a_place() -> None:
    (serve,) = values("ExecStart")
    assert "--data /var/lib/broker" in serve
    assert values("StateDirectory") == ["broker"]
    assert values("ProtectSystem") == ["strict"]
