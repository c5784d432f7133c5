"""What the operators' port sees of the node: the composition root fits this shape, and tests may too."""

from __future__ import annotations

from typing import Protocol

from broker.server.context import Context
from broker.server.pump import Pump


class Node(Protocol):
    """One running broker."""

    context: Context
    pump: Pump
    started_at: float
    """Unix time (s)."""

    @property
    def ready(self) -> bool:
        """Whether new clients are welcome."""
