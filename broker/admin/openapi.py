"""The OpenAPI 3.1 document, made from the table of operations and the typed models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from broker import __version__
from broker.admin.faults import STATUS, Problem
from broker.admin.operations import Operation
from broker.errors import ErrorCode

_TEMPLATE: Final = "#/components/schemas/{name}"
_ALWAYS: Final = (
    ErrorCode.BAD_MESSAGE,
    ErrorCode.UNAUTHENTICATED,
    ErrorCode.FORBIDDEN,
    ErrorCode.INTERNAL,
    ErrorCode.UNAVAILABLE,
    ErrorCode.TIMEOUT,
)
"""Codes that any request may meet (for one that is open: only the last three)."""
_WITH_BODY: Final = (ErrorCode.TOO_LARGE,)
PARAMETER: Final = re.compile(r"\{(\w+)\}")


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The whole document as JSON-like values."""
    types = [kind for operation in operations for kind in _types(operation)]
    schemas, components = msgspec.json.schema_components([*types, Problem], ref_template=_TEMPLATE)
    by_type = dict(zip([*types, Problem], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe(operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Broker, operators' port",
            "version": __version__,
            "description": "State of one node, publishing, and ending sessions. See docs/admin.md.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _types(operation: Operation) -> Iterable[Any]:
    if operation.answer is not None:
        yield operation.answer
    if operation.body is not None:
        yield operation.body


def _describe(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    if operation.open:
        described["security"] = []
    parameters = [*_path_parameters(operation.path), *_query_parameters(operation.query)]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[operation.body]}},
        }
    schema = schemas[operation.answer] if operation.answer is not None else {"type": "string"}
    described["responses"] = {
        "200": {"description": "Done", "content": {operation.media: {"schema": schema}}},
        **_refusals(operation, schemas[Problem]),
    }
    return described


def _path_parameters(path: str) -> Iterable[dict[str, Any]]:
    for name in PARAMETER.findall(path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(query: type) -> Iterable[dict[str, Any]]:
    """A query is a flat structure, so each of its properties is one parameter."""
    _, components = msgspec.json.schema_components([query], ref_template=_TEMPLATE)
    for name, schema in components[query.__name__]["properties"].items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _refusals(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    codes = [*(_ALWAYS[-3:] if operation.open else _ALWAYS), *operation.errors]
    if operation.body is not None:
        codes += _WITH_BODY
    by_status: dict[int, list[str]] = {}
    for code in codes:
        names = by_status.setdefault(STATUS[code], [])
        if code not in names:
            names.append(str(code))
    content = {"application/json": {"schema": schema}}
    return {
        str(status): {"description": ", ".join(names), "content": content}
        for status, names in sorted(by_status.items())
    }
