"""The load client itself, against the floor: both are C, and both are what the figures rest on."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.analysis import analyse
from bench.dialect import Backends, Broker, Dialect, SocketIO
from bench.load import LoadClient, LoadError
from bench.plan import Pace, write_plan
from bench.recording import Recording, Why, read_recording
from bench.servers import Server
from bench.tools import CACHE
from bench.workload import Workload, even, from_elsewhere, inbound, one_room, silent, together
from tests.bench.dribbling_server import UPGRADED, DribblingServer, frame
from tests.redis_server import RedisServer, redis_server

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler"),
    pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux"),
]

PACE = Pace(setup_timeout=20.0, quiet=0.02, lead=0.01)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


def ignore(_phase: str, _done: int, _total: int) -> None:
    pass


def run(load: Workload, tmp_path: Path) -> list[str]:
    plan = tmp_path / "plan"
    CACHE.mkdir(parents=True, exist_ok=True)
    with Server("floor", None) as server:
        write_plan(plan, load, Broker(), server.ports, PACE)
        with LoadClient(plan, None, ignore) as client:
            assert client.wait("ready", 30) == (load.connections, load.connections)
            if load.publishes:
                client.go()
                client.wait("done", 30)
            recording = client.finish()
        assert server.memory() > 0
        assert server.cpu() > 0
    verdict = analyse(load, recording, Broker().read)
    assert verdict.arrived == verdict.expected == load.publishes * np.count_nonzero(load.member >= 0)
    return verdict.faults()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_every_event_is_recorded(tmp_path: Path, size: int) -> None:
    body = f'{{"n":"##########","v":"{"ä" * (size // 2)}"}}'
    assert run(one_room(20, 1000, 0.05, [body, '{"v":"é","n":"##########"}']), tmp_path) == []


def test_questions_are_answered(tmp_path: Path) -> None:
    load = inbound(4, 1000, 0.02, ['{"n":"##########"}'])
    assert run(load, tmp_path) == []


def test_connections_that_say_nothing(tmp_path: Path) -> None:
    assert run(silent(30), tmp_path) == []


def test_nobody_listens(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    with socket.socket() as unheard:  # bound, so that nobody else takes the port, but not listening
        unheard.bind(("127.0.0.1", 0))
        _nobody_listens(plan, unheard.getsockname()[1])


def _nobody_listens(plan: Path, port: int) -> None:
    write_plan(plan, silent(3), Broker(), [port], PACE)
    with LoadClient(plan, None, ignore) as client:
        assert client.wait("ready", 30) == (0, 3)
        recording = client.finish()
    verdict = analyse(silent(3), recording, Broker().read)
    assert set(recording.outcomes["why"].tolist()) == {Why.CONNECT_FAILED}
    assert verdict.faults()[0] == "3 connections never became ready"


def record(server: DribblingServer, tmp_path: Path, dialect: Dialect | None = None) -> Recording:
    plan = tmp_path / "plan"
    write_plan(plan, silent(1), dialect or Broker(), [server.port], PACE)
    with server, LoadClient(plan, None, ignore) as client:
        client.wait("ready", 30)
        client.go()
        client.wait("done", 30)
        return client.finish()


@pytest.mark.parametrize("piece", [1, 3, 1000, 300_000])
def test_frames_cut_anywhere(tmp_path: Path, piece: int) -> None:
    sizes = [0, 1, 125, 126, 400] if piece < 1000 else [0, 125, 126, 65535, 65536, 300_000, 5]
    payloads = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    stream = UPGRADED + b"".join(map(frame, payloads))
    server = DribblingServer([stream[at : at + piece] for at in range(0, len(stream), piece)])
    recording = record(server, tmp_path)
    assert [recording.payload(int(number))[1] for number in recording.records["payload"]] == payloads
    assert recording.outcomes["bytes"][0] == len(stream) - len(UPGRADED)


def test_equal_payloads_are_kept_once(tmp_path: Path) -> None:
    frames = [frame(b"a" * 40), frame(b"b" * 40), frame(b"a" * 40), frame(b"a" * 40, head=0xC1)]
    recording = record(DribblingServer([UPGRADED, *frames]), tmp_path)
    assert recording.records["payload"].tolist() == [0, 1, 0, 2]
    assert recording.payload(2) == (0xC1, b"a" * 40)


def test_pings_are_answered_and_not_recorded(tmp_path: Path) -> None:
    server = DribblingServer([UPGRADED, frame(b"[]"), frame(b"now?", head=0x89)])
    recording = record(server, tmp_path)
    assert server.heard == [(0x8A, b"now?"), (0x88, b"\x03\xe8")]
    assert (len(recording.records), recording.outcomes["pings"][0]) == (1, 1)


def test_engine_io_pings_are_answered(tmp_path: Path) -> None:
    server = DribblingServer([UPGRADED, frame(b"0{}"), frame(b"40{}"), frame(b"2")])
    record(server, tmp_path, SocketIO())
    assert server.heard == [(0x81, b"40"), (0x81, b"3"), (0x88, b"\x03\xe8")]


@pytest.mark.parametrize(
    ("said", "why", "detail"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", Why.UPGRADE_REFUSED, 503),
        (UPGRADED + frame(b"[]") + frame(b"\x11\x9c", head=0x88), Why.CLOSED, 4508),
        (UPGRADED + frame(b"", head=0x88), Why.CLOSED, 1005),
        (UPGRADED + frame(b"[", head=0x01), Why.BAD_FRAME, 0x01),
        (UPGRADED + b"\x81\x84abcdefgh", Why.BAD_FRAME, 0x81),
    ],
)
def test_ends_are_told(tmp_path: Path, said: bytes, why: Why, detail: int) -> None:
    outcome = record(DribblingServer([said]), tmp_path).outcomes[0]
    assert (outcome["why"], outcome["detail"]) == (why, detail)


def test_a_broken_plan_is_told(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(b"no plan" + bytes(200))
    with LoadClient(plan, None, ignore) as client, pytest.raises(LoadError, match="is no plan"):
        client.wait("ready", 30)


def test_a_recording_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(b"blrec01\0" + bytes(20))
    with pytest.raises(ValueError, match="cut short"):
        read_recording(path)
    path.write_bytes(b"something" + bytes(200))
    with pytest.raises(ValueError, match="is no recording"):
        read_recording(path)


def test_each_connection_goes_to_its_own_server(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    servers = [DribblingServer([UPGRADED + frame(text)]) for text in (b"[]", b"[ ]", b"[  ]")]
    load = dataclasses.replace(silent(3), place=np.array([2, 0, 1], dtype=np.int32))
    write_plan(plan, load, Broker(), [server.port for server in servers], PACE)
    with servers[0], servers[1], servers[2], LoadClient(plan, None, ignore) as client:
        assert client.wait("ready", 30) == (3, 3)
        recording = client.finish()
    said = {int(one["connection"]): recording.payload(int(one["payload"]))[1] for one in recording.records}
    assert said == {0: b"[  ]", 1: b"[]", 2: b"[ ]"}


class Short(Broker):
    """Publishes that fit into the frames of a dribbling server."""

    def publish(self, room: str, body: str) -> str:
        return body


TWO_AND_TWO = [b"[<0000000000>,<0000000001>]", b"[<0000000002>,<0000000003>]", b"<0000000004>"]


@pytest.mark.parametrize(
    ("gather", "sent"),
    [
        (1, [b"<0000000000>", b"<0000000001>", b"<0000000002>", b"<0000000003>", b"<0000000004>"]),
        (2, TWO_AND_TWO),
        (9, TWO_AND_TWO),  # what is due at another moment is not waited for
    ],
)
def test_what_is_due_together_goes_out_as_an_array(tmp_path: Path, gather: int, sent: list[bytes]) -> None:
    plan = tmp_path / "plan"
    load = one_room(1, 1000, 0.005, ["<##########>"])
    load = dataclasses.replace(load, at=together(load.at, 2), gather=gather)
    server = DribblingServer([UPGRADED + frame(b"[]"), frame(b"[ ]")])
    write_plan(plan, load, Short(), [server.port], PACE)
    with server, LoadClient(plan, None, ignore) as client:
        client.wait("ready", 30)
        client.go()
        client.wait("done", 30)
        recording = client.finish()
    _joined, *published = [text for head, text in server.heard if head == 0x81]
    assert published == sent
    assert np.all(recording.sent_at > 0)


class Mistaken(Backends):
    """A backend with a command that Redis does not know."""

    def publish(self, room: str, body: str) -> str:
        return "NONSENSE\r\n"


def from_backend(tmp_path: Path, redis: RedisServer, dialect: Backends, count: int) -> list[str]:
    """The faults of a run in which one backend publishes to two rooms that nobody is in."""
    plan = tmp_path / "plan"
    at = even(1000, count / 1000)
    load = from_elsewhere(
        0, 2, 1, at, ['{"n":"##########"}'], sessions_at=0, senders_at=1, backends=True, gather=3
    )
    write_plan(plan, load, dialect, [0, redis.port], PACE)
    with LoadClient(plan, None, ignore) as client:
        assert client.wait("ready", 30) == (1, 1)
        client.go()
        client.wait("done", 30)
        return analyse(load, client.finish(), dialect.read).faults()


def test_a_backend_publishes_in_redis(tmp_path: Path, redis: RedisServer) -> None:
    with redis.client() as client, client.pubsub() as hearing:
        hearing.psubscribe("broker:room:*")
        hearing.get_message(timeout=30)
        assert from_backend(tmp_path, redis, Backends(), 3) == []
        heard = [hearing.get_message(timeout=30) for _ in range(3)]
    assert [(said["channel"], said["data"]) for said in heard if said] == [
        (b"broker:room:bench:0", b'{"event":"update","data":{"n":"0000000000"}}'),
        (b"broker:room:bench:1", b'{"event":"update","data":{"n":"0000000001"}}'),
        (b"broker:room:bench:0", b'{"event":"update","data":{"n":"0000000002"}}'),
    ]


def test_what_redis_refuses_is_a_fault(tmp_path: Path, redis: RedisServer) -> None:
    fault, *more = from_backend(tmp_path, redis, Mistaken(), 2)
    assert fault.startswith("2 times the server said: -ERR unknown command")
    assert more == []
