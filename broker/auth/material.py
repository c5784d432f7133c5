"""Keys, ready to use, and what is said about those that cannot be used.

The words that reading (:mod:`broker.auth.crypto`), fetching
(:mod:`broker.auth.jwks`) and choosing keys (:mod:`broker.auth.keys`) share. It
imports none of them, and of cryptography, which takes 11 MB, only the types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey, Ed448PublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

    PublicKey = bytes | RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey
    PrivateKey = bytes | RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey | Ed448PrivateKey


@dataclass(frozen=True, slots=True)
class Material:
    """One key, ready to use. ``kid`` is the name tokens call it by; a secret is both halves at once."""

    kid: str | None
    public: PublicKey = field(repr=False)
    private: PrivateKey | None = field(repr=False, default=None)


class KeyProblem(Exception):  # noqa: N818 - a finding about a key, not a failure of the program
    """Key material that cannot be used: what is wrong, and how to mend it. Quotes none of it."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem}; {mend}")
        self.problem = problem
        self.mend = mend


class FixedKeys:
    """Keys by key id. Never changes. ``named``: the configuration asks tokens for their key's id."""

    __slots__ = ("_by_kid", "_unnamed")

    def __init__(self, keys: Sequence[Material], *, named: bool = False) -> None:
        by_kid: dict[str | None, list[Material]] = {}
        for key in keys:
            by_kid.setdefault(key.kid, []).append(key)
        self._by_kid: Mapping[str | None, Sequence[Material]] = by_kid
        # A set of one needs no names (RFC 7517 section 4.5: kid is optional).
        alone = len(keys) == 1 and not named
        self._unnamed: Sequence[Material] = by_kid.get(None) or (keys if alone else ())

    def find(self, kid: str | None) -> Sequence[Material]:
        """Keys that may have signed a token naming ``kid``; RFC 7517 lets several share one."""
        return self._unnamed if kid is None else self._by_kid.get(kid, ())

    def __len__(self) -> int:
        return sum(len(keys) for keys in self._by_kid.values())
