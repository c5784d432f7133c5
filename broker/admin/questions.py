"""Questions that nodes ask each other for their operators: one table, and asking everybody at once.

A node that is asked runs the same part (:mod:`broker.admin.parts`) as for
itself. Whoever does not answer, or answers what cannot be read (another
version, in the middle of a deploy), is named with the reason, so that nobody
takes a part for the whole.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from broker.admin import parts
from broker.admin.models import Disconnect, NodeAnswer, RoomsQuery, SessionDetail, SessionsQuery
from broker.admin.models_nodes import Drained, LoadFigure, Rebalanced
from broker.admin.node import Node
from broker.admin.parts import (
    EndedPart,
    Named,
    NodeRebalance,
    Nothing,
    OfGroup,
    OfNode,
    RoomPart,
    RoomsPart,
    SessionsPart,
    UserPart,
)
from broker.admin.statistics import Snapshot
from broker.engine.peers import Handler
from broker.errors import BrokerError, ErrorCode

P = TypeVar("P", bound=msgspec.Struct)
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Question(Generic[P, A]):
    """One row: what it is called among nodes, the types of both directions, and who answers."""

    name: str
    parameters: type[P]
    answer: Any
    """Type of the answer, as msgspec reads it."""
    part: Callable[[Node, P], Awaitable[A]]


ROOMS: Final = Question("admin.rooms", RoomsQuery, RoomsPart, parts.rooms)
FULLEST: Final = Question("admin.fullest_rooms", RoomsQuery, RoomsPart, parts.fullest_rooms)
ROOM: Final = Question("admin.room", Named, RoomPart | None, parts.room)
SESSIONS: Final = Question("admin.sessions", SessionsQuery, SessionsPart, parts.sessions)
SESSION: Final = Question("admin.session", Named, SessionDetail | None, parts.session)
USER: Final = Question("admin.user", Named, UserPart, parts.user)
DISCONNECT: Final = Question("admin.disconnect", Disconnect, EndedPart, parts.disconnect)
STATISTICS: Final = Question("admin.statistics", OfGroup, Snapshot | None, parts.statistics)
LOAD: Final = Question("admin.load", Nothing, LoadFigure, parts.load)
DRAIN: Final = Question("admin.drain", OfNode, Drained | None, parts.drain)
REBALANCE: Final = Question("admin.rebalance", NodeRebalance, Rebalanced | None, parts.rebalance)

QUESTIONS: Final[tuple[Question[Any, Any], ...]] = (
    ROOMS,
    FULLEST,
    ROOM,
    SESSIONS,
    SESSION,
    USER,
    DISCONNECT,
    STATISTICS,
    LOAD,
    DRAIN,
    REBALANCE,
)


def serve(node: Node) -> None:
    """Answer other nodes' operators from now on; called once by the composition root."""
    for question in QUESTIONS:
        node.context.peers.serve(question.name, _handler(node, question))


def _handler(node: Node, question: Question[Any, Any]) -> Handler:
    async def answer(parameters: Any) -> Any:
        try:
            wanted = msgspec.convert(parameters, question.parameters)
        except msgspec.ValidationError as error:
            raise BrokerError(ErrorCode.BAD_MESSAGE, f"{question.name}: {error}") from None
        return msgspec.to_builtins(await question.part(node, wanted))

    return answer


@dataclass(frozen=True, slots=True)
class Heard(Generic[A]):
    """What was answered, and by whom."""

    found: list[tuple[str, A]]
    """Name of the node and its answer, this node first."""
    nodes: list[NodeAnswer]
    """All that were asked."""

    @property
    def answers(self) -> list[A]:
        """What was answered, whoever did."""
        return [answer for _, answer in self.found]

    @property
    def partial(self) -> bool:
        """Whether somebody did not answer."""
        return any(each.error is not None for each in self.nodes)

    def joined(self, other: Heard[A]) -> Heard[A]:
        """Both as one."""
        return Heard([*self.found, *other.found], [*self.nodes, *other.nodes])

    def silent(self) -> str:
        """Who did not answer and why, in words."""
        return ", ".join(f"{each.node}: {each.error}" for each in self.nodes if each.error is not None)


async def hear(node: Node, question: Question[P, A], parameters: P, *, local: bool = False) -> Heard[A]:
    """Ask this node, and with it all others unless ``local``. Raises what this node's own part raises."""
    name = node.context.node
    own = Heard([(name, await question.part(node, parameters))], [NodeAnswer(node=name)])
    return own if local else own.joined(await hear_others(node, question, parameters))


async def hear_others(node: Node, question: Question[P, A], parameters: P) -> Heard[A]:
    """Ask all other nodes."""
    heard: Heard[A] = Heard([], [])
    for answer in await node.context.peers.ask(question.name, msgspec.to_builtins(parameters)):
        problem = answer.error
        if problem is None:
            try:
                heard.found.append((answer.node, msgspec.convert(answer.result, question.answer)))
            except msgspec.ValidationError as error:
                problem = f"its answer cannot be read: {error}"
        heard.nodes.append(NodeAnswer(node=answer.node, error=problem))
    return heard


async def command(node: Node, question: Question[P, A | None], name: str, parameters: P) -> A:
    """Have the node called ``name`` do something. Raises ``not_found``, ``unavailable``."""
    if name == node.context.node:
        done = await question.part(node, parameters)
        assert done is not None, "it is the one that is meant"
        return done
    heard = await hear_others(node, question, parameters)
    for done in heard.answers:
        if done is not None:
            return done
    for each in heard.nodes:
        if each.node == name and each.error is not None:
            raise BrokerError(ErrorCode.UNAVAILABLE, f"{name} was asked, and may have done it: {each.error}")
    raise BrokerError(ErrorCode.NOT_FOUND, "no node of this name is alive; see /api/nodes")
