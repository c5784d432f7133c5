"""Where a result was measured: without it a figure means nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.tools import CACHE, ROOT


def machine() -> dict[str, Any]:
    """Processor, kernel, versions, commit."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "node": _said("node", "--version"),
        "redis": _said("redis-server", "--version"),
        "npm_packages": _npm_packages(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str | None:
    commit = _said("git", "rev-parse", "--short", "HEAD")
    changed = _said("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _npm_packages() -> dict[str, str]:
    versions = {}
    for name in ("ws", "socket.io"):
        package = CACHE / "node" / "node_modules" / name / "package.json"
        found = re.search(r'"version": "([^"]+)"', package.read_text()) if package.exists() else None
        if found:
            versions[name] = found[1]
    return versions


def _said(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
