from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.admin.publishing import Content
from broker.errors import BrokerError
from broker.protocol.messages import MAX_DEPTH, Refusal, decode


def nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@given(st.integers(0, 80), st.sampled_from([list, dict]))
def test_depth_is_bounded_as_for_clients(depth: int, kind: type) -> None:
    message = orjson.dumps({"op": "publish", "room": "a", "event": "e", "data": nested(depth, kind)})
    client_may = not isinstance(decode(message, 1)[0], Refusal)
    try:
        Content("e", nested(depth, kind), None, None, None)
        operator_may = True
    except BrokerError:
        operator_may = False
    assert operator_may == client_may == (depth < MAX_DEPTH)


def test_depth_is_seen_beside_shallow_values() -> None:
    with pytest.raises(BrokerError, match="deeper than 64"):
        Content("e", {"wide": list(range(1000)), "deep": nested(70, list)}, None, None, None)


def test_tags_are_checked_once_for_all_rooms() -> None:
    with pytest.raises(BrokerError, match="tags"):
        Content("e", 1, None, None, {"a": True})
