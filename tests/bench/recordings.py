"""Recordings made by hand: what the load client would have written down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import orjson

from bench.recording import OUTCOME, PAYLOAD, RECORD, Recording
from bench.workload import Workload

START = 5_000_000_000
TEXT = 0x81


class Frame(NamedTuple):
    """A frame that a connection received ``at`` ns after the start, with these events in it."""

    connection: int
    numbers: tuple[int, ...]
    at: int = 0


def payload_of(numbers: Iterable[int]) -> bytes:
    """What the broker would send: a batch of events."""
    return orjson.dumps([{"op": "event", "room": "r", "data": {"n": f"{number:010d}"}} for number in numbers])


def workload(
    member: Sequence[int], publishes: Sequence[tuple[int, int]], deaf: Iterable[int] = ()
) -> Workload:
    """Connections by room, and ``publishes`` as (publisher, room), one a millisecond."""
    rooms = 1 + max([*member, *(room for _, room in publishes)], default=0)
    return Workload(
        rooms=[f"bench:{index}" for index in range(rooms)],
        member=np.array(member, dtype=np.int32),
        at=np.arange(len(publishes), dtype=np.uint64) * np.uint64(1_000_000),
        publisher=np.array([publisher for publisher, _ in publishes], dtype=np.int32),
        room=np.array([room for _, room in publishes], dtype=np.int32),
        bodies=["{}"],
        deaf=frozenset(deaf),
    )


def recording(
    load: Workload,
    frames: Sequence[Frame],
    *,
    raw: Sequence[tuple[int, bytes]] = (),
    unsent: Iterable[int] = (),
) -> Recording:
    """A recording of ``frames``, then of ``raw`` payloads as (connection, bytes); all were ready."""
    received = [(frame.connection, START + frame.at, payload_of(frame.numbers)) for frame in frames]
    received += [(connection, START, payload) for connection, payload in raw]
    numbers: dict[bytes, int] = {}
    records = np.array(
        [(at, connection, numbers.setdefault(payload, len(numbers))) for connection, at, payload in received],
        dtype=RECORD,
    )
    payloads = np.zeros(len(numbers), dtype=PAYLOAD)
    payloads["length"] = [len(payload) for payload in numbers]
    payloads["offset"] = np.cumsum(payloads["length"]) - payloads["length"]
    payloads["head"] = TEXT
    outcomes = np.zeros(load.connections, dtype=OUTCOME)
    outcomes["started"], outcomes["ready"] = 1_000_000, 3_000_000
    sent_at = load.at + np.uint64(START)
    sent_at[list(unsent)] = 0
    return Recording(
        outcomes=outcomes,
        sent_at=sent_at,
        records=records,
        payloads=payloads,
        arena=b"".join(numbers),
        setup_started=0,
        setup_ended=START,
        started=START,
        published=START + 10**9,
        last_data=START + 10**9,
    )
