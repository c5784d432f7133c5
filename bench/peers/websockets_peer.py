"""The same broker on the `websockets` library: asyncio, rooms in a dict, its own ``broadcast``."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import defaultdict
from typing import Any

import orjson
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

rooms: defaultdict[str, set[ServerConnection]] = defaultdict(set)
sessions = itertools.count(1)


def encode(message: dict[str, Any]) -> str:
    return orjson.dumps([message]).decode()


def publish(message: dict[str, Any]) -> None:
    members = rooms.get(message["room"])
    if members:
        event = {"op": "event", "room": message["room"], "event": message["event"]}
        broadcast(members, encode({**event, "data": message["data"], "ts": time.time()}))


async def handle(socket: ServerConnection, mine: set[str], message: dict[str, Any]) -> None:
    match message["op"]:
        case "publish":
            publish(message)
            if "id" not in message:
                return
        case "join":
            rooms[message["room"]].add(socket)
            mine.add(message["room"])
        case "ping":
            pass
        case _:
            await socket.send(encode({"op": "error", "id": message.get("id"), "code": "unknown_op"}))
            return
    await socket.send(encode({"op": "ok", "id": message.get("id"), "ts": time.time()}))


async def session(socket: ServerConnection) -> None:
    mine: set[str] = set()
    try:
        await socket.send(encode({"op": "welcome", "protocol": 1, "session": f"s{next(sessions)}"}))
        async for text in socket:
            await handle(socket, mine, orjson.loads(text))
    except ConnectionClosed:
        pass
    finally:
        for room in mine:
            rooms[room].discard(socket)
            if not rooms[room]:
                del rooms[room]


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # open_timeout: a storm of 10,000 takes longer than the default 10 s to be served.
    async with serve(
        session, "127.0.0.1", 0, compression=None, max_size=64 * 1024, backlog=4096, open_timeout=120
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        print(f"ready ws://127.0.0.1:{port}/ws", flush=True)
        await stop.wait()


asyncio.run(main())
