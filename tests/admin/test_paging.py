from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from broker.admin import paging
from broker.admin.paging import page, read_cursor, write_cursor
from broker.errors import BrokerError, ErrorCode


def collect(names: list[str], limit: int) -> list[str]:
    """Every page, one after the other, with the cursor going through its text form."""

    async def main() -> list[str]:
        found: list[str] = []
        after: tuple[str, ...] | None = None
        while True:
            chosen, following = await page(iter(names), lambda name: (name,), limit, after)
            assert len(chosen) <= limit
            found += chosen
            if following is None:
                return found
            after = read_cursor(write_cursor(following), tuple[str])

    return trio.run(main)


@given(st.lists(st.text(max_size=5), unique=True, max_size=40), st.integers(1, 7))
def test_pages_together_are_the_whole_list_in_order(names: list[str], limit: int) -> None:
    assert collect(names, limit) == sorted(names)


async def test_other_tasks_run_between_slices() -> None:
    passes = 0

    async def count() -> None:
        nonlocal passes
        while True:
            passes += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        names = [str(number) for number in range(paging.SLICE * 10)]
        chosen, following = await page(iter(names), lambda name: (name,), 3, None)
        nursery.cancel_scope.cancel()
    assert chosen == ["0", "1", "10"]
    assert following == ("10",)
    assert passes >= 9


async def test_things_with_equal_keys_are_never_compared() -> None:
    things = [object(), object(), object()]
    chosen, _ = await page(iter(things), lambda _thing: ("same",), 2, None)
    assert chosen == things[:2]


async def test_what_has_no_key_is_left_out() -> None:
    chosen, following = await page(iter("abcd"), lambda c: (c,) if c in "bd" else None, 2, None)
    assert (chosen, following) == (["b", "d"], None)


@given(
    st.one_of(st.text(max_size=30), st.binary(max_size=20).map(lambda raw: write_cursor((raw.hex(),)) or ""))
)
def test_any_text_is_a_cursor_or_one_documented_error(text: str) -> None:
    key: Any
    try:
        key = read_cursor(text, tuple[int, str])
    except BrokerError as error:
        code = error.code
        assert code is ErrorCode.BAD_MESSAGE
    else:
        assert read_cursor(write_cursor(key), tuple[int, str]) == key


def test_no_cursor_is_the_beginning() -> None:
    assert read_cursor(None, tuple[str]) is None
    assert write_cursor(None) is None
    with pytest.raises(BrokerError):
        read_cursor("", tuple[str])
