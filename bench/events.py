"""Bodies of events: plain ones of an exact size, and lifelike ones of a CRM, repeatable from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import orjson

from bench.workload import SEQUENCE

_FIRST = (
    "Anna",
    "Bruno",
    "Chiara",
    "David",
    "Elif",
    "Farid",
    "Greta",
    "Henrik",
    "Ines",
    "Jonas",
    "Katja",
    "Luca",
)
_LAST = (
    "Abel",
    "Bianchi",
    "Costa",
    "Demir",
    "Eriksen",
    "Fischer",
    "Garcia",
    "Haddad",
    "Ivanova",
    "Jansen",
    "Keller",
)
_COMPANIES = (
    "Acme",
    "Baltic",
    "Cobalt",
    "Delta",
    "Evergreen",
    "Fjord",
    "Granite",
    "Harbor",
    "Isar",
    "Juniper",
    "Lumen",
)
_LEGAL = ("GmbH", "AG", "Ltd", "Inc", "SARL", "BV")
_STAGES = ("lead", "qualified", "proposal", "negotiation", "won", "lost")
_CURRENCIES = ("EUR", "USD", "CHF", "GBP", "SEK")
_ACTIVITIES = ("call", "email", "meeting", "note", "task")
_OUTCOMES = ("reached", "left a message", "no answer", "rescheduled", "interested", "wants a quote")

# A broker's event around a body: [{"op":"event","room":…,"event":"update","data":…,"ts":1732388598.123456}]
_ENVELOPE = len('[{"op":"event","room":"","event":"update","data":,"ts":1732388598.123456}]')


def padded(frame_bytes: int, room: str = "bench:room") -> str:
    """A body that makes the broker's whole single-event payload about ``frame_bytes`` long."""
    shortest = f'{{"n":"{SEQUENCE}","v":""}}'
    padding = max(0, frame_bytes - _ENVELOPE - len(room) - len(shortest))
    return f'{{"n":"{SEQUENCE}","v":"{"x" * padding}"}}'


def varied(count: int, frame_bytes: int, seed: int, room: str = "bench:room") -> list[str]:
    """``count`` bodies like :func:`padded`, each of other words: no more compressible than real text."""
    chance = random.Random(seed)
    length = len(padded(frame_bytes, room)) - len(f'{{"n":"{SEQUENCE}","v":""}}')
    bodies = []
    for _ in range(count):
        words = ""
        while len(words) < length:
            words += f"{_name(chance)}, {chance.choice(_STAGES)} {chance.randrange(5, 2000) * 100}; "
        bodies.append(f'{{"n":"{SEQUENCE}","v":"{words[:length]}"}}')
    return bodies


def crm_bodies(count: int, seed: int) -> list[str]:
    """``count`` changes of deals, contacts and activities, as a sales team makes them; some 120 B each."""
    chance = random.Random(seed)
    makers: tuple[Callable[[random.Random], dict[str, Any]], ...] = (_deal, _contact, _activity)
    bodies = []
    for _ in range(count):
        body = chance.choices(makers, weights=(5, 2, 3))[0](chance)
        bodies.append(orjson.dumps({"n": SEQUENCE, **body}).decode())
    return bodies


def _name(chance: random.Random) -> str:
    return f"{chance.choice(_FIRST)} {chance.choice(_LAST)}"


def _company(chance: random.Random) -> str:
    return f"{chance.choice(_COMPANIES)} {chance.choice(_LEGAL)}"


def _deal(chance: random.Random) -> dict[str, Any]:
    return {
        "type": "deal",
        "id": chance.randrange(1000, 100_000),
        "stage": chance.choice(_STAGES),
        "amount": chance.randrange(5, 2000) * 100,
        "currency": chance.choice(_CURRENCIES),
        "owner": _name(chance),
        "company": _company(chance),
    }


def _contact(chance: random.Random) -> dict[str, Any]:
    name = _name(chance)
    return {
        "type": "contact",
        "id": chance.randrange(1000, 500_000),
        "name": name,
        "email": f"{name.replace(' ', '.').lower()}@{chance.choice(_COMPANIES).lower()}.example",
        "phone": f"+49 {chance.randrange(30, 999)} {chance.randrange(10**6, 10**7)}",
    }


def _activity(chance: random.Random) -> dict[str, Any]:
    return {
        "type": "activity",
        "id": chance.randrange(10**6, 10**7),
        "kind": chance.choice(_ACTIVITIES),
        "deal": chance.randrange(1000, 100_000),
        "by": _name(chance),
        "outcome": chance.choice(_OUTCOMES),
        "minutes": chance.randrange(1, 90),
    }
