"""Settings that are each legal and together are not; files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from broker.auth.keys import DEVELOPMENT_SECRET
from broker.config import Admin, Auth, Config, Key, Redis, RoomOptions, Route, Server, Store
from broker.settings_checks import contradictions, is_loopback, warnings

OPEN = Auth(anonymous=True)


def problems(config: Config) -> list[str]:
    return [
        f"{'.'.join(keys[0])}{at}: {problem}; {mend}" for keys, problem, mend, at in contradictions(config)
    ]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_addresses_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.evil.example", ""])
def test_addresses_that_others_reach(host: str) -> None:
    assert not is_loopback(host)


def test_a_sound_configuration_has_none() -> None:
    assert problems(Config(auth=OPEN)) == []


def test_development_stays_on_this_machine() -> None:
    (line,) = problems(Config(dev=True, auth=OPEN, server=Server(host="0.0.0.0")))
    assert line.startswith('server.host: "0.0.0.0" can be reached from elsewhere, and dev lets everybody in')
    assert problems(Config(dev=True, auth=OPEN, server=Server(host="::1"))) == []


def test_two_listeners_need_two_ports() -> None:
    (line,) = problems(Config(auth=OPEN, server=Server(port=9), admin=Admin(port=9)))
    assert line.startswith("admin.port: 9 is the client port as well")
    assert problems(Config(auth=OPEN, server=Server(port=0), admin=Admin(port=0))) == []
    assert problems(Config(auth=OPEN, server=Server(port=9, host="::1"), admin=Admin(port=9))) == []


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.com",
        "http://localhost:3000",
        "http://[::1]:3000",
        "loopback",
        "null",
        "*",
        "app://x",
    ],
)
def test_origins(origin: str) -> None:
    assert problems(Config(auth=OPEN, server=Server(origins=(origin,)))) == []


@pytest.mark.parametrize(
    ("origin", "mend"),
    [
        ("https://app.example.com/", '"https://app.example.com"'),
        ("https://app.example.com/path?x#y", '"https://app.example.com"'),
        ("app.example.com", '"https://app.example.com"'),
        ("https://*.example.com", "every host by its name"),
        ("https://x:99999", '"https://app.example.com"'),
        ("not an origin", '"https://app.example.com"'),
    ],
)
def test_what_is_no_origin(origin: str, mend: str) -> None:
    (line,) = problems(Config(auth=OPEN, server=Server(origins=("loopback", origin))))
    assert line.startswith(f'server.origins[1]: "{origin}" is not an origin; write ')
    assert mend in line


def test_trusted_proxies_are_addresses_or_networks() -> None:
    assert problems(Config(auth=OPEN, server=Server(trusted_proxies=("10.0.0.1", "10.0.0.0/8", "::1")))) == []
    lines = problems(Config(auth=OPEN, server=Server(trusted_proxies=("proxy", "10.0.0.1/8"))))
    assert lines[0].startswith("server.trusted_proxies[0]: 'proxy' does not appear to be")
    assert lines[1].startswith(
        "server.trusted_proxies[1]: 10.0.0.1/8 has host bits set; write an address or a network"
    )


# --- TLS ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_pair(authority: trustme.CA, folder: Path) -> tuple[str, str]:
    pair = authority.issue_cert("localhost")
    cert, key = folder / "tls.crt", folder / "tls.key"
    pair.cert_chain_pems[0].write_to_path(cert)
    pair.private_key_pem.write_to_path(key)
    return str(cert), str(key)


def tls(cert: str | None, key: str | None) -> list[str]:
    return problems(Config(auth=OPEN, server=Server(tls_cert=cert, tls_key=key)))


def test_certificate_and_key(authority: trustme.CA, tmp_path: Path) -> None:
    assert tls(*write_pair(authority, tmp_path)) == []


def test_a_certificate_needs_its_key_and_the_other_way_round() -> None:
    assert tls("x", None) == [
        "server.tls_cert: given without server.tls_key; give server.tls_key too, or neither"
    ]
    assert tls(None, "x") == [
        "server.tls_key: given without server.tls_cert; give server.tls_cert too, or neither"
    ]


def test_both_files_must_be_readable(tmp_path: Path) -> None:
    lines = tls(str(tmp_path / "none"), str(tmp_path))
    assert [line.partition(":")[0] for line in lines] == ["server.tls_cert", "server.tls_key"]
    assert "cannot be read: No such file or directory" in lines[0]
    assert "cannot be read: Is a directory" in lines[1]


def test_files_that_are_no_pair(authority: trustme.CA, tmp_path: Path) -> None:
    cert, key = write_pair(authority, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, foreign = write_pair(authority, other)
    for first, second in ((cert, foreign), (key, cert)):
        (line,) = tls(first, second)
        assert line.startswith("server.tls_cert: certificate and key cannot be used: ")


def test_an_encrypted_key_is_refused_without_asking_for_its_password(
    authority: trustme.CA, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = write_pair(authority, tmp_path)
    loaded = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    Path(key).write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hush"),
        )
    )
    (line,) = tls(cert, key)
    assert "unencrypted" in line


# --- Keys ------------------------------------------------------------------------


def keys(*entries: Key, dev: bool = False) -> list[str]:
    return problems(Config(dev=dev, auth=Auth(keys=entries)))


def test_where_nobody_can_authenticate_a_warning_is_due() -> None:
    assert keys() == []
    (line,) = warnings(Config())
    assert line.startswith("auth.keys: there is no key and anonymous sessions are off: nobody can ")
    for fine in (Config(dev=True), Config(auth=OPEN), Config(auth=Auth(keys=(Key(algorithm="HS256"),)))):
        assert list(warnings(fine)) == []


def test_a_key_has_exactly_one_source() -> None:
    lines = keys(
        Key(algorithm="HS256"),
        Key(algorithm="HS256", secret="s" * 32, jwks="https://x.example/"),
        Key(algorithm="HS256", secret="s" * 32),
    )
    assert [line.partition(":")[0] for line in lines] == ["auth.keys[0]", "auth.keys[1]"]
    assert all("exactly one of secret, file, jwks" in line for line in lines)


def test_a_short_secret_can_be_guessed(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("short")
    lines = keys(Key(algorithm="HS256", secret="short"), Key(algorithm="HS256", file=str(tmp_path / "key")))
    assert [line.partition(":")[0] for line in lines] == ["auth.keys[0].secret", "auth.keys[1].file"]
    assert all("at least 32" in line for line in lines)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    (line,) = keys(Key(algorithm="EdDSA", file=str(tmp_path / "none")))
    assert line.startswith("auth.keys[0].file: cannot read")


@pytest.mark.parametrize(
    "url", ["https://login.example.com/jwks.json", "http://127.0.0.1:9/jwks", "http://localhost/"]
)
def test_key_sets_from_where_nobody_can_swap_them(url: str) -> None:
    assert keys(Key(algorithm="RS256", jwks=url)) == []


def test_a_key_set_over_plain_http_can_be_forged() -> None:
    (line,) = keys(Key(algorithm="RS256", jwks="http://login.example.com/jwks.json"))
    assert line.startswith(
        'auth.keys[0].jwks: "http://login.example.com/jwks.json" can be forged on its way; write https'
    )


def test_the_development_key_is_for_development() -> None:
    entry = Key(algorithm="HS256", secret=DEVELOPMENT_SECRET)
    assert keys(entry, dev=True) == []
    (line,) = keys(entry)
    assert line.startswith("auth.keys[0].secret: everybody knows the development key")
    assert DEVELOPMENT_SECRET not in line


# --- The admin port, and the store -----------------------------------------------------


def test_an_admin_port_that_others_reach_needs_a_token() -> None:
    (line,) = problems(Config(auth=OPEN, admin=Admin(host="0.0.0.0")))
    assert line.startswith('admin.host: "0.0.0.0" can be reached from elsewhere, and there is no token')
    assert problems(Config(auth=OPEN, admin=Admin(host="0.0.0.0", token="t" * 20))) == []
    assert problems(Config(auth=OPEN, admin=Admin(host="0.0.0.0", port=-1))) == []


def test_open_on_loopback_needs_loopback() -> None:
    (line,) = problems(Config(auth=OPEN, admin=Admin(host="0.0.0.0", token="t" * 20, open_on_loopback=True)))
    assert line.startswith('admin.open_on_loopback: true, but "0.0.0.0" can be reached from elsewhere')


def test_samples_need_a_store() -> None:
    rooms = {"deal": RoomOptions(record=True), "live": RoomOptions()}
    (line,) = problems(Config(auth=OPEN, rooms=rooms))
    assert line == "rooms.deal.record: samples need a place on disk; set store.data, or record = false"
    assert problems(Config(auth=OPEN, rooms=rooms, store=Store(data="x"))) == []


def test_the_room_of_everybody_has_no_past() -> None:
    (line,) = problems(Config(auth=OPEN, rooms={"all": RoomOptions(history=10)}))
    assert line.startswith("rooms.all.history: nobody joins the room all")
    assert problems(Config(auth=OPEN, rooms={"all": RoomOptions(), "default": RoomOptions(history=10)})) == []


# --- Several processes, and rules -------------------------------------------------------


def test_several_workers_need_a_redis() -> None:
    (line,) = problems(Config(auth=OPEN, server=Server(workers=4)))
    assert line.startswith("server.workers: 4 processes share their rooms through Redis")
    assert "give redis.url" in line
    shared = Redis(url="redis://127.0.0.1")
    assert problems(Config(auth=OPEN, server=Server(workers=4), redis=shared)) == []


def test_a_redis_url_is_read_as_the_link_will_read_it() -> None:
    (line,) = problems(Config(auth=OPEN, redis=Redis(url="redis+sentinel://:secret@10.0.0.1")))
    assert line.startswith("redis.url: the name of the service is missing; write it after the hosts")
    assert "secret" not in line
    assert problems(Config(auth=OPEN, redis=Redis(url="redis+sentinel://:secret@10.0.0.1/main"))) == []


def test_every_mistake_of_every_rule_is_told() -> None:
    good = Route(source=("deal:*",), to=("activity",))
    bad = Route(source=("deal:\x07*",), to=("activity", "deal:{id}"), event=("a*b",), filter={"like": 1})
    lines = problems(Config(auth=OPEN, routes=(good, bad)))
    assert [line.partition(": ")[0] for line in lines] == [
        "routes[1].from",
        "routes[1].event[0]",
        "routes[1].filter",
        "routes[1].to[1]",
    ]
