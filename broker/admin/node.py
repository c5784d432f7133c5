"""What the operators' port sees of the node: the composition root fits this shape, and tests may too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from broker.server.context import Context
from broker.server.load import Load
from broker.server.moving import Mover
from broker.server.pump import Pump


class Node(Protocol):
    """One running broker."""

    context: Context
    pump: Pump
    load: Load
    mover: Mover
    started_at: float
    """Unix time (s)."""

    @property
    def ready(self) -> bool:
        """Whether new clients are welcome."""

    async def drain(self) -> int:
        """Welcome nobody any more, ask every session to come back elsewhere; return how many were asked."""

    def counted(self) -> Mapping[str, Any]:
        """Statistics of the parts that only a node of a cluster has; empty where it is alone."""
