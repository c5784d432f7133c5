"""Filters and tags: meaning, canonical form, limits, and that nothing else than ``bad_message`` comes out."""

from __future__ import annotations

import operator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, ErrorCode
from broker.protocol.filters import (
    MAX_DEPTH,
    MAX_IN_VALUES,
    MAX_NAME,
    MAX_NODES,
    MAX_STRING,
    MAX_TAGS,
    check_tags,
    compile_filter,
)

EVENT: dict[str, str | int | float] = {"region": "EMEA", "amount": 5000, "score": 0.5, "stage": "won"}

names = st.sampled_from(["a", "b", "c", "d"])
numbers = st.one_of(
    st.integers(-3, 3), st.sampled_from([0.5, 1.0, -0.0, 2.0**53, 2**53, 2**53 + 1, 2**64 - 1, -(2**63)])
)
values = st.one_of(numbers, st.sampled_from(["", "1", "x", "xy", "é", "\U0001f600", "\uffff"]))
tag_sets = st.dictionaries(names, values, max_size=4)


def _leaf() -> st.SearchStrategy[dict[str, Any]]:
    pair = st.tuples(names, values).map(list)
    return st.one_of(
        st.tuples(st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), pair).map(lambda p: {p[0]: p[1]}),
        st.tuples(names, st.lists(values, max_size=3)).map(lambda p: {"in": list(p)}),
        st.tuples(names, st.text("xyé", max_size=2)).map(lambda p: {"prefix": list(p)}),
        st.one_of(names, names.map(lambda n: [n]), st.tuples(names, st.booleans()).map(list)).map(
            lambda operand: {"exists": operand}
        ),
    )


def _branch(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(children, max_size=3)
    return st.one_of(
        several.map(lambda c: {"and": c}),
        several.map(lambda c: {"or": c}),
        children.map(lambda c: {"not": c}),
    )


trees = st.recursive(_leaf(), _branch, max_leaves=6)


def depth_of(tree: dict[str, Any]) -> int:
    ((name, operand),) = tree.items()
    if name == "not":
        return 1 + depth_of(operand)
    if name in {"and", "or"}:
        return 1 + max(map(depth_of, operand), default=0)
    return 1


def nodes_of(tree: dict[str, Any]) -> int:
    ((name, operand),) = tree.items()
    if name == "not":
        return 1 + nodes_of(operand)
    if name in {"and", "or"}:
        return 1 + sum(map(nodes_of, operand))
    return 1


def meaning(tree: dict[str, Any], tags: dict[str, Any]) -> bool:
    """The same language once more, as plainly as possible."""
    ((name, operand),) = tree.items()
    if name == "and":
        return all(meaning(child, tags) for child in operand)
    if name == "or":
        return any(meaning(child, tags) for child in operand)
    if name == "not":
        return not meaning(operand, tags)
    if name == "exists":
        tag, wanted = operand if isinstance(operand, list) and len(operand) == 2 else (operand, True)
        return ((tag[0] if isinstance(tag, list) else tag) in tags) is wanted
    tag, value = operand
    if name == "ne":
        return not meaning({"eq": operand}, tags)
    if tag not in tags:
        return False
    found = tags[tag]
    if name == "in":
        return any(meaning({"eq": [tag, one]}, tags) for one in value)
    if isinstance(found, str) is not isinstance(value, str):
        return False
    if name == "prefix":
        return bool(found[: len(value)] == value)
    compare = {"eq": "eq", "gt": "gt", "gte": "ge", "lt": "lt", "lte": "le"}[name]
    return bool(getattr(operator, compare)(found, value))


@given(trees, tag_sets)
def test_a_filter_means_what_the_table_says(tree: dict[str, Any], tags: dict[str, Any]) -> None:
    if depth_of(tree) > MAX_DEPTH or nodes_of(tree) > MAX_NODES:
        with pytest.raises(BrokerError):
            compile_filter(tree)
        return
    assert compile_filter(tree)(check_tags(tags)) is meaning(tree, tags)


@given(trees, trees, st.lists(tag_sets, max_size=5))
def test_equal_filters_never_differ_in_meaning(
    one: dict[str, Any], two: dict[str, Any], events: list[dict[str, Any]]
) -> None:
    try:
        first, second = compile_filter(one), compile_filter(two)
    except BrokerError:
        return
    assert first == compile_filter(orjson.loads(orjson.dumps(one)))
    if first == second:
        assert hash(first) == hash(second)
        assert all(first(tags) is second(tags) for tags in events)


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"eq": ["region", "EMEA"]}, True),
        ({"eq": ["region", "emea"]}, False),
        ({"eq": ["amount", "5000"]}, False),
        ({"eq": ["amount", 5000.0]}, True),
        ({"eq": ["missing", ""]}, False),
        ({"ne": ["region", "APAC"]}, True),
        ({"ne": ["missing", "x"]}, True),
        ({"ne": ["amount", "5000"]}, True),
        ({"in": ["region", ["APAC", "EMEA"]]}, True),
        ({"in": ["region", []]}, False),
        ({"in": ["missing", ["x"]]}, False),
        ({"gt": ["amount", 4999.5]}, True),
        ({"gt": ["amount", "0"]}, False),
        ({"gte": ["amount", 5000]}, True),
        ({"lt": ["score", 1]}, True),
        ({"lte": ["missing", 1]}, False),
        ({"gt": ["stage", "lost"]}, True),
        ({"prefix": ["region", "EM"]}, True),
        ({"prefix": ["region", ""]}, True),
        ({"prefix": ["missing", ""]}, False),
        ({"prefix": ["amount", "5"]}, False),
        ({"exists": "amount"}, True),
        ({"exists": ["missing"]}, False),
        ({"exists": ["missing", False]}, True),
        ({"and": []}, True),
        ({"or": []}, False),
        ({"and": [{"eq": ["region", "EMEA"]}, {"gt": ["amount", 1]}, {"exists": "stage"}]}, True),
        ({"and": [{"eq": ["region", "EMEA"]}, {"gt": ["amount", 1]}, {"exists": "missing"}]}, False),
        ({"or": [{"eq": ["region", "APAC"]}, {"gt": ["amount", 1]}]}, True),
        ({"not": {"eq": ["region", "EMEA"]}}, False),
    ],
)
def test_examples(tree: dict[str, Any], wanted: bool) -> None:
    assert compile_filter(tree)(EVENT) is wanted


