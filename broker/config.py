"""Every setting, with its unit and its reason.

The structures below are the schema: TOML tables, ``BROKER_…`` variables and
command-line flags are all derived from them (see :mod:`broker.settings_loader`
for how the three are read and merged). ``config/broker.toml`` is the same list
as a manual. Durations are seconds, sizes are bytes, rates are per second.

Ranges stand in the types below, so that the loader, the flags and the manual
tell the same ones; what one key's type cannot say is in
:mod:`broker.settings_checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""A TCP port; 0 lets the system choose one, which the ``ready`` line tells."""

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
"""A name, an address or a path. 4096: PATH_MAX on Linux, and nothing here is longer."""

Deadline = Annotated[float, msgspec.Meta(gt=0, le=3600)]
"""How long something may take (s). 0 would end everything at once; above an hour it protects nobody."""

Pause = Annotated[float, msgspec.Meta(ge=0, le=3600)]
"""How long to wait or to tolerate (s), 0 for not at all."""

Window = Annotated[float, msgspec.Meta(ge=0, le=1)]
"""How long to gather before acting (s). Above a second nobody would call it real time."""

PerSecond = Annotated[float, msgspec.Meta(ge=0, le=10_000_000)]
"""A rate; 0 for no limit. 10 million is beyond what one process can do, so it only catches slips."""

Count = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)]
"""A number of things, with 0 for none or for no limit; the top only catches slips."""

Some = Annotated[int, msgspec.Meta(ge=1, le=100_000_000)]
"""A number of things of which at least one is needed; there is no way to say "no limit"."""

Size = Annotated[int, msgspec.Meta(ge=64, le=GIB)]
"""A bound on memory that cannot be lifted. 64 bytes hold the shortest messages; 1 GiB bounds nothing."""

Access = Literal["token", "user", "anyone"]
"""Who may do it: only whose token names the room · any authenticated user · every session."""

Texts = Annotated[tuple[Text, ...], msgspec.Meta(extra={"or_one": True})]
"""A list of texts, or one text alone, which is a list of one."""

SlowPolicy = Literal["disconnect", "drop", "latest"]
"""What a full outbox means for a room's events (``docs/slow-consumers.md``)."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table: immutable, and an unknown key is an error."""


