"""Messages of clients: any bytes are answered, each refusal says what and to whom, nothing harmful passes."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.errors import BrokerError, ErrorCode
from broker.protocol import messages
from broker.protocol.events import Event, make_event
from broker.protocol.messages import (
    MAX_DEPTH,
    OPS,
    Refusal,
    batch,
    decode,
    encode_error,
    encode_ok,
    encode_op,
)

BATCH = 8


def refusal(payload: bytes, max_batch: int = BATCH) -> Refusal:
    [refused] = decode(payload, max_batch)
    assert isinstance(refused, Refusal), refused
    return refused


def told(refused: Refusal) -> tuple[int | str | None, str | None, ErrorCode]:
    return refused.id, refused.op, refused.error.code


# -- what is accepted -------------------------------------------------------------

ROOMS = st.text(min_size=1, max_size=20)
NAMES = st.text(min_size=1, max_size=20)
IDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=64))
OFFSETS = st.integers(0, 2**53 - 1)
SINCE = st.fixed_dictionaries({"epoch": st.text(max_size=64), "offset": OFFSETS})
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

FIELDS: dict[str, tuple[dict[str, st.SearchStrategy[Any]], dict[str, st.SearchStrategy[Any]]]] = {
    # op: what it needs, and what it may have
    "auth": ({"token": st.text()}, {}),
    "join": (
        {"room": ROOMS},
        {"since": SINCE, "tail": st.integers(0, 10_000), "filter": JSON, "presence": st.booleans()},
    ),
    "leave": ({"room": ROOMS}, {}),
    "publish": (
        {"room": ROOMS, "event": NAMES, "data": JSON},
        {"key": NAMES, "slot": NAMES, "echo": st.booleans(), "tags": JSON},
    ),
    "state": ({"room": ROOMS, "state": st.dictionaries(st.text(max_size=5), JSON, max_size=3)}, {}),
    "presence": ({"room": ROOMS}, {}),
    "history": (
        {"room": ROOMS},
        {
            "since": SINCE,
            "before": OFFSETS,
            "at": st.floats(allow_nan=False, allow_infinity=False),
            "limit": st.integers(1, 1000),
        },
    ),
    "ack": ({"room": ROOMS, "offset": OFFSETS}, {}),
    "call": ({"method": NAMES}, {"params": JSON, "supersede": NAMES}),
    "cancel": ({"call": IDS}, {}),
    "dict": ({"dict": st.integers(-(2**63), 2**64 - 1)}, {}),
    "ping": ({}, {}),
}


def test_the_table_above_names_every_op() -> None:
    assert set(FIELDS) == set(OPS)


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """One message that is right, with some fields that nobody knows."""
    op = draw(st.sampled_from(sorted(FIELDS)))
    needed, optional = FIELDS[op]
    message = {"op": op} | {name: draw(values) for name, values in needed.items()}
    for name, values in ({"id": IDS} | optional).items():
        if draw(st.booleans()):
            message[name] = draw(values)
    if draw(st.booleans()):
        message["unknown-field"] = draw(JSON)
    return dict(draw(st.permutations(list(message.items()))))


def assert_same(decoded: Any, message: dict[str, Any]) -> None:
    """Assert that ``decoded`` says what ``message`` says, and defaults for the rest."""
    assert type(decoded) is OPS[message["op"]]
    for field in msgspec.structs.fields(type(decoded)):
        value = getattr(decoded, field.name)
        if field.name == "since" and value is not None:
            value = {"epoch": value.epoch, "offset": value.offset}
        assert value == message.get(field.name, field.default), field.name


@given(valid())
def test_valid_messages_are_read_as_they_are(message: dict[str, Any]) -> None:
    for payload in (
        json.dumps(message),
        json.dumps(message, ensure_ascii=False),
        json.dumps(message, indent=1),
        f" {json.dumps(message)}\n",
    ):
        [decoded] = decode(payload.encode(), BATCH)
        assert_same(decoded, message)


BAD_ENTRIES = (
    st.just({"op": "no-such-op"})
    | st.just({"id": 5})
    | st.just({"op": "ack", "room": "a", "offset": -1, "id": "x"})
    | st.sampled_from([0, None, "ping", [], [{"op": "ping"}]])
)


@given(st.lists(st.tuples(st.booleans(), valid(), BAD_ENTRIES), min_size=1, max_size=BATCH))
def test_a_batch_keeps_what_is_right_in_order(entries: list[tuple[bool, dict[str, Any], Any]]) -> None:
    chosen = [good if is_good else bad for is_good, good, bad in entries]
    decoded = decode(json.dumps(chosen).encode(), BATCH)
    assert len(decoded) == len(chosen)
    for (is_good, good, bad), answer in zip(entries, decoded, strict=True):
        if is_good:
            assert_same(answer, good)  # the slow way reads the same as the fast one
        else:
            assert isinstance(answer, Refusal)
            assert answer == Refusal(*refusal(json.dumps([bad]).encode())[:2], answer.error)


def test_defaults() -> None:
    [join, publish, history] = decode(
        b'[{"op":"join","room":"a"},{"op":"publish","room":"a","event":"e","data":null},{"op":"history","room":"a"}]',
        BATCH,
    )
    assert (join.id, join.since, join.tail, join.filter, join.presence) == (None, None, 0, None, False)
    assert (publish.data, publish.key, publish.slot, publish.echo, publish.tags) == (
        None,
        None,
        None,
        True,
        None,
    )
    assert (history.since, history.before, history.at, history.limit) == (None, None, None, 100)


# -- what is refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "wanted", "problem"),
    [
        (b"", (None, None, "bad_message"), "not JSON"),
        (b"{", (None, None, "bad_message"), "not JSON"),
        (b"hello", (None, None, "bad_message"), "not JSON"),
        (b'{"op":"ping"} x', (None, None, "bad_message"), "not JSON"),
        (b'\xef\xbb\xbf{"op":"ping"}', (None, None, "bad_message"), "not JSON"),
        (b'{"op":"ping","id":"\xff"}', (None, None, "bad_message"), "not JSON"),
        (b'{"op":"ping","id":"\\ud800"}', (None, None, "bad_message"), "not JSON"),
        (b"null", (None, None, "bad_message"), "object"),
        (b"[[]]", (None, None, "bad_message"), "object"),
        (b"[]", (None, None, "bad_message"), "empty array"),
        (b"{}", (None, None, "bad_message"), "needs an op"),
        (b'{"id":7}', (7, None, "bad_message"), "needs an op"),
        (b'{"op":1,"id":"seven"}', ("seven", None, "bad_message"), "needs an op"),
        (b'{"op":"fly","id":7}', (7, "fly", "unknown_op"), "no op 'fly'"),
        (b'{"op":"Ping","id":7}', (7, "Ping", "unknown_op"), "no op 'Ping'"),
        (b'{"op":"fly"}', (None, "fly", "unknown_op"), "no op 'fly'"),
        (b'{"op":"%s","id":7}' % (b"x" * 99), (7, "x" * 64, "unknown_op"), "no op"),
        (b'{"op":"auth","id":7}', (7, "auth", "bad_message"), "`token`"),
        (b'{"op":"auth","token":5}', (None, "auth", "bad_message"), "$.token"),
        (b'{"op":"join","id":7}', (7, "join", "bad_message"), "`room`"),
        (b'{"op":"join","room":"a","since":{"epoch":"e"}}', (None, "join", "bad_message"), "`offset`"),
        (
            b'{"op":"join","room":"a","since":{"epoch":"e","offset":9007199254740992}}',
            (None, "join", "bad_message"),
            "$.since.offset",
        ),
        (
            b'{"op":"join","room":"a","since":{"epoch":"%s","offset":1}}' % (b"e" * 65),
            (None, "join", "bad_message"),
            "$.since.epoch",
        ),
        (b'{"op":"join","room":"a","tail":-1}', (None, "join", "bad_message"), "$.tail"),
        (b'{"op":"join","room":"a","tail":10001}', (None, "join", "bad_message"), "$.tail"),
        (b'{"op":"publish","room":"a","event":"e","id":1}', (1, "publish", "bad_message"), "`data`"),
        (b'{"op":"publish","room":"a","data":1}', (None, "publish", "bad_message"), "`event`"),
        (b'{"op":"publish","room":"a","event":"","data":1}', (None, "publish", "bad_message"), "$.event"),
        (
            b'{"op":"publish","room":"a","event":"e","data":1,"key":"%s"}' % (b"k" * 129),
            (None, "publish", "bad_message"),
            "$.key",
        ),
        (
            b'{"op":"publish","room":"a","event":"e","data":1,"echo":0}',
            (None, "publish", "bad_message"),
            "$.echo",
        ),
        (b'{"op":"state","room":"a","state":[]}', (None, "state", "bad_message"), "$.state"),
        (b'{"op":"history","room":"a","limit":0}', (None, "history", "bad_message"), "$.limit"),
        (b'{"op":"history","room":"a","limit":1001}', (None, "history", "bad_message"), "$.limit"),
        (b'{"op":"history","room":"a","at":"now"}', (None, "history", "bad_message"), "$.at"),
        (b'{"op":"ack","room":"a","offset":5.0}', (None, "ack", "bad_message"), "$.offset"),
        (b'{"op":"ack","room":"a","offset":true}', (None, "ack", "bad_message"), "$.offset"),
        (b'{"op":"cancel","id":7}', (7, "cancel", "bad_message"), "`call`"),
        (b'{"op":"dict","dict":"7"}', (None, "dict", "bad_message"), "$.dict"),
    ],
)
def test_refusals_say_what_is_wrong_to_whom(
    payload: bytes, wanted: tuple[int | str | None, str | None, str], problem: str
) -> None:
    refused = refusal(payload)
    assert told(refused) == wanted
    assert problem in str(refused.error)


@pytest.mark.parametrize(
    "identifier",
    ["true", "1.0", "1e2", "1.5", "[]", "{}", str(2**63), str(-(2**63) - 1), "1" * 400, f'"{"x" * 65}"'],
)
@pytest.mark.parametrize("op", ["ping", "fly", "join"])
def test_ids_are_integers_or_short_strings(identifier: str, op: str) -> None:
    refused = refusal(b'{"op":"%b","id":%b}' % (op.encode(), identifier.encode()))
    assert told(refused) == (None, None, ErrorCode.BAD_MESSAGE)
    assert "id is an integer or a string of at most 64 characters" in str(refused.error)


@pytest.mark.parametrize("identifier", [0, -1, 2**63 - 1, -(2**63), "", "x" * 64, "😀" * 64, None])
def test_ids_come_back_as_they_were(identifier: int | str | None) -> None:
    [ping] = decode(json.dumps({"op": "ping", "id": identifier}).encode(), BATCH)
    assert ping.id == identifier
    assert refusal(json.dumps({"op": "fly", "id": identifier}).encode()).id == identifier


def test_rooms_are_told_where_they_are_plausible() -> None:
    assert refusal(b'{"op":"ack","room":"deal:1"}').error.room == "deal:1"
    assert refusal(b'{"op":"ack","room":5}').error.room is None
    assert refusal(b'{"op":"ack","room":"%b"}' % (b"r" * 201)).error.room is None


def test_arrays_hold_so_many_messages_and_no_more() -> None:
    ping = b'{"op":"ping"}'
    assert len(decode(batch([ping] * BATCH), BATCH)) == BATCH
    assert told(refusal(batch([ping] * (BATCH + 1)))) == (None, None, ErrorCode.LIMIT_EXCEEDED)
    assert told(refusal(batch([b"0"] * (BATCH + 1)))) == (None, None, ErrorCode.LIMIT_EXCEEDED)
    assert len(decode(batch([b"0"] * BATCH), BATCH)) == BATCH


# -- depth -----------------------------------------------------------------------------

PUBLISH = b'{"op":"publish","room":"a","event":"e","data":%b}'


def nested(depth: int, inner: bytes = b"") -> bytes:
    """JSON of this depth, brackets of both kinds by turns."""
    half, odd = divmod(depth, 2)
    start = b'[{"a":' * half
    return start + (b"[%b]" % inner if odd else inner or b"0") + b"}]" * half


@pytest.mark.parametrize("depth", [MAX_DEPTH - 2, MAX_DEPTH - 1])
def test_depth_may_be_64(depth: int) -> None:
    [publish] = decode(PUBLISH % nested(depth), BATCH)
    assert publish.data == json.loads(nested(depth))


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 200, 30_000])
def test_more_is_refused(depth: int) -> None:
    refused = refusal(PUBLISH % nested(depth))
    assert told(refused) == (None, None, ErrorCode.BAD_MESSAGE)
    assert "deeper than 64" in str(refused.error)
    assert "deeper than 64" in str(refusal(b"[" * (depth + 1)).error)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100,
        "{" * 100,
        '"[' * 100,
        '\\"[' * 100,
        '\\\\[{"' * 100,
        "]" * 100 + "[" * 100,
        "\\" * 99 + "[" * 70,
    ],
)
def test_brackets_within_strings_do_not_count(text: str) -> None:
    data = {text: [text, {"a": text}]}
    [publish] = decode(PUBLISH % json.dumps(data).encode(), BATCH)
    assert publish.data == data
    deep = nested(MAX_DEPTH, json.dumps(data).encode())
    assert "deeper" in str(refusal(PUBLISH % deep).error)


def test_many_brackets_side_by_side_are_not_deep() -> None:
    [publish] = decode(PUBLISH % (b"[" + b"{},[]," * 100 + b"0]"), BATCH)
    assert len(publish.data) == 201


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@given(
    st.recursive(
        st.text(alphabet='[]{}"\\a', max_size=6),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.text(alphabet='[]{}"\\', max_size=3), inner, max_size=2)
        ),
        max_leaves=6,
    ),
    st.integers(50, 66),
)
def test_depth_is_counted_as_a_parser_would(value: Any, around: int) -> None:
    for _ in range(around):
        value = [value]
    [answer] = decode(b'{"op":"call","method":"m","params":%b}' % orjson.dumps(value), BATCH)
    if depth_of(value) + 1 > MAX_DEPTH:
        assert "deeper" in str(answer.error)
    else:
        assert answer.params == value


def test_a_string_without_end_is_not_searched_again_and_again() -> None:
    # With a backtracking pattern this took time quadratic in the number of quotes: minutes for 256 KiB.
    # Finishing is the proof; nothing is timed.
    endless = b'["' + b'","'.join([b"[]"] * 70) + b'",' + b"[]," * 70 + b'"' + b'\\"' * 130_000
    assert "not JSON" in str(refusal(endless).error)
    assert "not JSON" in str(refusal(endless + b"\\").error)


# -- numbers and letters that others could not read ---------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e400",
        b"-1e400",
        b"1e99999999999999999999",
        b"9" * 400 + b".5",
        b"9" * 5000,  # beyond what Python turns into an integer
        b"01",
        b"+1",
        b".5",
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'{"\\ud800":1}',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b'"\0"',
        b"'a'",
        b"[1,]",
        b"{a:1}",
    ],
)
def test_what_is_no_json_is_refused_at_once(data: bytes) -> None:
    assert told(refusal(PUBLISH % data)) == (None, None, ErrorCode.BAD_MESSAGE)


@pytest.mark.parametrize("data", [2**64, -(2**63) - 1, 10**300, [{"a": 2**64}]])
def test_integers_beyond_64_bits_end_where_the_event_is_made(data: Any) -> None:
    [publish] = decode(PUBLISH % json.dumps(data).encode(), BATCH)
    with pytest.raises(BrokerError) as caught:
        make_event(publish.room, publish.event, publish.data, 1.0)
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert caught.value.room == "a"


@pytest.mark.parametrize(
    "data", [2**64 - 1, -(2**63), -0.0, 5e-324, 1.7976931348623157e308, "\x00\x7f\u2028😀"]
)
def test_what_everybody_can_read_arrives(data: Any) -> None:
    [publish] = decode(PUBLISH % json.dumps(data).encode(), BATCH)
    wire = json.loads(make_event("a", "e", publish.data, 1.0).wire)
    assert wire["data"] == data
    assert math.copysign(1, wire["data"]) == math.copysign(1, data) if isinstance(data, float) else True


# -- any bytes ------------------------------------------------------------------------------

TOKENS = st.one_of(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\xff", b"\0", b" "]
    ),
    st.sampled_from([b'"op"', b'"publish"', b'"ping"', b'"room":"a"', b'"id":', b'"event":"e"', b'"data":']),
    st.sampled_from([b"1", b"-", b"1e999", b"1" * 30, b".5", b"NaN", b"null", b"true", b"\xed\xa0\x80"]),
    st.sampled_from([b'"\\ud83d\\ude00"', b'{"op":"ping"}', b'{"op":"fly","id":1}']),
)


@st.composite
def nearly_valid(draw: st.DrawFn) -> bytes:
    """A message or a batch of them with some of its bytes changed, or fields of another kind."""
    entries = draw(st.lists(valid(), min_size=1, max_size=3))
    for entry in entries:
        if draw(st.booleans()):
            entry[draw(st.sampled_from(sorted(entry)))] = draw(JSON)
    document: Any = entries if draw(st.booleans()) else entries[0]
    payload = bytearray(json.dumps(document, ensure_ascii=draw(st.booleans())).encode())
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(payload)))
        payload[place : place + draw(st.integers(0, 2))] = draw(TOKENS)
    return bytes(payload)


def assert_answered(payload: bytes) -> None:
    """Assert that ``payload`` gives messages, or refusals that can be told."""
    answers = decode(payload, BATCH)
    assert 1 <= len(answers) <= BATCH
    for answer in answers:
        if isinstance(answer, Refusal):
            reply = json.loads(encode_error(answer.id, answer.op, answer.error))
            assert reply["op"] == "error"
            assert reply["code"] in {"bad_message", "unknown_op", "limit_exceeded"}
            assert reply["retry"] is False
            assert reply.get("id") == answer.id
        else:
            assert type(answer) in OPS.values()


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'"' * 10_001)
@example(b'{"op":"ping","id":' + b"9" * 10_000 + b"}")
@example(b"[" + b"9" * 10_000 + b"]")
def test_any_bytes_are_answered(payload: bytes) -> None:
    assert_answered(payload)


@given(st.lists(TOKENS, max_size=40).map(b"".join))
def test_any_json_tokens_are_answered(payload: bytes) -> None:
    assert_answered(payload)


@given(JSON)
def test_any_json_is_answered(document: Any) -> None:
    assert_answered(json.dumps(document).encode())


@given(nearly_valid())
def test_nearly_valid_messages_are_answered(payload: bytes) -> None:
    assert_answered(payload)


def strict_json(text: bytes) -> Any:
    """As the strictest client reads it: UTF-8, no NaN, no lone surrogate."""

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    document = json.loads(text.decode(), parse_constant=refuse)
    json.dumps(document, ensure_ascii=False).encode()  # raises for lone surrogates
    return document


def made(message: messages.Publish) -> Event | None:
    """The event, unless it is refused in the one way that is documented."""
    try:
        return make_event(message.room, message.event, message.data, 1.5)
    except BrokerError as error:
        refused = error
    assert refused.code is ErrorCode.BAD_MESSAGE
    return None


NASTY = st.sampled_from(
    [
        "NaN",
        "1e309",
        "-1e309",
        str(2**64),
        str(2**64 - 1),
        "1" * 5000,
        '"\\ud800"',
        '"\\udfff\\ud800"',
        '"\x7f"',
        "-0.0",
    ]
)


@given(
    st.one_of(
        JSON.map(orjson.dumps),
        NASTY.map(str.encode),
        st.lists(TOKENS, max_size=12).map(b"".join),
        st.builds(nested, st.integers(0, 70)),
    ),
    st.booleans(),
)
def test_no_client_can_break_the_parser_of_another(data: bytes, in_array: bool) -> None:
    payload = PUBLISH % data
    for message in decode(b"[%b]" % payload if in_array else payload, BATCH):
        if not isinstance(message, messages.Publish):
            continue
        event = made(message)
        if event is None:
            continue
        [arrived] = strict_json(batch([event.wire]))
        assert arrived["data"] == message.data
        assert depth_of([arrived]) <= MAX_DEPTH + 2


# -- what the server says ------------------------------------------------------------------


def test_ok() -> None:
    assert json.loads(encode_ok(7)) == {"op": "ok", "id": 7}
    assert json.loads(encode_ok("a", {"offset": 3})) == {"op": "ok", "id": "a", "offset": 3}


def test_errors_with_an_id() -> None:
    error = BrokerError(ErrorCode.RATE_LIMITED, "too many", room="deal:1", retry_after=1.23456)
    assert json.loads(encode_error(7, "publish", error)) == {
        "op": "error",
        "id": 7,
        "code": "rate_limited",
        "message": "too many",
        "retry": True,
        "room": "deal:1",
        "retry_after": 1.235,
    }


def test_errors_without_an_id_name_the_op() -> None:
    error = BrokerError(ErrorCode.FORBIDDEN, "not yours")
    assert json.loads(encode_error(None, "publish", error)) == {
        "op": "error",
        "for": "publish",
        "code": "forbidden",
        "message": "publish: not yours",
        "retry": False,
    }
    assert json.loads(encode_error(None, None, error)) == {
        "op": "error",
        "code": "forbidden",
        "message": "not yours",
        "retry": False,
    }


def test_other_messages_and_batches() -> None:
    assert json.loads(batch([encode_op("pong", ts=1.5), encode_op("bye", code=4503)])) == [
        {"op": "pong", "ts": 1.5},
        {"op": "bye", "code": 4503},
    ]
    assert batch([]) == b"[]"


@given(st.lists(JSON, max_size=4))
def test_batches_hold_what_was_put_in(documents: list[Any]) -> None:
    assert json.loads(batch([orjson.dumps(document) for document in documents])) == documents
