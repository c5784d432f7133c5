"""Who is connected: every index is emptied by the way it was filled."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from structlog.testing import capture_logs

from broker.config import Limits, Rates
from broker.errors import CloseCode
from broker.protocol.events import SessionId, UserId
from broker.server.registry import OTHER, Registry
from tests.hub.fakes import FakePeers

if TYPE_CHECKING:
    from broker.server.session import Session

ANN = UserId("ann")


class Visitor:
    """What the registry needs of a session."""

    def __init__(self, name: str, address: str = "10.0.0.1") -> None:
        self.id = SessionId(name)
        self.address = address
        self.user: UserId | None = None


def visitor(name: str, address: str = "10.0.0.1") -> Session:
    return cast("Session", Visitor(name, address))


def identify(registry: Registry, session: Session, user: UserId) -> None:
    """What a session does when its token is verified."""
    registry.stranger_known(session.address)
    registry.identify(session, user)
    session.user = user


def make(*, strangers: int = 2, sessions: int = 2, rates: bool = True) -> Registry:
    limits = Limits(unauthenticated_per_address=strangers, sessions_per_user=sessions)
    return Registry(limits, Rates(enabled=rates), FakePeers())


def test_an_address_has_so_many_strangers() -> None:
    registry = make(strangers=2)
    assert [registry.admit_stranger("a") for _ in range(3)] == [True, True, False]
    assert registry.admit_stranger("b")
    registry.stranger_known("a")
    assert registry.admit_stranger("a")
    assert registry.statistics()["strangers"] == 3


def test_other_nodes_are_told_who_is_here() -> None:
    peers = FakePeers()
    registry = Registry(Limits(), Rates(), peers)
    guest, other, stranger = visitor("s1"), visitor("s2"), visitor("s3")
    for session in (guest, other, stranger):
        registry.open(session)
    assert peers.here == []
    registry.admit(guest)
    identify(registry, other, ANN)
    assert peers.here == [("s1", None), ("s2", ANN)]
    registry.close(stranger, 4408)
    registry.close(other, 1000)
    assert peers.here == [("s1", None)]
    identify(registry, guest, ANN)
    assert peers.here == [("s1", None), ("s1", ANN)]
    registry.close(guest, 1000)
    assert peers.here == []


def test_no_limit_still_counts() -> None:
    registry = make(strangers=0, sessions=0)
    assert all(registry.admit_stranger("a") for _ in range(500))
    assert registry.statistics()["strangers"] == 500
    for number in range(500):
        identify(registry, visitor(str(number)), ANN)
    assert registry.has_place(ANN)


def test_a_user_has_so_many_sessions() -> None:
    registry = make(sessions=2)
    sessions = [visitor(str(number)) for number in range(2)]
    for session in sessions:
        assert registry.has_place(ANN)
        registry.open(session)
        identify(registry, session, ANN)
    assert not registry.has_place(ANN)
    assert registry.has_place(UserId("bob"))
    registry.close(sessions[0], 1000)
    assert registry.has_place(ANN)
    assert registry.of_user("ann") == [sessions[1]]
    assert registry.of_user("bob") == []


def test_renewing_takes_no_second_place() -> None:
    registry = make(sessions=2)
    session = visitor("s")
    registry.open(session)
    identify(registry, session, ANN)
    registry.identify(session, ANN)
    assert registry.of_user("ann") == [session]


def test_a_user_shares_buckets_while_a_session_lasts() -> None:
    registry = make()
    first, second = visitor("1"), visitor("2")
    for session in (first, second):
        registry.open(session)
        identify(registry, session, ANN)
    rates = registry.user_rates(ANN)
    assert rates is not None
    registry.close(first, 1000)
    assert registry.user_rates(ANN) is rates
    registry.close(second, 1001)
    assert registry.user_rates(ANN) is None
    assert list(registry.users()) == []


def test_without_rates_users_have_no_buckets() -> None:
    registry = make(rates=False)
    session = visitor("s")
    registry.open(session)
    identify(registry, session, ANN)
    assert registry.user_rates(ANN) is None
    assert list(registry.users()) == [ANN]
    registry.close(session, 1000)


def test_statistics_count_by_reason() -> None:
    registry = make()
    for reason in ("origin", "origin", "full"):
        registry.refuse(reason)
    registry.count_error("forbidden")
    registry.count_error("forbidden")
    registry.admit_stranger("10.0.0.1")
    session = visitor("s")
    registry.open(session)
    registry.close(session, 4508)
    assert registry.statistics() == {
        "connections": 0,
        "accepted": 0,
        "sessions": 0,
        "users": 0,
        "strangers": 0,
        "opened": 1,
        "closes": {"4508": 1},
        "refused": {"origin": 2, "full": 1},
        "errors": {"forbidden": 2},
    }


def test_the_log_says_why_a_session_ended_but_not_a_thousand_times() -> None:
    registry = make()
    with capture_logs() as lines:
        for now in (0.0, 0.1, 0.2, 5.0):
            registry.tell(visitor("s"), CloseCode.SLOW_CONSUMER, "too slow", now)
        registry.tell(visitor("s"), CloseCode.NORMAL, "bye", 6.0)
    assert [(line["code"], line["reason"], line["suppressed"]) for line in lines] == [
        (4508, "too slow", 0),
        (4508, "too slow", 2),
    ]


class RegistryMachine(RuleBasedStateMachine):
    """Sessions come, identify and go in any order; the indexes follow."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = make(strangers=3, sessions=0)
        self.open: list[Session] = []
        self.opened = 0

    @rule(address=st.sampled_from("ab"))
    def connect(self, address: str) -> None:
        strangers = sum(s.address == address and s.user is None for s in self.open)
        assert self.registry.admit_stranger(address) == (strangers < 3)
        if strangers < 3:
            self.opened += 1
            session = visitor(str(self.opened), address)
            self.registry.open(session)
            self.open.append(session)

    @rule(which=st.integers(0, 9), user=st.sampled_from(["ann", "bob"]))
    def identify(self, which: int, user: str) -> None:
        if self.open and self.open[which % len(self.open)].user is None:
            identify(self.registry, self.open[which % len(self.open)], UserId(user))

    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        if self.open:
            self.registry.close(self.open.pop(which % len(self.open)), 1000)

    @invariant()
    def indexes_agree(self) -> None:
        statistics = self.registry.statistics()
        assert list(self.registry.sessions.values()) == self.open
        assert statistics["strangers"] == sum(session.user is None for session in self.open)
        for user in ("ann", "bob"):
            theirs = [session for session in self.open if session.user == user]
            assert set(self.registry.of_user(user)) == set(theirs)
            assert (user in list(self.registry.users())) == bool(theirs)


TestRegistryModel = RegistryMachine.TestCase
TestRegistryModel.settings = settings(max_examples=50, stateful_step_count=30)


def test_codes_of_the_clients_own_are_counted_as_one() -> None:
    registry = make()
    for name, code in (("a", 3001), ("b", 4777), ("c", 1005), ("d", 1000)):
        session = visitor(name)
        registry.open(session)
        registry.close(session, code)
    assert registry.closes == {OTHER: 2, 1005: 1, 1000: 1}
