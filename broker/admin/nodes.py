"""Endpoints about nodes rather than rooms and sessions: who there is, how busy, and orders to them."""

from __future__ import annotations

from typing import Any

import msgspec

from broker.admin.models_nodes import Drain, LoadPage, NodeEntry, NodeLoad, NodesPage, Rebalance
from broker.admin.operations import Call
from broker.admin.parts import Nothing, OfNode, rebalance_of
from broker.admin.questions import DRAIN, LOAD, REBALANCE, command, hear
from broker.engine.peers import NodeInfo


async def nodes(call: Call) -> Any:
    """The nodes that are alive, and which of them answers."""
    context = call.node.context
    found = [_entry(each) for each in context.peers.nodes()]
    return NodesPage(node=context.node, nodes=found)


def _entry(info: NodeInfo) -> NodeEntry:
    return msgspec.convert(info, NodeEntry, from_attributes=True)


async def load(call: Call) -> Any:
    """How busy this node is, and every other."""
    node = call.node
    heard = await hear(node, LOAD, Nothing(), local=call.query.local)
    figures = dict(heard.found)
    known = {each.name: each.load for each in node.context.peers.nodes()}
    listed = []
    for each in heard.nodes:
        figure = figures.get(each.node)
        listed.append(
            NodeLoad(node=each.node, load=figure.load, parts=figure.parts)
            if figure is not None
            else NodeLoad(node=each.node, error=each.error, load=known.get(each.node, 0.0))
        )
    own = heard.answers[0]
    return LoadPage(
        node=node.context.node, load=own.load, parts=own.parts, nodes=listed, partial=heard.partial
    )


async def drain(call: Call) -> Any:
    """Empty a node: it welcomes nobody any more, and everybody is asked to come back elsewhere."""
    body: Drain = call.body
    name = body.node or call.node.context.node
    return await command(call.node, DRAIN, name, OfNode(node=name))


async def rebalance(call: Call) -> Any:
    """Ask a share of a node's sessions to move, spread over a time."""
    body: Rebalance = call.body
    name = body.node or call.node.context.node
    return await command(call.node, REBALANCE, name, rebalance_of(name, body))