class Server(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The client port."""

    host: Text = "127.0.0.1"
    port: Port = 8765
    tls_cert: Text | None = None
    tls_key: Text | None = None
    backlog: Some = 4096
    """Connections the kernel may queue before we accept them; a storm of 10,000 must not lose one."""
    origins: tuple[Text, ...] = ()
    """Origins browsers may connect from (``https://app.example.com``); empty: same host only.

    ``"loopback"`` stands for every page of this machine, ``"null"`` for sandboxed and local pages,
    ``"*"`` for any page at all: tokens, not cookies, authenticate, so strangers' pages may try, no more.
    """
    trusted_proxies: tuple[Text, ...] = ()
    """Addresses or networks whose ``X-Forwarded-For`` names the client."""
    deflate: bool = True
    """Offer permessage-deflate (never together with zstd)."""
    zstd: bool = True
    """Offer the ``broker.v1.zstd`` subprotocol."""
    query_token: bool = False
    """Accept ``?token=``. Off: URLs end up in logs."""
    echo: bool = False
    """Serve ``/echo``, which returns every message as it came (for conformance tests)."""
    handshake_timeout: Deadline = 5.0
    auth_timeout: Deadline = 10.0
    ping_interval: Deadline = 25.0
    """Below the 30 to 60 s after which common proxies cut idle connections."""
    pong_timeout: Deadline = 10.0
    write_timeout: Deadline = 30.0
    """A session whose queued bytes did not move for this long is a slow consumer."""
    close_timeout: Deadline = 2.0
    """How long the peer may take to answer our close frame."""
    drain_timeout: Pause = 5.0
    retry_after: Pause = 10.0
    """Upper end of the jittered wait that ``bye`` asks for when the node drains."""
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    """Processes on this machine that share the port, each a node. More than one needs ``redis.url``."""


class Limits(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds against floods. Where 0 is allowed it means no limit, except where said otherwise."""

    connections: Count = 0
    """Connections of this process; 0: 90 % of the descriptors the system grants."""
    accepts: PerSecond = 500.0
    accept_burst: Some = 2000
    unauthenticated_per_address: Count = 100
    sessions_per_user: Count = 20
    request_bytes: Size = 16 * KIB
    request_headers: Some = 64
    message_bytes: Size = 64 * KIB
    """One client message as it comes over the wire, all fragments together."""
    inflated_bytes: Size = 256 * KIB
    """One client message after zstd or deflate."""
    fragments: Some = 64
    batch_messages: Some = 256
    """Messages in one array from a client."""
    control_frames: PerSecond = 10.0
    """Pings and pongs a second from one connection."""
    rooms_per_session: Some = 128
    rooms: Some = 1_000_000
    """Rooms alive on this node."""
    state_bytes: Size = 2 * KIB
    inbox_messages: Some = 64
    """Messages waiting behind one that must wait; past it the socket is no longer read."""
    outbox_bytes: Size = 256 * KIB
    """Bytes queued for one session that reads too slowly."""
    process_outbox_bytes: Annotated[int, msgspec.Meta(ge=0, le=1024 * GIB)] = 256 * MIB
    """The same for the whole process; past it any session with a backlog counts as slow."""
    calls: Some = 16
    """Calls of one session that may run at once."""


class Rate(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token bucket: ``rate`` a second in the long run, ``burst`` at once. ``rate = 0``: no limit."""

    rate: PerSecond
    burst: Some


class Rates(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token buckets of one session, and of one user over all their sessions here."""

    enabled: bool = True
    message: Rate = Rate(rate=200, burst=1000)
    publish: Rate = Rate(rate=50, burst=200)
    join: Rate = Rate(rate=20, burst=128)
    state: Rate = Rate(rate=20, burst=60)
    query: Rate = Rate(rate=20, burst=60)
    """``history`` and ``presence``."""
    call: Rate = Rate(rate=20, burst=60)
    auth: Rate = Rate(rate=1, burst=5)
    user_factor: Annotated[float, msgspec.Meta(ge=1, le=1_000_000)] = 4.0
    """A user's buckets hold this many times a session's."""


class RoomOptions(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one namespace; a key that is missing comes from ``[rooms.default]``."""

    join: Access = "token"
    publish: Access = "token"
    history: Count = 0
    """Events kept; 0 makes the rooms ephemeral."""
    history_ttl: Annotated[float, msgspec.Meta(gt=0, le=10 * 365 * 86400)] = 24 * 3600.0
    presence: bool = True
    slow: SlowPolicy = "disconnect"
    last_value: bool = False
    """A join is followed by the newest event of every slot."""
    slots: Some = 1000
    """Slots remembered per room with ``last_value``; the oldest gives way."""
    batch_window: Window = 0.0
    """Wait this long for more events before sending (s, at most 1): better ratio, more latency."""
    event_bytes: Size = 64 * KIB
    record: bool = False
    """Keep samples of events for ``broker train-dict``."""


class Key(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key that signs tokens. The algorithm is pinned to the key, never taken from the token."""

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"]
    id: Text | None = None
    """``kid`` of the tokens it signs; without it, tried for tokens that name none."""
    secret: Text | None = None
    file: Text | None = None
    """PEM, raw secret, or a JWK set on disk."""
    jwks: Text | None = None
    """URL of a JWK set; fetched again when an unknown ``kid`` comes, at most every 30 s."""
    issuer: Text | None = None
    audience: Text | None = None


class Auth(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may connect."""

    anonymous: bool = False
    keys: tuple[Key, ...] = ()
    leeway: Pause = 5.0
    """Clock difference tolerated in ``exp`` and ``nbf``."""


class Admin(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The operators' port. ``port = -1`` turns it off."""

    host: Text = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=-1, le=65535)] = 8766
    token: Text | None = None
    """Bearer token. Without one, and without ``open_on_loopback``, a random one is made and never shown."""
    open_on_loopback: bool = False


class Store(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the past is kept."""

    data: Text | None = None
    """Directory of the database and the dictionaries; without one, history lives in memory only."""
    commit_window: Window = 0.0
    """Wait this long for more publishes before a commit (s). The disk's own time already groups them."""
    ring_events: Count = 256
    """Newest events of an open room kept in memory, so that a short absence needs no read."""
    samples: Count = 2000
    """Events recorded per namespace for dictionary training."""


class Redis(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The link to other nodes and to backends. Without ``url`` the node is alone."""

    url: Text | None = None
    """``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://host,host/service``, ``redis+cluster://``."""
    prefix: Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[^{}*\s]+$")] = "broker:"
    """Of every key and channel, so that several brokers may share a Redis."""
    connect_timeout: Deadline = 2.0
    answer_timeout: Deadline = 1.5
    """A command without an answer for this long has failed; publishers must hear of it within 2 s."""
    probe_after: Deadline = 4.0
    """Nothing heard on the subscription for this long: publish a probe to oneself."""
    probe_timeout: Deadline = 3.0
    """Nothing heard after this long either: the connection is dead, whatever the kernel says."""
    node_lease: Deadline = 10.0
    """A node that was not heard of for this long is gone, and its members with it."""
    reader_lease: Deadline = 3.0
    """The one reader of the ``publish`` stream is replaced when it was not heard of for this long."""
    sweep_interval: Deadline = 5.0
    """Between two comparisons of what was delivered with what is stored."""
    replicas: Count = 0
    """Replicas that must have an event before it is acknowledged (``WAIT``)."""
    lifecycle: bool = True
    """Tell backends who comes and goes, in the stream ``lifecycle``."""
    lifecycle_grace: Pause = 15.0
    """Who is back within this long has never been away, as far as the feed tells."""
    lifecycle_length: Some = 100_000
    """Entries kept in the feed, and in the stream of rejected entries."""


class Route(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies events into other rooms (``docs/event-bus.md``)."""

    source: Texts = msgspec.field(name="from")
    """Patterns of rooms, as in tokens: ``deal:*``."""
    event: Texts = ()
    """Names of events, or how they begin (``deal-*``); empty: every event."""
    filter: dict[str, Any] | None = None
    """Only events whose tags match; the tree that a join takes."""
    to: Texts
    """Rooms that get a copy: names, or templates (``user:{data.owner}``)."""
    rename: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    """Name of the event in the copy."""
    data: Texts | None = None
    """Keys of ``data`` that the copy keeps; unset: all of it."""


class Wire(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Compression."""

    zstd_level: Annotated[int, msgspec.Meta(ge=1, le=19)] = 1
    deflate_level: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    deflate_min_bytes: Count = 128
    """Smaller frames are sent as they are."""
    dictionary_max_bytes: Count = 8 * KIB
    """Batches above this gain nothing from a dictionary."""


class Log(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    """``auto``: for people on a terminal, JSON lines otherwise."""


class Config(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. ``rooms`` maps a namespace to its options."""

    dev: bool = False
    node: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    """Name of this node in ``welcome``; without it, host name and process id."""
    server: Server = Server()
    limits: Limits = Limits()
    rates: Rates = Rates()
    auth: Auth = Auth()
    rooms: dict[str, RoomOptions] = msgspec.field(default_factory=dict)
    admin: Admin = Admin()
    store: Store = Store()
    redis: Redis = Redis()
    routes: tuple[Route, ...] = ()
    wire: Wire = Wire()
    log: Log = Log()

    def options(self, room: str) -> RoomOptions:
        """Options of ``room``: its namespace's, else the default's."""
        namespace = room.partition(":")[0]
        found = self.rooms.get(namespace)
        if found is not None:
            return found
        if room == "all":
            return _EVERYBODY
        default = self.rooms.get("default", _CLOSED)
        return default if namespace != "user" else for_users(default)


_CLOSED = RoomOptions()
_EVERYBODY = RoomOptions(presence=False)
"""Room ``all`` has no past, whatever the default says."""

USER_HISTORY = 200
"""Events that ``user:`` rooms keep unless ``[rooms.user]`` says otherwise: they always have history."""


def for_users(default: RoomOptions) -> RoomOptions:
    """Options of ``user:`` rooms where there is no ``[rooms.user]``."""
    return msgspec.structs.replace(default, history=max(default.history, USER_HISTORY))
