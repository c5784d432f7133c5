"""Who may import whom: the layers, held against every import in the package.

Imports are read, not run, so that one inside a function counts too, and one
under ``if TYPE_CHECKING``: to know a type is to know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import pytest

import broker

ROOT: Final = Path(broker.__file__).parent

EVERYWHERE: Final = frozenset({"broker", "broker.config", "broker.errors"})
"""Plain data without imports of their own, open to all."""

INSIDE: Final[dict[str, frozenset[str]]] = {
    # layer: what of the package it may import besides itself and EVERYWHERE; a name stands for all below it
    "broker.protocol": frozenset(),
    "broker.auth": frozenset({"broker.protocol"}),
    "broker.hub": frozenset(
        {"broker.protocol", "broker.engine.base", "broker.engine.peers", "broker.metrics"}
    ),
    "broker.engine": frozenset({"broker.protocol", "broker.metrics", "broker.logs"}),
    "broker.server": frozenset(
        {
            "broker.protocol",
            "broker.auth",
            "broker.hub",
            "broker.engine.base",
            "broker.engine.peers",
            "broker.metrics",
            "broker.logs",
        }
    ),
    "broker.link": frozenset({"broker.logs"}),
    "broker.streams": frozenset({"broker.link", "broker.engine", "broker.protocol", "broker.logs"}),
    "broker.peers": frozenset({"broker.link", "broker.engine.peers", "broker.protocol", "broker.logs"}),
    "broker.backends": frozenset(
        {
            "broker.link",
            "broker.engine.base",
            "broker.engine.peers",
            "broker.auth.permissions",
            "broker.protocol",
            "broker.logs",
        }
    ),
    "broker.cluster": frozenset(
        {
            "broker.link",
            "broker.streams",
            "broker.peers",
            "broker.backends",
            "broker.engine.base",
            "broker.engine.peers",
            "broker.protocol",
            "broker.logs",
        }
    ),
    "broker.client": frozenset({"broker.protocol"}),
    "broker.config": frozenset(),
    "broker.errors": frozenset(),
    "broker.metrics": frozenset(),
    "broker.logs": frozenset(),
}

IO: Final = frozenset(
    {"trio", "trio_asyncio", "trio_websocket", "asyncio", "anyio", "socket", "ssl", "select", "selectors"}
    | {
        "socketserver",
        "subprocess",
        "multiprocessing",
        "threading",
        "concurrent",
        "signal",
        "sqlite3",
        "redis",
    }
    | {"hypercorn", "starlette", "httpx", "http.client", "http.server", "urllib.request"}
)
"""What waits, or reaches beyond the process's memory."""

OUTSIDE: Final[dict[str, frozenset[str]]] = {
    # layer: modules of others that it must not import
    "broker.protocol": IO,
    "broker.hub": IO | {"os", "pathlib", "time"},
    "broker.errors": IO,
    "broker.config": IO,
    "broker.metrics": IO,
    "broker.auth": frozenset({"socket", "asyncio", "redis", "sqlite3"}),
    "broker.engine": frozenset({"socket", "starlette", "hypercorn", "wsproto"}),
    # Only the link knows that there are asyncio and redis-py.
    "broker.streams": frozenset({"redis", "hiredis", "asyncio", "trio_asyncio", "socket", "sqlite3"}),
    "broker.peers": frozenset({"redis", "hiredis", "asyncio", "trio_asyncio", "socket", "sqlite3"}),
    "broker.backends": frozenset({"redis", "hiredis", "asyncio", "trio_asyncio", "socket", "sqlite3"}),
    "broker.cluster": frozenset({"redis", "hiredis", "asyncio", "trio_asyncio", "socket", "sqlite3"}),
    "broker.server": frozenset({"redis", "sqlite3", "asyncio", "trio_asyncio", "starlette", "hypercorn"}),
}


class Import(NamedTuple):
    """One import: by whom, of what, and where."""

    module: str
    target: str
    line: int
    when: Literal["load", "call", "types"]
    """Runs when the module is loaded, when a function is called, or never."""

    def __str__(self) -> str:
        path = self.module.replace(".", "/") + ".py"
        note = " (TYPE_CHECKING)" if self.when == "types" else ""
        return f"{path}:{self.line} imports {self.target}{note}"


