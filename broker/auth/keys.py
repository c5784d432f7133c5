"""Which keys may have signed a token, and what their tokens must say.

Built once from ``[[auth.keys]]``; asked by :mod:`broker.auth.tokens`. Every
entry pins one algorithm to its keys, and a key is only ever offered for tokens
of that algorithm, so that nobody's public key can pass for a secret (RFC 8725
section 3.1). Key ids live inside their entry: two issuers that both call a key
``1`` never meet.

PyJWT and cryptography take 11 MB; they are imported with the first key from the
configuration (:mod:`broker.auth.crypto`), not for a broker that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

import trio

from broker.auth.material import FixedKeys, KeyProblem, Material
from broker.config import KIB, Auth, Key
from broker.errors import ConfigurationError

if TYPE_CHECKING:
    from broker.auth.jwks import RemoteKeys

DEVELOPMENT_SECRET: Final = "development-only-key-that-everybody-knows"  # noqa: S105 - public on purpose
"""HS256 secret of a broker with ``dev = true`` and no keys. Anyone can sign with it."""

MAX_FILE_BYTES: Final = 256 * KIB
"""A key file that is larger is not a key file."""


class _Keys(Protocol):
    """The keys of one entry: from a file for good, or from a URL until the next fetch."""

    def find(self, kid: str | None) -> Sequence[Material]: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    rules: Key
    keys: _Keys


class KeyRing:
    """Every configured key.

    ``source`` names the configuration in errors. Reads key files; raises
    :class:`~broker.errors.ConfigurationError` for what cannot be used. Sets
    behind URLs are empty until :meth:`run` has fetched them.
    """

    def __init__(self, auth: Auth, *, dev: bool, source: str) -> None:
        self._entries: list[_Entry] = []
        self.remotes: list[RemoteKeys] = []
        for rules, fixed in _load(auth, dev=dev, source=source):
            if fixed is None:
                remote = _remote(rules)
                self.remotes.append(remote)
                self._entries.append(_Entry(rules, remote))
            else:
                self._entries.append(_Entry(rules, FixedKeys(fixed, named=rules.id is not None)))

    @property
    def algorithms(self) -> list[str]:
        """Algorithms that some key is pinned to."""
        return sorted({entry.rules.algorithm for entry in self._entries})

    def candidates(self, algorithm: str, kid: str | None) -> list[tuple[Key, Material]]:
        """Keys that may have signed such a token, each with the entry whose rules apply to it."""
        return [
            (entry.rules, material)
            for entry in self._entries
            if entry.rules.algorithm == algorithm
            for material in entry.keys.find(kid)
        ]

    def outdated(self, algorithm: str, kid: str | None) -> list[RemoteKeys]:
        """Sets behind URLs that lack ``kid``, and might have it if they were fetched again."""
        return [remote for remote in self.remotes if remote.algorithm == algorithm and not remote.find(kid)]

    async def run(self, changed: Callable[[], None]) -> None:
        """Keep the sets behind URLs fresh until cancelled; return at once if there are none.

        ``changed`` is called whenever a set's keys are no longer what they were.
        """
        async with trio.open_nursery() as nursery:
            for remote in self.remotes:
                nursery.start_soon(remote.run, changed)


def signing_key(auth: Auth, *, dev: bool, source: str) -> tuple[Key, Material]:
    """The first configured key that can sign.

    Raises :class:`~broker.errors.ConfigurationError` if there are only public ones.
    """
    for rules, fixed in _load(auth, dev=dev, source=source):
        for material in fixed or ():
            if material.private is not None:
                return rules, material
    raise ConfigurationError(
        source,
        "auth.keys",
        "no key here can sign a token" if auth.keys else "there are no keys",
        "add one with a secret (HS256) or a file that holds a private key; public keys and URLs only verify",
    )


# ------------------------------------------------------------------- loading

_Fixed = tuple[Material, ...]


def _load(auth: Auth, *, dev: bool, source: str) -> list[tuple[Key, _Fixed | None]]:
    """The keys of each entry, ``None`` for an entry whose keys come from a URL."""
    if dev and not auth.keys:
        secret = DEVELOPMENT_SECRET.encode()
        return [(Key(algorithm="HS256"), (Material(None, secret, secret),))]
    return [(key, _read(key, source, f"auth.keys[{number}]")) for number, key in enumerate(auth.keys)]


def _read(key: Key, source: str, at: str) -> _Fixed | None:
    given = [name for name in _READERS if getattr(key, name) is not None]
    if len(given) != 1:
        problem = f"{' and '.join(given)} are set together" if given else "it has no key"
        raise ConfigurationError(source, at, problem, f"set exactly one of {', '.join(_READERS)}")
    try:
        return _READERS[given[0]](key)
    except KeyProblem as found:
        raise ConfigurationError(source, f"{at}.{given[0]}", found.problem, found.mend) from None


def _read_secret(key: Key) -> _Fixed:
    from broker.auth import crypto  # noqa: PLC0415 - see the top of this file

    if key.algorithm != "HS256":
        raise KeyProblem(
            f"{key.algorithm} does not verify with a secret",
            "set file to its PEM, or jwks to the URL of its key set",
        )
    assert key.secret is not None
    return (crypto.from_secret(key.secret.encode(), key.id),)


def _read_file(key: Key) -> _Fixed:
    from broker.auth import crypto  # noqa: PLC0415 - see the top of this file

    assert key.file is not None
    try:
        with Path(key.file).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise KeyProblem(
            f"cannot read {key.file!r}: {reason}", "correct the path or its permissions"
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise KeyProblem(f"{key.file!r} is larger than {MAX_FILE_BYTES} bytes", "name the key file itself")
    if crypto.looks_like_jwk(content):
        if key.id is not None:
            raise KeyProblem("a JWK set names its own keys", f"remove id = {key.id!r}")
        return crypto.from_jwk_set(key.algorithm, content)
    if key.algorithm == "HS256":
        # `openssl rand -hex 32 > file` ends the line; a newline after binary bytes is part of the secret.
        text = content.isascii() and content.rstrip(b"\r\n").decode().isprintable()
        return (crypto.from_secret(content.rstrip(b"\r\n") if text else content, key.id),)
    return (crypto.from_pem(key.algorithm, content, key.id),)


def _check_url(key: Key) -> None:
    """Refuse what cannot be the address of a public key set; the set itself is fetched later."""
    assert key.jwks is not None
    try:
        url = urlsplit(key.jwks)
        usable = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise KeyProblem(f"{key.jwks!r} is no address of a key set", "give an https:// URL")
    if url.username is not None or url.password is not None:
        raise KeyProblem("it holds a user name or password", "key sets are public: remove it")
    if key.algorithm == "HS256":
        raise KeyProblem("a secret behind a URL is none", "set secret or file, or another algorithm")
    if key.id is not None:
        raise KeyProblem("a JWK set names its own keys", f"remove id = {key.id!r}")


def _remote(rules: Key) -> RemoteKeys:
    from broker.auth.jwks import RemoteKeys  # noqa: PLC0415 - see the top of this file

    assert rules.jwks is not None
    return RemoteKeys(rules.jwks, rules.algorithm)


_READERS: Final[dict[str, Callable[[Key], _Fixed | None]]] = {
    "secret": _read_secret,
    "file": _read_file,
    "jwks": _check_url,
}
