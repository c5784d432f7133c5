"""Events to learn from, such as a CRM's backend publishes."""

from __future__ import annotations

import random
from typing import Any

from broker.protocol.events import Position, make_event

COMPANIES = (
    "Acme",
    "Globex",
    "Initech",
    "Umbrella",
    "Hooli",
    "Stark Industries",
    "Wayne Enterprises",
    "Wonka",
)
STAGES = ("lead", "qualified", "proposal", "negotiation", "won", "lost")


def crm_events(count: int, *, seed: int = 1, namespace: str = "deal") -> list[bytes]:
    """Events such as a CRM's backend publishes, as they go over the wire: about 200 bytes each."""
    rng = random.Random(seed)
    events = []
    for number in range(count):
        data: dict[str, Any] = {"id": rng.randrange(90_000)}
        kind = rng.choice(("deal-updated", "activity-added", "contact-changed"))
        if kind == "deal-updated":
            data |= {"stage": rng.choice(STAGES), "amount": rng.randrange(1_000, 999_999), "currency": "EUR"}
        elif kind == "activity-added":
            data |= {
                "kind": rng.choice(("call", "mail")),
                "subject": f"Follow up with {rng.choice(COMPANIES)}",
            }
        else:
            data |= {
                "company": rng.choice(COMPANIES),
                "field": "email",
                "new": f"u{rng.randrange(10**6)}@example.com",
            }
        user = str(rng.randrange(400))
        event = make_event(
            f"{namespace}:{rng.randrange(5_000)}",
            kind,
            data | {"owner": user, "changed_by": f"user-{rng.randrange(400)}"},
            1.7e9 + number + round(rng.random(), 6),
            user=user,
        )
        event.place(Position("e", number + 1))
        events.append(event.wire)
    return events


EVENTS = crm_events(600)
