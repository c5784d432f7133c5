"""The composition root: builds every part, opens the root nursery, orders start and stop.

Imports everything; nobody imports it. The nursery holds, as siblings: the
engine, the pump, the fan-out task, the clock, the client port, the admin port.
A part that fails takes the process down in good order, save the admin port,
which is restarted instead.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from broker import __version__
from broker.auth.failures import FailureDelay
from broker.auth.tokens import TokenVerifier
from broker.clock import TICK, Clock
from broker.config import Config
from broker.engine.base import Engine
from broker.engine.embedded import EmbeddedEngine
from broker.engine.peers import Alone, NodeInfo, Peers
from broker.errors import ConfigurationError
from broker.hub.hub import Hub
from broker.metrics import Stages
from broker.protocol.codec import Encoder
from broker.protocol.dictionaries import Dictionaries
from broker.protocol.inflate import ZstdReader
from broker.protocol.samples import SampleRecorder
from broker.router import Router
from broker.server.calls import built_in
from broker.server.connection import Traffic
from broker.server.context import Context
from broker.server.listening import cannot_listen
from broker.server.load import Load
from broker.server.moving import Mover
from broker.server.pump import Pump
from broker.server.registry import Registry
from broker.server.server import Server, connection_limit, listen
from broker.server.wakeup import Wakeup
from broker.server.wheel import Wheel
from broker.supervisor import Worker

if TYPE_CHECKING:
    from broker.cluster import RedisCluster

log = structlog.get_logger(__name__)

GC_THRESHOLD = 50_000
"""New objects between two young collections. A full collection over 10,000 sessions takes
about 100 ms, and the hot path makes no cycles."""


class Broker:
    """One node, built but not running. ``run`` it in a nursery; ``stop`` drains it.

    ``worker``: what its supervisor says, where there is one; ``config`` is adapted to it already.
    """

    def __init__(
        self, config: Config, *, wall: Callable[[], float] = time.time, worker: Worker | None = None
    ) -> None:
        self.config = config
        data = Path(config.store.data) if config.store.data is not None else None
        self.dictionaries = Dictionaries.load(data)
        self.recorder = SampleRecorder(data, config.store.samples) if data is not None else None
        self._group = worker.group if worker is not None else ""
        self._shares_port = worker is not None
        self.cluster: RedisCluster | None = None
        self.engine: Engine
        self.peers: Peers
        if config.redis.url is None:
            self.engine = EmbeddedEngine(
                data,
                ring_events=config.store.ring_events,
                commit_window=config.store.commit_window,
                clock=wall,
            )
            self.peers = Alone(self._describe)
        else:
            from broker.cluster import RedisCluster  # noqa: PLC0415 - a node alone does without redis

            self.cluster = RedisCluster(config, describe=self._describe, wall=wall)
            self.engine, self.peers = self.cluster.engine, self.cluster.peers
        encoder = Encoder(config.wire, self.dictionaries)
        self._wakeup = Wakeup()
        stages = Stages()
        self.hub = Hub(
            config,
            self.engine,
            encoder,
            peers=self.peers,
            monotonic=trio.current_time,
            wall=wall,
            wake=self._wakeup.set,
            sent=lambda ts: stages.fanout.observe(wall() - ts),
            sample=self.recorder.offer if self.recorder is not None else None,
            routing=Router(config.routes, config.options) if config.routes else None,
        )
        self._fanout = self.hub.fanout
        self.pump = Pump(self._before_pass, self._after_pass)
        self.traffic = Traffic(
            self.pump,
            encoder,
            self._fanout.posted,
            outbox_bytes=config.limits.outbox_bytes,
            process_outbox_bytes=config.limits.process_outbox_bytes,
        )
        self.context = Context(
            config=config,
            node=config.node or f"{socket.gethostname()}-{os.getpid()}",
            hub=self.hub,
            engine=self.engine,
            peers=self.peers,
            encoder=encoder,
            zstd=ZstdReader(config.limits.inflated_bytes, self.dictionaries.for_reading),
            dictionaries=self.dictionaries,
            verifier=TokenVerifier(config.auth, dev=config.dev, wall_clock=wall),
            failures=FailureDelay(),
            registry=Registry(config.limits, config.rates, self.peers),
            methods=built_in(),
            traffic=self.traffic,
            wheel=Wheel(TICK),
            stages=stages,
            monotonic=trio.current_time,
            wall=wall,
        )
        self.load = Load(self.context.registry, self.traffic, connections=connection_limit(config))
        self.clock = Clock(self.context, self.load, self.recorder)
        self.mover = Mover(self.context.registry)
        self.server = Server(self.context)
        self.started_at = wall()
        self.client_port = 0
        self.admin_port = -1
        self._stopping = trio.Event()

    def _describe(self) -> NodeInfo:
        """What others and operators see of this node."""
        return NodeInfo(
            id=self.context.node,
            name=self.context.node,
            group=self._group,
            version=__version__,
            started_at=self.started_at,
            sessions=len(self.context.registry.sessions),
            load=self.load.figures.load,
            draining=not self.ready,
        )

    # -- rounds: the pump drives them while it is busy, a task of their own does the rest --------

    def _before_pass(self) -> None:
        self._fanout.driven = True

    def _after_pass(self) -> None:
        fanout = self._fanout
        if fanout.busy:
            fanout.step()
        fanout.driven = False
        if fanout.busy:
            self._wakeup.set()

    async def _run_fanout(self) -> None:
        fanout = self._fanout
        while True:
            due = fanout.due()
            if due == math.inf:
                await self._wakeup.wait()
            else:
                with trio.move_on_at(due):
                    await self._wakeup.wait()
            while fanout.step():
                await trio.lowlevel.checkpoint()

    # -- life -----------------------------------------------------------------------

    async def run(
        self,
        *,
        on_ready: Callable[[Broker], None] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run until :meth:`stop`, or until cancelled. Started once both ports answer."""
        config = self.config
        listeners = _listen(config, reuse_port=self._shares_port)
        self.client_port = listeners[0].getsockname()[1]
        try:
            async with trio.open_nursery() as nursery:
                if self.cluster is not None:
                    await nursery.start(self.cluster.run, self.hub)
                else:
                    await nursery.start(self.engine.run, self.hub.deliver, self.hub.moved)
                nursery.start_soon(self.pump.run)
                nursery.start_soon(self._run_fanout)
                nursery.start_soon(self.clock.run)
                nursery.start_soon(self.mover.run)
                nursery.start_soon(self.context.verifier.run)
                if self.cluster is not None:
                    from broker.admin.questions import serve  # noqa: PLC0415 - not needed by a node alone

                    serve(self)
                await nursery.start(self.server.run, listeners)
                if config.admin.port >= 0:
                    from broker.admin.server import AdminServer  # noqa: PLC0415 - 15 MB that not everybody needs

                    admin = AdminServer(self)
                    self.admin_port = await nursery.start(admin.run)
                if on_ready is not None:
                    on_ready(self)
                task_status.started()
                await self._stopping.wait()
                await self._part()
                await self.server.drain()
                nursery.cancel_scope.cancel()
        finally:
            for listener in listeners:
                listener.close()
            self._keep_samples()

    def _keep_samples(self) -> None:
        if self.recorder is None:
            return
        try:
            self.recorder.flush()
        except OSError as error:
            log.warning("cannot keep the recorded samples", error=str(error))

    async def drain(self) -> int:
        """Welcome nobody any more and ask every session to come back elsewhere; return how many were asked.

        The node stays up until :meth:`stop`. Repeating it asks nobody twice.
        """
        await self._part()
        return await self.server.turn_out()

    async def _part(self) -> None:
        """Before sessions are asked to go: they will be back elsewhere, so nobody is told that they leave."""
        if not self.server.draining:
            self.server.draining = True
            await self.peers.part()

    def counted(self) -> Mapping[str, Any]:
        """Statistics of the parts that only a node of a cluster has."""
        return self.cluster.statistics() if self.cluster is not None else {}

    def stop(self) -> None:
        """Drain, then end :meth:`run`."""
        self._stopping.set()

    @property
    def ready(self) -> bool:
        """Whether new clients are welcome."""
        return not self.server.draining and not self._stopping.is_set()

    def ready_line(self) -> str:
        """The one line of standard output."""
        scheme = "wss" if self.config.server.tls_cert is not None else "ws"
        line = f"ready {scheme}://{_host(self.config.server.host)}:{self.client_port}/ws"
        if self.admin_port >= 0:
            line += f" admin http://{_host(self.config.admin.host)}:{self.admin_port}"
        return line


