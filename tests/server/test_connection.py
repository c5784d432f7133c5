"""One socket: whole frames in order, whatever it takes at once, and nothing after the close frame."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any, cast

import orjson
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import CloseCode
from broker.hub.fanout import send_all
from broker.hub.rooms import Verdict
from broker.protocol.codec import JSON
from broker.protocol.frames import CLOSE, PING, TEXT, FrameDecoder, encode_close, encode_frame
from broker.server.connection import FLUSHES, READ_BYTES, Connection, Traffic
from broker.server.pump import READ, WRITE, Pump
from tests.hub.fakes import POISON, FakeSocket, PickyEncoder, payloads


class Owner:
    """A session as its connection knows it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.changes = 0
        self.faults: list[Exception] = []
        self.disconnected: list[tuple[CloseCode, str]] = []
        self.incoming: list[tuple[int, Any]] = []
        self.gone = 0

    def direct_changed(self) -> None:
        self.changes += 1

    def fault(self, _op: str, error: Exception) -> None:
        self.faults.append(error)

    def disconnect(self, code: CloseCode, reason: str) -> None:
        self.disconnected.append((code, reason))
        self.connection.close(code, reason)

    def on_incoming(self, opcode: int, payload: Any) -> None:
        self.incoming.append((opcode, payload))

    def on_gone(self) -> None:
        self.gone += 1


class Wire:
    """A connection, its owner, and the peer at the other end of a real socket."""

    def __init__(self, ours: socket.socket, peer: socket.socket, **limits: int) -> None:
        sizes = {"outbox_bytes": 1 << 20, "process_outbox_bytes": 0} | limits
        self.pump = Pump(lambda: None, lambda: None)
        self.posted: list[bool] = []
        self.encoder = PickyEncoder()
        self.traffic = Traffic(self.pump, self.encoder, self._note, **sizes)
        self.peer = peer
        self.stream = bytearray()
        self.connection = Connection(ours, self.traffic, FrameDecoder(1 << 16, 0), JSON)
        self.owner = Owner(self.connection)
        self.connection.owner = self.owner
        self.connection.on_incoming = self.owner.on_incoming
        self.connection.on_gone = self.owner.on_gone

    def _note(self, owner: object, *, after_events: bool) -> None:
        assert owner is self.owner
        self.posted.append(after_events)

    def fill(self) -> list[bytes]:
        """Write frames until the socket takes no more; what was written."""
        frames: list[bytes] = []
        while not self.backlog:
            frames.append(encode_frame(TEXT, b"%06d" % len(frames) * 500))
            assert self.connection.write(frames[-1]) == Verdict.TAKEN
        return frames

    @property
    def backlog(self) -> int:
        """Bytes that wait."""
        return self.connection.outbox.size if self.connection.outbox is not None else 0

    def read(self) -> bytes:
        """What the peer can read now."""
        data = b""
        try:
            while chunk := self.peer.recv(1 << 16):
                data += chunk
        except BlockingIOError:
            pass
        return data

    def drain(self) -> bytes:
        """The peer reads, the socket is flushed, until nothing is queued."""
        data = self.read()
        while self.backlog:
            self.connection.on_writable()
            data += self.read()
        return data

    def messages(self) -> list[Any]:
        """Batches that came, in frames."""
        self.stream += self.drain()
        return [orjson.loads(payload) for opcode, payload in payloads(self.stream) if opcode == TEXT]


def wire(**limits: int) -> Wire:
    ours, peer = socket.socketpair()
    for each in (ours, peer):
        each.setblocking(False)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return Wire(ours, peer, **limits)


@pytest.fixture
def line() -> Iterator[Wire]:
    made = wire()
    yield made
    made.connection.stop()
    made.peer.close()


# -- writing ------------------------------------------------------------------------


def test_a_frame_goes_straight_to_the_socket(line: Wire) -> None:
    assert line.connection.direct is line.connection.sock
    assert line.connection.write(b"frame") == Verdict.TAKEN
    assert line.read() == b"frame"
    assert line.connection.outbox is None