def test_an_event_without_tags_has_none() -> None:
    assert compile_filter({"eq": ["a", 1]})(None) is False
    assert compile_filter({"ne": ["a", 1]})(None) is True
    assert compile_filter({"exists": "a"})(None) is False


def test_integers_beyond_the_exact_range_of_floats_stay_exact() -> None:
    assert compile_filter({"gt": ["n", 2**53]})({"n": 2**53 + 1}) is True
    assert compile_filter({"eq": ["n", float(2**53)]})({"n": 2**53 + 1}) is False


def test_strings_compare_by_code_point_not_by_utf_16_unit() -> None:
    assert compile_filter({"gt": ["s", "\uffff"]})({"s": "\U0001f600"}) is True


A, B = {"eq": ["a", 1]}, {"prefix": ["b", "x"]}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"and": [A, B]}, {"and": [B, A]}),
        ({"and": [A, B, A]}, {"and": [A, B]}),
        ({"and": [A, {"and": [B]}]}, {"and": [A, B]}),
        ({"or": [{"or": [A, B]}, A]}, {"or": [B, A]}),
        ({"and": [A]}, A),
        ({"or": [A, A]}, A),
        ({"not": {"not": A}}, A),
        ({"ne": ["a", 1]}, {"not": A}),
        ({"not": {"ne": ["a", 1.0]}}, A),
        ({"in": ["a", [1]]}, A),
        ({"in": ["a", [1, 2, 2]]}, {"in": ["a", [2.0, 1]]}),
        ({"exists": ["a", False]}, {"not": {"exists": "a"}}),
    ],
)
def test_the_same_filter_said_differently_is_one_group(one: object, two: object) -> None:
    first, second = compile_filter(one), compile_filter(two)
    assert first == second
    assert {first: "group"}[second] == "group"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (A, B),
        (A, {"eq": ["a", "1"]}),
        (A, {"not": A}),
        ({"and": [A, B]}, {"or": [A, B]}),
        ({"and": []}, {"or": []}),
        ({"gt": ["a", 1]}, {"gte": ["a", 1]}),
        ({"eq": ["a", "b"]}, {"eq": ["b", "a"]}),
        # Joined strings would confuse these two.
        ({"in": ["a", ["x,y"]]}, {"in": ["a", ["x", "y"]]}),
    ],
)
def test_different_filters_are_different_groups(one: object, two: object) -> None:
    assert compile_filter(one) != compile_filter(two)


def test_a_filter_is_no_other_thing_and_shows_itself() -> None:
    matches = compile_filter(A)
    assert matches != ("in", "a", frozenset({1}))
    assert "in" in repr(matches)
    assert not hasattr(matches, "__dict__")


