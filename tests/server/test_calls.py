"""Calls: one reply each, whoever ends them, whatever the method does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.errors import BrokerError, ErrorCode
from broker.protocol.messages import Call
from broker.server.calls import CALL_TIMEOUT, Methods, RunningCall, built_in

if TYPE_CHECKING:
    from broker.server.calls import Method
    from broker.server.session import Session


class Clocked:
    """What the built-in methods ask of a context."""

    def wall(self) -> float:
        return 1234.5


class Caller:
    """A session that notes how its calls are answered."""

    def __init__(self) -> None:
        self.context = Clocked()
        self.answers: list[tuple[str, Any]] = []
        self.ended: list[RunningCall] = []
        self.faults: list[Exception] = []
        self.unencodable = False

    def answer(self, identifier: Any, fields: dict[str, Any] | None) -> None:
        if self.unencodable:
            raise TypeError("not JSON")
        self.answers.append(("ok", fields))

    def refuse(self, identifier: Any, op: str, error: BrokerError) -> None:
        self.answers.append((op, error.code))

    def fault(self, op: str, error: Exception) -> None:
        self.faults.append(error)

    def call_ended(self, call: RunningCall) -> None:
        self.ended.append(call)

    def limits(self) -> dict[str, Any]:
        return {"message": 7}


async def run(method: Method, caller: Caller | None = None, params: Any = None) -> Caller:
    caller = caller or Caller()
    call = RunningCall(method, Call(id=1, method="m", params=params))
    await call.run(cast("Session", caller))
    assert caller.ended == [call]
    return caller


async def test_a_result_is_the_answer() -> None:
    async def double(_session: Session, params: Any) -> Any:
        return params * 2

    caller = await run(double, params=21)
    assert caller.answers == [("ok", {"result": 42})]


async def test_a_refusal_is_told_as_it_is() -> None:
    async def refuse(_session: Session, _params: Any) -> Any:
        raise BrokerError(ErrorCode.FORBIDDEN, "no")

    assert (await run(refuse)).answers == [("call", ErrorCode.FORBIDDEN)]


@pytest.mark.parametrize("error", [ValueError("a fault"), ExceptionGroup("faults", [ValueError("a fault")])])
async def test_a_fault_ends_the_call_and_is_logged(error: Exception) -> None:
    async def fail(_session: Session, _params: Any) -> Any:
        raise error

    caller = await run(fail)
    assert caller.answers == [("call", ErrorCode.INTERNAL)]
    assert caller.faults == [error]


async def test_a_result_that_json_cannot_say_is_a_fault() -> None:
    async def odd(_session: Session, _params: Any) -> Any:
        return object()

    caller = Caller()
    caller.unencodable = True
    assert (await run(odd, caller)).answers == [("call", ErrorCode.INTERNAL)]


async def forever(_session: Session, _params: Any) -> Any:
    await trio.sleep_forever()


async def test_no_method_takes_for_ever(autojump_clock: MockClock) -> None:
    started = trio.current_time()
    assert (await run(forever)).answers == [("call", ErrorCode.TIMEOUT)]
    assert trio.current_time() - started == pytest.approx(CALL_TIMEOUT)


@pytest.mark.parametrize("code", [ErrorCode.CANCELLED, ErrorCode.SUPERSEDED])
@pytest.mark.parametrize("before", [True, False])
async def test_a_call_that_is_given_up_says_why(nursery: trio.Nursery, code: ErrorCode, before: bool) -> None:
    began = False

    async def wait(session: Session, params: Any) -> Any:
        nonlocal began
        began = True
        await forever(session, params)

    caller = Caller()
    call = RunningCall(wait, Call(id=1, method="m"))
    if before:
        call.end(code)
    nursery.start_soon(call.run, cast("Session", caller))
    await wait_all_tasks_blocked()
    assert began is not before
    call.end(code)
    await wait_all_tasks_blocked()
    assert caller.answers == [("call", code)]


async def test_a_method_that_does_not_listen_is_answered_for_once(nursery: trio.Nursery) -> None:
    release = trio.Event()

    async def deaf(_session: Session, _params: Any) -> Any:
        with trio.CancelScope(shield=True):
            await release.wait()
        return "too late"

    caller = Caller()
    call = RunningCall(deaf, Call(id=1, method="m"))
    nursery.start_soon(call.run, cast("Session", caller))
    await wait_all_tasks_blocked()
    call.end(ErrorCode.CANCELLED)
    release.set()
    await wait_all_tasks_blocked()
    assert caller.answers == [("call", ErrorCode.CANCELLED)]


async def test_a_session_that_ends_takes_its_calls_with_it() -> None:
    caller = Caller()
    call = RunningCall(forever, Call(id=1, method="m"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call.run, cast("Session", caller))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert (caller.answers, caller.ended) == ([], [call])


def test_a_name_is_taken_once() -> None:
    methods = Methods()
    methods.add("m", forever)
    assert methods.find("m") is forever
    with pytest.raises(ValueError, match="'m' is registered already"):
        methods.add("m", forever)
    with pytest.raises(BrokerError) as refused:
        methods.find("n")
    assert refused.value.code is ErrorCode.NOT_FOUND


async def test_every_broker_has_ping_and_limits() -> None:
    methods = built_in()
    assert (await run(methods.find("broker.ping"))).answers == [("ok", {"result": {"ts": 1234.5}})]
    assert (await run(methods.find("broker.limits"))).answers == [("ok", {"result": {"message": 7}})]
