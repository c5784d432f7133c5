"""What stands in for the edge, the store, and other nodes in the hub's tests.

:class:`FakeSink` is a session whose socket (:class:`FakeSocket`) takes as many
bytes as a test allows. :class:`MemoryEngine` is an engine that stores at once
and delivers when a test wants it to. :class:`FakePeers` are other nodes that
note what they are told. :class:`Node` is a hub between them all, and
:class:`Joining` drives a join the way ``broker.server.joining`` does, one
read at a time. Nothing here waits for time: the clock is set by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import orjson
import trio
import zstandard

from broker.config import Config, Limits, RoomOptions, Wire
from broker.engine.base import Deliver, Done, HistoryPage, HistoryQuery, Moved, Retention, Seen, stays
from broker.engine.peers import Answer, Described, Handler, Mate, NodeInfo
from broker.engine.selection import select
from broker.errors import BrokerError, CloseCode, ErrorCode
from broker.hub.hub import Hub
from broker.hub.recovery import CatchUp
from broker.hub.rooms import Member, Verdict
from broker.protocol.codec import JSON, Codec, Encoder
from broker.protocol.dictionaries import Dictionaries
from broker.protocol.events import Event, Position, SessionId, UserId, make_event
from broker.protocol.filters import Filter, compile_filter
from broker.protocol.frames import encode_close
from broker.protocol.messages import batch, encode_op

START = 1000.0
POISON = "poison"
"""Data that :class:`PickyEncoder` cannot encode."""

EPHEMERAL = RoomOptions(presence=False)
KEPT = RoomOptions(history=100, presence=False)


class ManualClock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class PickyEncoder(Encoder):
    """Counts what it encodes, and fails on :data:`POISON`."""

    def __init__(self) -> None:
        super().__init__(Wire(), Dictionaries.load(None))
        self.encoded: list[tuple[Codec, bytes]] = []

    def encode(self, codec: Codec, payload: bytes) -> bytes:
        if POISON.encode() in payload:
            raise ValueError("this payload is poison")
        self.encoded.append((codec, payload))
        plain = codec if not codec.dictionary else Codec(codec.kind)  # no test here needs a real one
        return super().encode(plain, payload)


class FakeSocket:
    """Takes ``capacity`` bytes (``None``: any number), then blocks; ``broken``: fails."""

    def __init__(self) -> None:
        self.capacity: int | None = None
        self.broken = False
        self.sends = 0
        self.taken = bytearray()

    def fileno(self) -> int:
        return -1

    def recv(self, _size: int) -> bytes:
        if self.broken:
            raise ConnectionResetError
        raise BlockingIOError

    def close(self) -> None:
        self.broken = True

    def send(self, data: bytes | memoryview, /) -> int:
        if self.broken:
            raise ConnectionResetError
        self.sends += 1
        size = len(data) if self.capacity is None else min(len(data), self.capacity)
        if not size:
            raise BlockingIOError
        if self.capacity is not None:
            self.capacity -= size
        self.taken += data[:size]
        return size


def payloads(stream: bytearray) -> Iterator[tuple[int, bytes]]:
    """Opcode and payload of each whole frame in ``stream``; cuts them off it."""
    while len(stream) >= 2:
        size, head = stream[1], 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(stream[2:head], "big")
        if len(stream) < head + size:
            return
        yield stream[0] & 0x0F, bytes(stream[head : head + size])
        del stream[: head + size]


class FakeSink:
    """A session: sends what its socket takes, queues at most ``limit`` bytes of the rest.

    ``direct`` false makes it one that must always be asked, as TLS sessions are.
    """

    def __init__(
        self,
        hub: Hub,
        name: str,
        *,
        user: str | None = None,
        info: Any = None,
        codec: Codec = JSON,
        limit: int = 1 << 20,
        direct: bool = True,
    ) -> None:
        self.id = SessionId(name)
        self.user = UserId(user) if user is not None else None
        self.info = info
        self.memberships: dict[str, Member] = {}
        self.socket = FakeSocket()
        self.codec = codec
        self.codecs: dict[str, Codec] = {}
        self.outbox = bytearray()
        self.closed: tuple[CloseCode, str] | None = None
        self.frames: list[list[dict[str, Any]]] = []
        self._hub = hub
        self.limit = limit
        self._plain = direct
        self._posts: list[bytes] = []
        self._posts_after: list[bytes] = []
        self._posts_sealed: list[bytes] = []
        self._wants_resume = False

    def __repr__(self) -> str:
        return f"<FakeSink {self.id}>"

    # -- what the hub asks ------------------------------------------------------

    @property
    def direct(self) -> FakeSocket | None:
        return self.socket if self._plain and not self.outbox and self.closed is None else None

    @property
    def backlogged(self) -> bool:
        return bool(self.outbox)

    @property
    def posts_wait(self) -> bool:
        return bool(self._posts_after or self._posts_sealed)

    def codec_for(self, room: str) -> Codec:
        return self.codecs.get(room, self.codec)

    def write(self, frame: bytes) -> int:
        if self._posts:
            self.flush_posts()
        if self.closed is not None:
            return Verdict.CLOSED
        if self.outbox:
            if len(self.outbox) + len(frame) > self.limit:
                return Verdict.FULL
            self.outbox += frame
            return Verdict.TAKEN
        try:
            size = self.socket.send(frame)
        except BlockingIOError:
            size = 0
        except OSError:
            size = -1
        return Verdict.TAKEN if size == len(frame) else self.sent(frame, size)

    def sent(self, frame: bytes, size: int) -> int:
        if size < 0:
            self.closed = CloseCode.GOING_AWAY, "the socket broke"
            self._direct_changed()
            return Verdict.CLOSED
        self.outbox += frame[size:]
        self._direct_changed()
        return Verdict.TAKEN

    def post(self, message: bytes, *, after_events: bool = False) -> None:
        if self.closed is not None:
            return
        if after_events or self._posts_after:
            if not self._posts_after:
                self._hub.fanout.posted(self, after_events=True)
            self._posts_after.append(message)
        elif self._posts_sealed:
            self._posts_sealed.append(message)
        else:
            if not self._posts:
                self._hub.fanout.posted(self, after_events=False)
            self._posts.append(message)

    def seal_posts(self) -> None:
        self._posts_sealed += self._posts_after
        self._posts_after = []

    def flush_posts(self, *, after_events: bool = False) -> None:
        posts, self._posts = self._posts, []
        self._write_posts(posts)
        if after_events:
            posts, self._posts_sealed = self._posts_sealed, []
            self._write_posts(posts)

    def _write_posts(self, posts: list[bytes]) -> None:
        if posts:
            frame = self._hub.encoder.encode(self.codec, batch(posts))
            if self.write(frame) == Verdict.FULL:
                self.disconnect(CloseCode.SLOW_CONSUMER, "too slow to read its answers")

    def on_drained(self) -> None:
        self._wants_resume = True

    def disconnect(self, code: CloseCode, reason: str) -> None:
        if self.closed is None:
            self.closed = code, reason
            self.outbox += encode_close(code)
            self._direct_changed()

    def _direct_changed(self) -> None:
        for member in self.memberships.values():
            if member.group is not None:
                member.group.changed()

    # -- what a test asks ---------------------------------------------------------

    def block(self, capacity: int = 0) -> None:
        """The peer reads ``capacity`` bytes more, then nothing."""
        self.socket.capacity = capacity

    def drain(self, capacity: int | None = None) -> None:
        """The peer reads again, ``capacity`` bytes or all; what was queued flows."""
        self.socket.capacity = capacity
        try:
            while self.outbox:
                del self.outbox[: self.socket.send(bytes(self.outbox))]
        except BlockingIOError:
            return
        if self.closed is None:
            self._direct_changed()
        if self._wants_resume:
            self._wants_resume = False
            self._hub.resume(self)

    def received(self) -> list[dict[str, Any]]:
        """Messages that reached the peer since the last call."""
        messages: list[dict[str, Any]] = []
        for opcode, payload in payloads(self.socket.taken):
            if opcode == 8:
                continue
            text = zstandard.decompress(payload) if opcode == 2 else payload
            self.frames.append(orjson.loads(text))
            messages += self.frames[-1]
        return messages

    def data(self, room: str | None = None) -> list[Any]:
        """``data`` of the events that came since the last look; other messages must not have come."""
        messages = self.received()
        assert all(message["op"] == "event" for message in messages), messages
        return [message["data"] for message in messages if room in (None, message["room"])]


class Stream:
    """What :class:`MemoryEngine` keeps of one room."""

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.events: list[Event] = []
        """All ever stored in this epoch; those up to ``floor`` are gone."""
        self.floor = 0
        self.delivered = Position(epoch, 0)
        self.open = False

    @property
    def top(self) -> Position:
        return Position(self.epoch, len(self.events))


class MemoryEngine:
    """Stores at once. Delivers at once, too, or while ``holding`` only by :meth:`release`.

    ``reads``: an event that lets stalled reads go on, if there is one; what they
    read is what was stored when they were asked.
    """

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.past: dict[str, list[Event]] = {}
        """All that was ever stored, by epoch, whatever was trimmed or replaced since."""
        self.holding = False
        self.failing = False
        self.reads: trio.Event | None = None
        self.seen: dict[tuple[str, str], Seen] = {}
        self.queries: list[HistoryQuery] = []
        self._deliver: Deliver | None = None
        self._moved: Moved = stays
        self._waiting: list[tuple[list[Event], Callable[[], None]]] = []
        self._keys: dict[tuple[str, str, str], Position] = {}
        self._epochs = 0

    def connect(self, deliver: Deliver, moved: Moved) -> None:
        """Deliver to the hub."""
        self._deliver = deliver
        self._moved = moved

    async def run(
        self,
        deliver: Deliver,
        moved: Moved = stays,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self.connect(deliver, moved)
        task_status.started()
        await trio.sleep_forever()

    def stream(self, room: str) -> Stream:
        """The stream of ``room``, made if need be."""
        if room not in self.streams:
            self._begin(room)
        return self.streams[room]

    def _begin(self, room: str) -> Stream:
        self._epochs += 1
        stream = self.streams[room] = Stream(f"epoch-{self._epochs}")
        self.past[stream.epoch] = stream.events
        return stream

    def position(self, room: str) -> Position | None:
        stream = self.streams.get(room)
        return stream.delivered if stream is not None and stream.open else None

    async def open(self, room: str, retention: Retention) -> Position:
        await trio.lowlevel.checkpoint()
        return self.open_nowait(room)

    def open_nowait(self, room: str) -> Position:
        """The same for tests without tasks."""
        stream = self.stream(room)
        stream.open = True
        return stream.delivered

    def close(self, room: str) -> None:
        if room in self.streams:
            self.streams[room].open = False

    def publish(self, event: Event, retention: Retention, done: Done) -> None:
        if self.failing:
            done(BrokerError(ErrorCode.UNAVAILABLE, "the store is away", room=event.room))
            return
        stream = self.stream(event.room)
        key = (event.room, event.publisher, event.key) if event.key is not None else None
        known = self._keys.get(key) if key is not None else None
        if known is not None:
            self._then([], lambda: done(known))
            return
        position = Position(stream.epoch, len(stream.events) + 1)
        event.place(position)
        stream.events.append(event)
        stream.floor = max(stream.floor, len(stream.events) - retention.size)
        if key is not None:
            self._keys[key] = position
        self._then([event], lambda: done(position))

    def _then(self, events: list[Event], done: Callable[[], None]) -> None:
        self._waiting.append((events, done))
        if not self.holding:
            self.release()

    def release(self, count: int | None = None) -> None:
        """Deliver the oldest ``count`` publishes that wait, or all, and answer them."""
        count = len(self._waiting) if count is None else count
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        for events, done in ready:
            self.deliver(events)
            done()

    def forget(self) -> None:
        """Lose what was not delivered yet, as a failover may."""
        self._waiting.clear()

    def deliver(self, events: list[Event]) -> None:
        """Give ``events`` to the hub, as they are."""
        for event in events:
            assert event.position is not None
            self.stream(event.room).delivered = event.position
        if events and self._deliver is not None:
            self._deliver(events)

    def move(self, room: str) -> None:
        """Say where the stream is, and give none of what lies between."""
        stream = self.stream(room)
        self.forget()
        stream.delivered = stream.top
        self._moved(room, stream.top)

    @property
    def undelivered(self) -> int:
        """Publishes that wait for :meth:`release`."""
        return len(self._waiting)

    def trim(self, room: str, floor: int) -> None:
        """Forget events up to ``floor``."""
        stream = self.stream(room)
        stream.floor = min(max(stream.floor, floor), len(stream.events))

    def replace(self, room: str) -> None:
        """Lose the stream: what is stored from now on is in a new epoch."""
        opened = self.stream(room).open
        self._begin(room).open = opened

    def page(self, room: str, query: HistoryQuery) -> HistoryPage:
        """What a reader finds now."""
        self.queries.append(query)
        if self.failing:
            raise BrokerError(ErrorCode.UNAVAILABLE, "the store is away", room=room)
        stream = self.stream(room)
        events = stream.events

        def first_since(ts: float) -> int:
            later = (event.offset for event in events[stream.floor :] if event.ts >= ts)
            return next(later, stream.top.offset + 1)

        chosen = select(query, stream.top, stream.floor, first_since)
        found = events[chosen.first - 1 : chosen.last]
        return HistoryPage(found, stream.top, chosen.recovered, chosen.more)

    async def history(self, room: str, query: HistoryQuery, retention: Retention) -> HistoryPage:
        page = self.page(room, query)
        await trio.lowlevel.checkpoint()
        if self.reads is not None:
            await self.reads.wait()
        return page

    def history_nowait(self, room: str, query: HistoryQuery) -> HistoryPage | None:
        return None if self.reads is not None else self.page(room, query)

    def acknowledge(self, room: str, who: str, offset: int, ts: float) -> None:
        before = self.seen.get((room, who))
        if before is None or offset > before.offset:
            self.seen[room, who] = Seen(who, offset, ts)

    async def acknowledgements(self, room: str) -> list[Seen]:
        await trio.lowlevel.checkpoint()
        return [seen for (name, _), seen in self.seen.items() if name == room]

    def statistics(self) -> dict[str, Any]:
        return {"streams": len(self.streams)}


class FakePeers:
    """Other nodes: notes what the hub tells them, and hears of every room at once.

    ``far``: rooms that are heard of only once somebody waits for it. ``slots``:
    what is remembered of a room elsewhere. ``elsewhere``: members of rooms there.
    """

    def __init__(self) -> None:
        self.relayed: list[tuple[Event, float]] = []
        self.touches: list[tuple[str, SessionId, UserId | None, Described | None]] = []
        self.attachments: set[str] = set()
        self.far: set[str] = set()
        self.slots: dict[str, list[Event]] = {}
        self.elsewhere: dict[str, list[Mate]] = {}
        self.here: list[tuple[SessionId, UserId | None]] = []
        """Sessions that appeared and have not vanished, once for each time they were told."""

    def attached(self, room: str) -> bool:
        return room not in self.far or room in self.attachments

    async def attach(self, room: str, *, slots: bool = False) -> Sequence[Event]:
        await trio.lowlevel.checkpoint()
        self.attachments.add(room)
        return self.slots.get(room, ()) if slots else ()

    def detach(self, room: str) -> None:
        self.attachments.discard(room)

    def relay(self, event: Event, *, remember: float = 0.0) -> None:
        self.relayed.append((event, remember))

    def touch(self, room: str, session: SessionId, user: UserId | None, member: Described | None) -> None:
        self.touches.append((room, session, user, member))

    async def mates(self, room: str) -> Sequence[Mate]:
        await trio.lowlevel.checkpoint()
        return self.elsewhere.get(room, ())

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        self.here.append((session, user))

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        self.here = [entry for entry in self.here if entry[0] != session]

    async def part(self) -> None:
        """Nobody here listens."""
        await trio.lowlevel.checkpoint()

    def nodes(self) -> Sequence[NodeInfo]:
        return ()

    def serve(self, method: str, handler: Handler) -> None:
        """Nobody here asks."""

    async def ask(self, method: str, parameters: Any) -> Sequence[Answer]:
        await trio.lowlevel.checkpoint()
        return ()


class Joining:
    """A join on its way, read by read. ``reply`` is its answer, once there is one; it names ``id``."""

    def __init__(self, node: Node, sink: FakeSink, member: Member, since: Position | None, tail: int) -> None:
        self._node = node
        self._sink = sink
        node.joins += 1
        self.id = node.joins
        self.member = member
        self.reply: dict[str, Any] | None = None
        room = member.room
        self.catch_up = CatchUp(
            node.hub,
            member,
            since=since if room.has_history else None,
            tail=min(tail, room.options.history),
            answer=self._answer,
        )

    def _answer(self, position: Position | None, recovered: bool) -> None:
        assert self.reply is None, "a join is answered once"
        self.reply = {"id": self.id, "room": self.member.room.name, "recovered": recovered}
        if position is not None:
            self.reply |= position._asdict()
        self._sink.post(encode_op("ok", **self.reply))

    def read(self) -> HistoryPage | None:
        """What the next read finds; ``None`` when there is nothing to read any more."""
        query = self.catch_up.query()
        return self._node.engine.page(self.member.room.name, query) if query is not None else None

    def frames(self, page: HistoryPage) -> Iterator[bool]:
        """Feed ``page``, and write each frame when asked for the next; false when one was not taken."""
        for frame in self.catch_up.feed(page):
            if self._sink.write(frame) == Verdict.FULL:
                self.catch_up.give_up()
                yield False
                return
            yield True

    def feed(self, page: HistoryPage) -> None:
        """Feed ``page`` to its end."""
        for _ in self.frames(page):
            pass

    def finish(self) -> None:
        """Read until there is nothing to read."""
        while (page := self.read()) is not None:
            self.feed(page)


class Node:
    """A hub between fake sinks and a fake engine. Namespaces are given as room options."""

    def __init__(self, *, limits: Limits | None = None, **rooms: RoomOptions) -> None:
        self.clock = ManualClock()
        self.engine = MemoryEngine()
        self.peers = FakePeers()
        self.encoder = PickyEncoder()
        self.wakes = 0
        self.joins = 0
        self.sampled: list[tuple[str, bytes]] = []
        self.sinks: list[FakeSink] = []
        options = {"live": EPHEMERAL, "kept": KEPT, "default": EPHEMERAL, **rooms}
        config = Config(rooms=options, limits=limits or Limits())
        self.hub = Hub(
            config,
            self.engine,
            self.encoder,
            peers=self.peers,
            monotonic=self.clock,
            wall=self.clock,
            wake=self._wake,
            sample=lambda namespace, body: self.sampled.append((namespace, body)),
        )
        self.engine.connect(self.hub.deliver, self.hub.moved)
        self.fanout = self.hub.fanout

    def _wake(self) -> None:
        self.wakes += 1

    def sink(self, name: str = "", **options: Any) -> FakeSink:
        """A new session."""
        sink = FakeSink(self.hub, name or f"s{len(self.sinks)}", **options)
        self.sinks.append(sink)
        return sink

    def start_join(
        self,
        sink: FakeSink,
        room: str,
        *,
        since: Position | None = None,
        tail: int = 0,
        filter_: object = None,
        watches: bool = False,
    ) -> Joining:
        """Join up to where the past must be read."""
        warm = self.hub.find(room)
        if warm is None:
            position = self.engine.open_nowait(room)
            past = self.engine.stream(room).events if self.hub.options(room).last_value else ()
            warm = self.hub.obtain(room, position, past)
        compiled: Filter | None = compile_filter(filter_) if filter_ is not None else None
        if sink.posts_wait:
            self.fanout.flush()
        member = self.hub.join(sink, warm, compiled, watches=watches)
        return Joining(self, sink, member, since, tail)

    def join(self, sink: FakeSink, room: str, **how: Any) -> Member:
        """Join to the end; the reply and what follows are in ``sink.received()`` after a flush."""
        joining = self.start_join(sink, room, **how)
        joining.finish()
        return joining.member

    def member(self, room: str = "live:1", name: str = "", **options: Any) -> FakeSink:
        """A new session that has joined ``room`` and read the reply."""
        sink = self.sink(name, **options)
        self.join(sink, room)
        self.fanout.flush()
        sink.received()
        return sink

    def publish(self, room: str, data: Any = None, *, done: Done | None = None, **fields: Any) -> Event:
        """Publish; nothing is sent yet."""
        event = make_event(room, "said", data, self.clock.now, **fields)
        self.hub.publish(event, self.hub.options(room), done)
        return event

    def receive(self, room: str, data: Any = None, **fields: Any) -> Event:
        """An ephemeral event comes from another node; nothing is sent yet."""
        event = make_event(room, "said", data, self.clock.now, **fields)
        self.hub.receive([event])
        return event

    def publish_as(self, sink: FakeSink, room: str, data: Any = None, **fields: Any) -> Event:
        """Publish as ``sink``, which is answered ``{"op": "ok", "of": data}`` as the edge would."""

        def answer(_outcome: object) -> None:
            sink.post(encode_op("ok", of=data), after_events=True)

        event = self.publish(room, data, done=answer, publisher=sink.id, **fields)
        if not self.hub.options(room).history:
            answer(None)
        return event

    def say(self, room: str, *data: Any, **fields: Any) -> None:
        """Publish each of ``data``, and send them in one round."""
        for each in data:
            self.publish(room, each, **fields)
        self.fanout.flush()

    def say_now(self, room: str, *data: Any, **fields: Any) -> None:
        """The same in one step, which leaves open windows alone."""
        for each in data:
            self.publish(room, each, **fields)
        while self.fanout.step():
            pass


def with_options(options: RoomOptions, **changes: Any) -> RoomOptions:
    """``options`` with other values."""
    return msgspec.structs.replace(options, **changes)
