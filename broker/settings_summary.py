"""What a configuration amounts to, for ``broker check-config``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from broker.config import Auth, Config, RoomOptions
from broker.settings_names import SECRET, dotted, quote, toml
from broker.settings_schema import KEYS


def summary(config: Config) -> Iterator[str]:
    """Lines that say who may connect where, and which keys differ from their defaults."""
    scheme = "ws" if config.server.tls_cert is None else "wss"
    yield f"clients   {scheme}://{_authority(config.server.host, config.server.port)}/ws"
    yield f"admin     {_admin(config)}"
    yield f"sessions  {_sessions(config)}"
    yield f"store     {_store(config)}"
    for name, options in config.rooms.items():
        yield f"rooms     {name}: {_room(options)}"
    for route in config.routes:
        events = f"events {_texts(route.event)} of " if route.event else ""
        yield f"route     {events}{_texts(route.source)} to {_texts(route.to)}"
    for path, key in KEYS.items():
        value: Any = config
        for part in path:
            value = getattr(value, part)
        if value != key.default:
            shown = "(hidden)" if path[-1] in SECRET else toml(value)
            yield f"changed   {dotted(path)} = {shown}"


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _texts(texts: Iterable[str]) -> str:
    return ", ".join(map(quote, texts))


def _store(config: Config) -> str:
    if config.redis.url is None:
        return config.store.data or "memory only: history ends with the process"
    scheme, _, rest = config.redis.url.partition("://")
    place = rest.partition("?")[0].rpartition("@")[2]  # user and password stand before the @
    return f"{scheme}://{place}, shared with every node that uses {quote(config.redis.prefix)}"


def _admin(config: Config) -> str:
    admin = config.admin
    if admin.port == -1:
        return "off"
    access = (
        "open on loopback"
        if admin.open_on_loopback
        else "token"
        if admin.token
        else "closed: there is no token"
    )
    return f"http://{_authority(admin.host, admin.port)}, {access}"


def _sessions(config: Config) -> str:
    ways = ["anonymous"] if config.auth.anonymous else []
    ways += _tokens(config.auth)
    if config.dev and not config.auth.keys:
        ways.append("tokens by the development key")
    return "; ".join(ways)


def _tokens(auth: Auth) -> list[str]:
    return [
        f"{key.algorithm} tokens by {key.jwks or key.file or 'a secret in the settings'}" for key in auth.keys
    ]


def _room(options: RoomOptions) -> str:
    kept = f"{options.history:,} events for {options.history_ttl:g} s" if options.history else "ephemeral"
    return f"join {options.join}, publish {options.publish}, {kept}, slow: {options.slow}"