def test_what_the_socket_does_not_take_waits_whole_and_in_order(line: Wire) -> None:
    frames = line.fill()
    frames += [b"more", b"and more"]
    for frame in frames[-2:]:
        assert line.connection.write(frame) == Verdict.TAKEN
    assert line.traffic.backlogs == 1
    assert line.traffic.behind == {line.connection: None}
    assert line.traffic.queued == line.backlog > 0
    assert not line.connection.clear
    assert line.owner.changes == 1
    assert line.drain() == b"".join(frames)
    assert (line.traffic.queued, line.traffic.behind) == (0, {})
    assert line.connection.direct is line.connection.sock
    assert line.owner.changes == 2


def test_a_backlog_watches_for_room_and_then_no_more(line: Wire) -> None:
    line.connection.start()
    assert line.connection.started
    line.fill()
    assert line.connection.interest == READ | WRITE
    line.drain()
    assert line.connection.interest == READ


def test_a_backlog_drains_a_bounded_number_of_sends_at_a_time() -> None:
    made, sock = fake_wire(0)
    chunk = b"x" * (40 * 1024)  # too large to be joined with another
    for _ in range(FLUSHES + 2):
        made.connection.write(chunk)
    sock.capacity = None
    sock.sends = 0
    made.connection.on_writable()
    assert sock.sends == FLUSHES
    assert made.backlog == 2 * len(chunk)
    made.connection.on_writable()
    assert (sock.sends, made.backlog) == (FLUSHES + 2, 0)


def fake_wire(capacity: int | None, **limits: int) -> tuple[Wire, FakeSocket]:
    sock = FakeSocket()
    sock.capacity = capacity
    return Wire(cast("socket.socket", sock), cast("socket.socket", None), **limits), sock


def test_a_full_outbox_takes_nothing_and_says_so() -> None:
    made, sock = fake_wire(0, outbox_bytes=10)
    assert made.connection.write(b"a frame of any size is the first") == Verdict.TAKEN
    assert made.connection.write(b"x") == Verdict.FULL
    assert made.traffic.refused == 1
    sock.capacity = 25
    made.connection.on_writable()
    assert made.connection.write(b"123") == Verdict.TAKEN
    assert made.connection.write(b"4") == Verdict.FULL
    sock.capacity = None
    made.connection.on_writable()
    assert bytes(sock.taken) == b"a frame of any size is the first123"


def test_the_process_has_a_budget_for_all_outboxes() -> None:
    made, _ = fake_wire(0, process_outbox_bytes=100)
    other = Connection(
        cast("socket.socket", FakeSocket()), made.traffic, FrameDecoder(100, 0), JSON
    )  # shares the traffic
    cast("FakeSocket", other.sock).capacity = 0
    assert made.connection.write(b"x" * 60) == Verdict.TAKEN
    assert other.write(b"y" * 30) == Verdict.TAKEN
    assert other.write(b"z" * 11) == Verdict.FULL
    made.connection.stop()
    assert made.traffic.queued == 30
    assert other.write(b"z" * 11) == Verdict.TAKEN


def test_a_broken_socket_is_noticed_once_by_whoever_writes(line: Wire) -> None:
    line.connection.start()
    line.peer.close()
    assert line.connection.write(b"frame") == Verdict.CLOSED
    assert line.connection.write(b"frame") == Verdict.CLOSED
    line.connection.push(b"ping")
    line.connection.post(b"{}")
    line.connection.close(1000)
    assert line.owner.gone == 1
    assert (len(line.pump), line.connection.started, line.connection.direct) == (0, False, None)


def test_a_socket_that_breaks_with_a_backlog_forgets_it(line: Wire) -> None:
    line.fill()
    line.peer.close()
    line.connection.on_writable()
    assert (line.owner.gone, line.traffic.queued, line.traffic.behind) == (1, 0, {})
    line.connection.on_fault()
    assert line.owner.gone == 1


