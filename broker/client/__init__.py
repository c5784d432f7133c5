"""Python client of the broker, for Trio.

::

    from broker.client import connect

    async with connect("ws://127.0.0.1:8765/ws", token=fetch_token) as client:
        room = await client.join("deal:7", tail=10)
        await client.publish("deal:7", "updated", {"stage": "won"})
        async for event in room:
            print(event.name, event.data)

Read in this order: :mod:`~broker.client.client` is the face;
:mod:`~broker.client.session` reconnects; :mod:`~broker.client.life` is one
connection's life; :mod:`~broker.client.reception` and
:mod:`~broker.client.rooms` are what was received;
:mod:`~broker.client.link` speaks to trio-websocket. ``docs/client-python.md``
tells its users what they can rely on.
"""

from broker.client.backoff import Backoff
from broker.client.client import Client, ClientStatistics, connect
from broker.client.errors import (
    ClientError,
    Closed,
    ConnectFailed,
    ConnectionLost,
    RequestError,
    RoomClosed,
)
from broker.client.messages import (
    Event,
    History,
    Item,
    Left,
    Lost,
    Member,
    Members,
    Position,
    Presence,
    Rejoined,
    Welcome,
)
from broker.client.rooms import Room, Stream

__all__ = [
    "Backoff",
    "Client",
    "ClientError",
    "ClientStatistics",
    "Closed",
    "ConnectFailed",
    "ConnectionLost",
    "Event",
    "History",
    "Item",
    "Left",
    "Lost",
    "Member",
    "Members",
    "Position",
    "Presence",
    "Rejoined",
    "RequestError",
    "Room",
    "RoomClosed",
    "Stream",
    "Welcome",
    "connect",
]
