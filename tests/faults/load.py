"""The load: publishers and sessions that behave as the protocol asks, and write all they see into the ledger.

Real WebSocket clients over real sockets. Sessions hold several rooms each,
their user's own among them, come back to any node when their connection ends,
after the wait that ``bye`` asked for, and recover with ``since``; some are
restless and do so all the time. Publishers keep a number of publishes
under way and send again, with the same key, what was refused for now or never
answered. :meth:`Load.settle` brings everything to rest, so that a ledger can be
judged while it is known what everybody must have.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

import orjson
import trio

from broker.auth.tokens import sign
from broker.config import Auth
from broker.protocol.events import Position
from tests.e2e.raw_client import Ended, Message, RawClient, request
from tests.faults.ledger import Ledger

HISTORY_ROOMS: Final = tuple(f"deal:{number}" for number in range(10))
LIVE_ROOMS: Final = ("live:1", "live:2")
ROOMS_EACH: Final = 3
"""Of these, that a session is in, besides its user's room and an ephemeral one."""
RESTLESS: Final = 4
"""One of so many sessions is restless."""
STAY: Final = (0.5, 3.0)
"""Seconds, drawn between the two, after which a restless session goes and comes back."""
PUBLISHERS_STAY: Final = (3.0, 12.0)
"""The same for publishers, all of which are restless: so they never end up on one node."""

UNDER_WAY: Final = 64
"""Publishes of one publisher that may wait for their answer; past it, it publishes nothing new."""
WHISPERS: Final = 0.1
"""Share of the publishes that goes to ephemeral rooms."""
LETTERS: Final = 0.1
"""Share that goes to users' own rooms."""
AGAIN: Final = (0.05, 0.3)
"""Seconds, drawn between the two, before something is tried again for which the server named no time."""
POLL: Final = 0.02
"""Seconds between two looks at a condition."""
PATIENCE: Final = 60.0
"""Seconds of real time for everything to come to rest once a fault is healed; promised are about ten."""


class Endpoint(NamedTuple):
    """Where a node's client port is."""

    host: str
    port: int


