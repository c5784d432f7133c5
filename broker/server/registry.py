"""Who is connected: sessions by id and by user, connections by address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import structlog

from broker.config import Limits, Rates
from broker.engine.peers import Peers
from broker.errors import CloseCode
from broker.logs import Throttle
from broker.protocol.events import SessionId, UserId
from broker.server.rates import RateLimiter

if TYPE_CHECKING:
    from broker.server.session import Session


log = structlog.get_logger(__name__)

ORDINARY = frozenset({CloseCode.NORMAL, CloseCode.GOING_AWAY, CloseCode.DRAINING, CloseCode.TOKEN_EXPIRED})
"""Endings that need no explanation."""
LABELS = frozenset({*CloseCode, 1005, 1006})
"""Codes counted one by one. A client may choose among 2,000 more, and must not fill our metrics."""
OTHER = 0


class Registry:
    """Both directions of every index change together, in the methods below, and other nodes are told."""

    def __init__(self, limits: Limits, rates: Rates, peers: Peers) -> None:
        self._limits = limits
        self._rates = rates
        self._peers = peers
        self.sessions: dict[SessionId, Session] = {}
        self._users: dict[UserId, dict[SessionId, Session]] = {}
        self._user_rates: dict[UserId, RateLimiter] = {}
        self._guests: set[SessionId] = set()
        """Sessions that may stay anonymous, and are."""
        self._strangers: dict[str, int] = {}
        self.connections = 0
        """Open sockets, handshakes included."""
        self.accepted = 0
        self.opened = 0
        """Sessions since the start."""
        self.closes: dict[int, int] = {}
        """Ended sessions by close code; 1006: the connection just broke, 0: a code of the client's own."""
        self.told = Throttle(1.0)
        """Lets one line a second into the log for each close code."""
        self.refused: dict[str, int] = {}
        """Connections and handshakes turned away, by reason."""
        self.errors: dict[str, int] = {}
        """Error replies by code."""

    def refuse(self, reason: str) -> None:
        """Count a connection turned away."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def count_error(self, code: str) -> None:
        """Count an error reply."""
        self.errors[code] = self.errors.get(code, 0) + 1

    # -- addresses: connections that have not authenticated ---------------------

    def admit_stranger(self, address: str) -> bool:
        """Count a connection of unknown identity; false when its address has too many of them."""
        limit = self._limits.unauthenticated_per_address
        count = self._strangers.get(address, 0)
        if limit and count >= limit:
            return False
        self._strangers[address] = count + 1
        return True

    def stranger_known(self, address: str) -> None:
        """One of them authenticated, or is gone."""
        count = self._strangers.get(address, 0) - 1
        if count > 0:
            self._strangers[address] = count
        else:
            self._strangers.pop(address, None)

    # -- sessions ---------------------------------------------------------------

    def open(self, session: Session) -> None:
        """A session begins."""
        self.sessions[session.id] = session
        self.opened += 1

    def admit(self, session: Session) -> None:
        """An anonymous session may stay. Until then it is nobody, and the other nodes hear nothing of it."""
        self._guests.add(session.id)
        self._peers.appeared(session.id, None)

    def has_place(self, user: UserId) -> bool:
        """Whether one more session of this user is allowed."""
        limit = self._limits.sessions_per_user
        return not limit or len(self._users.get(user, ())) < limit

    def identify(self, session: Session, user: UserId) -> None:
        """``session`` belongs to ``user`` from now on."""
        self._users.setdefault(user, {})[session.id] = session
        if self._rates.enabled and user not in self._user_rates:
            self._user_rates[user] = RateLimiter(self._rates, self._rates.user_factor)
        self._guests.discard(session.id)
        self._peers.appeared(session.id, user)

    def user_rates(self, user: UserId) -> RateLimiter | None:
        """The buckets that all sessions of a user share."""
        return self._user_rates.get(user)

    def tell(self, session: Session, code: CloseCode, reason: str, now: float) -> None:
        """Log that we end ``session``, for whoever asks why its events stopped coming."""
        if code in ORDINARY or (missed := self.told.admit(code, now)) is None:
            return
        log.info(
            "session ended",
            code=int(code),
            reason=reason,
            session=session.id,
            user=session.user,
            address=session.address,
            suppressed=missed,
        )

    def close(self, session: Session, code: int) -> None:
        """A session ended with ``code``."""
        del self.sessions[session.id]
        if session.user is not None or session.id in self._guests:
            self._guests.discard(session.id)
            self._peers.vanished(session.id, session.user)
        label = code if code in LABELS else OTHER
        self.closes[label] = self.closes.get(label, 0) + 1
        if session.user is None:
            self.stranger_known(session.address)
        else:
            theirs = self._users.get(session.user, {})
            theirs.pop(session.id, None)
            if not theirs:
                self._users.pop(session.user, None)
                self._user_rates.pop(session.user, None)

    def of_user(self, user: str) -> list[Session]:
        """Sessions of a user here."""
        return list(self._users.get(UserId(user), {}).values())

    def users(self) -> Iterator[UserId]:
        """Users with at least one session here."""
        return iter(self._users)

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {
            "connections": self.connections,
            "accepted": self.accepted,
            "sessions": len(self.sessions),
            "users": len(self._users),
            "strangers": sum(self._strangers.values()),
            "opened": self.opened,
            "closes": {str(code): count for code, count in self.closes.items()},
            "refused": dict(self.refused),
            "errors": dict(self.errors),
        }
