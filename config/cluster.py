"""A cluster on this machine, with one command: ``make cluster``.

Starts a redis-server of its own and three nodes on the ports 8765, 8775 and
8785, each with ``config/dev.toml``; says how to try them; on Ctrl-C ends what
it started, and nothing else. Another first port may be given. It lives beside
the configurations because it is one: what ``dev.toml`` is for a node, this is
for several. Only the standard library, ``broker`` and the program
``redis-server`` are needed.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
ROOT = HERE.parent
NODES = 3
FIRST_PORT = 8765
BETWEEN = 10
"""From one node's client port to the next one's; a node's operators' port is its client port + 1."""
PATIENCE = 30.0
"""Seconds after which a process that does not come up, or does not end, is given up."""

Process = subprocess.Popen[str]


class CannotStart(Exception):  # noqa: N818 - a sentence for the person who typed the command
    """Why there is no cluster, and what to do."""


def main(first_port: int) -> int:
    """Run until Ctrl-C, or until a node ends by itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    with tempfile.TemporaryDirectory(prefix="broker-cluster-") as directory, contextlib.ExitStack() as stack:
        nodes: dict[str, Process] = {}
        try:
            port = stack.enter_context(running_redis(Path(directory)))
            for number in range(NODES):
                name = f"node-{number + 1}"
                where = first_port + number * BETWEEN
                nodes[name] = stack.enter_context(running_node(name, where, port, Path(directory)))
            for name, process in nodes.items():
                wait_until_ready(name, process)
            print(how_to_try(first_port, port, Path(directory)), flush=True)
            return wait_for_any(nodes)
        except CannotStart as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not leave somebody running
                signal.signal(number, signal.SIG_IGN)
            print("\nending", flush=True)
            for process in nodes.values():
                process.terminate()  # all at once; each is waited for below
            return 0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def running_redis(directory: Path) -> Iterator[int]:
    """A redis-server that keeps everything it acknowledges; its port."""
    program = shutil.which("redis-server")
    if program is None:
        raise CannotStart("redis-server is not installed; Debian and Ubuntu: apt-get install redis-server")
    port = free_port()
    line = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""]
    line += ["--appendonly", "yes", "--appendfsync", "everysec"]
    with (directory / "redis.log").open("w") as log, ended_after(line, stdout=log, stderr=log) as process:
        end = time.monotonic() + PATIENCE
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise CannotStart(f"redis-server did not start:\n{(directory / 'redis.log').read_text()}")
            time.sleep(0.05)
        yield port


def answers(port: int) -> bool:
    """Whether a Redis answers there."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(64).startswith(b"+PONG")
    except OSError:
        return False


@contextlib.contextmanager
def running_node(name: str, port: int, redis_port: int, directory: Path) -> Iterator[Process]:
    """One node, starting. What it logs is shown with its name in front."""
    line = [sys.executable, "-m", "broker", "serve", "--config", str(HERE / "dev.toml"), "--node", name]
    line += ["--port", str(port), "--admin-port", str(port + 1)]
    line += ["--redis", f"redis://127.0.0.1:{redis_port}/0", "--data", str(directory / name)]
    with ended_after(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        threading.Thread(target=show, args=(name, process.stderr), daemon=True).start()
        yield process


def show(name: str, logs: IO[str]) -> None:
    """Pass a node's logs on, line by line."""
    for line in logs:
        print(f"{name} | {line}", end="", file=sys.stderr, flush=True)


def wait_until_ready(name: str, process: Process) -> None:
    """Wait for the one line that says so."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise CannotStart(f"{name} did not start; it says above why")
    print(f"{name} {line}", end="", flush=True)


@contextlib.contextmanager
def ended_after(line: list[str], *, stdout: int | IO[str], stderr: int | IO[str]) -> Iterator[Process]:
    """A process that has ended when the block is over: asked first, killed if it does not listen.

    In a session of its own, so that Ctrl-C reaches it through us, and nodes drain
    while their Redis is still there.
    """
    process = subprocess.Popen(  # noqa: S603 - our own command lines
        line, cwd=ROOT, text=True, start_new_session=True, stdout=stdout, stderr=stderr
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_any(nodes: dict[str, Process]) -> int:
    """Wait until a node ends, which nobody asked for."""
    while True:
        for name, process in nodes.items():
            if process.poll() is not None:
                print(f"{name} has ended with {process.returncode}", file=sys.stderr)
                return 1
        time.sleep(0.5)


def how_to_try(first: int, redis_port: int, directory: Path) -> str:
    """What to type next."""
    last = first + (NODES - 1) * BETWEEN
    return f"""
Three nodes on one Redis. In other terminals, from {ROOT}:

  {BROKER} listen --url ws://127.0.0.1:{last}/ws deal:7          # on node 3
  {BROKER} publish --url ws://127.0.0.1:{first}/ws deal:7 hello '{{"from": "node 1"}}'
  redis-cli -p {redis_port} publish broker:room:deal:7 '{{"event": "hello", "data": {{"from": "a backend"}}}}'
  redis-cli -p {redis_port} xadd broker:publish '*' room deal:7 event hello data '{{"durable": true}}'

Operators: http://127.0.0.1:{first + 1} (each node's client port + 1). Redis keeps its files in
{directory} while this runs. Ctrl-C ends all.
"""


BROKER = ".venv/bin/broker" if (ROOT / ".venv/bin/broker").exists() else "broker"


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else FIRST_PORT))
