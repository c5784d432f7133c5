"""One client: identity, rooms, and the order in which its messages are answered.

A message is handled at once, on the pump's pass, when nothing stands before it
and its handler need not wait. Else it goes to the inbox, which the session's
own task serves; while the inbox holds anything, later messages queue behind it.
Publishes are the exception that makes group commits big: several may be on
their way to the store, and :class:`~broker.server.replies.Replies` keeps their
answers in order.

The life of a session is :meth:`Session.run`, read top to bottom.
"""

from __future__ import annotations

import math
import random
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
import trio

from broker import __version__
from broker.auth.permissions import ANONYMOUS, Identity, valid_room
from broker.config import KIB
from broker.errors import BrokerError, CloseCode, ErrorCode
from broker.hub.rooms import Member, Sendable
from broker.protocol.codec import Codec
from broker.protocol.events import Position, SessionId, UserId
from broker.protocol.filters import MAX_DEPTH as FILTER_DEPTH
from broker.protocol.filters import MAX_NODES as FILTER_NODES
from broker.protocol.frames import BINARY, CLOSE, FAIL, PING, PONG, TEXT, encode_frame
from broker.protocol.inflate import InflateError
from broker.protocol.messages import Message, Publish, Refusal, decode, encode_error, encode_ok, encode_op
from broker.server import commands
from broker.server.calls import RunningCall
from broker.server.connection import Connection
from broker.server.context import Context
from broker.server.pump import READ
from broker.server.rates import RateLimiter
from broker.server.replies import Replies, Reply
from broker.server.wakeup import Wakeup

log = structlog.get_logger(__name__)

PING_FRAME = encode_frame(PING, b"")
SILENT = frozenset(
    {CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA, CloseCode.INVALID_DATA, CloseCode.TOO_BIG}
)
"""Codes without a ``bye``: the peer does not speak the protocol, or says what we cannot follow."""
IN_FLIGHT = 256
"""Replies of one session that may wait for its publishes on their way to the store."""
_OVERTAKING = frozenset({Publish, Refusal})
"""What is handled while publishes are on their way: it changes nothing that depends on their outcome."""
LARGE_ANSWER = 4 * KIB
"""A larger answer leaves at once, so that a client which asks for many of them, and does not read, is
seen to be slow before they fill the memory."""


