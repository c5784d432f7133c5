"""What one key's type cannot say: keys that contradict each other, files that cannot be read.

Called by :mod:`broker.settings_loader` with a complete configuration. A check
is a generator of :class:`Contradiction`; it never raises, so that a person gets
the whole list at once.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from broker.config import DEVELOPMENT_KEY, Config, Key
from broker.settings_names import Path, quote

HMAC_SECRET_BYTES = 32
"""RFC 7518 section 3.2: an HS256 key is at least as long as the hash it makes."""

LOOPBACK_ORIGINS = "loopback"
"""The word in ``server.origins`` that means every port of this machine."""

ANY_ORIGIN = "*"

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
"""An origin as browsers write it (RFC 6454 section 6.2): lower case, no path."""

_DEFAULT_PORTS = {"http": "80", "https": "443"}

_FILE_BYTES = 1 << 20
"""Keys and certificates are a few KiB; reading stops here, also for ``/dev/zero``."""


class Contradiction(NamedTuple):
    """``keys``: whose values do not go together; the first is the one named, ``at`` the place below it."""

    keys: tuple[Path, ...]
    problem: str
    mend: str
    at: str = ""


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Everything in ``config`` that cannot work, in the order of the schema."""
    yield from _listening(config)
    yield from _tls(config)
    yield from _origins(config)
    yield from _proxies(config)
    yield from _identity(config)
    for index, key in enumerate(config.auth.keys):
        for problem, mend in _signing_key(key, dev=config.dev):
            yield Contradiction((("auth", "keys"),), problem, mend, f"[{index}]")
    yield from _admin(config)
    yield from _rooms(config)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(config: Config) -> Iterator[Contradiction]:
    if config.dev and not is_loopback(config.server.host):
        yield Contradiction(
            (("server", "host"), ("dev",)),
            f"{quote(config.server.host)} can be reached from elsewhere, and dev lets everybody in",
            'write "127.0.0.1", or set dev = false and say who may connect',
        )
    both = config.server.port == config.admin.port != 0
    if both and config.server.host == config.admin.host:
        yield Contradiction(
            (("admin", "port"), ("server", "port"), ("admin", "host"), ("server", "host")),
            f"{config.admin.port} is the client port as well",
            "give each its own port (0 lets the system choose)",
        )


def _tls(config: Config) -> Iterator[Contradiction]:
    cert, key = config.server.tls_cert, config.server.tls_key
    if cert is None and key is None:
        return
    keys = (("server", "tls_cert"), ("server", "tls_key"))
    if cert is None or key is None:
        there, missing = ("tls_key", "tls_cert") if cert is None else ("tls_cert", "tls_key")
        path = ("server", there)
        yield Contradiction(
            (path, *keys), f"given without server.{missing}", f"give server.{missing} too, or neither"
        )
        return
    unreadable = [
        Contradiction((where,), why, "give a PEM file that this user may read")
        for where, name in zip(keys, (cert, key), strict=True)
        if (why := _unreadable(name)) is not None
    ]
    yield from unreadable
    if not unreadable and (why := _tls_pair(cert, key)) is not None:
        yield Contradiction(keys, why, "give the certificate chain and its own unencrypted key, both as PEM")


def _unreadable(name: str) -> str | None:
    """Why the file cannot be used, or nothing."""
    return why if isinstance(why := _read(name), str) else None


def _read(name: str) -> bytes | str:
    """Content of a small file, or why it cannot be read."""
    try:
        with open(name, "rb") as file:
            return file.read(_FILE_BYTES)
    except OSError as error:
        return f"{quote(name)} cannot be read: {error.strerror}"


def _tls_pair(cert: str, key: str) -> str | None:
    import ssl  # noqa: PLC0415 - only a configuration with TLS pays for it

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without the callback OpenSSL would ask for the password of an encrypted key on the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        return f"certificate and key cannot be used: {error}"
    return None


def _origins(config: Config) -> Iterator[Contradiction]:
    for index, origin in enumerate(config.server.origins):
        if origin in {LOOPBACK_ORIGINS, ANY_ORIGIN}:
            continue
        found = _ORIGIN.fullmatch(origin)
        if found is None:
            problem = f"{quote(origin)} is not an origin as browsers send it"
            mend = f"write {quote(_suggested_origin(origin))}" + (
                ", each host by its name"
                if "*" in origin
                else ": scheme://host[:port] in lower case, no path"
            )
        elif found[3] == _DEFAULT_PORTS.get(found[1]):
            problem = f"{quote(origin)} names the default port, which browsers leave out"
            mend = f"write {quote(found[1] + '://' + found[2])}"
        elif found[3] is not None and not 0 < int(found[3]) <= 65535:
            problem, mend = f"{quote(origin)} has no such port", "give a port from 1 to 65535"
        else:
            continue
        yield Contradiction((("server", "origins"),), problem, mend, f"[{index}]")


