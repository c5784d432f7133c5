"""Files that are read up to a limit, and written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker.protocol.files import read_file, write_file


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "name"
    write_file(path, b"first")
    write_file(path, b"second")
    assert read_file(path, 6) == b"second"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="name is larger than 5 bytes"):
        read_file(path, 5)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="is not a regular file"):
            read_file(tmp_path / name, 10)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing", 10)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "name"
    write_file(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert read_file(path, 10) == b"old"
    assert list(tmp_path.iterdir()) == [path]