def test_stopping_twice_is_harmless_and_parts_owner_and_connection(line: Wire) -> None:
    line.connection.start()
    line.fill()
    line.connection.stop()
    line.connection.stop()
    assert (line.traffic.queued, len(line.pump), line.connection.owner) == (0, 0, None)
    line.connection.when_drained(pytest.fail)
    line.connection.receive(encode_masked(b"late"))
    assert line.owner.incoming == []


# -- posts ----------------------------------------------------------------------------


def test_posts_leave_as_one_frame_before_any_event(line: Wire) -> None:
    line.connection.post(b'{"n":1}')
    line.connection.post(b'{"n":2}')
    assert line.posted == [False]
    line.connection.write(encode_frame(TEXT, b'[{"n":3}]'))
    assert line.messages() == [[{"n": 1}, {"n": 2}], [{"n": 3}]]
    line.connection.flush_posts(after_events=True)
    assert line.messages() == []


def test_posts_that_wait_for_events_let_them_pass(line: Wire) -> None:
    connection = line.connection
    connection.post(b'{"n":1}')
    connection.post(b'{"n":3}', after_events=True)
    connection.post(b'{"n":4}')
    assert connection.posts_wait
    assert line.posted == [False, True]
    connection.seal_posts()
    connection.write(encode_frame(TEXT, b'[{"n":2}]'))
    connection.post(b'{"n":5}')
    connection.post(b'{"n":6}', after_events=True)
    connection.flush_posts(after_events=True)
    assert line.messages() == [[{"n": 1}], [{"n": 2}], [{"n": 3}, {"n": 4}, {"n": 5}]]
    assert connection.posts_wait
    connection.seal_posts()
    connection.flush_posts()
    assert line.messages() == []
    connection.flush_posts(after_events=True)
    assert line.messages() == [[{"n": 6}]]
    assert not connection.posts_wait


def test_posts_sealed_by_a_round_that_failed_are_not_lost(line: Wire) -> None:
    connection = line.connection
    connection.post(b'{"n":1}', after_events=True)
    connection.seal_posts()
    connection.post(b'{"n":2}', after_events=True)
    connection.seal_posts()
    connection.seal_posts()
    connection.flush_posts(after_events=True)
    assert line.messages() == [[{"n": 1}, {"n": 2}]]


def test_answers_that_do_not_fit_end_the_session() -> None:
    made, _ = fake_wire(0, outbox_bytes=10)
    made.connection.write(b"queued")
    made.connection.post(b'{"an":"answer"}')
    made.connection.flush_posts()
    assert made.owner.disconnected == [(CloseCode.SLOW_CONSUMER, "too slow to read its answers")]
    assert made.connection.write(b"frame") == Verdict.CLOSED


def test_answers_that_cannot_be_encoded_end_the_session(line: Wire) -> None:
    line.connection.post(POISON.encode())
    line.connection.flush_posts()
    assert [code for code, _ in line.owner.disconnected] == [CloseCode.INTERNAL]
    assert len(line.owner.faults) == 1


# -- closing -----------------------------------------------------------------------------


def test_nothing_follows_the_close_frame(line: Wire) -> None:
    frames = line.fill()
    line.connection.push(encode_frame(PING, b""))
    line.connection.close(1001, "away")
    line.connection.push(encode_frame(PING, b""))
    line.connection.close(1000)
    line.connection.post(b"{}")
    line.connection.post(b"{}", after_events=True)
    assert line.connection.write(b"late") == Verdict.CLOSED
    assert not line.posted
    assert line.drain() == b"".join(frames) + encode_frame(PING, b"") + encode_close(1001, "away")
    assert line.connection.write(b"late") == Verdict.CLOSED
    assert line.connection.direct is None


def test_what_was_posted_precedes_the_close_frame(line: Wire) -> None:
    line.connection.post(b"{}")
    line.connection.close(1000)
    line.stream += line.drain()
    assert [opcode for opcode, _ in payloads(line.stream)] == [TEXT, CLOSE]


