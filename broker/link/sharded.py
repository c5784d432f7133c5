"""A Redis Cluster: which shards there are, and what happens when that changes.

The layout is asked for again when something turns out to live elsewhere, and
now and then anyway. When it has changed, no lane sends anything new until all
that is under way has been answered; then the table is changed in one step, and
what was refused or has waited goes out by the new one, in its order. So two
commands for one key never overtake each other on their way through two nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from broker.link.backoff import Backoff
from broker.link.base import LinkDown, LinkError
from broker.link.counts import Counts
from broker.link.dial import Refused, refusal
from broker.link.lane import Lane, Moved, pack
from broker.link.layout import SLOTS, Layout, read_layout
from broker.link.questions import newest
from broker.link.routes import Routes
from broker.link.shard import Events, Shard, Terms
from broker.link.target import Address
from broker.logs import get_logger

log = get_logger(__name__)

LOOK_EVERY: Final = 3.0
"""Between two looks at the layout (s)…"""

LOOK_EVERY_DOWN: Final = 0.5
"""…and while the link is down: a node may have been replaced."""

LOOK_AGAIN: Final = 0.1
"""…and before another look because something lives elsewhere (s): a slot on its way says so in every
answer. Until then nothing is sent to a shard that said so, and it is tried a few times only."""

_QUESTION: Final = (pack("CLUSTER", "INFO"), pack("CLUSTER", "SLOTS"))


class Cluster:
    """Keeps the routes as the cluster is laid out.

    ``changed`` is called when shards have come or gone; ``send_again`` gets the
    commands that a change of the table has to bring elsewhere.
    """

    def __init__(
        self,
        terms: Terms,
        events: Events,
        routes: Routes,
        seeds: tuple[Address, ...],
        *,
        is_up: Callable[[], bool],
        changed: Callable[[], None],
        send_again: Callable[[list[Moved]], None],
    ) -> None:
        self._terms = terms
        self._events = events
        self._routes = routes
        self._seeds = seeds
        self._is_up = is_up
        self._changed = changed
        self._send_again = send_again
        self._layout: Layout | None = None
        self._scopes: dict[Shard, trio.CancelScope] = {}
        self._stale = trio.Event()
        self._looked = trio.Event()
        self._asking = Counts()  # asking seeds is no traffic of the link's

    def refresh(self) -> None:
        """Look at the layout soon."""
        self._stale.set()

    async def refreshed(self) -> None:
        """Wait until the layout has been looked at from now on."""
        self.refresh()
        await self._looked.wait()

    async def run(self) -> None:
        """Keep shards until cancelled."""
        backoff = Backoff()
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._stale = trio.Event()
                    try:
                        layout = await self._look()
                    except LinkError as error:
                        self._report(error)
                        await backoff.pause()
                        continue
                    backoff.succeeded()
                    await self._apply(layout, nursery)
                    looked, self._looked = self._looked, trio.Event()
                    looked.set()
                    with trio.move_on_after(LOOK_EVERY if self._is_up() else LOOK_EVERY_DOWN):
                        await self._stale.wait()
                        await trio.sleep(LOOK_AGAIN)
        finally:
            self._routes.assign([], [None] * SLOTS)
            self._layout = None

    def _report(self, error: LinkError) -> None:
        self._terms.counts.connect_failures += 1
        if isinstance(error, Refused):
            self._events.refused(error)
        if (missed := self._terms.throttle.admit(("layout", str(error)))) is not None:
            log.warning("redis cluster cannot be seen", why=str(error), suppressed=missed)

    async def _look(self) -> Layout:
        """Ask the shards that we have, and the seeds when none of them knows."""
        shards = [shard for shard in self._routes.shards if shard.lane is not None]
        if shards:
            try:
                return await newest(shards, self._ask_shard, lambda layout: layout.epoch)
            except LinkDown:
                pass  # the seeds may know more
        known = [shard.address for shard in self._routes.shards if shard.address is not None]
        everybody = dict.fromkeys((*known, *self._seeds))
        return await newest(everybody, self._ask_seed, lambda layout: layout.epoch)

    async def _ask_shard(self, shard: Shard) -> Layout:
        assert shard.address is not None
        return read_layout(await shard.pool.ask(*_QUESTION), shard.address)

    async def _ask_seed(self, address: Address) -> Layout:
        terms = self._terms
        lane = Lane("layout", self._asking, (), terms.settings.answer_timeout, terms.throttle)
        try:
            await terms.dialer.open(lane, address)
            replies = await lane.ask(*_QUESTION)
        finally:
            lane.close("asked")
        for reply in replies:
            if isinstance(reply, LinkError):
                if "cluster support disabled" in str(reply):
                    raise Refused(f"{address} is no node of a cluster", "write redis:// or rediss://")
                raise refusal(LinkDown(str(reply)))
        return read_layout(replies, address)

    # -- changes ----------------------------------------------------------------------------

    async def _apply(self, layout: Layout, nursery: trio.Nursery) -> None:
        if not layout.complete:
            if (missed := self._terms.throttle.admit("incomplete")) is not None:
                log.warning("redis cluster has slots without a primary", suppressed=missed)
            if self._layout is None:
                return
        lanes = [shard.lane for shard in self._routes.shards if shard.lane is not None]
        if self._layout is not None and layout.ranges == self._layout.ranges:
            held = [lane for lane in lanes if lane.held]
            for lane in held:
                await lane.drained()
            self._send_again([moved for lane in held for moved in lane.take_back()])
            return
        for lane in lanes:
            lane.hold()
        for lane in lanes:
            await lane.drained()  # or given up: a lane watches its answers
        self._layout = layout
        before = {shard.address: shard for shard in self._routes.shards}
        after = {address: before.get(address) or self._new_shard(address) for address in layout.primaries}
        table: list[Shard | None] = [None] * SLOTS
        for first, last, address in layout.ranges:
            table[first : last + 1] = [after[address]] * (last - first + 1)
        self._routes.assign(list(after.values()), table)
        for address, shard in after.items():
            if address not in before:
                nursery.start_soon(self._run_shard, shard)
        for old_address, shard in before.items():
            if old_address not in after:
                self._scopes[shard].cancel()
        self._changed()
        self._send_again([moved for lane in lanes for moved in lane.take_back()])

    def _new_shard(self, address: Address) -> Shard:
        async def find() -> Address:
            return address

        shard = Shard(self._terms, self._events, find, {})
        shard.address = address
        self._scopes[shard] = trio.CancelScope()
        return shard

    async def _run_shard(self, shard: Shard) -> None:
        try:
            with self._scopes[shard]:
                await shard.run()
        finally:
            del self._scopes[shard]
