"""The languages of the subjects: how to join, publish and ask, and how to read what they send.

A dialect makes text; :mod:`bench.plan` frames it. ``read`` is called once per
distinct payload of a run, so it may be slow and thorough.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import orjson
import zstandard

from bench.recording import Recording
from bench.workload import SEQUENCE, Workload

_RSV1 = 0x40
_DEFLATE_TAIL = b"\x00\x00\xff\xff"
"""Stripped by the sender of a compressed message (RFC 7692 section 7.2.1)."""
_DECOMPRESSED_MAX = 64 << 20
_STRANGE = -1
"""Number of an event that nobody published in this run."""


Positions = Mapping[str, tuple[str, int]]
"""Room → epoch and offset."""


class Content(NamedTuple):
    """What one payload said: the numbers of its events, and everything else that matters."""

    events: list[int]
    notices: list[str]


class Dialect(Protocol):
    """How one kind of server is spoken to."""

    path: str
    headers: tuple[str, ...]
    engine_io: bool

    def opening(self, room: str | None) -> list[str]:
        """Texts to send after the upgrade, one upon each frame the server sends; ready upon one more."""

    def publish(self, room: str, body: str) -> str:
        """Publish ``body`` (JSON) in ``room``, without asking for a reply."""

    def ask(self) -> str:
        """Ask for one reply."""

    def read(self, head: int, payload: bytes) -> Content:
        """Understand one payload; ``head`` is the first byte of its frame. Raises ``ValueError``."""


class Broker:
    """The broker's own protocol (``docs/protocol.md``), also spoken by the ``ws`` and ``websockets`` peers.

    ``codec`` is ``json``, ``zstd`` or ``deflate``. ``dictionary`` names the zstd
    dictionary to ask for; ``dictionaries`` hold what is needed to read.
    """

    path = "/ws"
    engine_io = False

    def __init__(
        self,
        codec: str = "json",
        *,
        dictionary: int | None = None,
        dictionaries: Mapping[int, bytes] | None = None,
    ) -> None:
        self.codec = codec
        self.headers = {
            "json": (),
            "zstd": ("Sec-WebSocket-Protocol: broker.v1.zstd",),
            "deflate": ("Sec-WebSocket-Extensions: permessage-deflate",),
        }[codec]
        self._dictionary = dictionary
        self._plain = zstandard.ZstdDecompressor()
        self._by_id = {
            number: zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(data))
            for number, data in (dictionaries or {}).items()
        }

    def opening(self, room: str | None) -> list[str]:
        texts = []
        if self._dictionary is not None:
            texts.append(_json({"op": "dict", "id": 2, "dict": self._dictionary}))
        if room is not None:
            texts.append(_json({"op": "join", "id": 1, "room": room}))
        return texts

    def publish(self, room: str, body: str) -> str:
        return f'{{"op":"publish","room":"{room}","event":"update","data":{body}}}'

    def ask(self) -> str:
        return _json({"op": "ping", "id": 2})

    def read(self, head: int, payload: bytes) -> Content:
        events: list[int] = []
        notices: list[str] = []
        for message in orjson.loads(self.plain(head, payload)):
            match message["op"]:
                case "event":
                    events.append(int(message["data"]["n"]))
                case "welcome" | "ok":
                    pass
                case op:
                    notices.append(
                        " ".join(str(message[key]) for key in ("op", "code", "reason") if key in message)
                        or op
                    )
        return Content(events, notices)

    def plain(self, head: int, payload: bytes) -> bytes:
        """The JSON of a payload."""
        if self.codec == "zstd":
            frame = zstandard.get_frame_parameters(payload)
            decompressor = self._by_id[frame.dict_id] if frame.dict_id else self._plain
            return decompressor.decompress(payload, max_output_size=_DECOMPRESSED_MAX)
        if head & _RSV1:
            return zlib.decompressobj(-15).decompress(payload + _DEFLATE_TAIL, _DECOMPRESSED_MAX)
        return payload


class Acknowledged(Broker):
    """Clients that publish with an ``id``: what counts as arrived is the reply, to the publisher."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets: dict[int, int] = {}
        """What each publish was given."""

    def opening(self, room: str | None) -> list[str]:
        """Nothing is joined: publishing needs no membership."""
        return []

    def publish(self, room: str, body: str) -> str:
        return f'{{"op":"publish","id":"{SEQUENCE}","room":"{room}","event":"update","data":{body}}}'

    def read(self, head: int, payload: bytes) -> Content:
        acknowledged = []
        others = []
        for message in orjson.loads(payload):
            if message["op"] == "ok":
                number = int(message["id"])
                self.offsets[number] = message["offset"]
                acknowledged.append(number)
            else:
                others.append(message)
        return Content(acknowledged, super().read(head, orjson.dumps(others)).notices)

    def stored_in(self, workload: Workload) -> dict[tuple[str, int], int]:
        """Room and offset → number of the publish; only as many entries as there are different positions."""
        return {
            (workload.rooms[workload.room[number]], offset): number for number, offset in self.offsets.items()
        }


