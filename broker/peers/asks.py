"""Questions to all other nodes, and their answers.

A question goes out on the channel that everybody hears, an answer comes back on
the asker's own. Who is expected to answer is who is alive; who has not answered
in time is said to have given no answer, so that nobody takes a part for the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Final

import msgspec
import orjson
import trio

from broker.engine.peers import Answer, Handler
from broker.errors import BrokerError, ErrorCode
from broker.link import wire
from broker.link.base import Link, LinkError, Reply
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger
from broker.peers.nodes import Nodes

log = get_logger(__name__)

PATIENCE: Final = 2.0
"""How long an answer may take (s)."""
ANSWERING: Final = 8
"""Questions answered at once."""
WAITING: Final = 256
"""Questions that may wait for their turn; further ones are refused."""
ANSWER_BYTES: Final = 8 * 1024 * 1024
"""A larger answer is not sent: Redis cuts off subscribers that it owes more than 32 MiB."""

NO_ANSWER: Final = "no answer"


class _Question(msgspec.Struct):
    method: str
    params: Any = None


class _Failure(msgspec.Struct):
    code: str
    message: str


class _Reply(msgspec.Struct):
    result: Any = None
    error: _Failure | None = None


_question = msgspec.json.Decoder(_Question)
_reply = msgspec.json.Decoder(_Reply)


class _Asked:
    """A question on its way."""

    def __init__(self, expected: dict[str, str]) -> None:
        self.expected = expected
        """Id → name of the nodes that have yet to answer."""
        self.answers: dict[str, Answer] = {}
        self.done = trio.Event()

    def answer(self, node: str, answer: Answer) -> None:
        if self.expected.pop(node, None) is not None:
            self.answers[node] = answer
            if not self.expected:
                self.done.set()

    def fail(self, why: str) -> None:
        """Nobody will answer."""
        for node, name in list(self.expected.items()):
            self.answer(node, Answer(name, None, why))


class Asks:
    """Both sides of asking. ``start`` runs a task that ends with the node."""

    def __init__(self, link: Link, keys: Keys, nodes: Nodes) -> None:
        self._link = link
        self._keys = keys
        self._nodes = nodes
        self._handlers: dict[str, Handler] = {}
        self._asked: dict[int, _Asked] = {}
        self._numbers = count(1)
        self._turns = trio.CapacityLimiter(ANSWERING)
        self._waiting = 0
        self._throttle = Throttle()
        self.asks = 0
        self.unanswered = 0
        self.late = 0
        self.questions = 0
        self.failed_answers = 0
        self.bad = 0

    # -- asking -------------------------------------------------------------------------

    async def ask(self, method: str, parameters: Any) -> list[Answer]:
        """Ask all other nodes; one answer for each, by name."""
        asked = _Asked({info.id: info.name for info in self._nodes.running()})
        self.asks += 1
        if not asked.expected:
            await trio.lowlevel.checkpoint()
            return []
        number = next(self._numbers)
        body = orjson.dumps({"method": method, "params": parameters})
        message = wire.pack(wire.ASK, self._nodes.id, number, body=body)

        def sent(reply: Reply | LinkError) -> None:
            if isinstance(reply, LinkError):
                asked.fail(f"{NO_ANSWER}: the question could not be sent ({reply})")

        self._asked[number] = asked
        try:
            self._link.send(sent, self._keys.everybody, "PUBLISH", self._keys.everybody, message)
            with trio.move_on_after(PATIENCE):
                await asked.done.wait()
        finally:
            del self._asked[number]
        self.unanswered += len(asked.expected)
        asked.fail(NO_ANSWER)
        return sorted(asked.answers.values(), key=lambda answer: answer.node)

    def take_answer(self, node: str, number: int, body: bytes) -> None:
        """A node has answered."""
        asked = self._asked.get(number)
        if asked is None or node not in asked.expected:
            self.late += 1
            return
        name = asked.expected[node]
        try:
            reply = _reply.decode(body)
        except (msgspec.DecodeError, ValueError) as error:
            self.bad += 1
            asked.answer(node, Answer(name, None, f"the answer cannot be read ({error})"))
            return
        if reply.error is not None:
            asked.answer(node, Answer(name, None, f"{reply.error.code}: {reply.error.message}"))
        else:
            asked.answer(node, Answer(name, reply.result))

    # -- answering ----------------------------------------------------------------------

    def serve(self, method: str, handler: Handler) -> None:
        """Answer questions called ``method``."""
        self._handlers[method] = handler

    def take_question(self, node: str, number: int, body: bytes, start: Callable[..., None]) -> None:
        """Another node asks; ``start(function, *arguments)`` runs a task that outlives this call."""
        try:
            question = _question.decode(body)
        except (msgspec.DecodeError, ValueError) as error:
            self.bad += 1
            self._refuse(
                node, number, BrokerError(ErrorCode.BAD_MESSAGE, f"the question cannot be read ({error})")
            )
            return
        self.questions += 1
        if self._waiting >= WAITING:
            self._refuse(node, number, BrokerError(ErrorCode.UNAVAILABLE, "too many questions wait"))
            return
        self._waiting += 1
        start(self._answer, node, number, question, trio.current_time() + PATIENCE)

    async def _answer(self, node: str, number: int, question: _Question, due: float) -> None:
        """The life of a question here. It must end alone, whatever the handler does."""
        try:
            with trio.move_on_at(due) as scope:
                async with self._turns:
                    self._send(node, number, await self._result(question))
            if scope.cancelled_caught:
                self._refuse(node, number, BrokerError(ErrorCode.TIMEOUT, "it took too long"))
        except BrokerError as error:
            self._refuse(node, number, error)
        except Exception:
            log.exception("a question could not be answered", method=question.method, asker=node)
            self._refuse(node, number, BrokerError(ErrorCode.INTERNAL, "it could not be answered"))
        finally:
            self._waiting -= 1

    async def _result(self, question: _Question) -> bytes:
        handler = self._handlers.get(question.method)
        if handler is None:
            raise BrokerError(ErrorCode.NOT_FOUND, f"nobody answers {question.method!r} here")
        body = orjson.dumps({"result": await handler(question.params)})
        if len(body) > ANSWER_BYTES:
            raise BrokerError(ErrorCode.TOO_LARGE, f"the answer has {len(body)} bytes")
        return body

    def _refuse(self, node: str, number: int, error: BrokerError) -> None:
        self.failed_answers += 1
        self._send(node, number, orjson.dumps({"error": {"code": error.code, "message": error.message}}))

    def _send(self, node: str, number: int, body: bytes) -> None:
        channel = self._keys.node(node)
        message = wire.pack(wire.ANSWER, self._nodes.id, number, body=body)
        self._link.send(self._sent, channel, "PUBLISH", channel, message)

    def _sent(self, reply: Reply | LinkError) -> None:
        if isinstance(reply, LinkError):
            self.failed_answers += 1
            missed = self._throttle.admit("answer", trio.current_time())
            if missed is not None:
                log.warning("an answer could not be sent", why=str(reply), suppressed=missed)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {
            "asks": self.asks,
            "unanswered_asks": self.unanswered,
            "late_answers": self.late,
            "questions": self.questions,
            "failed_answers": self.failed_answers,
        }
