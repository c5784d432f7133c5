"""Shapes of what operators ask of nodes rather than of rooms and sessions; see :mod:`broker.admin.models`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from broker.admin.models import Input, NodeAnswer

NodeName = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
MAX_SPREAD = 3600.0
"""Seconds over which sessions may be moved: an hour is slower than any deploy."""


# -- bodies -----------------------------------------------------------------------


class Drain(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Empty a node; without ``node`` the one that is asked."""

    node: NodeName | None = None


class Rebalance(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask a part of a node's sessions to come back, so that a balancer places them anew."""

    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Of the node's sessions, chosen at random; 0 ends what is under way."""
    over: Annotated[float, msgspec.Meta(ge=0, le=MAX_SPREAD)]
    """Seconds over which they are asked."""
    node: NodeName | None = None


# -- answers ----------------------------------------------------------------------


class NodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One node, as it last described itself."""

    id: str
    """Of this incarnation: after a restart it is another."""
    name: str
    group: str
    """Same for the workers of one machine; empty without workers."""
    version: str
    started_at: float
    sessions: int
    load: float
    draining: bool


class NodesPage(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes that are alive."""

    node: str
    """Name of the one that answers; it comes first."""
    nodes: list[NodeEntry]


class LoadParts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node may run out of; each is a fraction from 0 to 1."""

    connections: float
    cpu: float
    lag: float
    outbox: float


class LoadFigure(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a node is: the largest of the parts."""

    load: float
    parts: LoadParts


class NodeLoad(NodeAnswer, frozen=True, kw_only=True):
    """The same of a node by name; without ``parts`` ``load`` is the last that was heard of it."""

    load: float
    parts: LoadParts | None = None


class LoadPage(LoadFigure, frozen=True, kw_only=True):
    """How busy this node is, and then every node."""

    node: str
    nodes: list[NodeLoad]
    partial: bool


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions were asked to come back elsewhere by this request."""

    node: str
    told: int


class Rebalanced(msgspec.Struct, frozen=True, kw_only=True):
    """How many sessions will be asked to move."""

    node: str
    moving: int
    over: float
