"""Which shard has a key, and which shard hears a channel.

Without a cluster one shard has and hears everything. In a cluster, sharded
channels are heard where their slot lives; all others can be heard on any node,
and one is taken for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from redis.crc import key_slot

from broker.link.layout import SLOTS
from broker.link.shard import Shard
from broker.link.target import Address


class Routes:
    """The table, and what has to be heard wherever that may be."""

    def __init__(self, own_channel: str, *, clustered: bool) -> None:
        self.clustered = clustered
        self.wanted: dict[str, bool] = {own_channel: False}
        """Every channel that the link should hear → whether it is sharded."""
        self.shards: list[Shard] = []
        self.table: list[Shard | None] = [None] * (SLOTS if clustered else 1)
        """Shard by slot."""

    def slot(self, key: str) -> int:
        """Where ``key`` lives, as an index of the table."""
        return key_slot(key.encode()) if self.clustered else 0

    def at(self, address: Address | None) -> Shard | None:
        """The shard whose primary is there."""
        return next((shard for shard in self.shards if shard.address == address), None)

    def hearing(self, channel: str) -> Shard | None:
        """The shard that hears ``channel``, when anybody wants it."""
        sharded = self.wanted.get(channel)
        return None if sharded is None else self._hearer(channel, sharded=sharded)

    def _hearer(self, channel: str, *, sharded: bool) -> Shard | None:
        if sharded:
            return self.table[self.slot(channel)]
        return self.shards[0] if self.shards else None

    def want(self, channels: Iterable[str], *, sharded: bool) -> None:
        """Hear ``channels``."""
        sharded = sharded and self.clustered
        new: dict[Shard, list[str]] = {}
        for channel in channels:
            if channel not in self.wanted:
                self.wanted[channel] = sharded
                shard = self._hearer(channel, sharded=sharded)
                if shard is not None:
                    shard.wanted[channel] = sharded
                    new.setdefault(shard, []).append(channel)
        for shard, some in new.items():
            shard.tell(some)

    def drop(self, channels: Iterable[str]) -> None:
        """Hear ``channels`` no more."""
        old: dict[Shard, list[str]] = {}
        for channel in channels:
            shard = self.hearing(channel)
            if self.wanted.pop(channel, None) is not None and shard is not None:
                shard.wanted.pop(channel, None)
                old.setdefault(shard, []).append(channel)
        for shard, some in old.items():
            shard.tell(some)

    def assign(self, shards: Sequence[Shard], table: list[Shard | None]) -> None:
        """Take another table, and bring every channel to its place."""
        self.shards = list(shards)
        self.table = table
        there: dict[Shard, dict[str, bool]] = {shard: {} for shard in shards}
        for channel, sharded in self.wanted.items():
            shard = self._hearer(channel, sharded=sharded)
            if shard is not None:
                there[shard][channel] = sharded
        for shard, wanted in there.items():
            changed = shard.wanted.keys() ^ wanted.keys()
            shard.wanted.clear()
            shard.wanted.update(wanted)
            shard.tell(changed)
