from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.auth.permissions import (
    ANONYMOUS,
    MAX_PATTERNS,
    Grants,
    Identity,
    check_room,
    compile_patterns,
    is_server_room,
    may_join,
    may_publish,
    may_see_presence,
    user_room,
    valid_room,
    valid_user,
)
from broker.config import RoomOptions
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import UserId

CLOSED = RoomOptions()
FOR_USERS = RoomOptions(join="user", publish="user")
OPEN = RoomOptions(join="anyone", publish="anyone")
GATES = (may_join, may_publish, may_see_presence)


def identity(**rooms: list[str]) -> Identity:
    return Identity(UserId("7"), 1.0, None, Grants.from_claim(rooms))


def refusal(gate: object, who: Identity, room: str, options: RoomOptions) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        gate(who, room, options)  # type: ignore[operator]
    assert caught.value.room == room
    return caught.value


# ---------------------------------------------------------------- room names


@pytest.mark.parametrize(
    "name", ["a", "deal:7", "a b", "ü", "x" * 200, "é" * 100, "😀" * 50, "{}", "user:", "\u2028", "a\u00a0"]
)
def test_names_of_rooms(name: str) -> None:
    assert valid_room(name)
    check_room(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("x" * 201, "201 bytes"),
        ("é" * 101, "202 bytes"),
        ("😀" * 51, "204 bytes"),
        ("a\x00", "control"),
        ("a\n", "control"),
        ("a\x7f", "control"),
        ("a\x80", "control"),
        ("a\x9f", "control"),
        ("\ud800", "surrogate"),
        ("deal:*", "'*'"),
    ],
)
def test_what_is_no_name_of_a_room(name: str, reason: str) -> None:
    assert not valid_room(name)
    with pytest.raises(BrokerError, match=reason) as caught:
        check_room(name)
    assert caught.value.code is ErrorCode.BAD_ROOM
    assert caught.value.message.isprintable()


