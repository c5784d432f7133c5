"""Who is asking: the page behind a browser (``Origin``), the address behind a proxy, the token.

Called by the server's handshake with a request that was parsed; says yes or no
or reads one value, and leaves the consequences to its caller.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from urllib.parse import unquote_plus

import msgspec

from broker.protocol.http import Fault, Request, RequestError, split_host

LOOPBACK = "loopback"
"""Word in the list of origins for every http(s) page served from this machine, at any port."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Origin = tuple[str, str, int | None]
"""Scheme, host, port: what must be equal (RFC 6454 section 5)."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*+)://([^/?#@]++)")
_FORWARDED = re.compile(r"(?:\[([0-9A-Fa-f:.]++)\]|([0-9.]++))(?::[0-9]{1,5})?")


class OriginPolicy(msgspec.Struct, frozen=True):
    """Which pages may connect.

    ``same_host``: those on the host and port that the request itself names.
    ``anyone`` (``*``) is safe here as long as nothing authenticates by cookie,
    for then a foreign page can do no more than its own server could.
    """

    listed: frozenset[Origin] = frozenset()
    same_host: bool = False
    loopback: bool = False
    null: bool = False
    anyone: bool = False

    @classmethod
    def parse(cls, entries: Iterable[str]) -> OriginPolicy:
        """Policy of the configured list: origins, ``loopback``, ``null``, ``*``; empty: same host.

        Raises ValueError with a sentence that names the entry which is none of these.
        """
        entries = tuple(entries)
        words = {LOOPBACK, "null", "*"}
        listed = set()
        for entry in entries:
            if entry in words:
                continue
            origin = _parse_origin(entry)
            if origin is None:
                raise ValueError(
                    f"{entry!r} is not an origin; write scheme://host[:port] without a path, or 'loopback'"
                )
            listed.add(origin)
        return cls(
            listed=frozenset(listed),
            same_host=not entries,
            loopback=LOOPBACK in entries,
            null="null" in entries,
            anyone="*" in entries,
        )


def check_origin(request: Request, allowed: OriginPolicy) -> bool:
    """Whether ``request`` may connect as far as its ``Origin`` goes.

    Only browsers send one, and only they can be tricked by a foreign page
    (cross-site WebSocket hijacking): without the header the answer is yes.
    """
    value = request.headers.get("origin")
    if value is None or allowed.anyone:
        return True
    if value == "null":  # sandboxed frames, local files: anybody can make one
        return allowed.null
    origin = _parse_origin(value)
    if origin is None:
        return False
    if origin in allowed.listed:
        return True
    scheme, host, port = origin
    if scheme not in _DEFAULT_PORTS:
        return False
    if allowed.loopback and _is_loopback(host):
        return True
    if not allowed.same_host:
        return False
    own = split_host(request.headers.get("host", ""))
    if own is None:
        return False
    # Without a port in ``Host`` it is the default of the page's own scheme: behind
    # a proxy that ends TLS we cannot know which one the client used.
    return host == own[0] and port == (own[1] if own[1] is not None else _DEFAULT_PORTS[scheme])


def _parse_origin(value: str) -> Origin | None:
    match = _ORIGIN.fullmatch(value)
    parts = split_host(match[2]) if match is not None else None
    if match is None or parts is None:
        return None
    scheme = match[1].lower()
    host, port = parts
    return scheme, host, port if port is not None else _DEFAULT_PORTS.get(scheme)


def _is_loopback(host: str) -> bool:
    if host in {"localhost", "127.0.0.1", "[::1]"}:
        return True
    if not host.startswith("127."):
        return False
    address = _parse_address(host)  # not "127.evil.example"
    return address is not None and address.is_loopback


def bearer_token(request: Request) -> str | None:
    """Token of ``Authorization: Bearer …`` (the scheme in any case); ``None`` if there is none.

    A malformed one comes back as it is, empty if need be: whoever checks tokens
    refuses it. Only ``None`` means that the client did not try.
    """
    scheme, *rest = request.headers.get("authorization", "").split(maxsplit=1) or ("",)
    if scheme.lower() != "bearer":
        return None
    return rest[0] if rest else ""


def query_token(request: Request) -> str | None:
    """Value of ``?token=``, ``None`` if there is none. Raises :class:`RequestError` on more than one."""
    if "token=" not in request.query:  # nearly always
        return None
    values = [item[6:] for item in request.query.split("&") if item.startswith("token=")]
    if len(values) > 1:
        raise RequestError(400, Fault.TARGET, "more than one token in the query")
    return unquote_plus(values[0]) if values else None


def client_address(request: Request, peer_ip: str, trusted: Sequence[Network]) -> str:
    """Address of the client: the rightmost one that is not a trusted proxy.

    ``X-Forwarded-For`` counts only where the peer itself is trusted, and is read
    from the right: each trusted hop vouches for the entry to its left, and what
    stands further left is the client's own invention. A malformed entry stops
    the walk at the hop that sent it. IPv4-mapped IPv6 addresses become IPv4,
    so that one client has one address on a dual-stack socket.
    """
    if not trusted and ":" not in peer_ip:  # the common case
        return peer_ip
    address = _parse_address(peer_ip)
    if address is None:
        return peer_ip  # a Unix socket has no address
    forwarded = request.headers.get("x-forwarded-for") if trusted else None
    if forwarded is not None:
        for entry in reversed(forwarded.split(",")):
            if not any(address in network for network in trusted):
                break
            text = entry.strip(" \t")
            match = _FORWARDED.fullmatch(text)
            hop = _parse_address(match[1] or match[2] if match else text)
            if hop is None:
                break
            address = hop
    return str(address)


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
