"""Nodes ask each other: the table, and what becomes of those who do not answer as they should."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from broker.admin import questions
from broker.admin.models import NodeAnswer, SessionsQuery
from broker.admin.parts import Named, Nothing, OfNode
from broker.admin.questions import DRAIN, LOAD, QUESTIONS, ROOM, SESSIONS, command, hear, hear_others, serve
from broker.errors import BrokerError, ErrorCode
from tests.admin.fakes import Line, Switchboard, json_of
from tests.admin.harness import SeparatePort, config


class Office:
    """Nodes that do not run, and ask each other all the same."""

    def __init__(self, *names: str) -> None:
        self.switchboard = Switchboard()
        self.nodes: dict[str, SeparatePort] = {}
        for name in names:
            line = self.switchboard.line(name)
            node = SeparatePort(config(node=name), line)
            line.describes(node.broker.peers.nodes)
            serve(node)
            self.nodes[name] = node

    def line(self, name: str) -> Line:
        return self.switchboard.lines[name]


async def test_every_question_is_served_under_its_name_and_no_other() -> None:
    office = Office("a")
    assert set(office.line("a").handlers) == {question.name for question in QUESTIONS}
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


async def test_whatever_is_asked_the_answer_survives_the_wire() -> None:
    office = Office("a", "b")
    samples: dict[str, dict[str, Any]] = {
        "admin.room": {"name": "deal:1"},
        "admin.session": {"name": "s"},
        "admin.user": {"name": "u"},
        "admin.disconnect": {"user": "u"},
        "admin.drain": {"node": "a"},
        "admin.rebalance": {"node": "a", "share": 0.5, "over": 1},
    }
    for question in QUESTIONS:
        answer = await office.line("a").handlers[question.name](samples.get(question.name, {}))
        read = msgspec.convert(json_of(answer), question.answer)
        assert json_of(read) == json_of(answer)


async def test_all_are_asked_and_the_own_answer_comes_first() -> None:
    office = Office("a", "b", "c")
    heard = await hear(office.nodes["b"], LOAD, Nothing())
    assert [name for name, _ in heard.found] == ["b", "a", "c"]
    assert heard.nodes == [NodeAnswer(node=name) for name in "bac"]
    assert not heard.partial


async def test_alone_nobody_is_asked() -> None:
    office = Office("a", "b")
    heard = await hear(office.nodes["a"], LOAD, Nothing(), local=True)
    assert [name for name, _ in heard.found] == ["a"]
    assert not office.switchboard.asked


async def test_who_is_silent_or_not_understood_is_named() -> None:
    office = Office("a", "b", "c", "d")
    office.switchboard.silent.add("b")
    office.switchboard.garbled.add("c")
    heard = await hear(office.nodes["a"], LOAD, Nothing())
    assert [name for name, _ in heard.found] == ["a", "d"]
    assert heard.partial
    problems = {each.node: each.error for each in heard.nodes}
    assert problems["a"] is None
    assert problems["b"] == "no answer within 2 s"
    assert "cannot be read" in str(problems["c"])
    assert "b: no answer within 2 s" in heard.silent()


async def test_none_is_an_answer() -> None:
    office = Office("a", "b")
    heard = await hear_others(office.nodes["a"], ROOM, Named(name="deal:1"))
    assert heard.found == [("b", None)]
    assert not heard.partial


async def test_a_question_that_cannot_be_read_is_refused() -> None:
    office = Office("a")
    unreadable: list[Any] = [{"what": 1}, [], None, {"limit": 0}]
    for parameters in unreadable:
        with pytest.raises(BrokerError) as caught:
            await office.line("a").handlers[SESSIONS.name](parameters)
        assert caught.value.code is ErrorCode.BAD_MESSAGE


async def test_a_refusal_of_another_node_is_its_answer() -> None:
    office = Office("a", "b")
    heard = await hear_others(office.nodes["a"], SESSIONS, SessionsQuery(after="!"))
    assert heard.partial
    assert "after" in heard.silent()


async def test_an_own_refusal_is_raised_and_nobody_else_asked() -> None:
    office = Office("a", "b")
    with pytest.raises(BrokerError):
        await hear(office.nodes["a"], SESSIONS, SessionsQuery(after="!"))
    assert not office.switchboard.asked


async def test_an_order_reaches_the_node_that_is_meant() -> None:
    office = Office("a", "b", "c")
    done = await command(office.nodes["a"], DRAIN, "c", OfNode(node="c"))
    assert done.node == "c"
    assert [office.nodes[name].ready for name in "abc"] == [True, True, False]
    done = await command(office.nodes["a"], DRAIN, "a", OfNode(node="a"))
    assert done.node == "a"
    assert [office.nodes[name].ready for name in "abc"] == [False, True, False]


async def test_an_order_to_nobody_or_to_one_who_is_silent() -> None:
    office = Office("a", "b")
    with pytest.raises(BrokerError) as caught:
        await command(office.nodes["a"], DRAIN, "x", OfNode(node="x"))
    assert caught.value.code is ErrorCode.NOT_FOUND
    office.switchboard.silent.add("b")
    with pytest.raises(BrokerError) as caught:
        await command(office.nodes["a"], DRAIN, "b", OfNode(node="b"))
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert "may have done it" in caught.value.message
    with pytest.raises(BrokerError) as caught:  # another's silence is not theirs
        await command(office.nodes["a"], DRAIN, "x", OfNode(node="x"))
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_the_table_is_all_there_is() -> None:
    rows = [value for value in vars(questions).values() if isinstance(value, questions.Question)]
    assert set(map(id, rows)) == set(map(id, QUESTIONS))
