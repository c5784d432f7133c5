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

import msgspec

from broker.auth.keys import DEVELOPMENT_SECRET, KeyRing
from broker.config import Config
from broker.errors import ConfigurationError
from broker.link.target import parse as parse_redis_url
from broker.protocol.origin import OriginPolicy
from broker.routes import mistakes
from broker.settings_names import Path, quote

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
    yield from _workers(config)
    yield from _tls(config)
    yield from _origins(config)
    yield from _proxies(config)
    yield from _keys(config)
    yield from _admin(config)
    yield from _redis(config)
    yield from _rooms(config)
    yield from _routes(config)


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


def _workers(config: Config) -> Iterator[Contradiction]:
    if config.server.workers > 1 and config.redis.url is None:
        yield Contradiction(
            (("server", "workers"), ("redis", "url")),
            f"{config.server.workers} processes share their rooms through Redis, and there is no redis.url",
            "give redis.url (--redis URL), or write workers = 1",
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
        try:
            OriginPolicy.parse((origin,))
        except ValueError:
            mend = f"write {quote(_suggested_origin(origin))}: scheme://host[:port], every host by its name"
            problem = f"{quote(origin)} is not an origin"
            yield Contradiction((("server", "origins"),), problem, mend, f"[{index}]")


def _suggested_origin(text: str) -> str:
    """What was probably meant by ``text``, or an example."""
    scheme, _, rest = text.rpartition("://")
    guess = f"{scheme or 'https'}://{re.split('[/?#]', rest, maxsplit=1)[0]}"
    try:
        OriginPolicy.parse((guess,))
    except ValueError:
        return "https://app.example.com"
    return guess


def _proxies(config: Config) -> Iterator[Contradiction]:
    for index, proxy in enumerate(config.server.trusted_proxies):
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            mend = 'write an address or a network, such as "10.0.0.5" or "10.0.0.0/8"'
            yield Contradiction((("server", "trusted_proxies"),), str(error), mend, f"[{index}]")


def warnings(config: Config) -> Iterator[str]:
    """What works and can hardly be meant; one sentence each, for the log."""
    if not config.dev and not config.auth.keys and not config.auth.anonymous:
        yield (
            "auth.keys: there is no key and anonymous sessions are off: nobody can authenticate; "
            "add an [[auth.keys]] table (config/broker.toml shows one), or set auth.anonymous = true, "
            "or start with --dev on your own machine"
        )


def _keys(config: Config) -> Iterator[Contradiction]:
    """The keys as the authentication will load them, each by itself so that every bad one is told."""
    where = (("auth", "keys"),)
    for index, key in enumerate(config.auth.keys):
        alone = msgspec.structs.replace(config.auth, keys=(key,))
        try:
            KeyRing(alone, dev=config.dev, source="")
        except ConfigurationError as error:
            yield Contradiction(
                where, error.problem, error.mend, error.key.replace("auth.keys[0]", f"[{index}]")
            )
            continue
        if key.jwks is not None and not _safe_url(key.jwks):
            problem = f"{quote(key.jwks)} can be forged on its way"
            yield Contradiction(
                where, problem, "write https:// (http:// only for loopback)", f"[{index}].jwks"
            )
        if key.secret == DEVELOPMENT_SECRET and not config.dev:
            yield Contradiction(
                where,
                "everybody knows the development key",
                "make one: openssl rand -hex 32",
                f"[{index}].secret",
            )


def _safe_url(text: str) -> bool:
    """Whether nobody on the way could swap what is fetched from there."""
    url = urlsplit(text)
    return url.scheme == "https" or is_loopback(url.hostname or "")


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


def _redis(config: Config) -> Iterator[Contradiction]:
    if config.redis.url is not None:
        try:
            parse_redis_url(config.redis.url)
        except ConfigurationError as error:
            yield Contradiction((("redis", "url"),), error.problem, error.mend)


def _rooms(config: Config) -> Iterator[Contradiction]:
    if "all" in config.rooms and config.rooms["all"].history:
        yield Contradiction(
            (("rooms", "all", "history"),),
            "nobody joins the room all, so nobody could ask for its past",
            "take it out, or set it to 0",
        )
    recorded = next((name for name, options in config.rooms.items() if options.record), None)
    if recorded is not None and config.store.data is None:
        yield Contradiction(
            (("rooms", recorded, "record"), ("rooms", "default", "record"), ("store", "data")),
            "samples need a place on disk",
            "set store.data, or record = false",
        )


def _routes(config: Config) -> Iterator[Contradiction]:
    """Each rule as the router will compile it."""
    for index, route in enumerate(config.routes):
        for mistake in mistakes(route):
            yield Contradiction((("routes",),), mistake.problem, mistake.mend, f"[{index}]{mistake.at}")
