"""Members of other nodes, as one node reads and hears them."""

from __future__ import annotations

import orjson
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.errors import BrokerError, ErrorCode
from broker.link import wire
from broker.peers import mates as module
from tests.peers.company import Company, Fellow, company, until
from tests.redis_server import RedisServer, redis_server


async def test_who_is_there_already_is_known_after_attaching(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there, third = await nodes.start_all("here", "there", "third")
        here.come("r", "s1", "u1")
        third.come("r", "s3")
        await until(lambda: here.count("told_changes") == third.count("told_changes") == 1)
        assert not there.peers.attached("r")
        await there.peers.attach("r")
        assert there.peers.attached("r")
        assert there.sees("r") == {"s1", "s3"}
        assert there.count("mates_read") == 1
        await there.peers.attach("r")
        assert there.count("mates_read") == 1, "again is the same as once"


async def test_who_attaches_together_reads_once(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        here.come("r", "s1")
        await until(lambda: here.count("told_changes") == 1)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(there.peers.attach, "r")
        assert there.count("mates_read") == 1
        assert there.sees("r") == {"s1"}


async def test_attaching_outlives_who_gave_up(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        here.come("r", "s1")
        await until(lambda: here.count("told_changes") == 1)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as gives_up:
                gives_up.cancel()
                await there.peers.attach("r")
            nursery.start_soon(there.peers.attach, "r")
            await trio.lowlevel.checkpoint()
            there.peers.detach("r")  # by who gave up
        assert there.peers.attached("r")
        assert there.sees("r") == {"s1"}


async def test_a_detached_room_is_not_heard(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        await there.peers.attach("r")
        there.peers.detach("r")
        there.peers.detach("unknown")
        assert not there.peers.attached("r")
        here.come("r", "s1")
        await until(lambda: here.count("told_changes") == 1)
        await there.peers.attach("other")
        assert there.hub.told == []
        assert there.count("attached") == 1


async def test_members_of_a_room_that_is_not_attached(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        assert await there.peers.mates("r") == []
        here.come("r", "s1", "u1")
        here.come("r", "s2")
        there.come("r", "own")
        await until(lambda: here.count("told_changes") == there.count("told_changes") == 1)
        mates = await there.peers.mates("r")
        assert sorted((mate.session, mate.user) for mate in mates) == [("s1", "u1"), ("s2", None)]
        assert not there.peers.attached("r")


async def test_members_of_the_dead_do_not_count(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (there,) = await nodes.start_all("there")
        with nodes.client() as client:
            client.hset(nodes.keys.member_nodes("r"), "dead", 7)
            client.hset(nodes.keys.members("r", "dead"), "s1", '{"session":"s1","user":null}')
            await there.peers.attach("r")
            assert await there.peers.mates("r") == []
            client.publish(
                nodes.keys.live("r"),
                wire.pack(wire.PRESENCE, "dead", 8, body=b'{"after":7,"came":[{"session":"s2"}]}'),
            )
        await until(lambda: there.count("unknown_nodes") == 2)
        assert there.hub.told == []
        with nodes.client() as client:
            await nodes.look_until(lambda: not client.keys(nodes.keys.members("r", "*").replace("{", "?")))
            assert not client.exists(nodes.keys.member_nodes("r"))


async def test_a_node_heard_before_it_was_known_is_read_when_it_is(redis_at: RedisServer) -> None:
    async with company(redis_at, lease=600.0) as nodes:
        (there,) = await nodes.start_all("there")
        await there.peers.attach("r")
        there.deaf.add(wire.ASK)  # misses the news of the new node
        here = await nodes.start("here")
        here.come("r", "s1")
        await until(lambda: there.sees("r") == {"s1"})


async def test_bad_members_and_changes_are_counted_and_cost_only_themselves(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        here.come("r", "s1")
        await until(lambda: here.count("told_changes") == 1)
        with nodes.client() as client:
            client.hset(nodes.keys.members("r", here.peers.id), "bad", '{"session":7}')
            await there.peers.attach("r")
            assert there.sees("r") == {"s1"}
            assert there.count("bad_messages") == 1
            client.hdel(nodes.keys.members("r", here.peers.id), "bad")
            for body in (b"", b"\xff", b'{"after":"x"}', b'{"came":[3]}'):
                client.publish(nodes.keys.live("r"), wire.pack(wire.PRESENCE, here.peers.id, 99, body=body))
        await until(lambda: there.count("bad_messages") == 5)
        here.come("r", "s2")
        await until(lambda: there.sees("r") == {"s1", "s2"})


async def test_late_and_repeated_changes_do_nothing(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        here.come("r", "s1")
        await until(lambda: here.count("told_changes") == 1)
        await there.peers.attach("r")
        late = wire.pack(wire.PRESENCE, here.peers.id, 1, body=b'{"after":0,"came":[{"session":"s1"}]}')
        with nodes.client() as client:
            client.publish(nodes.keys.live("r"), late)
        await until(lambda: there.count("old_versions") == 1)
        assert there.hub.told == [("came", "r", "s1")]


async def test_a_room_is_used_while_redis_is_away_and_heard_when_it_is_back() -> None:
    with redis_server() as server:
        async with company(server) as nodes:
            here, there = await nodes.start_all("here", "there")
            server.kill()
            await until(lambda: not here.link.up and not there.link.up)
            here.come("r", "s1")
            assert list(await there.peers.attach("r", slots=True)) == []
            assert there.peers.attached("r")
            assert there.count("degraded_attaches") == 1
            with pytest.raises(BrokerError) as refused:
                await there.peers.mates("r")
            assert refused.value.code is ErrorCode.UNAVAILABLE
            server.start()
            await until(lambda: there.sees("r") == {"s1"})


async def test_redis_starting_again_empty_makes_nobody_go() -> None:
    with redis_server() as server:
        async with company(server) as nodes:
            here, there = await nodes.start_all("here", "there")
            for node, other in ((here, there), (there, here)):
                await node.peers.attach("r")
                node.come("r", f"of {other.name}")
            await until(lambda: here.sees("r") and there.sees("r"))
            server.kill()
            await until(lambda: not here.link.up and not there.link.up)
            server.start()
            await until(lambda: here.count("told_anew") and there.count("told_anew"))
            await until(lambda: len(here.names()) == len(there.names()) == 2)
            await nodes.settle()
            for node in (here, there):
                assert [what for what, *_ in node.hub.told] == ["came"]


async def test_who_has_left_while_redis_was_away_goes_once_absence_counts(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        await there.peers.attach("r")
        here.come("r", "s1")
        await until(lambda: there.sees("r") == {"s1"})
        there.deaf.add(wire.PRESENCE)
        here.go("r", "s1")
        await until(lambda: here.count("member_rooms") == 0)
        with nodes.client() as client:
            client.hdel(nodes.keys.beats, "last", "began")  # as if Redis had been away
        there.peers.on_up()
        await until(lambda: there.count("settled") == 0 and there.count("mates_read") == 2)
        await trio.testing.wait_all_tasks_blocked()
        assert there.sees("r") == {"s1"}
        await nodes.settle()
        await until(lambda: not there.sees("r"))


async def test_reads_are_repeated_when_redis_refuses_them(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        with nodes.client() as client:
            client.set(nodes.keys.member_nodes("r"), "of the wrong type")
            await there.peers.attach("r")
            assert there.count("failed_reads") >= 1
            client.delete(nodes.keys.member_nodes("r"))
        here.come("r", "s1")
        await until(lambda: there.sees("r") == {"s1"})


async def test_who_attaches_does_not_wait_for_a_redis_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    with redis_server() as server:
        async with company(server) as nodes:
            here, there = await nodes.start_all("here", "there")
            here.come("r", "s1")
            await until(lambda: here.count("told_changes") == 1)
            server.freeze()
            try:
                await there.peers.attach("r")
                assert there.link.up
                assert there.count("degraded_attaches") == 1
            finally:
                server.thaw()
            await until(lambda: there.sees("r") == {"s1"})


async def test_many_rooms_are_read_a_window_at_a_time(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        rooms = [f"room:{number}" for number in range(3 * module.WINDOW)]
        for room in rooms:
            here.come(room, "s1")
            there.interest.want(room, "test")
        await until(lambda: here.count("told_changes") == len(rooms))
        async with trio.open_nursery() as nursery:
            for room in rooms:
                nursery.start_soon(there.peers.attach, room)
        assert all(there.sees(room) == {"s1"} for room in rooms)
        there.peers.on_up()
        await until(lambda: there.count("mates_read") == 2 * len(rooms))


# -- everything at once -----------------------------------------------------------------

NAMES = ("a", "b", "c")
ROOMS = ("r", "s")
WHO = st.sampled_from(NAMES)
WHERE = st.sampled_from(ROOMS)
SESSION = st.integers(0, 3)
STEPS = st.one_of(
    st.tuples(st.just("come"), WHO, WHERE, SESSION, st.integers(0, 99)),
    st.tuples(st.just("come"), WHO, WHERE, SESSION, st.integers(0, 99)),
    st.tuples(st.just("go"), WHO, WHERE, SESSION),
    st.tuples(st.just("go"), WHO, WHERE, SESSION),
    st.tuples(st.just("attach"), WHO, WHERE),
    st.tuples(st.just("detach"), WHO, WHERE),
    st.tuples(st.just("die"), WHO),
    st.tuples(st.just("fence"), WHO),
    st.tuples(st.sampled_from(["cut", "lose", "pause"])),
)


class Model:
    """Three nodes under a list of steps; in the end each sees the truth."""

    def __init__(self, nodes: Company) -> None:
        self.nodes = nodes
        self.fellows: dict[str, Fellow] = {}
        self.attached: dict[str, set[str]] = {name: set() for name in NAMES}

    async def run(self, steps: list[tuple[object, ...]]) -> None:
        for name, fellow in zip(NAMES, await self.nodes.start_all(*NAMES), strict=True):
            self.fellows[name] = fellow
        for what, *arguments in steps:
            await getattr(self, f"_{what}")(*arguments)
        await self.nodes.look_until(lambda: all(len(one.names()) == 3 for one in self.fellows.values()))
        await self.nodes.settle()
        await self.nodes.look_until(self._true)

    def _true(self) -> bool:
        return all(
            self.fellows[name].hub.mates(room) == self._truth(name, room)
            for name in NAMES
            for room in self.attached[name]
        )

    def _truth(self, name: str, room: str) -> dict[str, bytes]:
        return {
            session: orjson.dumps(member.describe())
            for other, fellow in self.fellows.items()
            if other != name
            for session, member in fellow.members.get(room, {}).items()
        }

    async def _come(self, name: str, room: str, session: int, state: int) -> None:
        self.fellows[name].come(room, f"{name}{session}", state=state)

    async def _go(self, name: str, room: str, session: int) -> None:
        if f"{name}{session}" in self.fellows[name].members.get(room, {}):
            self.fellows[name].go(room, f"{name}{session}")

    async def _attach(self, name: str, room: str) -> None:
        self.attached[name].add(room)
        await self.fellows[name].peers.attach(room)

    async def _detach(self, name: str, room: str) -> None:
        if room in self.attached[name]:
            self.attached[name].discard(room)
            self.fellows[name].peers.detach(room)
            self.fellows[name].hub.forget(room)

    async def _die(self, name: str) -> None:
        old = self.fellows[name]
        old.die()
        self.nodes.expire(old)
        self.fellows[name] = await self.nodes.start(name)
        self.attached[name].clear()

    async def _fence(self, name: str) -> None:
        self.nodes.take_out(self.fellows[name])

    async def _cut(self) -> None:
        with self.nodes.client() as client:
            client.client_kill_filter(_type="pubsub")
            client.client_kill_filter(_type="normal", skipme=True)

    async def _lose(self) -> None:
        with self.nodes.client() as client:
            client.flushall()

    async def _pause(self) -> None:
        await trio.sleep(0.06)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, max_size=25))
def test_every_node_sees_the_truth_in_the_end(redis_at: RedisServer, steps: list[tuple[object, ...]]) -> None:
    async def main() -> None:
        with redis_at.client() as client:
            client.flushall()
        async with company(redis_at) as nodes:
            await Model(nodes).run(steps)

    trio.run(main)
