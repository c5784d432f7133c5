"""Asking several servers the same question, of which some may be cut off, frozen or behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import trio

from broker.link.base import LinkDown
from broker.link.dial import Refused

PATIENCE: Final = 0.3
"""How long the others may take when one has answered (s)."""

_Whom = TypeVar("_Whom")
_Opinion = TypeVar("_Opinion")


async def newest(
    whom: Iterable[_Whom],
    ask: Callable[[_Whom], Awaitable[_Opinion]],
    epoch: Callable[[_Opinion], int],
) -> _Opinion:
    """Ask all at once and take the answer with the greatest epoch.

    So a server that is cut off from the others, perhaps together with an old
    primary, does not lead us there. Raises :class:`LinkDown` when nobody
    answers, and of several reasons the one that a person can mend.
    """
    everybody = list(whom)
    opinions: list[_Opinion] = []
    failures: list[LinkDown] = []
    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope

        async def one(who: _Whom) -> None:
            try:
                opinions.append(await ask(who))
            except LinkDown as error:
                failures.append(error)
            if len(opinions) + len(failures) == len(everybody):
                scope.cancel()
            elif len(opinions) == 1:
                scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE)

        for who in everybody:
            nursery.start_soon(one, who)
    if opinions:
        return max(opinions, key=epoch)
    failures.sort(key=lambda error: not isinstance(error, Refused))
    raise failures[0] if failures else LinkDown("there is nobody to ask")
