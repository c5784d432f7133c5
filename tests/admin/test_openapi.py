from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from broker.admin.api import OPERATIONS
from broker.admin.openapi import document
from broker.errors import CloseCode, ErrorCode
from tests.admin.harness import running

DOCUMENT = document(OPERATIONS)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_route_is_in_it_and_nothing_else() -> None:
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == {(operation.method, operation.path) for operation in OPERATIONS}
    names = [entry["operationId"] for methods in DOCUMENT["paths"].values() for entry in methods.values()]
    assert len(names) == len(set(names))


def test_the_contracts_endpoints_are_there() -> None:
    assert set(DOCUMENT["paths"]) == {
        *("/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/api/stats"),
        *("/api/rooms", "/api/rooms/{room}", "/api/sessions", "/api/sessions/{id}"),
        *("/api/users/{id}", "/api/publish", "/api/broadcast", "/api/disconnect"),
        *("/api/nodes", "/api/load", "/api/drain", "/api/rebalance"),
    }


def test_it_is_a_document_of_openapi_3_1() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert {"title", "version"} <= set(DOCUMENT["info"])
    for path, methods in DOCUMENT["paths"].items():
        assert path.startswith("/")
        for method, entry in methods.items():
            assert method in {"get", "post"}
            assert "200" in entry["responses"]
            for status, response in entry["responses"].items():
                assert re.fullmatch("[1-5][0-9][0-9]", status)
                assert response["description"]
                (content,) = response["content"].values()
                assert content["schema"]
            in_path = [each["name"] for each in entry.get("parameters", []) if each["in"] == "path"]
            assert in_path == re.findall(r"\{(\w+)\}", path)
            for parameter in entry.get("parameters", []):
                assert {"name", "in", "required", "schema"} <= set(parameter)
            assert ("requestBody" in entry) == (method == "post")


def test_every_reference_leads_somewhere() -> None:
    found = set(references(DOCUMENT))
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"]


def test_it_tells_limits_codes_and_who_needs_a_token() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["Publish"]["additionalProperties"] is False
    assert set(schemas["Publish"]["required"]) == {"room", "event", "data"}
    assert schemas["Broadcast"]["properties"]["rooms"]["maxItems"] == 1000
    assert set(schemas["CloseCode"]["enum"]) == set(CloseCode)
    assert set(schemas["ErrorCode"]["enum"]) == set(ErrorCode)
    assert DOCUMENT["paths"]["/healthz"]["get"]["security"] == []
    assert "security" not in DOCUMENT["paths"]["/api/stats"]["get"]
    query = {each["name"]: each["schema"] for each in DOCUMENT["paths"]["/api/rooms"]["get"]["parameters"]}
    assert query["limit"]["maximum"] == 1000
    assert query["sort"]["enum"] == ["members", "name"]
    assert set(DOCUMENT["paths"]["/api/publish"]["post"]["responses"]) >= {"400", "401", "409", "413", "503"}


async def test_the_port_serves_it() -> None:
    async with running() as node, node.http() as http:
        assert (await http.get("/openapi.json")).json() == DOCUMENT