class Backends(Broker):
    """Sessions as always, but events come from backends, which ``PUBLISH`` them in Redis."""

    def publish(self, room: str, body: str) -> str:
        words = ("PUBLISH", f"broker:room:{room}", f'{{"event":"update","data":{body}}}')
        return f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)

    def read(self, head: int, payload: bytes) -> Content:
        if head == 0:  # not a frame: an error of Redis
            return Content([], [payload.decode(errors="replace").strip()])
        return super().read(head, payload)


class Returning(Broker):
    """Clients that come back and say where they were; ``positions``: room → epoch and offset.

    Events are known by where they are stored: ``numbers``, (room, offset) → number of the publish.
    """

    def __init__(self, positions: Positions, numbers: Mapping[tuple[str, int], int]) -> None:
        super().__init__()
        self._positions = positions
        self._numbers = numbers

    def opening(self, room: str | None) -> list[str]:
        if room is None:
            return []
        epoch, offset = self._positions[room]
        return [_json({"op": "join", "id": 1, "room": room, "since": {"epoch": epoch, "offset": offset}})]

    def read(self, head: int, payload: bytes) -> Content:
        events = []
        others = []
        for message in orjson.loads(payload):
            if message["op"] == "event":
                events.append(self._numbers.get((message["room"], message["offset"]), _STRANGE))
            else:
                others.append(message)
        notices = super().read(head, orjson.dumps(others)).notices
        notices += [
            "not recovered" for message in others if message["op"] == "ok" and not message["recovered"]
        ]
        return Content(events, notices)


def joined_at(recording: Recording) -> Positions:
    """Where the rooms were that the connections of a recording joined."""
    positions = {}
    for number in range(len(recording.payloads)):
        for message in orjson.loads(recording.payload(number)[1]):
            if message["op"] == "ok":
                positions[message["room"]] = message["epoch"], message["offset"]
    return positions


class SocketIO:
    """Socket.IO 4 over Engine.IO 4, WebSocket transport only."""

    path = "/socket.io/?EIO=4&transport=websocket"
    headers: tuple[str, ...] = ()
    engine_io = True

    def opening(self, room: str | None) -> list[str]:
        """Upon Engine.IO's open packet the namespace's connect, upon its answer the join."""
        return ["40"] if room is None else ["40", "420" + _json(["join", room])]

    def publish(self, room: str, body: str) -> str:
        return f'42["publish",{{"room":"{room}","event":"update","data":{body}}}]'

    def ask(self) -> str:
        return "421" + _json(["ask"])

    def read(self, head: int, payload: bytes) -> Content:
        text = payload.decode()
        if text.startswith("42["):
            name, message = orjson.loads(payload[2:])
            return Content([int(message["data"]["n"])], []) if name == "event" else Content([], [name])
        # Engine.IO's open, the namespace's connect, an acknowledgement.
        expected = text.startswith(("0{", "40", "43"))
        return Content([], [] if expected else [text[:40]])


def _json(message: Any) -> str:
    return orjson.dumps(message).decode()
