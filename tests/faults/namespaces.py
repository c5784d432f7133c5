"""A network of its own for a Redis, with cables that can be pulled. Needs root and the program ``ip``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.redis_server import RedisServer


def allowed() -> bool:
    """Whether networks can be made here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with namespace(1):
            return True
    except subprocess.CalledProcessError:
        return False


def ip(*arguments: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Namespace:
    """``cables`` links to it, each with an address of its own at either end: 10.213.N.1 here, .2 there."""

    def __init__(self, cables: int) -> None:
        self.name = f"broker-{os.getpid()}"
        self.addresses = [f"10.213.{number}.2" for number in range(cables)]

    def _ends(self, number: int) -> tuple[str, str]:
        """Names of the interfaces here and there; at most 15 characters."""
        return f"bf{os.getpid()}h{number}", f"bf{os.getpid()}n{number}"

    def make(self) -> None:
        """Make it, and lay the cables."""
        ip("netns", "add", self.name)
        for number, address in enumerate(self.addresses):
            here, there = self._ends(number)
            ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name)
            ip("address", "add", f"10.213.{number}.1/30", "dev", here)
            ip("link", "set", here, "up")
            ip("-n", self.name, "address", "add", f"{address}/30", "dev", there)
            ip("-n", self.name, "link", "set", there, "up")

    def remove(self) -> None:
        """Remove what there is of it. Cables first: with the network they would go a moment later."""
        for number in range(len(self.addresses)):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("link", "delete", self._ends(number)[0])
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "delete", self.name)

    def pull(self, number: int) -> None:
        """Nothing goes through this cable any more, and nobody is told."""
        ip("-n", self.name, "link", "set", self._ends(number)[1], "down")

    def plug(self, number: int) -> None:
        """It does again."""
        ip("-n", self.name, "link", "set", self._ends(number)[1], "up")

    def redis(self, directory: Path, **options: Any) -> RedisServer:
        """A Redis inside."""

        class Inside(RedisServer):
            host = self.addresses[0]
            runner = ("ip", "netns", "exec", self.name)

        return Inside(directory, None, bind="0.0.0.0", protected_mode="no", **options)


@contextlib.contextmanager
def namespace(cables: int) -> Iterator[Namespace]:
    """A network that is gone after the block."""
    made = Namespace(cables)
    try:
        made.make()
        yield made
    finally:
        made.remove()