class Session:
    """A :class:`~broker.hub.rooms.Sink` with a socket behind it."""

    __slots__ = (
        "_auth_deadline",
        "_control",
        "_dictionaries",
        "_due",
        "_expires_at",
        "_handled",
        "_inbox",
        "_ping_at",
        "_pong_deadline",
        "_rates",
        "_replies",
        "_stalled_since",
        "_starting",
        "_wakeup",
        "address",
        "calls",
        "connected_at",
        "connection",
        "context",
        "ending",
        "id",
        "identity",
        "info",
        "memberships",
        "peer_closed",
        "user",
        "write",
    )

    def __init__(self, context: Context, connection: Connection, address: str) -> None:
        now = context.monotonic()
        server = context.config.server
        self.context = context
        self.connection = connection
        self.address = address
        self.id = SessionId(secrets.token_urlsafe(12))
        self.user: UserId | None = None
        self.info: Any = None
        self.identity: Identity = ANONYMOUS
        self.memberships: dict[str, Member] = {}
        self.connected_at = context.wall()
        self.write: Callable[[bytes], int] = connection.write  # straight to it: the fan-out's hot call
        self.calls: dict[RunningCall, None] = {}
        self.ending: int | None = None
        """Close code, once the session is to end."""
        self.peer_closed = False
        self._starting: list[RunningCall] | None = None
        self._inbox: deque[Any] | None = None
        self._replies: Replies | None = None
        self._handled = 0
        self._wakeup = Wakeup()
        self._dictionaries: frozenset[int] = frozenset()
        self._rates = RateLimiter(context.config.rates) if context.config.rates.enabled else None
        self._control: RateLimiter | None = None
        self._auth_deadline = 0.0 if context.config.auth.anonymous else now + server.auth_timeout
        self._expires_at = 0.0
        # The first ping is jittered over the whole interval, so that a storm of connects is none of pings.
        self._ping_at = now + random.uniform(0.1, 1.0) * server.ping_interval
        self._pong_deadline = 0.0
        self._stalled_since = now
        self._due = 0.0
        """When the wheel will ask next."""
        connection.owner = self
        connection.on_incoming = self._on_incoming
        connection.on_gone = self._on_gone

    # -- life -------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the session to its end: ``welcome`` was posted, the connection is started."""
        self._wind()
        try:
            while self.ending is None:
                await self._serve_inbox()
                if self._starting:
                    await self._run_calls()
                elif self.ending is None:
                    await self._wakeup.wait()
            await self._part()
        finally:
            self.context.hub.leave_all(self)
            self.connection.stop()

    async def _run_calls(self) -> None:
        """Serve while calls run: the only time a session has children."""
        async with trio.open_nursery() as nursery:
            while self.calls and self.ending is None:
                while self._starting:
                    nursery.start_soon(self._starting.pop(0).run, self)
                await self._serve_inbox()
                # Serving may have waited, and used up the call to look at these again.
                if self.calls and not self._starting and self.ending is None:
                    await self._wakeup.wait()
            nursery.cancel_scope.cancel()

    async def _serve_inbox(self) -> None:
        inbox = self._inbox
        while inbox and self.ending is None:
            message = inbox[0]
            if self._must_wait(message):
                return  # woken again when all are stored
            if not self._attempt(message):
                await self._do_later(message)
            inbox.popleft()
            if len(inbox) * 2 < self.context.config.limits.inbox_messages:
                self.connection.resume_reading()
        if inbox is not None and not inbox:
            self._inbox = None

    async def _do_later(self, message: Message) -> None:
        command = commands.COMMANDS[type(message)]
        assert command.later is not None, "only what can be done later may ask to wait"
        try:
            reply = await command.later(self, message)
        except BrokerError as error:
            self._refuse(message, command.op, error)
        except Exception as error:  # a fault of ours must not end the session, let alone the others
            self._confess(message, error)
        else:
            self._finish(message.id, reply)

    async def _part(self) -> None:
        """Our close frame is queued or theirs is answered: let the rest flow, then end."""
        server = self.context.config.server
        patience = server.drain_timeout if self.ending == CloseCode.DRAINING else server.close_timeout
        with trio.move_on_after(patience):
            while self.connection.outbox is not None and not self.connection.gone:
                self.connection.when_drained(self._on_drained)
                await self._wakeup.wait()
            if self.connection.decoder.done and not self.peer_closed:
                # We cannot follow what the peer says, so we cannot see its close frame: end our half.
                self.connection.finish_writing()
            while not self.peer_closed and not self.connection.gone:
                await self._wakeup.wait()

    def disconnect(self, code: CloseCode, reason: str) -> None:
        """End the session in good order: ``bye``, close frame, teardown by its own task."""
        if self.ending is not None:
            return
        self.ending = code
        self.context.registry.tell(self, code, reason, self.context.monotonic())
        connection = self.connection
        if code is CloseCode.SLOW_CONSUMER:
            connection.abandon_backlog()
        fanout = self.context.hub.fanout
        if connection.posts_wait and not fanout.running:
            fanout.flush()  # an answer goes after the events it answers for, or not at all
        connection.flush_posts()
        if code not in SILENT:
            bye = encode_op("bye", code=int(code), reason=reason, retry_after=self._retry_after(code))
            connection.push(self.context.encoder.encode(connection.codec, b"[%b]" % bye))
        connection.close(code, reason)
        connection.resume_reading()
        self._wakeup.set()

    def _retry_after(self, code: CloseCode) -> float | None:
        if code.final or code is CloseCode.NORMAL:
            return None
        if code is CloseCode.TOKEN_EXPIRED:
            return 0.0
        return round(random.uniform(0.1, self.context.config.server.retry_after), 3)

    def _on_gone(self) -> None:
        if self.ending is None:
            self.ending = 1006
        self._wakeup.set()

    # -- what the hub asks of a sink ----------------------------------------------

    @property
    def backlogged(self) -> bool:
        """Whether bytes wait for the socket."""
        return self.connection.outbox is not None

    def codec_for(self, room: str) -> Codec:
        """How frames of ``room`` are encoded for this session."""
        codec = self.connection.codec
        if not self._dictionaries:
            return codec
        dictionary = self.context.dictionaries.for_room(room, self._dictionaries)
        return Codec("zstd", dictionary) if dictionary else codec

    def post(self, message: bytes, *, after_events: bool = False) -> None:
        """Queue one message for the end of this round."""
        self.connection.post(message, after_events=after_events)

    def seal_posts(self) -> None:
        """Waiting posts wait for the round that begins now."""
        self.connection.seal_posts()

    def flush_posts(self, *, after_events: bool = False) -> None:
        """Send posted messages."""
        self.connection.flush_posts(after_events=after_events)

    @property
    def direct(self) -> Sendable | None:
        """The socket, while whole frames may be sent to it directly."""
        return self.connection.direct

    def direct_changed(self) -> None:
        """Tell every group that goes by it."""
        for member in self.memberships.values():
            if member.group is not None:
                member.group.changed()

    def sent(self, frame: bytes, size: int) -> int:
        """The socket took only ``size`` bytes of ``frame``."""
        return self.connection.sent(frame, size)

    def on_drained(self) -> None:
        """Resume this session's rooms once its backlog is gone."""
        self.connection.when_drained(self._on_drained)

    async def drained(self) -> None:
        """Wait until nothing is queued. Only from the session's own task."""
        while self.connection.outbox is not None and self.ending is None:
            self.connection.when_drained(self._on_drained)
            await self._wakeup.wait()

    def _on_drained(self) -> None:
        # A connection has one such callback, so it serves both who asked: the hub and our own task.
        if self.ending is None:
            self.context.hub.resume(self)
        self._wakeup.set()

    # -- what comes in ------------------------------------------------------------

    def _on_incoming(self, opcode: int, payload: Any) -> None:
        if opcode == TEXT:
            if self.ending is None:
                self.take(payload)
        elif opcode == CLOSE:
            self._on_close(*payload)
        elif self.ending is not None:
            return
        elif opcode == BINARY:
            self._on_binary(payload)
        elif opcode in (PING, PONG):
            self._on_control(opcode, payload)
        elif opcode == FAIL:
            self.disconnect(*payload)

    def _on_close(self, code: int, reason: str) -> None:
        self.peer_closed = True
        if self.ending is None:
            self.ending = code
            self.connection.close(code, reason)
        self._wakeup.set()

    def _on_binary(self, payload: bytes) -> None:
        if self.connection.codec.kind != "zstd":
            self.disconnect(CloseCode.UNSUPPORTED_DATA, "binary frames need the subprotocol broker.v1.zstd")
            return
        try:
            text = self.context.zstd.decompress(payload)
            text.decode()
        except InflateError as error:
            self.disconnect(error.close_code, error.reason)
        except UnicodeDecodeError:
            self.disconnect(CloseCode.INVALID_DATA, "text that is not UTF-8")
        else:
            self.take(text)

    def _on_control(self, opcode: int, payload: bytes) -> None:
        limit = self.context.config.limits.control_frames
        if limit:
            if self._control is None:
                self._control = RateLimiter(commands.control_rates(limit))
            if self._control.take("message", self.context.monotonic()):
                self.disconnect(CloseCode.TOO_MANY_MESSAGES, f"more than {limit:g} control frames a second")
                return
        if opcode == PING and not self.backlogged:
            # While a backlog holds, pings are not answered: their sender does not read either.
            self.connection.push(encode_frame(PONG, payload))

    def take(self, payload: bytes) -> None:
        """Handle the messages of one frame."""
        self._handled += 1
        started = self.context.monotonic() if self._handled & 63 == 1 else 0.0
        rates = self._rates
        for received in decode(payload, self.context.config.limits.batch_messages):
            message = received if rates is None else self._metered(received, rates)
            if self.ending is not None:
                return
            if self._inbox is not None or self._must_wait(message) or not self._attempt(message):
                self._queue(message)
        if started:
            self.context.stages.handle.observe(self.context.monotonic() - started)

    def _metered(self, message: Message | Refusal, rates: RateLimiter) -> Message | Refusal:
        """``message`` itself, or what it is refused with. A flood ends the session."""
        if self._wait_for("message", rates):
            self.disconnect(CloseCode.TOO_MANY_MESSAGES, "far too many messages")
            return message
        if type(message) is Refusal:
            return message
        command = commands.COMMANDS[type(message)]
        wait = self._wait_for(command.rate, rates)
        if not wait:
            return message
        problem = f"too many messages of class {command.rate}"
        return Refusal(message.id, command.op, BrokerError(ErrorCode.RATE_LIMITED, problem, retry_after=wait))

    def _wait_for(self, kind: str, rates: RateLimiter) -> float:
        now = self.context.monotonic()
        wait = rates.take(kind, now)
        if not wait and self.user is not None:
            shared = self.context.registry.user_rates(self.user)
            wait = shared.take(kind, now) if shared is not None else 0.0
        return wait

    def _must_wait(self, message: Message | Refusal) -> bool:
        """Whether publishes on their way to the store stand before ``message``."""
        replies = self._replies
        return replies is not None and (type(message) not in _OVERTAKING or len(replies) >= IN_FLIGHT)

    def _attempt(self, message: Message | Refusal) -> bool:
        """Handle a message at once; false if it must be done later, and nothing has happened yet."""
        if isinstance(message, Refusal):
            self.refuse(message.id, message.op, message.error)
            return True
        command = commands.COMMANDS[type(message)]
        if self._auth_deadline and not command.open:
            self.refuse(message.id, command.op, commands.authenticate_first())
            return True
        try:
            reply = command.now(self, message)
        except BrokerError as error:
            self._refuse(message, command.op, error)
        except Exception as error:  # a fault of ours must not end the pump
            self._confess(message, error)
        else:
            if reply is commands.WAIT:
                return False
            self._finish(message.id, reply)
        return True

    def _finish(self, identifier: int | str | None, reply: commands.Reply) -> None:
        if not isinstance(reply, commands.Mark):
            self.answer(identifier, reply)

    def _confess(self, message: Message, error: Exception) -> None:
        op = commands.COMMANDS[type(message)].op
        self.fault(op, error)
        self.refuse(message.id, op, BrokerError(ErrorCode.INTERNAL, "a fault of the server"))

    def _queue(self, message: Message | Refusal) -> None:
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.append(message)
        if len(self._inbox) >= self.context.config.limits.inbox_messages:
            self.connection.pause_reading()
        if self._replies is None:
            self._wakeup.set()

    # -- what goes out ------------------------------------------------------------

    def answer(
        self, identifier: int | str | None, fields: dict[str, Any] | None, *, after_events: bool = False
    ) -> None:
        """Say yes, where an answer was asked for."""
        if identifier is not None:
            self._reply(encode_ok(identifier, fields), after_events=after_events)

    def refuse(self, identifier: int | str | None, op: str | None, error: BrokerError) -> None:
        """Say no, and count it."""
        self.context.registry.count_error(error.code)
        self._reply(encode_error(identifier, op, error), after_events=False)

    def _reply(self, message: bytes, *, after_events: bool) -> None:
        if self._replies is not None:
            self._replies.hold(message, after_events=after_events)
            return
        self.connection.post(message, after_events=after_events)
        if len(message) > LARGE_ANSWER:
            self.flush_answers()

    def flush_answers(self) -> None:
        """Send what was answered so far, and the events that it waits for."""
        if self.connection.posts_wait:
            self.context.hub.fanout.flush()
        else:
            self.connection.flush_posts()

    def _refuse(self, message: Message, op: str, error: BrokerError) -> None:
        """Refuse a message, naming its room where it has one."""
        room = getattr(message, "room", None)
        if error.room is None and room is not None and valid_room(room):
            error.room = room
        self.refuse(message.id, op, error)

    def fault(self, op: str, error: Exception) -> None:
        """Log a fault of ours; it was caught so that it harms nobody else."""
        log.error("fault in a handler", op=op, session=self.id, user=self.user, exc_info=error)

    def start_publish(self) -> Reply:
        """A publish is on its way to the store: keep its reply's place in the order."""
        if self._replies is None:
            self._replies = Replies()
        return self._replies.reserve()

    def published(
        self, reply: Reply, identifier: int | str | None, outcome: Position | BrokerError | None
    ) -> None:
        """A publish was stored, or not; ``None`` for one of an ephemeral room, whose copies were."""
        if isinstance(outcome, BrokerError):
            self.context.registry.count_error(outcome.code)
            reply.fill(encode_error(identifier, "publish", outcome), after_events=False)
        else:
            fields = outcome._asdict() if outcome is not None else None
            message = encode_ok(identifier, fields) if identifier is not None else None
            reply.fill(message, after_events=True)
        replies = self._replies
        assert replies is not None, "its place is still held"
        replies.release(self._post_reply)
        if not replies:
            self._replies = None
            if self._inbox is not None:
                self._wakeup.set()

    def _post_reply(self, message: bytes, after_events: bool) -> None:
        self.connection.post(message, after_events=after_events)

    @property
    def posts_wait(self) -> bool:
        """Whether answers wait for events that are pending in rooms."""
        return self.connection.posts_wait

    def start_call(self, call: RunningCall) -> None:
        """Let the session's task run a call."""
        self.calls[call] = None
        if self._starting is None:
            self._starting = []
        self._starting.append(call)
        self._wakeup.set()

    def call_ended(self, call: RunningCall) -> None:
        """A call has answered."""
        self.calls.pop(call, None)
        self._wakeup.set()

    def use_dictionary(self, identifier: int) -> None:
        """The client has loaded a dictionary; frames may use it from now on."""
        self._dictionaries |= {identifier}
        self.context.hub.regroup(self)

    # -- identity -----------------------------------------------------------------

    def identify(self, identity: Identity) -> None:
        """Be who a verified token says. Raises ``conflict`` for another user's token."""
        if self.user is not None and identity.user != self.user:
            raise BrokerError(ErrorCode.CONFLICT, f"this session belongs to user {self.user}")
        if self.user is None and identity.user is not None:
            self.context.registry.stranger_known(self.address)
            self.context.registry.identify(self, identity.user)
            self.user = identity.user
        self.identity = identity
        self.info = identity.info
        self._auth_deadline = 0.0
        self._expires_at = 0.0
        if identity.expires is not None:
            context = self.context
            left = identity.expires - context.wall()
            if left <= 0:
                left += context.config.auth.leeway  # taken for a difference between clocks
            self._expires_at = context.monotonic() + left
            if self._expires_at < self._due:
                self._wind()

    @property
    def authenticated(self) -> bool:
        """Whether the session may do more than authenticate."""
        return not self._auth_deadline

    @property
    def time_to_authenticate(self) -> float:
        """Seconds until the session must go for want of a token; infinite where it may stay."""
        return self._auth_deadline - self.context.monotonic() if self._auth_deadline else math.inf

    def limits(self) -> dict[str, Any]:
        """The bounds a client should know."""
        limits = self.context.config.limits
        return {
            "message": limits.message_bytes,
            "batch": limits.batch_messages,
            "rooms": limits.rooms_per_session,
            "state": limits.state_bytes,
            "filter": {"depth": FILTER_DEPTH, "nodes": FILTER_NODES},
        }

    def welcome(self, rooms: dict[str, Any]) -> bytes:
        """The first message."""
        context = self.context
        fields: dict[str, Any] = {
            "protocol": 1,
            "session": self.id,
            "user": self.user,
            "expires": self.identity.expires,
            "node": context.node,
            "server": __version__,
            "ping": context.config.server.ping_interval,
            "limits": self.limits(),
        }
        if self.connection.codec.kind == "zstd":
            dictionaries = context.dictionaries.announcement()
            if dictionaries:
                fields["dicts"] = dictionaries
        return encode_op("welcome", **fields, rooms=rooms)

    # -- deadlines ----------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """Act on what is overdue; return when to look again."""
        if self.ending is not None or now < self._due:
            return None  # an entry that a sooner one has replaced
        overdue = self._overdue(now)
        if overdue is not None:
            self.disconnect(*overdue)
            return None
        self._due = self._next_tick()
        return self._due

    def _wind(self) -> None:
        self._due = self._next_tick()
        self.context.wheel.add(self, self._due)

    def _overdue(self, now: float) -> tuple[CloseCode, str] | None:
        if self._auth_deadline and now >= self._auth_deadline:
            return CloseCode.NEVER_AUTHENTICATED, "no token came in time"
        if self._expires_at and now >= self._expires_at:
            return CloseCode.TOKEN_EXPIRED, "the token has expired"
        if self._silent(now):
            return CloseCode.NO_PONG, "no pong"
        return None

    def _next_tick(self) -> float:
        times = (self._pong_deadline or self._ping_at, self._auth_deadline, self._expires_at)
        return min(time for time in times if time)

    def check_progress(self, now: float) -> None:
        """There is a backlog: end the session if it has not moved for too long. Called every second."""
        connection = self.connection
        if connection.progress:
            connection.progress = False
            self._stalled_since = now
        elif now - self._stalled_since >= self.context.config.server.write_timeout:
            self.disconnect(CloseCode.SLOW_CONSUMER, "queued bytes did not move")

    def _silent(self, now: float) -> bool:
        server = self.context.config.server
        connection = self.connection
        if self._pong_deadline:
            if connection.heard or not connection.interest & READ:  # alive, or we do not listen
                self._pong_deadline = 0.0
                self._ping_at = now + random.uniform(0.9, 1.1) * server.ping_interval
                return False
            return now >= self._pong_deadline
        if now >= self._ping_at:
            if connection.outbox is None:
                connection.heard = False
                connection.push(PING_FRAME)
                self._pong_deadline = now + server.pong_timeout
            else:
                self._ping_at = now + server.pong_timeout
        return False

    # -- for people ---------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The session as ``/api/sessions/{id}`` shows it."""
        connection = self.connection
        return {
            "session": self.id,
            "user": self.user,
            "info": self.info,
            "address": self.address,
            "connected_at": self.connected_at,
            "expires": self.identity.expires,
            "codec": connection.codec.kind,
            "rooms": sorted(self.memberships),
            "outbox_bytes": connection.outbox.size if connection.outbox is not None else 0,
            "inbox": len(self._inbox) if self._inbox is not None else 0,
            "calls": len(self.calls),
            "frames_handled": self._handled,
            "ending": self.ending,
        }
