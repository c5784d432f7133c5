"""Nodes that ask each other without anything between them, and an engine that fails when it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import trio

from broker.engine.base import Engine
from broker.engine.peers import Alone, Answer, Handler, NodeInfo
from broker.errors import BrokerError


class Switchboard:
    """Connects the lines of several nodes of one process, as a cluster connects processes."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.silent: set[str] = set()
        """Nodes that are alive, and do not answer."""
        self.garbled: set[str] = set()
        """Nodes that answer what nobody understands."""
        self.asked: list[tuple[str, str]] = []
        """Who was asked what."""

    def line(self, name: str, group: str = "") -> Line:
        """The line of a node."""
        self.lines[name] = Line(self, name, group)
        return self.lines[name]


class Line(Alone):
    """One node's end: asks the others' handlers, with JSON in both directions."""

    def __init__(self, switchboard: Switchboard, name: str, group: str) -> None:
        super().__init__(self._unknown)
        self.name = name
        self.group = group
        self.handlers: dict[str, Handler] = {}
        self._switchboard = switchboard
        self._describe: Callable[[], Sequence[NodeInfo]] = lambda: (self._unknown(),)

    def _unknown(self) -> NodeInfo:
        return NodeInfo(id=f"id of {self.name}", name=self.name, group=self.group)

    def describes(self, nodes: Callable[[], Sequence[NodeInfo]]) -> None:
        """Take what the node says of itself from there."""
        self._describe = nodes

    def own(self) -> NodeInfo:
        """What the node says of itself."""
        return msgspec.structs.replace(self._describe()[0], group=self.group)

    def nodes(self) -> Sequence[NodeInfo]:
        others = [line.own() for line in self._switchboard.lines.values() if line is not self]
        return [self.own(), *others]

    def serve(self, method: str, handler: Handler) -> None:
        self.handlers[method] = handler

    async def ask(self, method: str, parameters: Any) -> Sequence[Answer]:
        await trio.lowlevel.checkpoint()
        answers = []
        for line in list(self._switchboard.lines.values()):
            if line is not self:
                self._switchboard.asked.append((line.name, method))
                answers.append(await self._ask(line, method, parameters))
        return answers

    async def _ask(self, line: Line, method: str, parameters: Any) -> Answer:
        if line.name in self._switchboard.silent:
            return Answer(line.name, None, "no answer within 2 s")
        if line.name in self._switchboard.garbled:
            return Answer(line.name, {"what": "is this?"})
        try:
            result = await line.handlers[method](json_of(parameters))
        except BrokerError as error:
            return Answer(line.name, None, f"{error.code}: {error.message}")
        return Answer(line.name, json_of(result))

    def statistics(self) -> dict[str, int]:
        """As peers that count what they do."""
        return {"nodes": len(self._switchboard.lines), "asks": len(self._switchboard.asked)}


def json_of(value: Any) -> Any:
    """A value after it went over a wire."""
    return msgspec.json.decode(msgspec.json.encode(value))


class FailingEngine:
    """Stands in front of an engine's statistics, and says that the store fails when the test wants it."""

    def __init__(self, engine: Engine) -> None:
        self.failing = False
        self._statistics = engine.statistics
        engine.statistics = self._told  # type: ignore[method-assign]  # a broken disk, without one

    def _told(self) -> dict[str, Any]:
        return {**self._statistics(), "failing": int(self.failing)}
