"""The supervisor: real processes, killed and stopped in every way."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from broker.config import Admin, Config, Server
from broker.errors import ConfigurationError
from broker.supervisor import VARIABLE, Worker, reserve
from tests.supervised import CHOSEN

ROOT = Path(__file__).parent.parent
PATIENCE = 30.0
"""Seconds after which what never happens fails the test."""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"


class Greeting(NamedTuple):
    """A connection to one of the workers, and what it said."""

    socket: socket.socket
    node: str
    pid: int
    admin: int


class Supervised:
    """The process of a supervisor."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.line = ""
        self.port = 0
        self.sockets: list[socket.socket] = []

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE)[0]
        self.line = self.process.stdout.readline()
        found = re.match(r"ready ws://127\.0\.0\.1:(\d+)/ws", self.line)
        assert found is not None, self.line
        self.port = int(found[1])

    def greet(self) -> Greeting:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        self.sockets.append(sock)
        node, pid, admin = sock.recv(100).split()
        return Greeting(sock, node.decode(), int(pid), int(admin))

    def workers(self, count: int) -> dict[str, Greeting]:
        """Connections until each of so many workers has answered, by node name."""
        found: dict[str, Greeting] = {}

        def meet_another() -> bool:
            try:
                one = self.greet()
            except (OSError, ValueError):
                return False  # it went to a worker that is gone
            found.setdefault(one.node, one)
            return len(found) == count

        until(meet_another)
        return found

    def ended(self) -> tuple[int, str, str]:
        """Exit code, the rest of standard output, and standard error."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


@contextmanager
def supervised(workers: int, how: str = "well", *, port: int = 0) -> Iterator[Supervised]:
    line = [sys.executable, "-m", "tests.supervised", str(port), str(workers), how]
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        broker = Supervised(process)
        try:
            yield broker
        finally:
            process.kill()
            for sock in broker.sockets:
                sock.close()


# -- as it should be ---------------------------------------------------------------------


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_one_ready_line_and_a_quiet_end(stop: signal.Signals) -> None:
    with supervised(2) as broker:
        broker.wait_ready()
        assert broker.line == f"ready ws://127.0.0.1:{broker.port}/ws admin http://127.0.0.1:{CHOSEN}\n"
        found = broker.workers(2)
        assert set(found) == {"here-0", "here-1"}
        assert {name: one.admin for name, one in found.items()} == {"here-0": 0, "here-1": -1}
        broker.process.send_signal(stop)
        code, out, _ = broker.ended()
        assert (code, out) == (0, "")
        assert not any(is_alive(one.pid) for one in found.values())


def test_a_worker_that_was_killed_is_replaced_and_the_others_never_notice() -> None:
    with supervised(3) as broker:
        broker.wait_ready()
        found = broker.workers(3)
        os.kill(found["here-0"].pid, signal.SIGKILL)
        again = found["here-0"]

        def is_replaced() -> bool:
            nonlocal again
            again = broker.workers(2).get("here-0", again)
            return again.pid != found["here-0"].pid

        until(is_replaced)
        assert again.admin == CHOSEN, "its admin port is where the ready line said"
        for name in ("here-1", "here-2"):
            assert is_alive(found[name].pid)
            found[name].socket.send(b"x")
            assert found[name].socket.recv(10) == b"", "the connection was still there"
        broker.process.terminate()
        code, out, err = broker.ended()
        assert (code, out) == (0, "")
        assert '"event": "a worker ended; starting another"' in err


def test_no_worker_outlives_a_supervisor_that_was_killed() -> None:
    with supervised(2) as broker:
        broker.wait_ready()
        found = broker.workers(2)
        broker.process.kill()
        until(lambda: not any(is_alive(one.pid) for one in found.values()))


# -- what goes wrong ------------------------------------------------------------------------


def test_bad_configuration_is_told_once_and_passed_on() -> None:
    with supervised(3, "refuse") as broker:
        code, out, err = broker.ended()
    assert (code, out) == (2, "")
    assert err.count("bad.key: is bad; mend it") == 1


@pytest.mark.parametrize("who", ["crash", "crash:1"])
def test_a_worker_that_cannot_start_ends_it_with_its_code_and_words(who: str) -> None:
    with supervised(2, who) as broker:
        code, out, err = broker.ended()
    assert (code, out) == (7, "")
    assert err.count("the reason of the crash") == 3


def test_a_worker_that_does_not_end_is_killed_and_told() -> None:
    with supervised(2, "deaf:1") as broker:
        broker.wait_ready()
        found = broker.workers(2)
        broker.process.terminate()
        code, _, err = broker.ended()
        assert code == 1
        assert '"event": "a worker does not end; killing it"' in err
        assert not any(is_alive(one.pid) for one in found.values())


def test_a_port_in_use_is_told_even_where_it_might_be_shared() -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigurationError, match=r"server\.port: cannot listen on 127\.0\.0\.1"):
            reserve(Server(port=port))
    held = reserve(Server(port=port, host="127.0.0.1"))
    for sock in held:
        sock.close()


# -- what a worker is told --------------------------------------------------------------------


def test_a_worker_reads_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Worker.from_environment() is None
    worker = Worker(2, 8765, -1, 5, "a1b2:c")
    monkeypatch.setenv(VARIABLE, worker.text())
    assert Worker.from_environment() == worker
    for text in ("", "1", "a:1:1:1:g"):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ConfigurationError, match="BROKER_WORKER"):
            Worker.from_environment()


def test_a_worker_adapts_the_settings() -> None:
    config = Config(node="n", server=Server(port=0), admin=Admin(port=9))
    adapted = Worker(1, 1234, -1, 5, "g").adapt(config)
    assert (adapted.node, adapted.server.port, adapted.admin.port) == ("n-1", 1234, -1)
    unnamed = Worker(3, 1234, 9, 5, "g").adapt(Config())
    assert unnamed.node is not None
    assert socket.gethostname() in unnamed.node
    assert unnamed.node.endswith("-3")
    assert unnamed.admin.port == 9