def test_a_backlog_is_abandoned_but_for_what_is_half_sent(line: Wire) -> None:
    frames = line.fill()
    line.connection.write(b"more")
    line.connection.abandon_backlog()
    assert line.traffic.queued == line.backlog
    line.connection.close(4508)
    assert line.drain() == b"".join(frames) + encode_close(4508)
    line.connection.abandon_backlog()


def test_ending_our_half_is_seen_by_the_peer(line: Wire) -> None:
    line.connection.write(b"last")
    line.connection.finish_writing()
    assert (line.peer.recv(10), line.peer.recv(10)) == (b"last", b"")
    line.connection.sock.close()
    line.connection.finish_writing()
    assert line.owner.gone == 1


# -- when drained ---------------------------------------------------------------------------


def test_who_asks_is_told_when_the_backlog_is_gone(line: Wire) -> None:
    told: list[str] = []
    line.fill()
    line.connection.when_drained(lambda: told.append("first"))
    line.connection.when_drained(lambda: told.append("second"))
    line.connection.on_writable()
    assert told == []
    line.drain()
    assert told == ["second"]
    line.connection.on_writable()
    assert told == ["second"]


def test_without_a_backlog_who_asks_is_told_by_the_pump(line: Wire) -> None:
    told: list[str] = []
    line.connection.start()
    line.connection.when_drained(lambda: told.append("now"))
    assert (told, line.connection.interest) == ([], READ | WRITE)
    line.connection.on_writable()
    assert (told, line.connection.interest) == (["now"], READ)


def test_a_backlog_that_returns_while_it_is_told_is_kept(line: Wire) -> None:
    line.connection.start()
    line.fill()

    def fill() -> None:
        line.fill()

    line.connection.when_drained(fill)
    while line.traffic.backlogs == 1:
        line.read()
        line.connection.on_writable()
    assert line.backlog
    assert line.connection.interest == READ | WRITE


# -- reading ------------------------------------------------------------------------------------


def encode_masked(payload: bytes, opcode: int = TEXT) -> bytes:
    """A short frame as a client sends it, with a mask of zeros."""
    assert len(payload) < 126
    return bytes((0x80 | opcode, 0x80 | len(payload))) + bytes(4) + payload


def test_messages_are_handed_on(line: Wire) -> None:
    line.connection.heard = False
    line.peer.send(encode_masked(b"one") + encode_masked(b"two")[:4])
    line.connection.on_readable()
    line.peer.send(encode_masked(b"two")[4:])
    line.connection.on_readable()
    line.connection.on_readable()  # nothing there
    assert line.owner.incoming == [(TEXT, b"one"), (TEXT, b"two")]
    assert line.connection.heard
    assert line.traffic.bytes_read == 2 * len(encode_masked(b"one"))


def test_the_end_and_an_error_are_both_the_end(line: Wire) -> None:
    line.peer.close()
    line.connection.on_readable()
    assert line.owner.gone == 1
    other, sock = fake_wire(None)
    sock.broken = True
    other.connection.on_readable()
    assert other.owner.gone == 1


def test_nothing_is_handed_on_once_the_peer_is_gone(line: Wire) -> None:
    def end(opcode: int, payload: Any) -> None:
        line.owner.on_incoming(opcode, payload)
        line.connection.on_fault()

    line.connection.on_incoming = end
    line.connection.receive(encode_masked(b"one") + encode_masked(b"two"))
    assert line.owner.incoming == [(TEXT, b"one")]


def test_reading_pauses_and_goes_on(line: Wire) -> None:
    line.connection.start()
    line.connection.pause_reading()
    line.connection.pause_reading()
    assert line.connection.interest == 0
    line.connection.resume_reading()
    line.connection.resume_reading()
    assert line.connection.interest == READ


def test_what_came_before_the_start_is_not_forgotten(line: Wire) -> None:
    frames = line.fill()
    line.connection.start(encode_masked(b"early"))
    assert line.owner.incoming == [(TEXT, b"early")]
    assert line.connection.interest == READ | WRITE
    assert line.drain() == b"".join(frames)


