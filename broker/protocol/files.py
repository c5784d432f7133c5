"""Files below the data directory: read up to a limit, written whole or not at all.

For dictionaries and samples. Both functions wait for the disk, so that only
what loads, flushes or trains may call them.
"""

from __future__ import annotations

import os
from pathlib import Path


def read_file(path: Path, limit: int) -> bytes:
    """Content of a regular file of at most ``limit`` bytes.

    Raises :class:`ValueError` for one that is larger, or no regular file, and :class:`OSError`.
    """
    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes")
    return data


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and its folder, so that after a crash it is whole or absent. Raises :class:`OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)
