"""What every session of a node shares; made by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from broker.auth.failures import FailureDelay
from broker.auth.tokens import TokenVerifier
from broker.config import Config
from broker.engine.base import Engine
from broker.engine.peers import Peers
from broker.hub.hub import Hub
from broker.metrics import Stages
from broker.protocol.codec import Encoder
from broker.protocol.dictionaries import Dictionaries
from broker.protocol.inflate import ZstdReader
from broker.server.calls import Methods
from broker.server.connection import Traffic
from broker.server.registry import Registry
from broker.server.wheel import Wheel


@dataclass(frozen=True, slots=True)
class Context:
    """One node's parts, as its sessions need them.

    ``monotonic`` is the clock of deadlines, ``wall`` that of timestamps and
    token expiry; both in seconds.
    """

    config: Config
    node: str
    hub: Hub
    engine: Engine
    peers: Peers
    encoder: Encoder
    zstd: ZstdReader
    dictionaries: Dictionaries
    verifier: TokenVerifier
    failures: FailureDelay
    registry: Registry
    methods: Methods
    traffic: Traffic
    wheel: Wheel
    stages: Stages
    monotonic: Callable[[], float]
    wall: Callable[[], float]
