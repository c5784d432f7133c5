"""Where Redis is: ``redis.url`` taken apart.

========================  ==========================================================
``redis://``              ``[user:password@]host[:6379][/db]``
``rediss://``             the same with TLS
``unix://``               ``[user:password@]/path[?db=0]``
``redis+sentinel://``     ``[user:password@]host[:26379],host,…/service[/db]``
``redis+cluster://``      ``[user:password@]host[:6379],host,…``
``rediss+sentinel://``    both with TLS, also to the sentinels
``rediss+cluster://``
========================  ==========================================================

What stands in a URL may be percent-encoded, and in passwords ``/ ? # @ %`` must
be. No message of this module shows a password.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote

from broker.errors import ConfigurationError

_KINDS: Final[dict[str, Literal["server", "unix", "sentinel", "cluster"]]] = {
    "redis": "server",
    "rediss": "server",
    "unix": "unix",
    "redis+sentinel": "sentinel",
    "rediss+sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}

_CertReqs = Literal["required", "optional", "none"]

_CERT_REQS: Final[dict[str, _CertReqs]] = {"required": "required", "optional": "optional", "none": "none"}

_TLS_PARAMETERS: Final = frozenset(
    {
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "ssl_password",
    }
)

_SENTINEL_PARAMETERS: Final = frozenset({"sentinel_username", "sentinel_password"})

_EXAMPLE: Final = 'write for example "redis://127.0.0.1:6379/0"; config/broker.toml shows the other forms'


class Address(NamedTuple):
    """A server that listens on TCP."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server proves who it is, and how we do."""

    ca_certs: str | None = None
    """PEM file; without it, the system's authorities."""
    cert_reqs: _CertReqs = "required"
    check_hostname: bool = True
    certfile: str | None = None
    keyfile: str | None = None
    password: str | None = field(default=None, repr=False)
    """Of the key file."""


