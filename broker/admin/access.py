"""Who may use the operators' port. Sans-IO: headers and peer in, a refusal or nothing out.

A bearer token always opens it. ``admin.open_on_loopback`` opens it without one
to this machine, and that needs more care than it seems: a page of any site runs
in a browser on this machine and can send requests to 127.0.0.1. What such a
page cannot do is forge the headers that browsers set, hence the ladder in
:meth:`Access._check_loopback`:

- ``Host`` names a loopback host: else a foreign name was pointed at 127.0.0.1
  after the page was loaded (DNS rebinding), and the page may read our answers;
- ``Origin``, which browsers send with every cross-site POST, is this very host;
- POST bodies are ``application/json`` (checked for every request where bodies
  are read): a form cannot send that, and a script needs a CORS preflight,
  which nobody answers here;
- no trace of a proxy: behind one every stranger's peer address is loopback.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from typing import Final

from broker.config import Admin
from broker.errors import BrokerError, ErrorCode

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""

_HOST = re.compile(r"(?i)(localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?")
_PROXY: Final = frozenset({b"forwarded", b"via", b"x-real-ip"})

NO_ACCESS = (
    "no access: this broker has no admin token; set admin.token and send it as "
    "'Authorization: Bearer …', or set admin.open_on_loopback = true for this machine alone"
)
SEND_ONE = "send the admin token as 'Authorization: Bearer …'"


class Access:
    """The rules of one port. ``check`` raises for whoever must not come in."""

    def __init__(self, settings: Admin) -> None:
        # Without a token a random one is compared to, so that there is one path and no "if unset".
        self._token = (settings.token or secrets.token_urlsafe(32)).encode()
        self._configured = settings.token is not None
        self._open = settings.open_on_loopback

    def check(self, headers: Headers, peer: str | None) -> None:
        """Return for a valid token, or for this machine where that is enough.

        ``peer`` is the address of the other end, ``None`` where it has none.
        Raises ``unauthenticated`` for a missing or wrong token, ``forbidden``
        where open access ends, naming the rule.
        """
        headers = list(headers)
        tokens = [value for name, value in headers if name == b"authorization"]
        if tokens:
            if len(tokens) == 1 and self._matches(tokens[0]):
                return
            raise BrokerError(ErrorCode.UNAUTHENTICATED, self._refusal("the token is wrong"))
        if not self._open:
            raise BrokerError(ErrorCode.UNAUTHENTICATED, self._refusal(SEND_ONE))
        problem = self._check_loopback(headers, peer)
        if problem is not None:
            raise BrokerError(
                ErrorCode.FORBIDDEN, f"open access is for this machine alone: {problem}; use a token"
            )

    def _refusal(self, reason: str) -> str:
        return reason if self._configured else NO_ACCESS

    def _matches(self, authorization: bytes) -> bool:
        scheme, _, token = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)

    def _check_loopback(self, headers: list[tuple[bytes, bytes]], peer: str | None) -> str | None:
        """The first rule that is broken, in words."""
        if not is_loopback(peer):
            return "the request comes from elsewhere"
        for name, _ in headers:
            if name in _PROXY or name.startswith(b"x-forwarded-"):
                return f"a proxy stands before it ({name.decode('latin-1')})"
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
            return "Host is not a loopback name"
        own = f"http://{hosts[0]}".lower()
        for name, value in headers:
            if name == b"origin" and value.decode("latin-1").lower() != own:
                return "the page behind it is of another origin"
        return None


def is_loopback(peer: str | None) -> bool:
    """Whether an address is this machine's own loopback."""
    if peer is None:
        return False
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