def _suggested_origin(text: str) -> str:
    """What was probably meant by ``text``, or an example."""
    scheme, _, rest = text.lower().rpartition("://")
    guess = f"{scheme or 'https'}://{re.split('[/?#]', rest, maxsplit=1)[0]}"
    return guess if _ORIGIN.fullmatch(guess) else "https://app.example.com"


def _proxies(config: Config) -> Iterator[Contradiction]:
    for index, proxy in enumerate(config.server.trusted_proxies):
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            mend = 'write an address or a network, such as "10.0.0.5" or "10.0.0.0/8"'
            yield Contradiction((("server", "trusted_proxies"),), str(error), mend, f"[{index}]")


def _identity(config: Config) -> Iterator[Contradiction]:
    auth = config.auth
    if not auth.keys and not auth.anonymous:
        yield Contradiction(
            (("auth", "keys"), ("auth", "anonymous")),
            "there is no key and anonymous sessions are off: nobody could connect",
            "add an [[auth.keys]] table (config/broker.toml shows one), or set auth.anonymous = true, "
            "or start with --dev on your own machine",
        )
    names = [(key.issuer, key.id) for key in auth.keys if key.id is not None]
    for issuer, name in sorted(set(names), key=str):
        if names.count((issuer, name)) > 1:
            yield Contradiction(
                (("auth", "keys"),),
                f"several keys of one issuer have the id {quote(name)}",
                "give each key its own id",
            )


def _signing_key(key: Key, *, dev: bool) -> Iterator[tuple[str, str]]:
    given = [name for name in ("secret", "file", "jwks") if getattr(key, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none of secret, file and jwks"
        yield f"has {found}", "give exactly one of secret, file and jwks"
        return
    symmetric = key.algorithm == "HS256"
    short = f"an HS256 key needs at least {HMAC_SECRET_BYTES} bytes (RFC 7518)"
    make = "make one with: openssl rand -base64 48"
    if key.secret is not None:
        if not symmetric:
            yield f"{key.algorithm} has no shared secret", "name the public key with file or jwks"
        elif len(key.secret.encode()) < HMAC_SECRET_BYTES:
            yield f"secret has {len(key.secret.encode())} bytes; {short}", make
        elif key.secret == DEVELOPMENT_KEY.secret and not dev:
            yield "secret is the published development key", make
    elif key.file is not None:
        content = _read(key.file)
        if isinstance(content, str):
            yield content, "give a file that this user may read"
        elif symmetric and len(content.strip()) < HMAC_SECRET_BYTES:
            yield f"{quote(key.file)} has {len(content.strip())} bytes; {short}", make
        elif not content.strip():
            yield f"{quote(key.file)} is empty", "put a PEM key or a JWK set into it"
    elif key.jwks is not None:
        if symmetric:
            yield "a shared secret must not be fetched from a URL", "use secret or file"
        elif not _safe_url(key.jwks):
            yield (
                f"{quote(key.jwks)} is not an https:// address",
                "write https://… (http:// only for loopback)",
            )


def _safe_url(text: str) -> bool:
    """Whether nobody on the way could swap what is fetched from there."""
    try:
        url = urlsplit(text)
        host, _ = url.hostname, url.port
    except ValueError:
        return False
    return bool(host) and (url.scheme == "https" or (url.scheme == "http" and is_loopback(host or "")))


def _admin(config: Config) -> Iterator[Contradiction]:
    admin = config.admin
    if admin.port == -1 or is_loopback(admin.host):
        return
    if admin.open_on_loopback:
        yield Contradiction(
            (("admin", "open_on_loopback"), ("admin", "host")),
            f"true, but {quote(admin.host)} can be reached from elsewhere",
            'write admin.host = "127.0.0.1", or set it to false and give admin.token',
        )
    elif admin.token is None:
        yield Contradiction(
            (("admin", "host"), ("admin", "token")),
            f"{quote(admin.host)} can be reached from elsewhere, and there is no token",
            'give admin.token, or write "127.0.0.1"',
        )


def _rooms(config: Config) -> Iterator[Contradiction]:
    if config.store.data is not None:
        return
    for name, options in config.rooms.items():
        if options.record:
            yield Contradiction(
                (("rooms", name, "record"), ("rooms", "default", "record"), ("store", "data")),
                "samples need a place on disk",
                "set store.data, or record = false",
            )