@dataclass(frozen=True, slots=True)
class Target:
    """What ``redis.url`` says."""

    kind: Literal["server", "unix", "sentinel", "cluster"]
    addresses: tuple[Address, ...] = ()
    """The server; the sentinels; some nodes of the cluster."""
    path: str | None = None
    """Of the socket, for ``unix``."""
    service: str | None = None
    """What the sentinels call the primary."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.path}"
        scheme = ("redis" if self.tls is None else "rediss") + (
            "" if self.kind == "server" else f"+{self.kind}"
        )
        where = ",".join(map(str, self.addresses))
        return f"{scheme}://{where}" + (f"/{self.service}" if self.service else "")


def parse(url: str, source: str = "") -> Target:
    """Take ``url`` apart. Raises :class:`ConfigurationError`, with ``source`` as the place it stands in."""
    try:
        return _parse(url)
    except _Wrong as wrong:
        raise ConfigurationError(source, "redis.url", wrong.problem, wrong.mend) from None


class _Wrong(Exception):  # noqa: N818 - becomes a ConfigurationError
    def __init__(self, problem: str, mend: str = _EXAMPLE) -> None:
        self.problem = problem
        self.mend = mend


def _parse(url: str) -> Target:
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise _Wrong("this is not a URL")
    kind = _KINDS.get(scheme)
    if kind is None:
        raise _Wrong(f"there is no scheme {scheme[:40]!r}", f"write one of {', '.join(_KINDS)}")
    if "#" in rest:
        raise _Wrong("it contains #", "write %23 for a # in a password")
    rest, _, query = rest.partition("?")
    username, password, rest = _credentials(rest)
    parameters = _parameters(query, kind, tls=scheme.startswith("rediss"))
    if kind == "unix":
        if not rest.startswith("/"):
            raise _Wrong(
                "the path of the socket is missing", 'write for example "unix:///run/redis/redis.sock"'
            )
        db = _database(parameters.get("db", ""))
        return Target(kind, path=unquote(rest), db=db, username=username, password=password)
    hosts, _, path = rest.partition("/")
    addresses = _addresses(hosts, default_port=26379 if kind == "sentinel" else 6379)
    service = None
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not service:
            raise _Wrong(
                "the name of the service is missing",
                'write it after the hosts: "redis+sentinel://host:26379/mymaster"',
            )
        service = unquote(service)
    elif kind == "server" and len(addresses) > 1:
        raise _Wrong("several hosts", "write redis+sentinel:// or redis+cluster:// for more than one")
    db = _database(path.rstrip("/"))
    if kind == "cluster" and db:
        raise _Wrong(f"database {db}", "take it out: a Redis Cluster has database 0 only")
    return Target(
        kind,
        addresses,
        service=service,
        db=db,
        username=username,
        password=password,
        sentinel_username=parameters.get("sentinel_username"),
        sentinel_password=parameters.get("sentinel_password"),
        tls=_tls(parameters) if scheme.startswith("rediss") else None,
    )


def _credentials(text: str) -> tuple[str | None, str | None, str]:
    """User, password, and what comes behind them."""
    before, separator, rest = text.rpartition("@")
    if not separator:
        return None, None, text
    if "/" in before:
        raise _Wrong("a / before the host", "write %2F for a / in a password")
    username, _, password = before.partition(":")
    return unquote(username) or None, unquote(password) or None, rest


def _addresses(text: str, default_port: int) -> tuple[Address, ...]:
    return tuple(_address(part.strip(), default_port) for part in text.split(","))


def _address(text: str, default_port: int) -> Address:
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise _Wrong("an address begins with [ and does not end well", "write [::1]:6379")
        port = port[1:]
    else:
        host, _, port = text.partition(":")
        if ":" in port:
            raise _Wrong("a host contains :", "write an IPv6 address in brackets: [::1]:6379")
    if not host:
        raise _Wrong("the host is missing")
    if not port:
        return Address(unquote(host), default_port)
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        # Not repeated: in "redis://user:password" it is the password.
        raise _Wrong("what follows the host and : is not a port", "write a number from 1 to 65535")
    return Address(unquote(host), int(port))


def _database(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise _Wrong(
            "what follows the last / is not a database", "write its number, most often 0, or nothing"
        )
    return int(text)


def _parameters(query: str, kind: str, *, tls: bool) -> dict[str, str]:
    known: set[str] = set()
    if tls:
        known |= _TLS_PARAMETERS
    if kind == "sentinel":
        known |= _SENTINEL_PARAMETERS
    if kind == "unix":
        known.add("db")
    found = dict(parse_qsl(query, keep_blank_values=True))
    for name in found:
        if name not in known:
            mend = f"write one of {', '.join(sorted(known))}" if known else "take out what comes behind the ?"
            if name in _TLS_PARAMETERS:
                mend = "write rediss:// for TLS"
            raise _Wrong(f"there is no parameter {name[:40]!r} here", mend)
    return found


def _tls(parameters: dict[str, str]) -> Tls:
    reqs = _CERT_REQS.get(parameters.get("ssl_cert_reqs", "required"))
    if reqs is None:
        raise _Wrong("ssl_cert_reqs says nothing known", f"write one of {', '.join(_CERT_REQS)}")
    check = parameters.get("ssl_check_hostname", "true").lower()
    if check not in ("true", "false"):
        raise _Wrong("ssl_check_hostname is neither true nor false", "write one of them")
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        _readable(name, parameters.get(name))
    return Tls(
        ca_certs=parameters.get("ssl_ca_certs"),
        cert_reqs=reqs,
        check_hostname=check == "true",
        certfile=parameters.get("ssl_certfile"),
        keyfile=parameters.get("ssl_keyfile"),
        password=parameters.get("ssl_password"),
    )


def _readable(name: str, path: str | None) -> None:
    if path is None:
        return
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise _Wrong(f"{name} {path[:200]!r} cannot be read: {error.strerror}", "give a PEM file") from None