def _nested(depth: int) -> object:
    tree: object = A
    for _ in range(depth - 1):
        tree = {"not": tree}
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, "filter: must be an object with one of: and or not eq"),
        ([], "filter: must be an object"),
        ({}, "filter: must be an object"),
        ({"eq": ["a", 1], "ne": ["a", 1]}, "filter: must be an object"),
        ({"regex": ["a", ".*"]}, "filter: unknown operator"),
        ({"and": A}, "filter.and: must be a list of filters"),
        ({"or": [A, 3]}, "filter.or[1]: must be an object"),
        ({"and": [A, {"not": {"eq": ["a"]}}]}, "filter.and[1].not.eq: must be a list of a tag and a value"),
        ({"not": [A]}, "filter.not: must be an object"),
        ({"eq": ["a", True]}, "filter.eq: a value must be a string or a number"),
        ({"eq": ["a", None]}, "filter.eq: a value must be"),
        ({"eq": ["a", [1]]}, "filter.eq: a value must be"),
        ({"eq": ["a", float("nan")]}, "filter.eq: a number must be finite"),
        ({"gt": ["a", float("inf")]}, "filter.gt: a number must be finite"),
        ({"eq": ["a", 2**64]}, "filter.eq: an integer must fit 64 bits"),
        ({"eq": ["a", -(2**63) - 1]}, "filter.eq: an integer must fit 64 bits"),
        ({"eq": [1, 1]}, "filter.eq: the name of a tag must be a string"),
        ({"eq": ["", 1]}, "filter.eq: the name of a tag must have 1 to 64 characters, not 0"),
        ({"eq": ["a" * (MAX_NAME + 1), 1]}, "not 65"),
        ({"eq": ["a", "x" * (MAX_STRING + 1)]}, "filter.eq: a string may have at most 256 characters"),
        ({"in": ["a", "x"]}, "filter.in: must be a list of a tag and a list of values"),
        ({"in": "a"}, "filter.in: must be a list of a tag and a list"),
        ({"in": ["a", [1, False]]}, "filter.in[1][1]: a value must be"),
        ({"in": ["a", list(range(MAX_IN_VALUES + 1))]}, "filter.in: 65 values, at most 64"),
        ({"prefix": ["a", 1]}, "filter.prefix: a prefix must be a string"),
        ({"exists": 1}, "filter.exists: must be a tag"),
        ({"exists": ["a", 1]}, "filter.exists: must be a tag"),
        ({"exists": ["a", True, True]}, "filter.exists: must be a tag"),
        ({"exists": ""}, "filter.exists: the name of a tag"),
        (_nested(MAX_DEPTH + 1), "more than 8 operators inside one another"),
        ({"and": [A] * MAX_NODES}, "filter.and[31].eq: more than 32 operators"),
    ],
)
def test_a_bad_filter_says_where(tree: object, message: str) -> None:
    with pytest.raises(BrokerError) as caught:
        compile_filter(tree)
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert message in caught.value.message


def test_the_limits_themselves_are_allowed() -> None:
    compile_filter(_nested(MAX_DEPTH))
    compile_filter({"and": [{"gt": ["a", n]} for n in range(MAX_NODES - 1)]})
    compile_filter({"in": ["a" * MAX_NAME, [*range(MAX_IN_VALUES - 1), "x" * MAX_STRING]]})
    compile_filter({"or": [{"eq": ["a", 2**64 - 1]}, {"eq": ["a", -(2**63)]}]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["and", "or", "not", "eq", "in", "gt", "exists", "x"]), inner, max_size=2
        )
    ),
    max_leaves=20,
)


def _refusal(tree: object, tags: object) -> BrokerError | None:
    try:
        compile_filter(tree)(check_tags(tags))
    except BrokerError as error:
        return error
    return None


@given(json_values, json_values)
def test_anything_gives_a_filter_or_bad_message(tree: object, tags: object) -> None:
    refusal = _refusal(tree, tags)
    assert refusal is None or refusal.code is ErrorCode.BAD_MESSAGE


def test_a_tree_deeper_than_the_stack_is_refused_before_it_is_walked() -> None:
    refusal = _refusal(_nested(100_000), {})
    assert refusal is not None
    assert "operators inside one another" in refusal.message


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (None, "tags: must be an object"),
        ([["a", 1]], "tags: must be an object"),
        ({"a": True}, "tags.a: a value must be a string or a number"),
        ({"a": None}, "tags.a: a value"),
        ({"a": {"b": 1}}, "tags.a: a value"),
        ({"a": float("nan")}, "tags.a: a number must be finite"),
        ({"a": 2**64}, "tags.a: an integer must fit 64 bits"),
        ({"a": "x" * (MAX_STRING + 1)}, "tags.a: a string may have"),
        ({"": 1}, "tags: the name of a tag"),
        ({str(n): n for n in range(MAX_TAGS + 1)}, "tags: 33 tags, at most 32"),
    ],
)
def test_bad_tags_say_where(tags: object, message: str) -> None:
    with pytest.raises(BrokerError) as caught:
        check_tags(tags)
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert message in caught.value.message


def test_good_tags_come_back_as_they_are() -> None:
    tags = {str(n): n for n in range(MAX_TAGS - 3)} | {
        "s" * MAX_NAME: "x" * MAX_STRING,
        "f": -0.5,
        "big": 2**64 - 1,
    }
    assert check_tags(tags) is tags
    assert check_tags({}) == {}
