"""The outbox against a plain buffer: no byte lost, doubled or overtaken, and no frame torn."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.protocol.outbox import JOIN_BYTES, Outbox

SIZES = st.one_of(
    st.integers(1, 200),
    st.integers(1, JOIN_BYTES * 2),
    st.sampled_from([JOIN_BYTES // 2, JOIN_BYTES // 2 + 1, JOIN_BYTES - 1, JOIN_BYTES, JOIN_BYTES + 1]),
)


class AgainstABuffer(RuleBasedStateMachine):
    """Pushes frames and sends what is to be sent, short sends and refused ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox()
        self.waiting = b""
        self.frames: list[int] = []  # sizes of the waiting frames, the first perhaps sent in part
        self.number = 0

    def make(self, size: int) -> bytes:
        """A frame unlike its neighbours."""
        self.number += 1
        seed = b"<%d>" % self.number
        return (seed * (size // len(seed) + 1))[:size]

    @rule(size=SIZES)
    def push(self, size: int) -> None:
        frame = self.make(size)
        self.outbox.push(frame)
        self.waiting += frame
        self.frames.append(size)

    @precondition(lambda self: not self.frames)
    @rule(size=SIZES, part=st.floats(0, 1, exclude_max=True))
    def push_what_a_short_send_left(self, size: int, part: float) -> None:
        frame = self.make(size)
        sent = int(size * part)
        self.outbox.push(frame, sent)
        self.waiting += frame[sent:]
        self.frames.append(size - sent)

    @rule(part=st.one_of(st.just(1.0), st.floats(0, 1)), peeks=st.integers(1, 2))
    def send(self, part: float, peeks: int) -> None:
        for _ in range(peeks):  # the socket may refuse, and be asked again
            chunk = bytes(self.outbox.peek())
        assert self.waiting.startswith(chunk)
        assert bool(chunk) is bool(self.waiting)
        if not chunk:
            return
        # Whole frames only, and joined no further than the limit.
        ends = list(itertools.accumulate(self.frames))
        assert len(chunk) in ends
        assert len(chunk) <= JOIN_BYTES or len(chunk) == ends[0]
        sent = int(len(chunk) * part)
        self.outbox.advance(sent)
        self.waiting = self.waiting[sent:]
        self.frames = [
            end - start for start, end in itertools.pairwise([sent, *(e for e in ends if e > sent)])
        ]

    @precondition(lambda self: self.frames)
    @rule()
    def keep_first(self) -> None:
        forgotten = self.outbox.keep_first()
        assert forgotten == len(self.waiting) - self.outbox.size
        self.waiting = self.waiting[: self.outbox.size]
        ends = list(itertools.accumulate(self.frames))
        kept = ends.index(self.outbox.size) + 1  # ends where a frame ends
        self.frames = self.frames[:kept]

    @invariant()
    def size_is_what_waits(self) -> None:
        assert self.outbox.size == len(self.waiting)

    def teardown(self) -> None:
        out = b""
        while chunk := self.outbox.peek():
            out += chunk
            self.outbox.advance(len(chunk))
        assert out == self.waiting
        assert self.outbox.size == 0


TestAgainstABuffer = AgainstABuffer.TestCase


def test_small_frames_become_one_send() -> None:
    outbox = Outbox()
    for _ in range(100):
        outbox.push(b"x" * 100)
    assert len(outbox.peek()) == 10_000
    outbox.advance(10_000)
    assert (outbox.size, outbox.peek()) == (0, b"")


def test_one_frame_alone_is_not_copied() -> None:
    frame = b"x" * (JOIN_BYTES + 100)
    outbox = Outbox()
    outbox.push(frame)
    outbox.push(b"y")
    assert outbox.peek() is frame
    outbox.advance(10)
    rest = outbox.peek()
    assert isinstance(rest, memoryview)
    assert rest.obj is frame


@pytest.mark.parametrize("sent", [0, 1, 99])
def test_what_may_be_half_sent_is_kept(sent: int) -> None:
    outbox = Outbox()
    for _ in range(3):
        outbox.push(b"x" * JOIN_BYTES)
    outbox.peek()
    outbox.advance(sent)
    assert outbox.keep_first() == 2 * JOIN_BYTES
    assert bytes(outbox.peek()) == b"x" * (JOIN_BYTES - sent)
    assert outbox.keep_first() == 0
