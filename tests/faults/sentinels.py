"""A Sentinel: the redis-server that watches a primary and its replicas, and decides who is primary."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

import redis
import trio

from tests.redis_server import MISSING, free_port

SERVICE: Final = "broker"
DOWN_AFTER: Final = 2000
"""Milliseconds without an answer after which a primary is thought to be down."""
QUORUM: Final = 2

CONFIG: Final = f"""
bind 127.0.0.1
sentinel monitor {SERVICE} 127.0.0.1 {{primary}} {QUORUM}
sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER}
sentinel failover-timeout {SERVICE} 6000
"""


class Sentinel:
    """One of them, in a directory of its own."""

    def __init__(self, directory: Path, primary: int) -> None:
        directory.mkdir()
        self.port = free_port()
        self._log = directory / "sentinel.log"
        self._config = directory / "sentinel.conf"  # which it writes to
        self._config.write_text(f"port {self.port}\ndir {directory}{CONFIG.format(primary=primary)}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        program = shutil.which("redis-server")
        assert program is not None, MISSING
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, str(self._config), "--sentinel"], stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def knows_all(self, sentinels: int) -> None:
        """Return once it knows a replica and so many Sentinels; whoever calls has the deadline."""
        while True:
            with contextlib.suppress(redis.RedisError), redis.Redis(port=self.port) as client:
                state = client.sentinel_master(SERVICE)
                if state["num-other-sentinels"] == sentinels - 1 and state["num-slaves"] == 1:
                    return
            await trio.sleep(0.1)