def _listen(config: Config, *, reuse_port: bool) -> list[socket.socket]:
    """Listening sockets; the reason why there are none is the operator's to mend."""
    try:
        return listen(config.server, reuse_port=reuse_port)
    except OSError as error:
        raise cannot_listen(config.server, error) from None


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _stop_on_signal(broker: Broker) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            log.info("draining", sessions=len(broker.context.registry.sessions))
            broker.stop()


async def _stop_without(worker: Worker, broker: Broker) -> None:
    await worker.orphaned()
    log.warning("the supervisor is gone; draining", sessions=len(broker.context.registry.sessions))
    broker.stop()


async def _main(config: Config) -> None:
    worker = Worker.from_environment()
    broker = Broker(worker.adapt(config) if worker is not None else config, worker=worker)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, broker)
        if worker is not None:
            nursery.start_soon(_stop_without, worker, broker)
        await broker.run(on_ready=_announce)
        nursery.cancel_scope.cancel()


def _announce(broker: Broker) -> None:
    gc.freeze()  # what start-up made stays; collections need not look at it again
    sys.stdout.write(broker.ready_line() + "\n")
    sys.stdout.flush()
    log.info("ready", node=broker.context.node, port=broker.client_port, admin=broker.admin_port)


def run(config: Config) -> int:
    """Run one node to its end; return the exit code."""
    gc.set_threshold(GC_THRESHOLD, 20, 50)
    faults: list[str] = []
    try:
        trio.run(_main, config)
    except* ConfigurationError as group:
        faults += [str(error) for error in _leaves(group)]
    for fault in faults:
        sys.stderr.write(f"{fault}\n")
    return 2 if faults else 0


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