def within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: Final = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def targets(node: ast.Import | ast.ImportFrom, module: str) -> Iterator[str]:
    """Modules that the statement names: ``from package import module`` names the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"{module}:{node.lineno} imports relatively; absolute names are the rule here"
    assert node.module is not None
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        yield inner if inner in MODULES else node.module


def is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(module: str, source: str) -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, when: Literal["load", "call", "types"]) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend(Import(module, target, node.lineno, when) for target in targets(node, module))
        elif isinstance(node, ast.If) and is_type_checking(node):
            for statement in node.body:
                walk(statement, "types")
            for statement in node.orelse:
                walk(statement, when)
        else:
            inner = "call" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else when
            for child in ast.iter_child_nodes(node):
                walk(child, inner)

    walk(ast.parse(source), "load")
    return found


IMPORTS: Final = [found for name, path in MODULES.items() for found in imports_of(name, path.read_text())]


def violations(imports: list[Import], layer: str) -> list[Import]:
    """Imports by modules of ``layer`` that the tables above do not allow."""
    allowed = INSIDE[layer] | {layer}
    forbidden = OUTSIDE.get(layer, frozenset())
    return [
        one
        for one in imports
        if within(one.module, layer)
        and (
            any(within(one.target, name) for name in forbidden)
            or (
                within(one.target, "broker")
                and one.target not in EVERYWHERE
                and not any(within(one.target, name) for name in allowed)
            )
        )
    ]


def tell(found: list[Import], rule: str) -> None:
    if found:
        pytest.fail("\n  ".join([f"{rule}:", *map(str, found)]), pytrace=False)


# -- the rules ----------------------------------------------------------------------


@pytest.mark.parametrize("layer", INSIDE)
def test_a_layer_imports_only_what_it_may(layer: str) -> None:
    allowed = ", ".join(sorted(INSIDE[layer] | EVERYWHERE - {"broker"}))
    tell(violations(IMPORTS, layer), f"{layer} may import {allowed}, and nothing that waits")


def test_every_package_has_its_rule() -> None:
    packages = {".".join(name.split(".")[:2]) for name, path in MODULES.items() if path.parent != ROOT}
    free = {"broker.admin"}  # on top: it sees everything but the application, see below
    assert packages - free <= set(INSIDE), "a new package needs a row in the table"


def importers(targets: tuple[str, ...], *, but: tuple[str, ...]) -> list[Import]:
    """Imports of ``targets`` by anyone who is neither one of them nor in ``but``."""
    return [
        one
        for one in IMPORTS
        if any(within(one.target, name) for name in targets)
        and not any(within(one.module, name) for name in (*targets, *but))
    ]


COMMAND_LINE: Final = tuple(
    name for name in MODULES if name == "broker.cli" or name.startswith("broker.cli_")
)


def test_nobody_imports_the_application_but_the_command_line() -> None:
    tell(importers(("broker.app",), but=COMMAND_LINE), "only the command line knows broker.app")
    tell(
        importers(COMMAND_LINE, but=("broker.__main__",)),
        "nobody knows the command line",
    )


def test_only_what_builds_everything_imports_the_admin_server() -> None:
    found = importers(("broker.admin",), but=("broker.app", *COMMAND_LINE))
    tell(found, "nobody but the application knows broker.admin")


def test_engines_are_known_to_the_application_alone() -> None:
    layers = ("broker.engine.", "broker.cluster", "broker.link.", "broker.streams.", "broker.peers.")
    engines = tuple(
        name
        for name in MODULES
        if name.startswith((*layers, "broker.backends."))
        and name not in {"broker.engine.base", "broker.engine.peers"}
    )
    # A URL taken apart is for whoever checks settings, too.
    found = [one for one in importers(engines, but=("broker.app",)) if one.target != "broker.link.target"]
    tell(found, "an engine is chosen in broker.app; everybody else sees broker.engine.base and .peers")


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for one in IMPORTS:
        if one.when == "load" and one.target in MODULES:
            graph[one.module].add(one.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        circle = " -> ".join((*path, module))
        assert module not in path, f"a circle of imports: {circle}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


# -- the test tested ------------------------------------------------------------------


def test_violations_are_seen_wherever_they_hide() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "import orjson, trio\n"
        "from broker.hub import rooms\n"
        "if TYPE_CHECKING:\n"
        "    from broker.server.session import Session\n"
        "else:\n"
        "    from broker.errors import BrokerError\n"
        "def late():\n"
        "    from urllib.request import urlopen\n"
        "    from broker.protocol import frames\n"
    )
    found = violations(imports_of("broker.protocol.sample", source), "broker.protocol")
    assert list(map(str, found)) == [
        "broker/protocol/sample.py:2 imports trio",
        "broker/protocol/sample.py:3 imports broker.hub.rooms",
        "broker/protocol/sample.py:5 imports broker.server.session (TYPE_CHECKING)",
        "broker/protocol/sample.py:9 imports urllib.request",
    ]


def test_a_failure_names_the_place() -> None:
    found = imports_of("broker.hub.sample", "import trio\n")
    with pytest.raises(pytest.fail.Exception, match=r"^no IO:\n  broker/hub/sample\.py:1 imports trio$"):
        tell(found, "no IO")
