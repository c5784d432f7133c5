"""The broker as a process: what it prints, how it ends, what a kill leaves, life without descriptors."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest
import trio

from tests.e2e.harness import ROOT, command, environment, serving, until
from tests.e2e.raw_client import RawClient, connected, opened, request, tcp

DEV = ("--dev",)


async def test_one_line_out_and_a_drain_on_sigterm() -> None:
    async with serving(*DEV) as broker:
        assert broker.line.startswith("ready ws://127.0.0.1:")
        async with connected(broker.port) as client:
            await client.ask("join", room="deal:1")
            broker.process.send_signal(signal.SIGTERM)
            bye, code = await client.ended_with()
            assert code == 4503
            assert bye is not None
            assert 0 < bye["retry_after"] <= 10
        assert await broker.process.wait() == 0
        assert await broker.read_out() == b"", "the ready line is all there is"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_both_signals_end_with_zero(stop: signal.Signals) -> None:
    async with serving(*DEV) as broker:
        broker.process.send_signal(stop)
        assert await broker.process.wait() == 0


async def test_acknowledged_events_survive_a_kill(tmp_path: Path) -> None:
    """Epoch and offsets go on, nothing acknowledged is gone, and a key is known again."""
    config = tmp_path / "broker.toml"
    config.write_text(f'dev = true\n[store]\ndata = "{tmp_path / "data"}"\n[rooms.default]\nhistory = 1000\n')
    acknowledged = 0
    epoch = None
    for _ in range(2):
        async with serving("--config", str(config)) as broker:
            async with opened(broker.port) as client:
                await client.next()
                for _ in range(30):
                    stored = await client.ask("publish", room="deal:1", event="e", data=acknowledged)
                    assert epoch in {None, stored["epoch"]}
                    epoch = stored["epoch"]
                    assert stored["offset"] > acknowledged
                    acknowledged = stored["offset"]
                # More are on their way when it dies.
                publish = {"op": "publish", "room": "deal:1", "event": "e", "data": "late"}
                await client.send(*[publish] * 50)
                keyed = await client.ask("publish", room="deal:1", event="e", data="keyed", key="k")
                acknowledged = keyed["offset"]
                broker.process.kill()
            assert await broker.process.wait() == -signal.SIGKILL
    async with serving("--config", str(config)) as broker, connected(broker.port) as client:
        again = await client.ask("publish", room="deal:1", event="e", data="keyed", key="fresh")
        assert again["epoch"] == epoch
        assert again["offset"] > acknowledged
        since = {"epoch": epoch, "offset": 0}
        joined = await client.ask("join", room="deal:1", since=since)
        assert joined["recovered"] is True
        offsets = [(await client.event())["offset"] for _ in range(joined["offset"])]
        assert offsets == list(range(1, again["offset"] + 1))


async def test_a_client_recovers_over_a_restart(tmp_path: Path) -> None:
    config = tmp_path / "broker.toml"
    config.write_text(f'dev = true\n[store]\ndata = "{tmp_path / "data"}"\n[rooms.default]\nhistory = 1000\n')
    async with serving("--config", str(config)) as broker:
        async with connected(broker.port) as client:
            await client.ask("join", room="deal:1")
            stored = await client.ask("publish", room="deal:1", event="e", data=1)
        async with connected(broker.port) as client:
            await client.ask("publish", room="deal:1", event="e", data=2)
        assert await broker.stop() == 0
    async with serving("--config", str(config)) as broker, connected(broker.port) as client:
        since = {"epoch": stored["epoch"], "offset": stored["offset"]}
        assert (await client.ask("join", room="deal:1", since=since))["recovered"] is True
        assert (await client.event())["data"] == 2


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_port_in_use_is_told_with_its_mend() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ended = run("serve", "--dev", "--port", str(port), "--admin-port", "-1")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "server.port" in ended.stderr
    assert str(port) in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1\n", ["server.prot", "port"]),
        ('[server]\nport = "many"\n', ["server.port"]),
        ("[server\n", ["broker.toml"]),
        ('dev = true\n[server]\nhost = "0.0.0.0"\n', ["server.host", "dev"]),
        (
            'dev = true\n[server]\ntls_cert = "nowhere.pem"\ntls_key = "nowhere.key"\n',
            ["tls_cert", "nowhere.pem"],
        ),
        ('dev = true\n[store]\ndata = "/dev/null/x"\n', ["store.data"]),
    ],
)
def test_bad_configuration_names_key_and_mend(tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "broker.toml"
    config.write_text(text)
    ended = (
        run("serve", "--config", str(config), "--port", "0", "--admin-port", "-1")
        if "port" not in text
        else run("serve", "--config", str(config))
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    for word in words:
        assert word in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_without_descriptors_it_serves_those_it_has_and_recovers() -> None:
    """90 % of the descriptors are for clients; who takes the rest is refused, and it recovers."""
    async with serving(*DEV, "--limits-accepts", "0", limit_descriptors=40) as broker:
        async with trio.open_nursery() as nursery:
            streams = []
            for _ in range(60):
                streams.append(await tcp(broker.port))
            answers: list[int] = []

            async def ask(stream: trio.SocketStream) -> None:
                try:
                    answers.append(await RawClient(stream).upgrade(request()))
                except trio.BrokenResourceError:
                    answers.append(0)

            for stream in streams[:20]:
                nursery.start_soon(ask, stream)
            await until(lambda: len(answers) == 20)
            assert answers.count(101) >= 10
            for stream in streams:
                await stream.aclose()
            nursery.cancel_scope.cancel()
        async with connected(broker.port) as client:
            assert (await client.ask("ping"))["op"] == "ok"
        assert await broker.stop() == 0
        assert broker.logs.count(b"cannot accept") == 1, "told once, however long it lasted"