class Line(RawClient):
    """A connection that several tasks may write to, and that keeps nothing it was sent."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self._writing = trio.Lock()

    async def send_bytes(self, data: bytes) -> None:
        async with self._writing:
            await super().send_bytes(data)

    async def next(self) -> Message:
        message = await super().next()
        self.batches.clear()
        self.opcodes.clear()
        return message


BROKEN = (OSError, Ended, trio.BrokenResourceError, trio.ClosedResourceError)
"""How a connection ends, or does not begin."""


def digest(data: Any) -> str:
    """Of an event's data, whatever the order of its keys."""
    return hashlib.blake2b(orjson.dumps(data, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()


class Client:
    """What publishers and sessions share: a connection that is made anew for as long as the load runs."""

    def __init__(self, load: Load, name: str, number: int) -> None:
        self.load = load
        self.ledger = load.ledger
        self.name = name
        self.random = random.Random(f"{load.seed} {name}")
        self._number = number
        letters = [own_room(f"s{session}") for session in range(load.size)]
        self._token = sign(Auth(), name, ttl=86_400.0, rooms={"publish": letters}, dev=True)
        self._wait: float | None = None
        """What ``bye`` asked for."""
        self.lines = 0
        """Connections that were welcomed."""
        self.at_home = False
        """Whether the connection of now has everything it wants, so that nobody may close it for nothing."""

    async def run(self) -> None:
        """Connect, live, come back; until cancelled."""
        while True:
            self._wait = None
            self.at_home = False
            try:
                await self._connection()
            except* BROKEN as group:
                self.ledger.closed(self.name, _code(group), at_home=self.at_home)
            await trio.sleep(self._pause())

    def _pause(self) -> float:
        return self._wait if self._wait is not None else self.random.uniform(*AGAIN)

    async def _connection(self) -> None:
        async with await self._dial() as stream:
            line = Line(stream)
            if await line.upgrade(request(headers=[("Authorization", f"Bearer {self._token}")])) == 101:
                welcome = await line.next()
                if welcome["op"] == "welcome":  # else it says bye
                    self.lines += 1
                    await self.live(line, welcome)

    async def _dial(self) -> trio.SocketStream:
        """The first time spread evenly over all nodes, then to any of them."""
        endpoints = self.load.endpoints
        chosen = self.random.choice(endpoints) if self.lines else endpoints[self._number % len(endpoints)]
        return await trio.open_tcp_stream(*chosen)

    async def live(self, line: Line, welcome: Message) -> None:
        """Use the connection until it breaks."""
        raise NotImplementedError

    async def go_soon(self, connection: trio.CancelScope, stay: tuple[float, float]) -> None:
        """End the connection after a while, without a word, as a phone in a tunnel does."""
        while True:
            await trio.sleep(self.random.uniform(*stay))
            if self.load.flowing.is_set() and self.at_home:
                connection.cancel()

    def heard_bye(self, message: Message) -> None:
        """The server is about to close, and says when to come back."""
        self._wait = message["retry_after"]

    def pause_before(self, error: Message) -> float:
        """How long to wait before what was refused with ``error`` is tried again."""
        after = error.get("retry_after")
        return float(after) if after is not None else self.random.uniform(*AGAIN)


def _code(group: BaseExceptionGroup[Any]) -> int:
    """The close code among the reasons why a connection ended; 1006 if there was none."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _code(error)
        if isinstance(error, Ended):
            return error.code
    return 1006


def own_room(name: str) -> str:
    """The room of a user."""
    return f"user:{name}"


class Session(Client):
    """A subscriber."""

    def __init__(self, load: Load, number: int) -> None:
        super().__init__(load, f"s{number}", number)
        self.own_room = own_room(self.name)
        self.rooms = (*self.random.sample(HISTORY_ROOMS, ROOMS_EACH), self.own_room)
        self.live_room = self.random.choice(LIVE_ROOMS)
        self.restless = number % RESTLESS == 0
        self._joins: dict[str, str] = {}
        """Id → room."""
        self._ids = 0
        self._reclaims = False
        """The server has put it into its own room, but not from where it was; its own join is on its way."""

    async def live(self, line: Line, welcome: Message) -> None:
        self._joins.clear()
        self._welcomed(welcome["rooms"][self.own_room])
        with trio.CancelScope() as connection:
            async with trio.open_nursery() as nursery:
                for room in (*self.rooms, self.live_room):
                    if room != self.own_room or self._reclaims:
                        await self._join(line, room)
                if self.restless:
                    nursery.start_soon(self.go_soon, connection, STAY)
                while True:
                    message = await line.next()
                    take = self._TAKE.get(message["op"])
                    if take is not None and not self._too_early(message):
                        again = take(self, message)
                        if again is not None:
                            nursery.start_soon(self._join_later, line, *again)
        if connection.cancelled_caught:
            self.ledger.left(self.name)

    def _welcomed(self, here: Message) -> None:
        """The server has joined the user's room; who was there before joins it again, from where it was."""
        self._reclaims = self.ledger.joins(self.name, self.own_room) is not None
        if not self._reclaims:
            self._joined(self.own_room, here, recovered=False)

    def _too_early(self, message: Message) -> bool:
        """What the answer to the join will repeat."""
        return (
            self._reclaims and message.get("room") == self.own_room and message["op"] not in {"ok", "error"}
        )

    async def _join(self, line: Line, room: str) -> None:
        self._ids += 1
        identifier = f"j{self._ids}"
        self._joins[identifier] = room
        message: Message = {"op": "join", "id": identifier, "room": room}
        if room != self.live_room:
            since = self.ledger.joins(self.name, room)
            if since is not None:
                message["since"] = since._asdict()
        await line.send(message)

    async def _join_later(self, line: Line, room: str, pause: float) -> None:
        await trio.sleep(pause)
        await self._join(line, room)

    def _joined(self, room: str, here: Message, *, recovered: bool) -> None:
        epoch, offset, now = here["epoch"], here["offset"], trio.current_time()
        self.ledger.joined(self.name, room, epoch, offset, recovered=recovered, now=now)

    # -- what comes; whoever returns a room and a pause wants to join it (again) --------------------

    def _ok(self, message: Message) -> None:
        room = self._joins.pop(message["id"])
        self.at_home = self.at_home or not self._joins
        if room == self.own_room:
            self._reclaims = False
        if room != self.live_room:
            self._joined(room, message, recovered=message["recovered"])

    def _error(self, message: Message) -> tuple[str, float]:
        room = self._joins.pop(message["id"])
        if not message["retry"]:
            self.ledger.turned_away(self.name, room, message["code"])
        return room, self.pause_before(message)

    def _event(self, message: Message) -> None:
        room, data = message["room"], message["data"]
        if room == self.live_room:
            self.ledger.whisper(self.name, data["line"], data["number"])
        elif room in self.rooms:
            self.ledger.event(self.name, room, message.get("offset"), data["key"], digest(data))

    def _position(self, message: Message) -> None:
        self.ledger.claims(self.name, message["room"], message["epoch"], message["offset"])

    def _lost(self, message: Message) -> tuple[str, float] | None:
        if message["room"] == self.live_room:
            return None
        self.ledger.lost(
            self.name, message["room"], message["epoch"], message["offset"], str(message["reason"])
        )
        return message["room"], 0.0

    def _bye(self, message: Message) -> None:
        self.heard_bye(message)

    _TAKE: Final[dict[str, Callable[[Session, Message], tuple[str, float] | None]]] = {
        "ok": _ok,
        "error": _error,
        "event": _event,
        "position": _position,
        "lost": _lost,
        "bye": _bye,
    }


class Publisher(Client):
    """Publishes at a steady rate, and does not rest until everything is acknowledged."""

    def __init__(self, load: Load, number: int) -> None:
        super().__init__(load, f"p{number}", number)
        self._made = 0
        self._whispered = 0
        self._under_way: dict[str, tuple[Message, float]] = {}
        """Key → the publish, and when it was sent last."""
        self._line: Line | None = None

    async def live(self, line: Line, welcome: Message) -> None:
        self._whispered = 0
        self.at_home = True
        with trio.CancelScope() as connection:
            async with trio.open_nursery() as nursery:
                self._line = line
                try:
                    for key in list(self._under_way):
                        await self._send(line, key)
                    nursery.start_soon(self._publish, line)
                    nursery.start_soon(self.go_soon, connection, PUBLISHERS_STAY)
                    while True:
                        self._take(await line.next(), line, nursery)
                finally:
                    self._line = None

    async def _publish(self, line: Line) -> None:
        """New events, while the load is on."""
        while True:
            await self.load.flowing.wait()
            await trio.sleep(self.random.expovariate(self.load.rate / len(self.load.publishers)))
            if len(self._under_way) >= UNDER_WAY or not self.load.flowing.is_set():
                continue
            kind = self.random.random()
            if kind < WHISPERS:
                await self._whisper(line)
            else:
                rooms = self.load.own_rooms if kind < WHISPERS + LETTERS else HISTORY_ROOMS
                await self._send(line, self._make(self.random.choice(rooms)))

    def _make(self, room: str) -> str:
        """A new publication; its key."""
        self._made += 1
        key = f"{self.name}-{self._made}"
        data = {"key": key, "pad": "x" * self.random.randrange(200)}
        message = {"op": "publish", "id": key, "room": room, "event": "e", "data": data, "key": key}
        self._under_way[key] = (message, trio.current_time())
        return key

    async def _send(self, line: Line, key: str) -> None:
        message, _ = self._under_way[key]
        now = trio.current_time()
        self._under_way[key] = (message, now)
        self.ledger.sends(message["room"], key, digest(message["data"]), now)
        await line.send(message)

    async def _whisper(self, line: Line) -> None:
        self._whispered += 1
        data = {"line": f"{self.name}.{self.lines}", "number": self._whispered}
        room = LIVE_ROOMS[self._number % len(LIVE_ROOMS)]
        await line.send({"op": "publish", "room": room, "event": "e", "data": data})

    def _take(self, message: Message, line: Line, nursery: trio.Nursery) -> None:
        if message["op"] == "bye":
            self.heard_bye(message)
        key = message.get("id")
        if key not in self._under_way:
            return
        _, sent_at = self._under_way[key]
        self.load.slowest_answer = max(self.load.slowest_answer, trio.current_time() - sent_at)
        if message["op"] == "ok":
            del self._under_way[key]
            self.ledger.acknowledged(key, message["epoch"], message["offset"])
        elif message["retry"]:
            self.load.put_off += 1
            nursery.start_soon(self._send_later, line, key, self.pause_before(message))
        else:
            del self._under_way[key]
            self.ledger.refused(key, message["code"])

    async def _send_later(self, line: Line, key: str, pause: float) -> None:
        await trio.sleep(pause)
        await self._send(line, key)

    async def mark(self, room: str) -> str:
        """Publish one event now, or with the next connection, whether the load is on or not; its key."""
        key = self._make(room)
        if self._line is not None:
            with contextlib.suppress(*BROKEN):  # the next connection sends it again
                await self._send(self._line, key)
        return key


class Load:
    """All clients of one run. ``endpoints`` may change while it runs."""

    def __init__(
        self,
        ledger: Ledger,
        endpoints: Sequence[Endpoint],
        *,
        seed: int,
        sessions: int = 40,
        publishers: int = 8,
        rate: float = 300.0,
    ) -> None:
        self.ledger = ledger
        self.endpoints = endpoints
        self.seed = seed
        self.size = sessions
        self.rate = rate
        """Events a second, of all publishers together."""
        self.flowing = Gate()
        self.slowest_answer = 0.0
        """Seconds that a publish waited for an answer of any kind, in this round."""
        self.put_off = 0
        """Publishes answered "not now", in this round."""
        self.sessions = [Session(self, number) for number in range(sessions)]
        self.own_rooms = [session.own_room for session in self.sessions]
        self.publishers = [Publisher(self, number) for number in range(publishers)]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; started once every session is in every room of its own."""
        async with trio.open_nursery() as nursery:
            for client in (*self.sessions, *self.publishers):
                nursery.start_soon(client.run)
            await until(
                lambda: all(self.ledger.follower(one.name, room).live for one, room in self._places())
            )
            task_status.started()

    def _places(self) -> list[tuple[Session, str]]:
        return [(session, room) for session in self.sessions for room in session.rooms]

    def begin(self, *, may_tell: bool, may_close: bool) -> None:
        """A new round: a new page of the ledger, and events flow."""
        self.ledger.begin(may_tell=may_tell, may_close=may_close)
        self.slowest_answer = 0.0
        self.put_off = 0
        self.flowing.open()

    async def flow(self, events: int) -> None:
        """Return once so many more events are acknowledged."""
        goal = self.ledger.acknowledgements + events
        await until(lambda: self.ledger.acknowledgements >= goal)

    async def settle(self) -> dict[str, Position]:
        """Bring everything to rest: nothing under way, every session at the top; the top of each room.

        Gives up after :data:`PATIENCE`; what is not at rest by then is the ledger's to judge.
        """
        self.flowing.close()
        tops: dict[str, Position] = {}
        with trio.move_on_after(PATIENCE):
            await until(lambda: not self.ledger.outstanding)
            while True:
                tops = await self._mark()
                if await self._reached(tops):
                    break
        return tops

    async def _mark(self) -> dict[str, Position]:
        """Publish one last event to each room; where it lies is the top."""
        keys = {room: await self.publishers[0].mark(room) for room in (*HISTORY_ROOMS, *self.own_rooms)}
        found: dict[str, Position] = {}
        for room, key in keys.items():
            while True:
                publication = self.ledger.publications.get(key)
                if publication is not None and publication.answered:
                    break
                await trio.sleep(POLL)
            if publication.position is not None:
                found[room] = publication.position
        return found

    async def _reached(self, tops: dict[str, Position]) -> bool:
        """Wait until every session is at the top; false if a room began a new epoch instead."""
        while behind := self.ledger.behind(tops):
            for follower in behind:
                if any(visit.epoch == tops[follower.room].epoch for visit in follower.visits[:-1]):
                    return False
            await trio.sleep(POLL)
        return True

    async def read_back(self, tops: dict[str, Position]) -> None:
        """Read what every room keeps of this round, so that it is held against what was acknowledged."""
        for room, top in tops.items():
            oldest = self.ledger.oldest_acknowledged(room)
            if oldest is not None and room in HISTORY_ROOMS:
                keys: dict[int, str] = {}
                with trio.move_on_after(PATIENCE):
                    await self._read_room(room, Position(top.epoch, oldest - 1), keys)
                self.ledger.kept(room, keys)

    async def _read_room(self, room: str, since: Position, keys: dict[int, str]) -> None:
        while True:
            answer = await self._ask_any("history", room=room, since=since._asdict(), limit=1000)
            if answer is None:
                await trio.sleep(POLL)
                continue
            keys.update((event["offset"], event["key"]) for event in answer["events"])
            if not answer["more"]:
                return
            since = Position(since.epoch, answer["events"][-1]["offset"])

    async def _ask_any(self, op: str, **fields: Any) -> Message | None:
        """Ask the first node that answers."""
        for endpoint in self.endpoints:
            answer = await self._ask(endpoint, op, **fields)
            if answer is not None:
                return answer
        return None

    async def count_members(self, names: Sequence[str]) -> None:
        """Ask every node who is in a room, until all are right; who is not by the end is accused."""
        room = HISTORY_ROOMS[0]
        really = sum(room in session.rooms for session in self.sessions)
        for name, endpoint in zip(names, self.endpoints, strict=True):
            said = -1
            with trio.move_on_after(PATIENCE):
                while said != really:
                    said = await self._ask_presence(endpoint, room)
                    if said != really:
                        await trio.sleep(0.1)
            if said != really:
                self.ledger.miscounted(room, name, said, really)

    async def _ask_presence(self, endpoint: Endpoint, room: str) -> int:
        """How many sessions a node counts in ``room``; -1 if it does not say."""
        answer = await self._ask(endpoint, "presence", room=room)
        return int(answer["sessions"]) if answer is not None else -1

    async def _ask(self, endpoint: Endpoint, op: str, **fields: Any) -> Message | None:
        """Ask a node by a connection of its own; nothing if it refuses or does not answer."""
        try:
            async with await trio.open_tcp_stream(*endpoint) as stream:
                line = Line(stream)
                if await line.upgrade(request()) != 101:
                    return None
                answer = await line.ask(op, **fields)
                return answer if answer["op"] == "ok" else None
        except BROKEN:
            return None


class Gate:
    """An event that can be taken back."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def open(self) -> None:
        """Let everybody through."""
        self._event.set()

    def close(self) -> None:
        """Let nobody through any more."""
        if self._event.is_set():
            self._event = trio.Event()

    def is_set(self) -> bool:
        """Whether it is open."""
        return self._event.is_set()

    def wait(self) -> Awaitable[None]:
        """Until it is open."""
        return self._event.wait()


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; whoever calls has the deadline."""
    while not condition():  # noqa: ASYNC110 - conditions over processes and many tasks have no one event
        await trio.sleep(POLL)
