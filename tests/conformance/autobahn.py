"""Run the Autobahn|Testsuite against ``/echo``, and hold the verdicts against a pinned table.

    python -m tests.conformance.autobahn            # all cases, about nine minutes
    python -m tests.conformance.autobahn '1.*' '7.*'  # some of them

The suite needs Python 2.7, so it gets a virtual environment of its own below
``.cache/``; name an interpreter by ``PYTHON27`` if none is found. Every case
must end as ``expected.json`` says, in behaviour and in how the connection was
closed: OK, save those that are listed there with the reason. Exit code 0 if so.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "autobahn"
EXPECTED = Path(__file__).with_name("expected.json")
SUITE = "autobahntestsuite==25.10.1"
VIRTUALENV = "virtualenv==20.21.1"
"""The last one that makes environments for Python 2.7."""
AGENT = "broker"

Verdict = tuple[str, str]
"""How a case behaved, and how it closed."""


def find_python27() -> str:
    """An interpreter of Python 2.7. Raises FileNotFoundError with what to do."""
    installed = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/2.7.*/bin/python")))
    # Last what the path has: pyenv's shims answer there for versions that are not selected.
    for candidate in [os.environ.get("PYTHON27"), *installed, shutil.which("python2.7")]:
        if candidate and Path(candidate).exists():
            return candidate
    raise FileNotFoundError("the suite needs Python 2.7: install it, or name it by PYTHON27=…")


def install() -> Path:
    """The suite's command ``wstest``, installed if need be."""
    wstest = CACHE / "suite" / "bin" / "wstest"
    if wstest.exists():
        return wstest
    tool = CACHE / "virtualenv"
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run = subprocess.run
    run([sys.executable, "-m", "venv", str(tool)], check=True)
    run([str(tool / "bin" / "python"), *pip, VIRTUALENV], check=True)
    run(
        [str(tool / "bin" / "virtualenv"), "-q", "-p", find_python27(), str(CACHE / "suite")],
        check=True,
    )
    run([str(CACHE / "suite" / "bin" / "python"), *pip, SUITE], check=True)
    return wstest


@contextmanager
def echoing() -> Iterator[int]:
    """A broker with ``/echo``, in a process of its own; its port."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    command = [sys.executable, "-m", "broker", "serve", "--dev", "--port", "0", "--admin-port", "-1"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            yield int(line.split("/ws")[0].rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)


def run_cases(wstest: Path, port: int, cases: list[str]) -> dict[str, Verdict]:
    """The verdict on each case."""
    reports = CACHE / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    spec = {
        "outdir": str(reports),
        "servers": [{"agent": AGENT, "url": f"ws://127.0.0.1:{port}/echo"}],
        "cases": cases,
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    file = CACHE / "spec.json"
    file.write_text(json.dumps(spec))
    with open(CACHE / "log", "wb") as log:
        subprocess.run(
            [str(wstest), "-m", "fuzzingclient", "-s", str(file)], stdout=log, stderr=log, check=True
        )
    index: dict[str, Any] = json.loads((reports / "index.json").read_text())[AGENT]
    return {case: (found["behavior"], found["behaviorClose"]) for case, found in index.items()}


def differences(found: dict[str, Verdict], expected: dict[str, Any], *, whole: bool) -> Iterator[str]:
    """A sentence for each case that is not as it should be."""
    for case in sorted(found, key=_number):
        wanted = _expected(case, expected["exceptions"])
        if found[case] != wanted:
            yield f"{case}: behaviour {found[case][0]}, close {found[case][1]}; expected {wanted}"
    if whole and len(found) != expected["cases"]:
        yield f"{len(found)} cases were run, not {expected['cases']}"


def _expected(case: str, exceptions: list[dict[str, Any]]) -> Verdict:
    for exception in exceptions:
        if any(fnmatchcase(case, pattern) for pattern in exception["cases"]):
            return exception["behavior"], exception["close"]
    return "OK", "OK"


def _number(case: str) -> tuple[int, ...]:
    return tuple(int(part) for part in case.split("."))


def main(cases: list[str]) -> int:
    """Run ``cases``, all if there are none; the exit code."""
    wstest = install()
    with echoing() as port:
        found = run_cases(wstest, port, cases or ["*"])
    for part, name in enumerate(("behaviour", "close")):
        counts = Counter(verdict[part] for verdict in found.values())
        print(f"{name}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    wrong = list(differences(found, json.loads(EXPECTED.read_text()), whole=not cases))
    for line in wrong:
        print(line)
    print(f"{len(found)} cases, {len(wrong)} not as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
