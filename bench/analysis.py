"""Holds a recording against its workload: whether all arrived that was meant to, once, in order, how late.

Theory. A record says that a connection received a payload; a payload, decoded
once, holds the numbers of its events. Spreading each record into its events
gives every delivery of the run as three arrays (connection, number, time), and
each question becomes arithmetic on them: the numbers a connection must have are
those of its room, so counting (connection, rank in the room) shows what is
missing or came twice; order is that of each publisher, since two publishers'
frames may overtake each other on their way in. Tens of millions of deliveries
do not fit in memory at once, so connections are taken in portions. Latency is
counted from the intended moment of the publish, and percentiles are taken over
all raw samples, never over averages.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from bench.dialect import Content
from bench.recording import Recording, Why
from bench.workload import Workload

PORTION = 4_000_000
"""Deliveries looked at together: some 200 MB of arrays."""

Read = Callable[[int, bytes], Content]


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What a run came to. Counts are deliveries unless they say otherwise; times are milliseconds."""

    connections: int
    ready: int
    intended: int = 0
    """With those that could not be sent; ``expected`` without."""
    expected: int = 0
    arrived: int = 0
    missing: int = 0
    duplicated: int = 0
    foreign: int = 0
    """Events of a room the connection is not in, or that nobody sent."""
    reordered: int = 0
    unsent: int = 0
    """Publishes that could not be sent because their connection was gone."""
    unreadable: int = 0
    """Distinct payloads that could not be decoded."""
    unrecorded: int = 0
    unanswered: int = 0
    unstored: int = 0
    """Acknowledged, but not where the store should have it."""
    unacknowledged: int = 0
    """Stored more than was acknowledged."""
    ended: Counter[str] = field(default_factory=Counter)
    """Connections that ended before the run did, by reason."""
    notices: Counter[str] = field(default_factory=Counter)
    """Messages that were not asked for (errors, losses), by text."""
    deaf_ended: Counter[str] = field(default_factory=Counter)
    deaf_notices: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    """Data frames during the run, at connections held to account."""
    payload_bytes: int = 0
    latency: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    setup: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """From ``connect`` to ready, of each connection."""
    lag: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """How late the load client itself was, of each publish."""

    def faults(self) -> list[str]:
        """What went wrong, in words; empty if every event arrived once and in order."""
        counts = {
            "connections never became ready": self.connections - self.ready,
            "deliveries are missing": self.missing,
            "deliveries came twice": self.duplicated,
            "deliveries went to the wrong connection": self.foreign,
            "deliveries are out of order": self.reordered,
            "publishes could not be sent": self.unsent,
            "payloads could not be decoded": self.unreadable,
            "frames did not fit in the recording": self.unrecorded,
            "questions were not answered": self.unanswered,
            "acknowledged events are not stored": self.unstored,
            "stored events were not acknowledged": self.unacknowledged,
        }
        faults = [f"{count:,} {what}" for what, count in counts.items() if count]
        faults += [f"{count:,} connections ended: {reason}" for reason, count in self.ended.most_common(3)]
        faults += [f"{count:,} times the server said: {text}" for text, count in self.notices.most_common(3)]
        return faults

    def arrival(self) -> float:
        """Percent of all intended deliveries that arrived; 100 of none."""
        return 100.0 * self.arrived / self.intended if self.intended else 100.0

    def percentile(self, *points: float) -> list[float]:
        """Percentiles of latency over all deliveries (ms); not a number where there were none."""
        if not len(self.latency):
            return [float("nan")] * len(points)
        return [float(value) for value in np.percentile(self.latency, points)]


