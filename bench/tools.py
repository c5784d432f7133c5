"""What the benchmark needs of the machine: a place for its files, a C compiler, npm, cores, descriptors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "bench"
CACHE = ROOT / ".cache" / "bench"


class Unavailable(click.ClickException):
    """Something the benchmark needs is not on this machine; the message says what and what to do."""

    exit_code = 3


def compiled(name: str) -> Path:
    """The program made of ``bench/NAME.c``, built when the source is newer than what is cached.

    Raises :class:`Unavailable` where there is no C compiler.
    """
    source = HERE / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    program = CACHE / f"{name}-{digest}"
    if program.exists():
        return program
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Unavailable("the load client is C and no C compiler was found: install gcc or clang, or set CC")
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O2", "-Wall", "-o", str(unfinished), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if built.returncode:
        raise Unavailable(f"{' '.join(command)} failed:\n{built.stderr}")
    unfinished.rename(program)
    return program


def node_modules() -> Path:
    """A folder with the Node peers and what they need, installed by npm on the first call.

    Raises :class:`Unavailable` where node or npm is missing, or npm fails.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Unavailable("node and npm were not found")
    folder = CACHE / "node"
    folder.mkdir(parents=True, exist_ok=True)
    for peer in (HERE / "peers").glob("*.mjs"):
        shutil.copyfile(peer, folder / peer.name)
    wanted = (HERE / "peers" / "package.json").read_text()
    installed = folder / "installed.json"
    if installed.exists() and installed.read_text() == wanted:
        return folder
    (folder / "package.json").write_text(wanted)
    command = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--no-package-lock",
        "--silent",
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable("npm install took longer than 3 minutes") from None
    if done.returncode:
        raise Unavailable(f"npm install failed: {(done.stderr or done.stdout).strip()[-300:]}")
    installed.write_text(wanted)
    return folder


def raise_descriptor_limit() -> int:
    """As many descriptors as the system grants, for this process and its children; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def cpu_time(pid: int) -> int:
    """CPU time of all threads of a process so far (ns), exact to the scheduler's tick of a few ms.

    ``schedstat`` and not ``stat``: the latter counts in steps of 10 ms.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Children started inside run on ``core`` only (``None``: anywhere), with all their threads."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
