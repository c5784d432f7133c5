"""``redis.url`` taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import ConfigurationError
from broker.link.target import Address, Target, Tls, parse


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("redis://localhost", Target("server", (Address("localhost", 6379),))),
        ("redis://10.0.0.1:6380/2", Target("server", (Address("10.0.0.1", 6380),), db=2)),
        ("redis://localhost/", Target("server", (Address("localhost", 6379),))),
        ("redis://[::1]:7000/0", Target("server", (Address("::1", 7000),))),
        ("redis://[::1]", Target("server", (Address("::1", 6379),))),
        ("redis://:secret@h", Target("server", (Address("h", 6379),), password="secret")),
        (
            "redis://me:p%40%2F%3A@h:1",
            Target("server", (Address("h", 1),), username="me", password="p@/:"),
        ),
        ("unix:///run/redis.sock", Target("unix", path="/run/redis.sock")),
        (
            "unix://me:secret@/run/my%20redis.sock?db=4",
            Target("unix", path="/run/my redis.sock", db=4, username="me", password="secret"),
        ),
        (
            "redis+sentinel://a,b:1,[::2]/main/3",
            Target(
                "sentinel",
                (Address("a", 26379), Address("b", 1), Address("::2", 26379)),
                service="main",
                db=3,
            ),
        ),
        (
            "redis+sentinel://:data@a/main?sentinel_username=s&sentinel_password=t",
            Target(
                "sentinel",
                (Address("a", 26379),),
                service="main",
                password="data",
                sentinel_username="s",
                sentinel_password="t",
            ),
        ),
        ("redis+cluster://a,b:7001", Target("cluster", (Address("a", 6379), Address("b", 7001)))),
        ("rediss://h", Target("server", (Address("h", 6379),), tls=Tls())),
        (
            "rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false",
            Target("server", (Address("h", 6379),), tls=Tls(cert_reqs="none", check_hostname=False)),
        ),
        ("rediss+cluster://h", Target("cluster", (Address("h", 6379),), tls=Tls())),
    ],
)
def test_what_a_url_says(url: str, target: Target) -> None:
    assert parse(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "redis://",
        "redis://user@",
        "redis://h:0",
        "redis://h:65536",
        "redis://h:port",
        "redis://h:٣",
        "redis://h/one",
        "redis://h/-1",
        "redis://h1,h2",
        "redis://::1",
        "redis://[::1",
        "redis://[::1]6379",
        "redis://h?db=1",
        "redis://h?ssl_cert_reqs=none",
        "redis://h#1",
        "redis://a/b@h",
        "unix://run/redis.sock",
        "unix://",
        "redis+sentinel://h",
        "redis+sentinel://h/",
        "redis+sentinel://h,/main",
        "redis+cluster://h/1",
        "rediss://h?ssl_cert_reqs=perhaps",
        "rediss://h?ssl_check_hostname=perhaps",
        "rediss://h?ssl_ca_certs=/does/not/exist.pem",
        "rediss://h?unknown=1",
    ],
)
def test_what_cannot_be_understood_is_told_with_a_mend(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url, "broker.toml")
    assert caught.value.key == "redis.url"
    assert caught.value.source == "broker.toml"
    assert caught.value.problem
    assert caught.value.mend


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hunter2",
        "redis://me:hunter2@",
        "redis://me:hunter2@h:port",
        "redis://me:hunter2#@h",
        "redis://me:/hunter2@h",
        "redis://me:hunter2@h/x",
        "redis://h1:hunter2@x@h:1,h2",
        "redis+sentinel://h/main?sentinel_password=hunter2&x=1",
        "rediss://h?ssl_password=hunter2&ssl_cert_reqs=x",
    ],
)
def test_passwords_appear_in_no_message(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url)
    assert "hunter2" not in str(caught.value)


def test_passwords_appear_in_no_text() -> None:
    target = parse("redis+sentinel://me:hunter2@h/main?sentinel_password=hunter3")
    assert str(target) == "redis+sentinel://h:26379/main"
    assert "hunter" not in repr(target)


def test_files_for_tls_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("")
    target = parse(f"rediss://h?ssl_ca_certs={file}")
    assert target.tls == Tls(ca_certs=str(file))


@given(st.text(max_size=40), st.sampled_from(["", "redis://", "redis+sentinel://", "rediss://", "unix://"]))
def test_nothing_else_is_ever_raised(text: str, scheme: str) -> None:
    try:
        target = parse(scheme + text)
    except ConfigurationError:
        return
    assert str(target)