class _Contents:
    """All distinct payloads, decoded; ``numbers[first[p] : first[p] + count[p]]`` are the events of p."""

    def __init__(self, recording: Recording, read: Read) -> None:
        contents = [_read(read, *recording.payload(number)) for number in range(len(recording.payloads))]
        self.unreadable = sum(content is None for content in contents)
        self.count = np.array([len(content.events) if content else 0 for content in contents], dtype=np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.numbers = np.array(
            [n for content in contents if content for n in content.events], dtype=np.int64
        )
        self.notices = {
            number: content.notices for number, content in enumerate(contents) if content and content.notices
        }


def _read(read: Read, head: int, payload: bytes) -> Content | None:
    try:
        return read(head, payload)
    except (ValueError, LookupError, TypeError, zlib.error, zstandard.ZstdError):
        return None  # counted, and told as a fault of the run


def analyse(workload: Workload, recording: Recording, read: Read) -> Verdict:
    """Check one run; ``read`` decodes a payload of its dialect."""
    outcomes = recording.outcomes
    contents = _Contents(recording, read)
    verdict = Verdict(
        connections=workload.connections,
        ready=int(np.count_nonzero(outcomes["ready"])),
        unsent=int(np.count_nonzero(recording.sent_at == 0)),
        unreadable=contents.unreadable,
        unrecorded=recording.overflow,
        unanswered=recording.finals_missing,
    )
    opened = outcomes[outcomes["ready"] > 0]
    verdict.setup = _milliseconds(opened["ready"] - opened["started"])
    sent = recording.sent_at > 0
    verdict.lag = _milliseconds(recording.sent_at[sent] - (workload.at[sent] + np.uint64(recording.started)))
    _count_ends(verdict, workload, outcomes)
    _count_notices(verdict, workload, recording, contents)
    _count_deliveries(verdict, workload, recording, contents)
    return verdict


def _milliseconds(nanoseconds: NDArray[Any]) -> NDArray[np.float32]:
    return (nanoseconds.astype(np.int64) / 1e6).astype(np.float32)


def _count_ends(verdict: Verdict, workload: Workload, outcomes: NDArray[Any]) -> None:
    for index in np.flatnonzero(outcomes["why"] != Why.FINE).tolist():
        why, detail = Why(outcomes["why"][index]), int(outcomes["detail"][index])
        reason = f"{why.name.lower().replace('_', ' ')} {detail}"
        (verdict.deaf_ended if index in workload.deaf else verdict.ended)[reason] += 1


def _count_notices(verdict: Verdict, workload: Workload, recording: Recording, contents: _Contents) -> None:
    if not contents.notices:
        return
    records = recording.records
    for record in records[np.isin(records["payload"], list(contents.notices))]:
        deaf = int(record["connection"]) in workload.deaf
        (verdict.deaf_notices if deaf else verdict.notices).update(contents.notices[int(record["payload"])])


class _Order:
    """The rank of each publish within its room, as far as it was sent, and how many each room had."""

    def __init__(self, workload: Workload, sent: NDArray[np.bool_]) -> None:
        rooms = workload.room.astype(np.int64)
        self.size = np.bincount(rooms[sent], minlength=max(1, len(workload.rooms)))
        self.rank = np.full(len(rooms), -1, dtype=np.int64)
        numbers = np.flatnonzero(sent)
        by_room = numbers[np.argsort(rooms[numbers], kind="stable")]
        starts = np.cumsum(self.size) - self.size
        self.rank[by_room] = np.arange(len(by_room)) - starts[rooms[by_room]]


def _count_deliveries(
    verdict: Verdict, workload: Workload, recording: Recording, contents: _Contents
) -> None:
    order = _Order(workload, recording.sent_at > 0)
    member = workload.member.astype(np.int64)
    held = np.ones(workload.connections, dtype=bool)
    held[sorted(workload.deaf)] = False
    size = np.where(member >= 0, order.size[member], 0) * held
    verdict.expected = int(size.sum())
    all_of = np.bincount(workload.room, minlength=max(1, len(workload.rooms)))
    verdict.intended = int((np.where(member >= 0, all_of[member], 0) * held).sum())

    records = recording.records
    known = records["payload"] < len(recording.payloads)
    during = records["at"] >= recording.started if recording.started else np.zeros(len(records), dtype=bool)
    records = records[known & during & held[records["connection"]]]
    verdict.frames = len(records)
    verdict.payload_bytes = int(recording.payloads["length"][records["payload"]].sum())
    records = records[contents.count[records["payload"]] > 0]
    records = records[np.argsort(records["connection"], kind="stable")]

    latencies = []
    for portion in _portions(records, contents.count):
        latencies.append(_check(verdict, workload, recording, order, portion, contents))
    verdict.missing = verdict.expected - verdict.arrived
    if latencies:
        verdict.latency = np.concatenate(latencies)


def _portions(records: NDArray[Any], count: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Cut at connections, so that each portion holds about :data:`PORTION` deliveries."""
    total = np.cumsum(count[records["payload"]])
    begin = 0
    while begin < len(records):
        done = int(total[begin - 1]) if begin else 0
        end = int(np.searchsorted(total, done + PORTION))
        if end < len(records):
            # To the end of the connection that the cut falls into.
            end = int(np.searchsorted(records["connection"], records["connection"][end], side="right"))
        yield records[begin:end]
        begin = end


def _check(  # noqa: PLR0917 - all that is known of the run
    verdict: Verdict,
    workload: Workload,
    recording: Recording,
    order: _Order,
    records: NDArray[Any],
    contents: _Contents,
) -> NDArray[np.float32]:
    """Count one portion into ``verdict``; returns its latencies."""
    times = contents.count[records["payload"]]
    before = np.cumsum(times) - times
    inside = np.arange(int(times.sum())) - np.repeat(before, times)
    number = contents.numbers[np.repeat(contents.first[records["payload"]], times) + inside]
    connection = np.repeat(records["connection"].astype(np.int64), times)
    at = np.repeat(records["at"].astype(np.int64), times)

    real = (number >= 0) & (number < workload.publishes)
    meant = real.copy()
    meant[real] = workload.room[number[real]] == workload.member[connection[real]]
    meant[meant] = order.rank[number[meant]] >= 0
    verdict.foreign += int(np.count_nonzero(~meant))
    number, connection, at = number[meant], connection[meant], at[meant]
    if not len(number):
        return np.zeros(0, dtype=np.float32)

    width = int(order.size.max())
    low = int(connection.min())
    copies = np.bincount((connection - low) * width + order.rank[number])
    arrived = int(np.count_nonzero(copies))
    verdict.arrived += arrived
    verdict.duplicated += len(number) - arrived
    verdict.reordered += _overtaken(connection, number, workload.publisher)
    late: NDArray[np.int64] = at - recording.started - workload.at[number].astype(np.int64)
    return _milliseconds(late)


def _overtaken(connection: NDArray[np.int64], number: NDArray[np.int64], publisher: NDArray[np.int32]) -> int:
    """How many deliveries came after a later one of the same publisher to the same connection."""
    if not np.any((connection[1:] == connection[:-1]) & (number[1:] < number[:-1])):
        return 0  # the common case: in order over all publishers, no need to sort
    by_publisher = np.lexsort((publisher[number], connection))  # stable: keeps the order of arrival
    connection, number = connection[by_publisher], number[by_publisher]
    source = publisher[number]
    same = (connection[1:] == connection[:-1]) & (source[1:] == source[:-1])
    return int(np.count_nonzero(same & (number[1:] < number[:-1])))
