"""The ledger itself: a run without a fault passes, and every fault that is put into one is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.ledger import Ledger, Verdict

ROOM = "deal:1"
Step = tuple[str, tuple[object, ...]]


@dataclasses.dataclass
class World:
    """A store that keeps every promise, and what everybody is told of it."""

    ledger: Ledger
    epoch: int = 0
    past: list[str] = dataclasses.field(default_factory=list)
    made: int = 0
    now: float = 0.0
    at: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """Session → epoch and offset of what it has, while it is connected or away."""
    here: set[str] = dataclasses.field(default_factory=set)

    def begin(self, *, may_tell: bool = True, may_close: bool = True) -> None:
        self.ledger.begin(may_tell=may_tell, may_close=may_close)

    def publish(self, *, answered: bool = True, attempts: int = 1) -> None:
        self.made += 1
        self.now += 1
        key = f"k{self.made}"
        for _ in range(attempts):
            self.ledger.sends(ROOM, key, f"d{self.made}", self.now)
        self.past.append(key)
        if answered:
            self.ledger.acknowledged(key, f"e{self.epoch}", len(self.past))
        for session in self.here:
            self.catch_up(session)

    def catch_up(self, session: str) -> None:
        _, offset = self.at[session]
        for number in range(offset, len(self.past)):
            key = self.past[number]
            self.ledger.event(session, ROOM, number + 1, key, f"d{key[1:]}")
        self.at[session] = (self.epoch, len(self.past))

    def come(self, session: str) -> None:
        if session in self.here:
            return
        self.now += 1
        since = self.ledger.joins(session, ROOM)
        had = self.at.get(session)
        assert (since is None) == (had is None)
        recovered = had is not None and had[0] == self.epoch
        self.ledger.joined(session, ROOM, f"e{self.epoch}", len(self.past), recovered=recovered, now=self.now)
        if not recovered:
            self.at[session] = (self.epoch, len(self.past))
        self.here.add(session)
        self.catch_up(session)

    def go(self, session: str) -> None:
        if session in self.here:
            self.here.remove(session)
            self.ledger.closed(session, 1006)

    def break_off(self, session: str) -> None:
        if session in self.here:
            epoch, offset = self.at[session]
            self.ledger.lost(session, ROOM, f"e{epoch}", offset, "gap")
            self.here.remove(session)

    def flush(self) -> None:
        """The past is gone."""
        for session in sorted(self.here):
            self.break_off(session)
        self.epoch += 1
        self.past.clear()

    def finish(self) -> Ledger:
        for session in self.at:
            self.come(session)
        for publication in self.ledger.publications.values():
            if not publication.answered:  # the retry finds it by its key, or stores it now
                self.ledger.sends(ROOM, publication.key, publication.digest, self.now)
                if publication.key not in self.past:
                    self.past.append(publication.key)
                    for session in self.here:
                        self.catch_up(session)
                offset = self.past.index(publication.key) + 1
                self.ledger.acknowledged(publication.key, f"e{self.epoch}", offset)
        return self.ledger


SESSIONS = ("anna", "bert", "cleo")
ACTIONS: dict[str, Callable[[World], None]] = {
    "publish": World.publish,
    "unanswered": partial(World.publish, answered=False),
    "retried": partial(World.publish, attempts=3),
    "flush": World.flush,
    **{
        f"{verb.__name__} {session}": partial(verb, session=session)
        for verb in (World.come, World.go, World.break_off)
        for session in SESSIONS
    },
}


@given(st.lists(st.sampled_from([*ACTIONS, *["publish"] * 6]), max_size=60))
def test_a_world_without_faults_is_in_order(actions: list[str]) -> None:
    world = World(Ledger())
    world.begin()
    for action in actions:
        ACTIONS[action](world)
    balance = world.finish().balance()
    assert balance.good, balance.evidence
    assert balance.acknowledged == balance.published == world.made


def lively() -> World:
    """Somewhere in the middle: two are there, one is away, events have come."""
    world = World(Ledger())
    world.begin(may_tell=False, may_close=False)
    for session in SESSIONS:
        world.come(session)
    for _ in range(3):
        world.publish()
    return world


def swallow(world: World) -> None:
    """The last of an acknowledged run never reaches anna, and nobody says so."""
    world.made += 1
    world.past.append("k4")
    world.ledger.sends(ROOM, "k4", "d4", 9.0)
    world.ledger.acknowledged("k4", "e0", 4)
    for session in ("bert", "cleo"):
        world.catch_up(session)


def skip(world: World) -> None:
    """Two events are stored, anna gets the second one."""
    for number in (4, 5):
        world.ledger.sends(ROOM, f"k{number}", f"d{number}", 9.0)
    world.ledger.event("anna", ROOM, 5, "k5", "d5")


def forget_over_a_reconnect(world: World) -> None:
    """``recovered: true``, and yet an event is missing."""
    world.ledger.left("anna")
    for number in (4, 5):
        world.ledger.sends(ROOM, f"k{number}", f"d{number}", 9.0)
        world.ledger.acknowledged(f"k{number}", "e0", number)
    world.ledger.joins("anna", ROOM)
    world.ledger.joined("anna", ROOM, "e0", 5, recovered=True, now=10.0)
    world.ledger.event("anna", ROOM, 5, "k5", "d5")


def claim_too_much(world: World) -> None:
    world.ledger.claims("anna", ROOM, "e0", 4)


def hide_a_hole_behind_lost(world: World) -> None:
    world.ledger.lost("anna", ROOM, "e0", 4, "gap")


def repeat(world: World) -> None:
    world.ledger.event("anna", ROOM, 3, "k3", "d3")


def turn_round(world: World) -> None:
    world.ledger.event("anna", ROOM, 1, "k1", "d1")


def store_twice(world: World) -> None:
    world.ledger.event("anna", ROOM, 4, "k3", "d3")


def issue_an_offset_again(world: World) -> None:
    """Bert and anna see different events at one offset."""
    for number in (4, 5):
        world.ledger.sends(ROOM, f"k{number}", f"d{number}", 9.0)
    world.ledger.event("anna", ROOM, 4, "k4", "d4")
    world.ledger.event("bert", ROOM, 4, "k5", "d5")


def acknowledge_where_another_lies(world: World) -> None:
    world.ledger.sends(ROOM, "k4", "d4", 9.0)
    world.ledger.acknowledged("k4", "e0", 3)


def acknowledge_elsewhere(world: World) -> None:
    world.publish(answered=False)
    world.ledger.acknowledged("k4", "e0", 9)


def mix_rooms(world: World) -> None:
    world.ledger.sends("deal:2", "k9", "d9", 9.0)
    world.ledger.event("anna", ROOM, 4, "k9", "d9")


def invent(world: World) -> None:
    world.ledger.event("anna", ROOM, 4, "k-nobody", "d")


def speak_after_the_end(world: World) -> None:
    world.ledger.left("anna")
    world.ledger.event("anna", ROOM, 4, "k1", "d1")


def speak_after_lost(world: World) -> None:
    world.ledger.lost("anna", ROOM, "e0", 3, "gap")
    world.ledger.event("anna", ROOM, 4, "k1", "d1")


def pass_a_new_epoch_for_the_old(world: World) -> None:
    """The store has lost everything, and goes on counting where anna is."""
    world.ledger.sends(ROOM, "k4", "d4", 9.0)
    world.ledger.acknowledged("k4", "e1", 4)
    world.ledger.event("anna", ROOM, 4, "k4", "d4")


def recover_into_another_epoch(world: World) -> None:
    world.ledger.joins("anna", ROOM)
    world.ledger.joined("anna", ROOM, "e1", 3, recovered=True, now=10.0)


def go_back_in_an_epoch(world: World) -> None:
    world.ledger.joins("anna", ROOM)
    world.ledger.joined("anna", ROOM, "e0", 1, recovered=False, now=10.0)


def return_to_an_old_epoch(world: World) -> None:
    for epoch in ("e1", "e0"):
        world.ledger.joins("anna", ROOM)
        world.ledger.joined("anna", ROOM, epoch, 3, recovered=False, now=10.0)


def corrupt(world: World) -> None:
    world.ledger.sends(ROOM, "k4", "d4", 9.0)
    world.ledger.event("anna", ROOM, 4, "k4", "d5")


def tell_for_nothing(world: World) -> None:
    world.ledger.joins("anna", ROOM)
    world.ledger.joined("anna", ROOM, "e0", 3, recovered=False, now=10.0)


def close(world: World) -> None:
    world.ledger.closed("anna", 1011)


def refuse(world: World) -> None:
    world.ledger.sends(ROOM, "k4", "d4", 9.0)
    world.ledger.refused("k4", "internal")


def hand_in(world: World, *numbers: int) -> None:
    for number in numbers:
        world.ledger.sends(ROOM, f"k{number}", f"d{number}", 9.0, by_backend=True)
        world.ledger.accepted(f"k{number}")


def lose_what_was_handed_in(world: World) -> None:
    hand_in(world, 4)


def tell_only_some_what_was_handed_in(world: World) -> None:
    hand_in(world, 4)
    world.ledger.event("anna", ROOM, 4, "k4", "d4")


def turn_entries_round(world: World) -> None:
    hand_in(world, 4, 5)
    for offset, number in ((4, 5), (5, 4)):
        world.ledger.event("anna", ROOM, offset, f"k{number}", f"d{number}")


def keep_less_than_was_acknowledged(world: World) -> None:
    world.ledger.kept(ROOM, {1: "k1", 3: "k3"})


def keep_something_else(world: World) -> None:
    world.ledger.kept(ROOM, {1: "k1", 2: "k3", 3: "k2"})


def whisper_twice(world: World) -> None:
    for number in (1, 2, 2):
        world.ledger.whisper("anna", "p.1", number)


def whisper_backwards(world: World) -> None:
    for number in (1, 3, 2):
        world.ledger.whisper("anna", "p.1", number)


def miscount(world: World) -> None:
    world.ledger.miscounted(ROOM, "n1", 4, 3)


def turn_away(world: World) -> None:
    world.ledger.joins("anna", ROOM)
    world.ledger.turned_away("anna", ROOM, "forbidden")


def never_answer(world: World) -> None:
    world.publish(answered=False)


def stay_away(world: World) -> None:
    world.ledger.left("anna")


CORRUPTIONS: dict[Callable[[World], None], Verdict] = {
    swallow: Verdict.HOLE,
    skip: Verdict.HOLE,
    forget_over_a_reconnect: Verdict.HOLE,
    claim_too_much: Verdict.HOLE,
    hide_a_hole_behind_lost: Verdict.HOLE,
    repeat: Verdict.DUPLICATE,
    turn_round: Verdict.REORDER,
    store_twice: Verdict.TWICE,
    issue_an_offset_again: Verdict.TWICE,
    acknowledge_where_another_lies: Verdict.TWICE,
    acknowledge_elsewhere: Verdict.TWICE,
    mix_rooms: Verdict.FOREIGN,
    invent: Verdict.FOREIGN,
    speak_after_the_end: Verdict.FOREIGN,
    speak_after_lost: Verdict.FOREIGN,
    pass_a_new_epoch_for_the_old: Verdict.STALE,
    recover_into_another_epoch: Verdict.STALE,
    go_back_in_an_epoch: Verdict.STALE,
    return_to_an_old_epoch: Verdict.STALE,
    corrupt: Verdict.CONTENT,
    tell_for_nothing: Verdict.TOLD,
    close: Verdict.CLOSED,
    refuse: Verdict.REFUSED,
    turn_away: Verdict.REFUSED,
    lose_what_was_handed_in: Verdict.UNFINISHED,
    tell_only_some_what_was_handed_in: Verdict.HOLE,
    turn_entries_round: Verdict.REORDER,
    keep_less_than_was_acknowledged: Verdict.GONE,
    keep_something_else: Verdict.GONE,
    whisper_twice: Verdict.DUPLICATE,
    whisper_backwards: Verdict.REORDER,
    miscount: Verdict.PRESENCE,
    never_answer: Verdict.UNFINISHED,
    stay_away: Verdict.UNFINISHED,
}


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.__name__)
def test_every_kind_of_corruption_is_found(corruption: Callable[[World], None]) -> None:
    world = lively()
    corruption(world)
    balance = world.ledger.balance()
    assert balance.of(CORRUPTIONS[corruption]) >= 1, balance
    assert any(CORRUPTIONS[corruption].value in line for line in balance.evidence)


def test_every_verdict_has_its_corruption() -> None:
    assert set(CORRUPTIONS.values()) == set(Verdict)


@given(
    st.lists(st.sampled_from([*ACTIONS, *["publish"] * 6]), max_size=40),
    st.sampled_from(["swallow", "repeat", "skip"]),
    st.data(),
)
def test_one_corruption_in_a_long_run_is_found(actions: list[str], kind: str, data: st.DataObject) -> None:
    """One message to one session is swallowed, said twice, or said without those before it."""
    world = World(Ledger())
    world.begin()
    for session in SESSIONS:
        world.come(session)
    for action in actions:
        ACTIONS[action](world)
    world.come("anna")
    missed = data.draw(st.integers(1, 3))
    if kind == "repeat":
        world.publish()
        world.ledger.event("anna", ROOM, len(world.past), world.past[-1], f"d{world.made}")
        expected = Verdict.DUPLICATE
    else:
        world.here.remove("anna")  # the world forgets her; the ledger does not
        for _ in range(missed):
            world.publish()
        world.at["anna"] = (world.epoch, len(world.past))
        world.here.add("anna")
        if kind == "skip":
            world.publish()
        expected = Verdict.HOLE
    balance = world.finish().balance()
    assert balance.of(expected) >= 1, balance


def test_what_is_told_is_no_fault_where_it_is_allowed() -> None:
    world = lively()
    world.begin(may_tell=True, may_close=True)
    world.publish()
    world.go("anna")
    world.publish()
    world.flush()
    world.publish()
    balance = world.finish().balance()
    assert balance.good, balance.evidence
    assert (balance.acknowledged, balance.told, balance.closed, balance.interrupted) == (3, 3, 1, 2)


def test_an_epoch_that_came_and_went_while_nobody_looked_was_told() -> None:
    world = World(Ledger())
    world.begin()
    world.come("anna")
    world.go("anna")
    world.flush()
    world.publish()
    world.flush()
    assert world.finish().balance().good


def test_what_was_published_after_the_word_is_not_covered_by_it() -> None:
    world = World(Ledger())
    world.begin()
    world.come("anna")
    world.flush()
    world.come("anna")
    world.ledger.sends(ROOM, "k9", "d9", 99.0)
    world.ledger.acknowledged("k9", "e5", 1)
    assert world.ledger.balance().of(Verdict.HOLE) == 1


def test_an_interval_told_inside_an_epoch_covers_no_more_than_itself() -> None:
    ledger = Ledger()
    ledger.begin(may_tell=True)
    ledger.joins("anna", ROOM)
    ledger.joined("anna", ROOM, "e", 5, recovered=False, now=1.0)
    ledger.joins("anna", ROOM)
    ledger.joined("anna", ROOM, "e", 9, recovered=False, now=2.0)
    for number in (3, 7, 10):
        ledger.sends(ROOM, f"k{number}", "d", 0.0)
        ledger.acknowledged(f"k{number}", "e", number)
    (line,) = ledger.balance().evidence
    assert "k10" in line


def test_rounds_are_judged_one_by_one() -> None:
    world = lively()
    skip(world)
    assert not world.ledger.balance().good
    for number in (4, 5):
        world.ledger.acknowledged(f"k{number}", "e0", number)
    world.begin()
    assert world.ledger.balance(tops={}).published == 0


def test_who_is_behind_the_top_is_named() -> None:
    world = lively()
    position = world.ledger.follower("anna", ROOM).position
    assert position is not None
    assert world.ledger.behind({ROOM: position}) == []
    further = position._replace(offset=99)
    assert {one.session for one in world.ledger.behind({ROOM: further})} == set(SESSIONS)
    assert world.ledger.balance(tops={ROOM: further}).of(Verdict.UNFINISHED) == 3


def test_what_backends_handed_in_has_no_answer_but_must_come() -> None:
    world = lively()
    world.ledger.sends(ROOM, "k4", "d4", 9.0, by_backend=True)
    world.past.append("k4")
    for session in SESSIONS:
        world.catch_up(session)
    assert world.ledger.outstanding == 1, "it came before the store's answer did"
    world.ledger.accepted("k4")
    assert world.ledger.outstanding == 0
    balance = world.ledger.balance()
    assert balance.good, balance.evidence
    assert balance.handed_in == 1


def test_a_store_that_may_forget_may_forget_what_was_handed_in() -> None:
    world = lively()
    world.begin(may_tell=True)
    hand_in(world, 4)
    assert world.ledger.outstanding == 0
    assert world.ledger.balance().good


def test_what_is_kept_is_no_fault() -> None:
    world = lively()
    assert world.ledger.oldest_acknowledged(ROOM) == 1
    assert world.ledger.oldest_acknowledged("deal:2") is None
    world.ledger.kept(ROOM, {1: "k1", 2: "k2", 3: "k3", 4: "somebody's"})
    assert world.ledger.balance().good


def test_whispers_are_judged_for_each_connection_by_itself() -> None:
    world = lively()
    for number in (1, 2, 5):
        world.ledger.whisper("anna", "p.1", number)
        world.ledger.whisper("bert", "p.1", number)
        world.ledger.whisper("anna", "p.2", number)
    world.ledger.left("anna")
    world.ledger.whisper("anna", "p.1", 1)
    assert world.ledger.balance().of(Verdict.DUPLICATE, Verdict.REORDER) == 0


def test_a_flood_of_violations_is_counted_and_cut() -> None:
    world = lively()
    for _ in range(100):
        repeat(world)
    balance = world.ledger.balance()
    assert balance.of(Verdict.DUPLICATE) == 100
    assert len(balance.evidence) < 100
