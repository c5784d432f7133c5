"""``/echo`` has bounds of its own; what it echoes is tested end to end, and by the Autobahn suite."""

from __future__ import annotations

from trio.testing import wait_all_tasks_blocked

from tests.e2e.harness import config, jump, running, until
from tests.e2e.raw_client import BINARY, frame, opened


async def test_an_echo_that_does_not_move_ends_at_the_write_deadline() -> None:
    quick = config(server={"write_timeout": 5.0})
    async with running(quick) as broker, opened(broker.client_port, path="/echo") as client:
        for _ in range(3):
            await client.send_bytes(frame(BINARY, bytes(8 << 20)))
        await until(lambda: broker.traffic.queued > 1 << 20)
        for _ in range(4):
            jump(5.1)
            await wait_all_tasks_blocked(0.01)
        await until(lambda: broker.context.registry.connections == 0)


async def test_echoes_come_in_order() -> None:
    async with running() as broker, opened(broker.client_port, path="/echo") as client:
        await client.send_bytes(b"".join(frame(BINARY, b"%d" % number) for number in range(1000)))
        for number in range(1000):
            assert await client.frame() == (BINARY, 0, b"%d" % number)
        await client.close()
