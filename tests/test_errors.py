"""The catalogue of errors: what each code promises, and that it is the one of the contract."""

from __future__ import annotations

import pytest

from broker.errors import RETRYABLE, BrokerError, CloseCode, ConfigurationError, ErrorCode


def test_the_codes_are_those_of_the_protocol() -> None:
    assert " ".join(ErrorCode) == (
        "bad_message unknown_op unauthenticated forbidden bad_room not_joined not_found too_large "
        "rate_limited limit_exceeded conflict unavailable timeout superseded cancelled internal"
    )
    assert sorted(CloseCode) == [
        *(1000, 1001, 1002, 1003, 1007, 1008, 1009, 1011),
        *(4401, 4403, 4408),
        *(4501, 4503, 4508, 4509, 4512, 4529),
    ]


def test_close_codes_tell_whether_to_come_back() -> None:
    assert [code for code in CloseCode if code.final] == [4401, 4403, 4408]


def test_close_codes_may_stand_in_a_close_frame() -> None:
    # RFC 6455 section 7.4.1: 1005, 1006 and 1015 must never be sent.
    assert not {1004, 1005, 1006, 1015} & set(CloseCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_errors_carry_their_code(code: ErrorCode) -> None:
    error = BrokerError(code, "why", room="deal:1", retry_after=1.5)
    assert (error.code, error.message, str(error)) == (code, "why", "why")
    assert (error.room, error.retry_after) == ("deal:1", 1.5)
    assert error.retry is (code in RETRYABLE)
    assert error.retry is (code in {"rate_limited", "unavailable", "timeout", "internal"})


def test_room_and_wait_are_optional() -> None:
    error = BrokerError(ErrorCode.CONFLICT, "taken")
    assert (error.room, error.retry_after, error.retry) == (None, None, False)


def test_configuration_errors_are_one_sentence() -> None:
    error = ConfigurationError("broker.toml", "server.port", "70000 is too large", "use 0 to 65535")
    assert str(error) == "broker.toml: server.port: 70000 is too large; use 0 to 65535"
    assert (error.source, error.key) == ("broker.toml", "server.port")
    assert (error.problem, error.mend) == ("70000 is too large", "use 0 to 65535")
