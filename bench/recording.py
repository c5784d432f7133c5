"""What the load client wrote down, as arrays; the layout mirrors the structs of ``load.c``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTCOME = np.dtype(
    [(name, np.uint64) for name in ("started", "upgraded", "ready", "ended", "frames", "bytes")]
    + [(name, np.uint32) for name in ("why", "detail", "pings", "unused")]
)
RECORD = np.dtype([("at", np.uint64), ("connection", np.uint32), ("payload", np.uint32)])
PAYLOAD = np.dtype([("offset", np.uint64), ("length", np.uint32), ("head", np.uint32)])
HEADER = np.dtype(
    [("magic", "S8")]
    + [(name, np.uint64) for name in ("records", "payloads", "arena", "overflow")]
    + [
        (name, np.uint64)
        for name in ("setup_started", "setup_ended", "started", "published", "last_data", "ended")
    ]
    + [(name, np.uint32) for name in ("connections", "publishes", "finals_missing", "unsent_bytes")]
)


class Why(IntEnum):
    """Why a connection ended before the run did."""

    FINE = 0
    CONNECT_FAILED = 1
    UPGRADE_REFUSED = 2
    CLOSED = 3
    END_OF_FILE = 4
    SOCKET_ERROR = 5
    BAD_FRAME = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One run. Times are nanoseconds of the monotonic clock, 0 for never.

    ``started`` is the schedule's zero; ``sent_at`` when each publish really
    left; ``records`` every data frame in order of arrival; ``payloads`` the
    distinct ones, slices of ``arena``. ``overflow`` counts frames that the
    client had no room to write down, ``finals_missing`` unanswered questions.
    """

    outcomes: NDArray[Any]
    sent_at: NDArray[np.uint64]
    records: NDArray[Any]
    payloads: NDArray[Any]
    arena: bytes
    setup_started: int
    setup_ended: int
    started: int
    published: int
    last_data: int
    overflow: int = 0
    finals_missing: int = 0

    def payload(self, number: int) -> tuple[int, bytes]:
        """First byte of the frame, and the bytes, of one distinct payload."""
        entry = self.payloads[number]
        offset = int(entry["offset"])
        return int(entry["head"]), self.arena[offset : offset + int(entry["length"])]


def read_recording(path: Path) -> Recording:
    """Read a recording. Raises ``ValueError`` if it is none, or cut short."""
    with path.open("rb") as file:
        header = _take(file, HEADER, 1)[0]
        if header["magic"] != b"blrec01":
            raise ValueError(f"{path} is no recording")
        return Recording(
            outcomes=_take(file, OUTCOME, header["connections"]),
            sent_at=_take(file, np.dtype(np.uint64), header["publishes"]),
            records=_take(file, RECORD, header["records"]),
            payloads=_take(file, PAYLOAD, header["payloads"]),
            arena=file.read(),
            **{
                name: int(header[name])
                for name in (
                    "setup_started",
                    "setup_ended",
                    "started",
                    "published",
                    "last_data",
                    "overflow",
                    "finals_missing",
                )
            },
        )


def _take(file: Any, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    items = np.fromfile(file, dtype=dtype, count=int(count))
    if len(items) != count:
        raise ValueError(f"{file.name} is cut short")
    return items
