"""Every setting, with its unit and its reason.

The structures below are the schema: TOML tables, ``BROKER_…`` variables and
command-line flags are all derived from them (see :mod:`broker.settings_loader`
for how the three are read and merged). ``config/broker.toml`` is the same list
as a manual. Durations are seconds, sizes are bytes, rates are per second.
"""

from __future__ import annotations

from typing import Literal

import msgspec

KIB = 1024
MIB = 1024 * KIB

Access = Literal["token", "user", "anyone"]
"""Who may do it: only whose token names the room · any authenticated user · every session."""

SlowPolicy = Literal["disconnect", "drop", "latest"]
"""What a full outbox means for a room's events (``docs/slow-consumers.md``)."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table: immutable, and an unknown key is an error."""


class Server(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The client port."""

    host: str = "127.0.0.1"
    port: int = 8765
    tls_cert: str | None = None
    tls_key: str | None = None
    backlog: int = 4096
    """Connections the kernel may queue before we accept them; a storm of 10,000 must not lose one."""
    origins: tuple[str, ...] = ()
    """Origins browsers may connect from (``https://app.example.com``); empty: same host only."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks whose ``X-Forwarded-For`` names the client."""
    deflate: bool = True
    """Offer permessage-deflate (never together with zstd)."""
    zstd: bool = True
    """Offer the ``broker.v1.zstd`` subprotocol."""
    query_token: bool = False
    """Accept ``?token=``. Off: URLs end up in logs."""
    echo: bool = False
    """Serve ``/echo``, which returns every message as it came (for conformance tests)."""
    handshake_timeout: float = 5.0
    auth_timeout: float = 10.0
    ping_interval: float = 25.0
    """Below the 30 to 60 s after which common proxies cut idle connections."""
    pong_timeout: float = 10.0
    write_timeout: float = 30.0
    """A session whose queued bytes did not move for this long is a slow consumer."""
    close_timeout: float = 2.0
    """How long the peer may take to answer our close frame."""
    drain_timeout: float = 5.0
    retry_after: float = 10.0
    """Upper end of the jittered wait that ``bye`` asks for when the node drains."""


class Limits(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds against floods. 0 means no limit, except where said otherwise."""

    connections: int = 0
    """Connections of this process; 0: 90 % of the descriptors the system grants."""
    accepts: float = 500.0
    accept_burst: int = 2000
    unauthenticated_per_address: int = 100
    sessions_per_user: int = 20
    request_bytes: int = 16 * KIB
    request_headers: int = 64
    message_bytes: int = 64 * KIB
    """One client message as it comes over the wire, all fragments together."""
    inflated_bytes: int = 256 * KIB
    """One client message after zstd or deflate."""
    fragments: int = 64
    batch_messages: int = 256
    """Messages in one array from a client."""
    control_frames: float = 10.0
    """Pings and pongs a second from one connection."""
    rooms_per_session: int = 128
    rooms: int = 1_000_000
    """Rooms alive on this node."""
    state_bytes: int = 2 * KIB
    inbox_messages: int = 64
    """Messages waiting behind one that must wait; past it the socket is no longer read."""
    outbox_bytes: int = 256 * KIB
    """Bytes queued for one session that reads too slowly."""
    process_outbox_bytes: int = 256 * MIB
    """The same for the whole process; past it any session with a backlog counts as slow."""
    calls: int = 16
    """Calls of one session that may run at once."""


class Rate(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token bucket: ``rate`` a second in the long run, ``burst`` at once. ``rate = 0``: no limit."""

    rate: float
    burst: int


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
    user_factor: float = 4.0
    """A user's buckets hold this many times a session's."""


class RoomOptions(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one namespace; a key that is missing comes from ``[rooms.default]``."""

    join: Access = "token"
    publish: Access = "token"
    history: int = 0
    """Events kept; 0 makes the rooms ephemeral."""
    history_ttl: float = 24 * 3600.0
    presence: bool = True
    slow: SlowPolicy = "disconnect"
    last_value: bool = False
    """A join is followed by the newest event of every slot."""
    slots: int = 1000
    """Slots remembered per room with ``last_value``; the oldest gives way."""
    batch_window: float = 0.0
    """Wait this long for more events before sending (s, at most 1): better ratio, more latency."""
    event_bytes: int = 64 * KIB
    record: bool = False
    """Keep samples of events for ``broker train-dict``."""


class Key(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key that signs tokens. The algorithm is pinned to the key, never taken from the token."""

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"]
    id: str | None = None
    """``kid`` of the tokens it signs; without it, tried for tokens that name none."""
    secret: str | None = None
    file: str | None = None
    """PEM, raw secret, or a JWK set on disk."""
    jwks: str | None = None
    """URL of a JWK set; fetched again when an unknown ``kid`` comes, at most every 30 s."""
    issuer: str | None = None
    audience: str | None = None


class Auth(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may connect."""

    anonymous: bool = False
    keys: tuple[Key, ...] = ()
    leeway: float = 5.0
    """Clock difference tolerated in ``exp`` and ``nbf``."""


class Admin(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The operators' port. ``port = -1`` turns it off."""

    host: str = "127.0.0.1"
    port: int = 8766
    token: str | None = None
    """Bearer token. Without one, and without ``open_on_loopback``, a random one is made and never shown."""
    open_on_loopback: bool = False


class Store(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the past is kept."""

    data: str | None = None
    """Directory of the database and the dictionaries; without one, history lives in memory only."""
    commit_window: float = 0.0
    """Wait this long for more publishes before a commit (s). The disk's own time already groups them."""
    ring_events: int = 256
    """Newest events of an open room kept in memory, so that a short absence needs no read."""
    samples: int = 2000
    """Events recorded per namespace for dictionary training."""


class Wire(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Compression."""

    zstd_level: int = 1
    deflate_level: int = 1
    deflate_min_bytes: int = 128
    """Smaller frames are sent as they are."""
    dictionary_max_bytes: int = 8 * KIB
    """Batches above this gain nothing from a dictionary."""


class Log(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    """``auto``: for people on a terminal, JSON lines otherwise."""


class Config(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration. ``rooms`` maps a namespace to its options."""

    dev: bool = False
    node: str | None = None
    """Name of this node in ``welcome``; without it, host name and process id."""
    server: Server = Server()
    limits: Limits = Limits()
    rates: Rates = Rates()
    auth: Auth = Auth()
    rooms: dict[str, RoomOptions] = msgspec.field(default_factory=dict)
    admin: Admin = Admin()
    store: Store = Store()
    wire: Wire = Wire()
    log: Log = Log()

    def options(self, room: str) -> RoomOptions:
        """Options of ``room``: its namespace's, else the default's."""
        namespace = room.partition(":")[0]
        found = self.rooms.get(namespace) or self.rooms.get("default")
        return found if found is not None else _CLOSED


_CLOSED = RoomOptions()
