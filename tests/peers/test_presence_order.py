"""Members told by one node and learned by another, with everything in between in any order.

No Redis and no time: commands, replies and messages move when a step says so,
may overtake each other where connections differ, and may be lost.
"""

from __future__ import annotations

import orjson
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.link import wire
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.peers.mates import Mates
from broker.peers.members import Members
from broker.protocol.events import SessionId
from tests.peers.fakes import FakeHub, FakeMember, HeldLink, KnownNodes, MemberStore

ROOM = "r"
SESSIONS = st.integers(0, 2)
STEPS = st.one_of(
    st.tuples(st.just("come"), SESSIONS, st.integers(0, 9)),
    st.tuples(st.just("go"), SESSIONS),
    st.tuples(st.just("tell")),
    st.tuples(st.just("hear")),
    st.tuples(st.sampled_from(["flush", "execute", "land"])),
    st.tuples(st.sampled_from(["read", "learn"])),
    st.tuples(st.sampled_from(["break", "rejoin", "die", "look"])),
)
LOSSES = st.tuples(st.sampled_from(["miss", "lose"]))
RACE = [("come", 0, 0), ("tell",), ("read",), ("go", 0), ("tell",), ("hear",), ("hear",), ("learn",)]
"""Who has come and gone is read as there, and that is learned last."""
STRANGER = [("read",), ("learn",), ("come", 0, 0), ("tell",), ("hear",), ("die",), ("tell",), ("hear",)]
"""A node tells all before anybody has heard that it is alive."""
LATE_STRANGER = [
    ("read",), ("learn",), ("die",), ("come", 0, 0), ("rejoin",), ("read",), ("tell",), ("hear",),
]  # fmt: skip
"""The same, and what was read before that is learned after it is known to be alive."""


class Pair:
    """``teller`` has members in the room, ``learner`` wants to know them."""

    def __init__(self) -> None:
        keys = Keys("test:")
        self.store = MemberStore()
        self.hub = FakeHub()
        self.truth: dict[str, FakeMember] = {}
        self.name = "teller"
        self._missed = False
        self._telling = HeldLink(self.store)
        self._learning = HeldLink(self.store)
        self._members = Members(self._telling, keys, lambda: self.name)
        self._nodes = KnownNodes(self._learning, keys, "learner", self.name)
        self._mates = Mates(self._learning, keys, Interest(self._learning, keys), self._nodes)
        self._mates.events = self.hub
        self._keys = keys

    async def run(self, steps: list[tuple[object, ...]]) -> None:
        self._members.begin()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mates.attach, ROOM)
            await trio.testing.wait_all_tasks_blocked()
            for what, *arguments in steps:
                getattr(self, f"_{what}")(*arguments)
            self._rest()
            if self._missed:
                self._come(0, 99)  # the next change tells of whatever was missed
                self._rest()
        assert self.hub.mates(ROOM) == {
            session: orjson.dumps(member.describe()) for session, member in self.truth.items()
        }
        assert self.hub.faults == []

    def _rest(self) -> None:
        """Everything gets where it was going."""
        self._look()
        while True:
            self._members.repeat()
            self._members.flush()
            self._mates.repeat()
            moved = [
                self._telling.execute(), self._telling.reply(), self._hear(), self._learning.execute(),
                self._learning.reply(),
            ]  # fmt: skip
            if not any(moved):
                return

    def _come(self, session: int, state: int) -> None:
        name = SessionId(f"s{session}")
        self.truth[name] = FakeMember(name, state=state)
        self._members.touch(ROOM, name, None, self.truth[name])

    def _go(self, session: int) -> None:
        name = SessionId(f"s{session}")
        if self.truth.pop(name, None) is not None:
            self._members.touch(ROOM, name, None, None)

    def _tell(self) -> None:
        self._flush()
        self._execute()
        self._land()

    def _flush(self) -> None:
        self._members.flush()

    def _execute(self) -> None:
        self._telling.execute()

    def _land(self) -> None:
        self._telling.reply()

    def _hear(self) -> bool:
        """The learner hears the next message."""
        if not self.store.published:
            return False
        _, payload = self.store.published.popleft()
        _, (node, version), body = wire.unpack(payload)
        self._mates.take(ROOM, node, int(version), body)
        return True

    def _read(self) -> None:
        self._learning.execute()

    def _learn(self) -> None:
        self._learning.reply()

    def _miss(self) -> None:
        """A message is lost."""
        self._missed = True
        if self.store.published:
            self.store.published.popleft()

    def _lose(self) -> None:
        """Redis loses everything, and both have to find out by themselves."""
        self._missed = True
        self.store.hashes.clear()

    def _break(self) -> None:
        self._telling.break_()
        self._learning.break_()

    def _rejoin(self) -> None:
        self._members.begin()
        self._mates.rejoined()

    def _die(self) -> None:
        """The teller is taken for dead, and goes on under another name."""
        former, self.name = self.name, f"{self.name}+"
        if self._nodes.lives(former):
            self._nodes.forget(former)
            self._mates.gone(former)
        for key in [key for key in self.store.hashes if key.endswith(f":{former}")]:
            del self.store.hashes[key]
        self.store.hashes.get(self._keys.member_nodes(ROOM), {}).pop(former, None)
        self._members.begin()

    def _look(self) -> None:
        """The learner hears who is alive."""
        if not self._nodes.lives(self.name):
            self._nodes.know(self.name)
            self._mates.came(self.name)
        self._mates.looked()


@settings(max_examples=400)
@example(RACE)
@example(STRANGER)
@example(LATE_STRANGER)
@given(st.lists(STEPS, min_size=10, max_size=60))
def test_in_whatever_order_things_happen_the_truth_is_learned(steps: list[tuple[object, ...]]) -> None:
    trio.run(Pair().run, steps)


@settings(max_examples=200)
@given(st.lists(st.one_of(STEPS, LOSSES), min_size=10, max_size=60))
def test_the_next_change_tells_of_what_was_missed(steps: list[tuple[object, ...]]) -> None:
    trio.run(Pair().run, steps)
