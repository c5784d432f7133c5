"""A supervisor with workers that only say who they are; run as processes by ``test_supervisor.py``.

``python -m tests.supervised PORT WORKERS HOW`` supervises. ``HOW`` says what
the workers do: ``well``, or ``refuse`` (bad configuration), ``crash`` (at the
start), ``deaf`` (to SIGTERM); ``crash:1`` is for that worker alone.
"""

from __future__ import annotations

import os
import signal
import sys

import trio

from broker import logs
from broker.config import Admin, Config, Server
from broker.errors import ConfigurationError
from broker.server.server import listen
from broker.supervisor import Worker, supervise

CHOSEN = 45678
"""The admin port that "the system chose"; nobody listens there."""


def settings(port: int, workers: int) -> Config:
    server = Server(port=port, workers=workers, drain_timeout=0.0, close_timeout=0.01)
    return Config(node="here", server=server, admin=Admin(port=0))


async def work(worker: Worker, *, deaf: bool) -> None:
    """Tell everybody who connects the node's name, the process id and the admin port."""
    config = worker.adapt(settings(0, 1))
    (sock,) = listen(config.server, reuse_port=True)
    hello = f"{config.node} {os.getpid()} {config.admin.port}\n".encode()

    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(hello)
        await stream.receive_some()

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_when_orphaned, worker, nursery.cancel_scope)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await nursery.start(trio.serve_listeners, greet, [listener])
            admin = f" admin http://127.0.0.1:{config.admin.port or CHOSEN}" if worker.number == 0 else ""
            print(f"ready ws://127.0.0.1:{worker.port}/ws{admin}", flush=True)
            async for _ in signals:
                if not deaf:
                    nursery.cancel_scope.cancel()


async def end_when_orphaned(worker: Worker, everything: trio.CancelScope) -> None:
    await worker.orphaned()
    everything.cancel()


def main(port: str, workers: str, how: str) -> int:
    worker = Worker.from_environment()
    if worker is None:
        logs.configure("info", "json")
        command = [sys.executable, "-m", "tests.supervised", *sys.argv[1:]]
        try:
            return supervise(settings(int(port), int(workers)), command, kill_margin=0.2)
        except ConfigurationError as error:
            print(error, file=sys.stderr)
            return 2
    does, _, one = how.partition(":")
    if one and worker.number != int(one):
        does = "well"
    if does == "refuse":
        print("bad.key: is bad; mend it", file=sys.stderr)
        return 2
    if does == "crash":
        print("the reason of the crash", file=sys.stderr)
        return 7
    trio.run(lambda: work(worker, deaf=does == "deaf"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
