from __future__ import annotations

import pytest

from broker.admin.faults import STATUS, HttpError, Problem, describe
from broker.errors import BrokerError, ErrorCode


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(ErrorCode)
    assert all(400 <= status < 600 for status in STATUS.values())


@pytest.mark.parametrize("code", ErrorCode)
def test_a_refusal_is_told_under_its_code(code: ErrorCode) -> None:
    status, headers, problem = describe(BrokerError(code, "why"))
    assert (status, problem) == (STATUS[code], Problem(code, "why"))
    assert ("WWW-Authenticate" in headers) == (status == 401)


def test_a_wait_is_told_in_whole_seconds() -> None:
    _, headers, _ = describe(BrokerError(ErrorCode.UNAVAILABLE, "later", retry_after=1.2))
    assert headers["Retry-After"] == "2"


def test_http_has_statuses_of_its_own() -> None:
    error = HttpError(405, ErrorCode.UNKNOWN_OP, "no", {"Allow": "GET"})
    assert describe(error) == (405, {"Allow": "GET"}, Problem(ErrorCode.UNKNOWN_OP, "no"))
