"""The composition root: what is said at the start, and what a part that fails does to the whole."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from broker import app
from broker.app import Broker
from broker.errors import ConfigurationError
from tests.e2e.harness import CONFIG, config, living_tasks, open_descriptors


def test_the_ready_line() -> None:
    broker = Broker(config(server={"host": "::1", "tls_cert": None}))
    broker.client_port, broker.admin_port = 1, 2
    assert broker.ready_line() == "ready ws://[::1]:1/ws admin http://127.0.0.1:2"
    broker.admin_port = -1
    assert broker.ready_line() == "ready ws://[::1]:1/ws"


def test_names_of_nodes() -> None:
    named = Broker(msgspec.structs.replace(CONFIG, node="mine"))
    unnamed = Broker(msgspec.structs.replace(CONFIG, node=None))
    assert named.context.node == "mine"
    assert socket.gethostname() in unnamed.context.node


def test_a_port_in_use_ends_with_2_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        assert app.run(config(server={"port": port})) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "server.port" in said.err
    assert str(port) in said.err


def test_a_store_that_cannot_be_used_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert app.run(config(store={"data": str(tmp_path / "file" / "data")})) == 2
    assert "store.data" in capsys.readouterr().err


def test_any_other_error_is_a_fault_and_not_told_as_bad_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by reading: every OSError at run time was told as `cannot listen`, with exit code 2."""

    async def broken(_self: Any) -> None:
        raise OSError("a fault of ours")

    monkeypatch.setattr("broker.server.pump.Pump.run", broken)
    with pytest.raises(ExceptionGroup):
        app.run(CONFIG)


@pytest.mark.parametrize("part", ["pump", "clock", "engine", "server"])
async def test_a_part_that_fails_takes_the_others_down_in_good_order(part: str) -> None:
    descriptors, tasks = open_descriptors(), living_tasks()
    broker = Broker(CONFIG)
    real = getattr(broker, part).run
    fail = trio.Event()

    async def failing(*arguments: Any, **options: Any) -> None:
        async with trio.open_nursery() as nursery:
            status = options.pop("task_status", None)
            if status is None:
                nursery.start_soon(partial(real, *arguments))
            else:
                await nursery.start(partial(real, *arguments))
                status.started()
            await fail.wait()
            raise ZeroDivisionError(part)

    getattr(broker, part).run = failing

    async def run_until_it_fails() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(broker.run))
            fail.set()

    with pytest.raises(ExceptionGroup) as caught:
        await run_until_it_fails()
    assert caught.group_contains(ZeroDivisionError)
    assert living_tasks() == tasks
    assert open_descriptors() == descriptors


async def test_a_port_in_use_is_an_error_of_configuration() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        broker = Broker(config(server={"port": holder.getsockname()[1]}))
        with pytest.raises(ConfigurationError, match=r"server\.port"):
            await broker.run()


async def test_ready_until_stopped() -> None:
    broker = Broker(CONFIG)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(broker.run))
        assert broker.ready
        broker.stop()
        assert not broker.ready
