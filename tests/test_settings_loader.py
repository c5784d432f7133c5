"""The loader: who wins, how names are spelled, what is told, and that nothing else ever escapes."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from broker.config import USER_HISTORY, Config, Rate, RoomOptions, Route
from broker.errors import ConfigurationError
from broker.settings_loader import DEVELOPMENT, ConfigurationErrors, load
from broker.settings_names import describe, dotted, flag, required, variable
from broker.settings_schema import KEYS, ROOM_KEYS, find, parse
from broker.settings_summary import summary

CONFIG = Path(__file__).parent.parent / "config"
OPEN = {"auth.anonymous": True}
"""The smallest configuration that somebody could connect to."""


def read(text: str, tmp_path: Path, env: Mapping[str, str] | None = None, **flags: Any) -> Config:
    path = tmp_path / "broker.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return load(
        path, env=env or {}, flags={**OPEN, **{name.replace("__", "."): flags[name] for name in flags}}
    )


def complaints(text: str, tmp_path: Path, env: Mapping[str, str] | None = None, **flags: Any) -> list[str]:
    with pytest.raises(ConfigurationErrors) as caught:
        read(text, tmp_path, env, **flags)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(caught.value.errors)
    return [line.removeprefix(f"{tmp_path}/") for line in lines]


# --- Precedence and names ---------------------------------------------------------


def test_without_anything_the_defaults_hold() -> None:
    config = load(None, env={}, flags=OPEN)
    assert config.server == Config().server
    assert config.rooms["default"] == RoomOptions()


def test_a_tool_needs_no_settings_that_could_be_served_with() -> None:
    flags = {"store.data": "/data", "server.tls_cert": "/nowhere"}
    assert load(None, env={}, flags=flags, serving=False).store.data == "/data"
    with pytest.raises(ConfigurationErrors, match=r"server\.tls_"):
        load(None, env={}, flags=flags)
    with pytest.raises(ConfigurationErrors, match="unknown key"):
        load(None, env={}, flags={"store.date": "/data"}, serving=False)


def test_flags_beat_variables_beat_the_file_beats_the_defaults(tmp_path: Path) -> None:
    text = "[server]\nport = 1\nbacklog = 1\nretry_after = 1"
    env = {"BROKER_SERVER_PORT": "2", "BROKER_SERVER_BACKLOG": "2"}
    server = read(text, tmp_path, env, server__port="3").server
    assert (server.port, server.backlog, server.retry_after, server.host) == (3, 2, 1.0, "127.0.0.1")


def test_every_key_has_its_own_variable_and_flag() -> None:
    assert len({variable(path) for path in KEYS}) == len(KEYS)
    assert len({flag(path) for path in KEYS}) == len(KEYS)
    assert variable(("limits", "outbox_bytes")) == "BROKER_LIMITS_OUTBOX_BYTES"
    assert flag(("limits", "outbox_bytes")) == "--limits-outbox-bytes"
    assert flag(("server", "port")) == "--port"
    assert flag(("rooms", "deal", "history")) == "--set"


@pytest.mark.parametrize("path", KEYS, ids=dotted)
def test_every_key_can_be_set_by_its_variable(path: tuple[str, ...]) -> None:
    default = KEYS[path].default
    kind = required(KEYS[path].kind)
    if isinstance(kind, inspect.VarTupleType):
        text = json.dumps(default) if isinstance(kind.item_type, inspect.StructType) else ""
    else:
        text = "" if default is None else str(default)
    if path == ("auth", "anonymous"):
        text = "yes"
    config: Any = load(None, env={variable(path): text}, flags=OPEN)
    for part in path:
        config = getattr(config, part)
    assert config == default or path == ("auth", "anonymous")


def test_variables_of_rooms_name_namespace_and_key(tmp_path: Path) -> None:
    env = {
        "BROKER_ROOMS_DEAL_HISTORY": "7",
        "BROKER_ROOMS_DEAL_HISTORY_TTL": "8",
        "BROKER_ROOMS_A_B_LAST_VALUE": "on",
    }
    rooms = read("", tmp_path, env).rooms
    assert (rooms["deal"].history, rooms["deal"].history_ttl, rooms["a_b"].last_value) == (7, 8.0, True)


def test_a_variable_finds_the_namespace_that_the_file_spells(tmp_path: Path) -> None:
    rooms = read('[rooms."Live-Data"]\nslots = 3', tmp_path, {"BROKER_ROOMS_LIVE_DATA_HISTORY": "7"}).rooms
    assert (rooms["Live-Data"].history, rooms["Live-Data"].slots) == (7, 3)
    assert set(rooms) == {"default", "user", "Live-Data"}


def test_a_variable_that_means_two_namespaces_is_refused(tmp_path: Path) -> None:
    text = "[rooms.a-b]\nslots = 3\n[rooms.a_b]\nslots = 3"
    (line,) = complaints(text, tmp_path, {"BROKER_ROOMS_A_B_HISTORY": "7"})
    assert 'may mean [rooms."a-b"] and [rooms."a_b"]; use --set rooms.a-b.history=…' in line


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("BROKER_SERVER_PROT", "did you mean BROKER_SERVER_PORT?"),
        ("BROKER_XYZZY", "`broker serve --help` names all"),
        ("BROKER_ROOMS_HISTORY", "end it with a key"),
        ("BROKER_ROOMS_A*_HISTORY", "write [rooms.a]"),
        ("BROKER_ROOMS_*_HISTORY", "before the first colon"),
        ("BROKER_PORT_8765_TCP", "enableServiceLinks: false"),
        ("BROKER_SERVICE_HOST", "enableServiceLinks: false"),
    ],
)
def test_an_unknown_variable_is_an_error(name: str, mend: str, tmp_path: Path) -> None:
    (line,) = complaints("", tmp_path, {name: "1", "PATH": "/bin", "BROKER_TOKEN": "x", "BROKER_URL": "x"})
    assert line.startswith("environment: ")
    assert mend in line


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[server]\nport = 5")
    assert load(None, env={"BROKER_CONFIG": str(path)}, flags=OPEN).server.port == 5
    assert load(None, env={"BROKER_CONFIG": ""}, flags=OPEN).server.port == 8765


def test_lists_are_separated_by_commas_and_an_empty_text_unsets() -> None:
    env = {"BROKER_SERVER_TRUSTED_PROXIES": "10.0.0.1, 10.1.0.0/16,", "BROKER_STORE_DATA": ""}
    config = load(None, env=env, flags=OPEN)
    assert config.server.trusted_proxies == ("10.0.0.1", "10.1.0.0/16")
    assert config.store.data is None


def test_keys_of_tokens_are_json_in_a_variable() -> None:
    secret = "s" * 32
    env = {"BROKER_AUTH_KEYS": json.dumps([{"algorithm": "HS256", "secret": secret}])}
    assert load(None, env=env, flags={}).auth.keys[0].secret == secret


def test_a_broken_list_of_keys_does_not_show_its_secrets(tmp_path: Path) -> None:
    (line,) = complaints("", tmp_path, {"BROKER_AUTH_KEYS": '[{"secret": "hush"'})
    assert "hush" not in line
    assert "auth.keys: a hidden value (string) has the wrong type; give a list of tables" in line


def test_flags_by_dotted_key_as_values_or_as_text() -> None:
    flags = {**OPEN, "rooms.deal.history": "5", "server.port": 0, "node": None, "rooms.a.b.slots": 2}
    config = load(None, env={}, flags=flags)
    assert (config.rooms["deal"].history, config.server.port, config.node) == (5, 0, None)
    assert config.rooms["a.b"].slots == 2


def test_unknown_flags_name_the_nearest(tmp_path: Path) -> None:
    flags = {"server__prot": 1, "rooms__x__hist": 1, "zzz": 1, "rooms__x:y__slots": 1, "rooms__x": 1}
    lines = complaints("", tmp_path, None, **flags)
    anything = "`broker serve --help` names all keys; rooms are rooms.NAMESPACE.KEY"
    assert lines == [
        "flag --set: server.prot: unknown key; did you mean server.port?",
        "flag --set: rooms.x.hist: unknown key; did you mean history?",
        f"flag --set: zzz: unknown key; {anything}",
        'flag --set: rooms."x:y": is a pattern or no name, where a namespace is needed; write [rooms.x]',
        f"flag --set: rooms.x: unknown key; {anything}",
    ]


# --- Rooms and rates ------------------------------------------------------------------


def test_the_room_of_everybody_inherits_no_history(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text("dev = true\n[rooms.default]\nhistory = 10\n[rooms.all]\nevent_bytes = 100\n")
    everybody = load(path, env={}, flags={}).options("all")
    assert (everybody.history, everybody.event_bytes) == (0, 100)


def test_rooms_inherit_from_the_default_table(tmp_path: Path) -> None:
    rooms = read('[rooms.deal]\nslots = 5\n[rooms.default]\nhistory = 9\nslow = "drop"', tmp_path).rooms
    assert rooms["deal"] == RoomOptions(slots=5, history=9, slow="drop")


def test_rooms_of_users_keep_history_unless_told_otherwise(tmp_path: Path) -> None:
    assert read("", tmp_path).options("user:7").history == USER_HISTORY
    assert read("[rooms.default]\nhistory = 1000", tmp_path).options("user:7").history == 1000
    assert read("[rooms.user]\nhistory = 3", tmp_path).options("user:7").history == 3
    assert Config().options("user:7").history == USER_HISTORY
    assert Config().options("deal:7") == RoomOptions()
    assert read("[rooms.deal]\nhistory = 3", tmp_path).options("deal:7").history == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[rooms."live:*"]',
            'rooms."live:*": is a pattern or no name, where a namespace is needed; write [rooms.live]',
        ),
        ('[rooms."*"]', 'rooms."*": is a pattern or no name'),
        ('[rooms.""]', 'rooms."": is a pattern or no name'),
        ('[rooms."a\\u0000"]', 'rooms."a\\u0000": is a pattern or no name'),
        (
            "rooms.history = 5",
            "rooms.history: 5 (integer) stands where a namespace is needed; write [rooms.default] history",
        ),
        (
            "rooms.deal = 5",
            "rooms.deal: 5 (integer) stands where a namespace is needed; write a [rooms.deal] table",
        ),
        ("[rooms.deal]\nhistori = 5", "rooms.deal.histori: unknown key; did you mean history?"),
        (
            "[rooms.deal]\nslow = 'latst'",
            'rooms.deal.slow: "latst" (string) is not a choice here; did you mean latest?',
        ),
        ("[rooms.deal]\nslow = 'x'", "give one of disconnect, drop, latest"),
        ("[rooms.deal]\nbatch_window = 1.5", "1.5 (float) is out of range; give a number from 0 to 1"),
        ("rooms = []", "rooms: [] (array) stands where a table is needed; write a [rooms] table"),
    ],
)
def test_bad_rooms(text: str, line: str, tmp_path: Path) -> None:
    (found,) = complaints(text, tmp_path)
    assert line in found


def test_a_rate_keeps_the_half_that_is_not_given(tmp_path: Path) -> None:
    rates = read("[rates]\nmessage = { rate = 7 }", tmp_path).rates
    assert rates.message == Rate(rate=7.0, burst=1000)
    assert rates.publish == Config().rates.publish


# --- What is told -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[server]\nprot = 1", "broker.toml: server.prot: unknown key; did you mean port?"),
        ("port = 1", "broker.toml: port: unknown key; did you mean server.port or admin.port?"),
        ("qqqq = 1", "qqqq: unknown key; remove it, or use one of dev, node, server"),
        ("server = 1", "server: 1 (integer) stands where a table is needed; write a [server] table"),
        (
            "[server]\nport = 70000",
            "server.port: 70000 (integer) is out of range; give a whole number from 0 to 65_535",
        ),
        ("[server]\nport = true", "server.port: true (boolean) has the wrong type; give a whole number"),
        ("[server]\nport = 1.0", "server.port: 1.0 (float) has the wrong type"),
        ("[server]\nport = 1979-05-27", "server.port: 1979-05-27 (date or time) has the wrong type"),
        (
            "[server]\nping_interval = nan",
            "nan (float) is out of range; give a number above 0, at most 3_600",
        ),
        ("[server]\nping_interval = -1", "-1 (integer) is out of range"),
        ("[server]\nping_interval = 0", "0 (integer) is out of range"),
        (
            "[server]\ndeflate = 'yes'",
            'server.deflate: "yes" (string) has the wrong type; give true or false',
        ),
        ("[server]\nhost = ''", "server.host: has 0 characters; give text of 1 to 4_096 characters"),
        ("[server]\nhost = 'a\\u0000'", None),
        (
            '[server]\nhost = "a\\u001b[31m"',
            'server.host: "a\\u001b[31m" (string) holds a control character; remove it',
        ),
        ('[admin]\ntoken = "hush\\u0007"', "admin.token: a hidden value (string) holds a control character"),
        ("[admin]\ntoken = 5", "admin.token: a hidden value (integer) has the wrong type"),
        ("[server]\norigins = 'x'", 'server.origins: "x" (string) has the wrong type; give a list of texts'),
        ("[server]\norigins = [1, [2, [3]], {a = 1}]", "server.origins[0]: 1 (integer) has the wrong type"),
        ("[log]\nlevel = 'inf'", "did you mean info?"),
        (
            f"[limits]\nrooms = 1{'0' * 3000}",
            "limits.rooms: a number of more than 60 digits (integer) is out of range",
        ),
        ("[limits]\nrooms = '" + "x" * 500 + "'", "…"),
        ("auth.keys = 5", "auth.keys: a hidden value (integer) has the wrong type; give a list of tables"),
        ("auth.keys = [5]", "auth.keys[0]: a hidden value (integer) has the wrong type; give a table"),
        ("[[auth.keys]]\nsekret = 'x'", "auth.keys[0].sekret: unknown key; did you mean secret?"),
        (
            "[[auth.keys]]\nsekret = 'x'",
            "auth.keys[0].algorithm: missing; give one of ES256, EdDSA, HS256, RS256",
        ),
        ("[[auth.keys]]\nalgorithm = 'HS257'", "did you mean HS256?"),
    ],
)
def test_what_a_bad_value_is_told(text: str, line: str | None, tmp_path: Path) -> None:
    if line is None:  # a literal string of TOML has no escapes: six ordinary characters
        assert read(text, tmp_path).server.host == "a\\u0000"
    else:
        assert any(line in found for found in complaints(text, tmp_path))


def test_all_problems_are_told_at_once_each_with_its_source(tmp_path: Path) -> None:
    text = "[server]\nport = -1\norigins = ['nope']\n[limits]\nfragments = 0"
    lines = complaints(text, tmp_path, {"BROKER_LOG_LEVEL": "loud"}, server__backlog="x")
    assert [line.split(": ")[:2] for line in lines] == [
        ["broker.toml", "server.port"],
        ["broker.toml", "limits.fragments"],
        ["environment variable BROKER_LOG_LEVEL", "log.level"],
        ["flag --server-backlog", "server.backlog"],
        ["broker.toml", "server.origins[0]"],
    ]


def test_the_first_problem_stands_in_the_attributes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read("[server]\nport = -1\nprot = 1", tmp_path)
    assert (caught.value.key, caught.value.problem) == ("server.prot", "unknown key")


@pytest.mark.parametrize(
    ("content", "key", "problem"),
    [
        (b"[server]\nport = = 1", "line 2, column 8", "not TOML: Invalid value"),
        (b"a = 1\na = 2", "end of document", "not TOML: Cannot overwrite a value"),
        (b"[server]\n\xff", "byte 9", "is not UTF-8"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "file", "beyond all bounds"),
        (b"a = " + b"9" * 5000, "file", "beyond all bounds"),
    ],
)
def test_a_file_that_is_not_toml(content: bytes, key: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationErrors) as caught:
        load(path, env={}, flags=OPEN)
    assert caught.value.key == key
    assert problem in caught.value.problem
    assert caught.value.source == str(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigurationErrors, match="cannot be read: "):
            load(path, env={}, flags=OPEN)


# --- The shipped files --------------------------------------------------------------------


def test_the_manual_says_every_default() -> None:
    assert load(CONFIG / "broker.toml", env={}, flags={}) == load(None, env={}, flags={})


def test_the_manual_mentions_every_key() -> None:
    section = ""
    mentioned: set[str] = set()
    for line in (CONFIG / "broker.toml").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif found := re.match(r"(?:# )?(\w+) = (.*)", line):
            mentioned.add(section + found[1])
            if found[2].startswith("{"):
                mentioned |= {f"{section}{found[1]}.{part}" for part in re.findall(r"(\w+) =", found[2])}
    keys = {dotted(path) for path in KEYS} | {f"rooms.default.{key}" for key in ROOM_KEYS}
    assert keys - mentioned == {"auth.keys", "routes"}  # whose tables are shown as examples


def test_the_key_shown_in_the_manual_is_complete(tmp_path: Path) -> None:
    text = (CONFIG / "broker.toml").read_text()
    example = text[text.index("# [[auth.keys]]") : text.index("[rooms.default]")].replace("\n# ", "\n")[2:]
    lines = complaints(example, tmp_path)
    assert len(lines) == 2
    assert "auth.keys[0].file: cannot read" in lines[0]
    assert "auth.keys[2].secret: a secret of" in lines[1]


def test_the_route_shown_in_the_manual_is_sound_and_complete(tmp_path: Path) -> None:
    text = (CONFIG / "broker.toml").read_text()
    example = text[text.index("# [[routes]]") : text.index("[wire]")].replace("\n# ", "\n")[2:]
    (route,) = read(example, tmp_path).routes
    assert all(value for value in msgspec.structs.asdict(route).values())


def test_routes_are_json_in_a_variable_and_one_text_is_a_list(tmp_path: Path) -> None:
    text = '[{"from": "deal:*", "to": ["activity", "all"], "event": "won", "data": []}]'
    expected = Route(source=("deal:*",), to=("activity", "all"), event=("won",), data=())
    assert read("", tmp_path, {"BROKER_ROUTES": text}).routes == (expected,)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[routes]\nfrom = 'a'", "routes: {…} (table) has the wrong type; give a list of tables"),
        ("[[routes]]\nto = 'a'", "routes[0].from: missing; give a text or a list of texts"),
        ("[[routes]]\nfrom = 1\nto = 'a'", "routes[0].from: 1 (integer) has the wrong type; give a text or"),
        ("[[routes]]\nfrom = 'a'\nto = [1]", "routes[0].to[0]: 1 (integer) has the wrong type"),
        ("[[routes]]\nfrom = 'a'\nto = 'b'\nfilter = 'x'", 'routes[0].filter: "x" (string) has the wrong'),
        (
            "[[routes]]\nfrom = 'a'\nto = 'b'\nevents = 'x'",
            "routes[0].events: unknown key; did you mean event?",
        ),
        ("[[routes]]\nfrom = 'a'\nto = 'a'", "routes[0].to[0]: may reach a room that the rule copies from"),
    ],
)
def test_what_a_bad_route_is_told(text: str, line: str, tmp_path: Path) -> None:
    assert complaints(text, tmp_path)[0].removeprefix("broker.toml: ").startswith(line)


def test_the_development_file() -> None:
    config = load(CONFIG / "dev.toml", env={}, flags={})
    assert config.dev
    assert config.auth.anonymous
    assert not config.auth.keys
    assert config.store.data == "./data"
    assert config.server.origins == ("loopback",)
    assert (config.server.echo, config.rates.enabled, config.admin.open_on_loopback) == (True, False, True)
    assert (config.limits.unauthenticated_per_address, config.limits.sessions_per_user) == (0, 0)
    deal, live = config.options("deal:7"), config.options("live:7")
    assert (deal.join, deal.publish, deal.history, deal.history_ttl) == ("anyone", "anyone", 1000, 86400.0)
    assert (live.join, live.publish, live.history) == ("anyone", "anyone", 0)


def test_explicit_settings_override_development(tmp_path: Path) -> None:
    text = "dev = true\n[server]\norigins = ['https://a.example']\n[rooms.default]\njoin = 'user'"
    config = read(text, tmp_path, {"BROKER_LIMITS_SESSIONS_PER_USER": "3"}, rates__enabled=True)
    assert config.server.origins == ("https://a.example",)
    assert (config.options("x").join, config.options("x").publish) == ("user", "anyone")
    assert config.rates.enabled
    assert config.limits.sessions_per_user == 3


def test_development_changes_only_keys_that_exist() -> None:
    assert all(find(path) for path in DEVELOPMENT)


def test_the_bench_file() -> None:
    config = load(CONFIG / "bench.toml", env={}, flags={})
    limits = config.limits
    assert not config.dev
    assert not config.rates.enabled
    assert config.auth.anonymous
    assert config.store.data is None
    assert (limits.connections, limits.accepts, limits.control_frames, limits.process_outbox_bytes) == (
        0,
        0.0,
        0.0,
        0,
    )
    assert config.options("bench:1").history == config.options("quiet:1").history == 0
    assert config.options("bench:1").publish == "anyone"
    assert (config.server.zstd, config.server.deflate, config.log.level) == (True, True, "warning")


def test_a_summary_tells_what_is_in_effect_but_no_secret(tmp_path: Path) -> None:
    secret = "hush" * 9
    key = f"[[auth.keys]]\nalgorithm = 'HS256'\nsecret = '{secret}'"
    text = f"{key}\n[admin]\nport = -1\n[rooms.deal]\nhistory = 5"
    lines = "\n".join(summary(read(text, tmp_path, server__host="::1", node="n1")))
    assert "ws://[::1]:8765/ws" in lines
    assert "admin     off" in lines
    assert "anonymous; HS256 tokens by a secret in the settings" in lines
    assert "deal: join token, publish token, 5 events for 86400 s, slow: disconnect" in lines
    assert 'changed   node = "n1"' in lines
    assert "changed   auth.keys = (hidden)" in lines
    assert "hush" not in lines
    shared = read(
        "[[routes]]\nfrom = 'a:*'\nevent = 'e'\nto = ['b', 'c:{id}']",
        tmp_path,
        redis__url="rediss://u:hush@r:1/0?ssl_password=hush",
    )
    lines = "\n".join(summary(shared))
    assert 'store     rediss://r:1/0, shared with every node that uses "broker:"' in lines
    assert 'route     events "e" of "a:*" to "b", "c:{id}"' in lines
    assert "changed   redis.url = (hidden)" in lines
    assert "hush" not in lines
    dev = "\n".join(summary(load(None, env={}, flags={"dev": True, "admin.token": "hush"})))
    assert "tokens by the development key" in dev
    assert "open on loopback" in dev
    assert "admin     http://127.0.0.1:8766, closed" in "\n".join(summary(read("", tmp_path)))
    assert "admin     http://127.0.0.1:8766, token" in "\n".join(
        summary(read("", tmp_path, admin__token="x"))
    )


def test_every_type_of_the_schema_has_words() -> None:
    for key in [*KEYS.values(), *ROOM_KEYS.values()]:
        assert describe(key.kind)


# --- Nothing else escapes -------------------------------------------------------------------

ODD_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = (
    st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.sampled_from([10**400, -1, 0, 1, 65536])
    | st.floats()
    | ODD_TEXT
    | st.datetimes()
    | st.dates()
    | st.times()
)
GARBAGE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3),
    max_leaves=8,
)
PLACES = st.sampled_from([dotted(path) for path in KEYS] + [f"rooms.deal.{key}" for key in ROOM_KEYS])


def to_toml(value: object) -> str:
    """Write any value that TOML knows."""
    match value:
        case bool():
            return "true" if value else "false"
        case float() if not math.isfinite(value):
            return str(value)
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value.encode(errors="replace").decode()).replace("\x7f", "\\u007f")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case list():
            return "[" + ", ".join(map(to_toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{to_toml(name)} = {to_toml(item)}" for name, item in value.items()) + "}"
    raise AssertionError(value)


def loads_or_complains(path: Path | None, env: Mapping[str, str], flags: Mapping[str, Any]) -> None:
    try:
        config = load(path, env=env, flags=flags)
    except ConfigurationErrors as error:
        for line in error.errors:
            assert line.source
            assert line.problem
            assert line.mend
            assert "\n" not in str(line)
            assert "\x1b" not in str(line)
    else:
        assert isinstance(config, Config)
        assert list(summary(config))


@given(place=PLACES, value=GARBAGE)
@settings(max_examples=300, deadline=None)
def test_any_garbage_in_any_key_of_a_flag_is_a_configuration_error(place: str, value: object) -> None:
    loads_or_complains(None, {}, {**OPEN, place: value})


@given(place=PLACES, value=GARBAGE)
@settings(max_examples=150, deadline=None)
def test_any_garbage_in_any_key_of_the_file_is_a_configuration_error(
    place: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.toml"
    path.write_text(f"{place} = {to_toml(value)}\n", encoding="utf-8", newline="")
    loads_or_complains(path, {}, OPEN)


@given(content=st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_configuration_or_an_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.toml"
    path.write_bytes(content)
    loads_or_complains(path, {}, OPEN)


@given(
    name=PLACES.map(lambda place: "BROKER_" + place.replace(".", "_").upper())
    | ODD_TEXT.map("BROKER_{}".format),
    value=ODD_TEXT,
)
@settings(max_examples=300, deadline=None)
def test_any_text_in_any_variable_is_a_configuration_error(name: str, value: str) -> None:
    loads_or_complains(None, {name: value} if name != "BROKER_CONFIG" else {}, OPEN)


@given(name=ODD_TEXT, value=ODD_TEXT)
def test_any_name_of_a_flag_is_a_configuration_error(name: str, value: str) -> None:
    loads_or_complains(None, {}, {**OPEN, name: value})


def test_deeply_nested_json_in_a_variable_is_refused(tmp_path: Path) -> None:
    for depth in (500, 100_000):
        (line,) = complaints("", tmp_path, {"BROKER_AUTH_KEYS": "[" * depth + "]" * depth})
        assert "auth.keys" in line


@given(st.integers(-(10**9), 10**9))
def test_numbers_are_read_back(number: int) -> None:
    kind = KEYS["limits", "rooms"].kind
    assert parse(str(number), kind) == number
    assert parse(f" {number} ", kind) == number
