"""The load client itself, against the floor: both are C, and both are what the figures rest on."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from bench.analysis import analyse
from bench.dialect import Broker
from bench.load import LoadClient, LoadError
from bench.plan import Pace, write_plan
from bench.recording import Why, read_recording
from bench.servers import Server
from bench.tools import CACHE
from bench.workload import Workload, inbound, one_room, silent

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler"),
    pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux"),
]

PACE = Pace(setup_timeout=20.0, quiet=0.02, lead=0.01)


def ignore(_phase: str, _done: int, _total: int) -> None:
    pass


def run(load: Workload, tmp_path: Path) -> list[str]:
    plan = tmp_path / "plan"
    CACHE.mkdir(parents=True, exist_ok=True)
    with Server("floor", None) as server:
        write_plan(plan, load, Broker(), server.port, PACE)
        with LoadClient(plan, None, ignore) as client:
            assert client.wait("ready", 30) == (load.connections, load.connections)
            if load.publishes:
                client.go()
                client.wait("done", 30)
            recording = client.finish()
        assert server.memory() > 0
        assert server.cpu() > 0
    verdict = analyse(load, recording, Broker().read)
    assert verdict.arrived == verdict.expected == load.publishes * np.count_nonzero(load.member >= 0)
    return verdict.faults()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_every_event_is_recorded(tmp_path: Path, size: int) -> None:
    body = f'{{"n":"##########","v":"{"ä" * (size // 2)}"}}'
    assert run(one_room(20, 1000, 0.05, [body, '{"v":"é","n":"##########"}']), tmp_path) == []


def test_questions_are_answered(tmp_path: Path) -> None:
    load = inbound(4, 1000, 0.02, ['{"n":"##########"}'])
    assert run(load, tmp_path) == []


def test_connections_that_say_nothing(tmp_path: Path) -> None:
    assert run(silent(30), tmp_path) == []


def test_nobody_listens(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    with socket.socket() as unheard:  # bound, so that nobody else takes the port, but not listening
        unheard.bind(("127.0.0.1", 0))
        _nobody_listens(plan, unheard.getsockname()[1])


def _nobody_listens(plan: Path, port: int) -> None:
    write_plan(plan, silent(3), Broker(), port, PACE)
    with LoadClient(plan, None, ignore) as client:
        assert client.wait("ready", 30) == (0, 3)
        recording = client.finish()
    verdict = analyse(silent(3), recording, Broker().read)
    assert set(recording.outcomes["why"].tolist()) == {Why.CONNECT_FAILED}
    assert verdict.faults()[0] == "3 connections never became ready"


def test_a_broken_plan_is_told(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(b"no plan" + bytes(200))
    with LoadClient(plan, None, ignore) as client, pytest.raises(LoadError, match="is no plan"):
        client.wait("ready", 30)


def test_a_recording_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(b"blrec01\0" + bytes(20))
    with pytest.raises(ValueError, match="cut short"):
        read_recording(path)
    path.write_bytes(b"something" + bytes(200))
    with pytest.raises(ValueError, match="is no recording"):
        read_recording(path)