@given(st.text(st.characters(codec=None), max_size=210) | st.text("a*é\x00\x9f", max_size=210))
def test_the_grammar_is_what_the_contract_says(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    controls = any(ord(char) < 0x20 or 0x7F <= ord(char) <= 0x9F for char in name)
    assert valid_room(name) == (1 <= size <= 200 and not controls and "*" not in name)


def test_user_ids_must_fit_behind_their_prefix() -> None:
    assert valid_user("x" * 195)
    assert valid_room(user_room(UserId("x" * 195)))
    for bad in ("", "x" * 196, "a*", "a\n", "\udc00"):
        assert not valid_user(bad)


# ------------------------------------------------------------------ patterns


def naive_match(pattern: str, room: str) -> bool:
    """The meaning of a pattern, by the book: a star is nothing, or one character and the star again."""

    @cache
    def match(p: int, r: int) -> bool:
        if p == len(pattern):
            return r == len(room)
        if pattern[p] == "*":
            return match(p + 1, r) or (r < len(room) and match(p, r + 1))
        return r < len(room) and pattern[p] == room[r] and match(p + 1, r + 1)

    if is_server_room(room):
        return pattern == room
    return match(0, 0)


small = st.text("ab:", min_size=1, max_size=12)
tiny = st.text("a", min_size=1, max_size=3)
rooms = small | st.sampled_from(["all", "user:a", "user:", "user", "allb", "a\u2028b"])
patterns = st.text("ab:*", min_size=1, max_size=9) | rooms | st.sampled_from(["*", "user:*", "a*l", "us*"])


@given(
    st.lists(patterns, max_size=5) | st.lists(st.text("a*", min_size=1, max_size=4), max_size=1), rooms | tiny
)
@example(["a*a"], "a")
@example(["ab*ba"], "aba")
@example(["a*b*b"], "ab")
@example(["*a*a*"], "a")
def test_matching_agrees_with_the_naive_model(names: list[str], room: str) -> None:
    expected = any(naive_match(name, room) for name in names)
    assert compile_patterns(tuple(names)).match(room) == expected


@given(rooms, st.data())
def test_a_pattern_made_from_a_room_matches_it(room: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(room)), max_size=4).map(sorted))
    pieces = [room[a:b] for a, b in zip([0, *cuts], [*cuts, len(room)], strict=True)]
    pattern = "*".join(pieces)
    assert compile_patterns((pattern,)).match(room) == (not is_server_room(room) or pattern == room)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ([], "claim rooms: Expected `object`, got `array`"),
        (None, "claim rooms"),
        ({"join": "deal:*"}, "Expected `array`, got `str`"),
        ({"join": [1]}, "Expected `str`, got `int`"),
        ({"publish": [""]}, r"rooms\.publish: pattern 1 can match no room: it is empty"),
        ({"presence": ["a", "b\n"]}, r"rooms\.presence: pattern 2 .* control"),
        ({"join": ["\ud800"]}, "surrogate"),
        ({"join": ["x" * 201]}, "201 bytes"),
        ({"join": ["é" * 101]}, "202 bytes"),
        ({"join": [str(n) for n in range(MAX_PATTERNS + 1)]}, "257 patterns"),
    ],
)
def test_a_bad_claim_is_refused_with_its_reason(claim: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Grants.from_claim(claim)


def test_unknown_members_of_the_claim_are_ignored() -> None:
    assert Grants.from_claim({"joins": 3}) == Grants()


def test_tokens_with_the_same_list_share_one_compiled_object() -> None:
    first, second = Grants.from_claim({"join": ["deal:*"]}), Grants.from_claim({"join": ["deal:*"]})
    assert first.join is second.join


# --------------------------------------------------------------------- gates


@pytest.mark.parametrize("gate", GATES)
def test_open_rooms_are_open_to_everyone(gate: object) -> None:
    for who in (ANONYMOUS, identity()):
        gate(who, "deal:7", OPEN)  # type: ignore[operator]


@pytest.mark.parametrize("gate", GATES)
def test_rooms_for_users_are_open_to_every_user_and_to_nobody_else(gate: object) -> None:
    gate(identity(), "deal:7", FOR_USERS)  # type: ignore[operator]
    error = refusal(gate, ANONYMOUS, "deal:7", FOR_USERS)
    assert error.code is ErrorCode.UNAUTHENTICATED
    assert error.message == "room deal:7: this session is anonymous; it takes a token"


@pytest.mark.parametrize(
    ("gate", "member"), [(may_join, "join"), (may_publish, "publish"), (may_see_presence, "presence")]
)
def test_closed_rooms_take_a_token_that_names_them_for_this_very_verb(gate: object, member: str) -> None:
    gate(identity(**{member: ["deal:*"]}), "deal:7", CLOSED)  # type: ignore[operator]
    for other in {"join", "publish", "presence"} - {member}:
        assert refusal(gate, identity(**{other: ["*"]}), "deal:7", CLOSED).code is ErrorCode.FORBIDDEN
    error = refusal(gate, identity(**{member: ["contact:*"]}), "deal:7", CLOSED)
    assert error.code is ErrorCode.FORBIDDEN
    assert error.message == f"room deal:7: your token's rooms.{member} names contact:* only"
    error = refusal(gate, ANONYMOUS, "deal:7", CLOSED)
    assert error.code is ErrorCode.UNAUTHENTICATED
    assert f"a token whose rooms.{member} names it" in error.message


def test_a_refusal_says_what_the_token_does_name() -> None:
    assert "names no room" in refusal(may_join, identity(), "deal:7", CLOSED).message
    many = identity(join=[f"r{n}" for n in range(9)])
    assert refusal(may_join, many, "x", CLOSED).message.endswith("names r0, r1, r2, r3, r4 and 4 more")


@pytest.mark.parametrize("options", [CLOSED, FOR_USERS, OPEN])
def test_a_user_room_is_read_by_that_user_only_whatever_options_and_token_say(options: RoomOptions) -> None:
    greedy = identity(join=["*", "user:8", "user:*"], presence=["*", "user:8", "user:*"])
    for gate in (may_join, may_see_presence):
        gate(greedy, "user:7", options)
        gate(identity(), "user:7", options)
        for room in ("user:8", "user:", "user:77", "user:7 "):
            assert refusal(gate, greedy, room, options).code is ErrorCode.FORBIDDEN
        assert refusal(gate, ANONYMOUS, "user:7", options).code is ErrorCode.FORBIDDEN


@pytest.mark.parametrize("options", [CLOSED, FOR_USERS, OPEN])
def test_all_is_never_joined(options: RoomOptions) -> None:
    for who in (ANONYMOUS, identity(join=["all", "*"])):
        assert refusal(may_join, who, "all", options).code is ErrorCode.FORBIDDEN


@pytest.mark.parametrize("options", [CLOSED, FOR_USERS, OPEN])
@pytest.mark.parametrize("room", ["all", "user:7", "user:8"])
def test_server_rooms_are_published_to_by_literal_name_only(room: str, options: RoomOptions) -> None:
    may_publish(identity(publish=[room]), room, options)
    error = refusal(may_publish, identity(publish=["*", "user:*", "a*"]), room, options)
    assert error.code is ErrorCode.FORBIDDEN
    assert error.message.endswith("(a pattern never matches a server's room)")
    assert refusal(may_publish, ANONYMOUS, room, options).code is ErrorCode.FORBIDDEN


@pytest.mark.parametrize("options", [CLOSED, FOR_USERS, OPEN])
def test_presence_of_all_takes_a_token_that_names_it(options: RoomOptions) -> None:
    may_see_presence(identity(presence=["all"]), "all", options)
    assert refusal(may_see_presence, identity(presence=["*"]), "all", options).code is ErrorCode.FORBIDDEN


def test_presence_can_be_off() -> None:
    off = RoomOptions(join="anyone", presence=False)
    error = refusal(may_see_presence, identity(presence=["*"]), "deal:7", off)
    assert error.code is ErrorCode.FORBIDDEN
    assert "presence is off" in error.message


def test_names_that_only_look_like_server_rooms_are_ordinary() -> None:
    for room in ("user", "users:7", "all:7", "ALL", "User:7"):
        may_join(ANONYMOUS, room, OPEN)
        may_publish(ANONYMOUS, room, OPEN)