def test_a_connection_that_broke_before_its_start_is_not_watched(line: Wire) -> None:
    line.connection.on_fault()
    line.connection.start()
    assert not line.connection.started


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> Iterator[Wire]:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    raw, raw_peer = socket.socketpair()
    shaken: list[ssl.SSLSocket] = []
    other = threading.Thread(
        target=lambda: shaken.append(client.wrap_socket(raw_peer, server_hostname="localhost"))
    )
    other.start()
    ours = server.wrap_socket(raw, server_side=True)
    other.join()
    [peer] = shaken
    for each in (ours, peer):
        each.setblocking(False)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made = TlsWire(ours, peer)
    yield made
    made.connection.stop()
    peer.close()


class TlsWire(Wire):
    """The same through TLS, where a read that finds nothing is another error."""

    def read(self) -> bytes:
        data = b""
        try:
            while chunk := self.peer.recv(1 << 16):
                data += chunk
        except ssl.SSLWantReadError:
            pass
        return data


def test_tls_is_never_written_to_directly_but_comes_whole(tls: Wire) -> None:
    assert tls.connection.direct is None
    frames = tls.fill()
    assert tls.connection.write(b"more") == Verdict.TAKEN
    tls.connection.on_writable()  # takes nothing yet
    assert tls.drain() == b"".join(frames) + b"more"


def test_tls_records_larger_than_a_read_are_read_to_their_end(tls: Wire) -> None:
    tls.connection.start()
    message = encode_masked(b"x" * 100)
    count = READ_BYTES // len(message)  # one record holds as many bytes
    tls.peer.setblocking(True)
    sender = threading.Thread(target=lambda: tls.peer.sendall(message * 2 * count))
    sender.start()
    while len(tls.owner.incoming) < 2 * count:
        tls.connection.on_readable()
    sender.join()
    assert tls.owner.incoming == [(TEXT, b"x" * 100)] * 2 * count


def test_what_tls_has_already_read_waits_for_the_resume(tls: Wire) -> None:
    """The poll object cannot see it, so nobody else would ever hand it on."""
    tls.connection.start()
    tls.peer.send(encode_masked(b"one") + encode_masked(b"two"))
    sock = cast("ssl.SSLSocket", tls.connection.sock)
    first = sock.recv(len(encode_masked(b"one")))
    assert sock.pending()
    tls.connection.pause_reading()
    tls.connection.receive(first)
    tls.connection.resume_reading()
    assert tls.owner.incoming == [(TEXT, b"one"), (TEXT, b"two")]


# -- the direct way is the careful way ----------------------------------------------------------------


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["frame", "drain", "post", "break"]), st.integers(0, 60)), max_size=30
    )
)
def test_sending_directly_is_the_same_as_writing(steps: list[tuple[str, int]]) -> None:
    """As the fan-out does it: a direct socket is sent to, and only what it did not take is seen to."""
    made = [fake_wire(100, outbox_bytes=80) for _ in range(2)]
    for kind, size in steps:
        if kind == "frame":
            frame = encode_frame(TEXT, b"x" * size)
            careful = made[0][0].connection.write(frame)
            line, _ = made[1]
            line.connection.flush_posts()  # the fan-out does before it sends
            if line.connection.direct is None:
                quick = line.connection.write(frame)
            else:
                short = send_all([line.connection.direct], frame)
                quick = line.connection.sent(frame, short[0][1]) if short else Verdict.TAKEN
            assert quick == careful
        for line, sock in made:
            if kind == "drain":
                sock.capacity = size
                line.connection.on_writable()
            elif kind == "post":
                line.connection.post(b"{}")
            elif kind == "break" and size > 50:
                sock.broken = True
        (one, first), (other, second) = made
        assert first.taken == second.taken
        assert one.traffic.queued == other.traffic.queued
        assert one.owner.gone == other.owner.gone
        assert one.owner.disconnected == other.owner.disconnected
