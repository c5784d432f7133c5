"""The link over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trustme

from broker.errors import ConfigurationError
from broker.link.base import LinkDown
from tests.link.linked import OWN, PATIENCE, build, linked, order, until
from tests.redis_server import RedisServer, free_port, redis_server


class Authority:
    """Certificates in files."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.ca = directory / "ca.pem"
        self.cert = directory / "cert.pem"
        self.key = directory / "key.pem"
        authority = trustme.CA()
        cert = authority.issue_cert(*(names or ("127.0.0.1",)))
        authority.cert_pem.write_to_path(self.ca)
        cert.cert_chain_pems[0].write_to_path(self.cert)
        cert.private_key_pem.write_to_path(self.key)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@contextmanager
def tls_server(authority: Authority, *, clients: str = "no") -> Iterator[tuple[RedisServer, str]]:
    port = free_port()
    with redis_server(
        tls_port=str(port),
        tls_cert_file=str(authority.cert),
        tls_key_file=str(authority.key),
        tls_ca_cert_file=str(authority.ca),
        tls_auth_clients=clients,
    ) as server:
        yield server, f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority.ca}"


async def test_everything_works_over_tls(authority: Authority) -> None:
    with tls_server(authority) as (server, url), server.client() as client:
        client.ping()
        async with linked(url) as here:
            # Larger than a TLS record and than one read, in both directions.
            blob = bytes(range(256)) * 4096
            assert await here.send("k", "SET", "k", blob) == b"OK"
            assert await here.send("k", "GET", "k") == blob
            assert await here.link.call("k", "GET", "k") == blob
            here.link.subscribe(["a"], sharded=False)
            assert await here.link.heard("a")
            for number in range(500):
                client.publish("a", number)
            client.publish("a", blob)
            await until(lambda: len(here.messages) == 501)
            assert here.messages == [("a", b"%d" % number) for number in range(500)] + [("a", blob)]
            order(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await until(lambda: here.ups == 2)
            assert await here.send("k", "STRLEN", "k") == len(blob)


async def test_a_frozen_server_is_given_up_over_tls_as_well(authority: Authority) -> None:
    settings = {"connect_timeout": 1.0, "answer_timeout": 0.3, "probe_after": 0.4, "probe_timeout": 0.3}
    with tls_server(authority) as (server, url):
        async with linked(url, **settings) as here:
            server.freeze()
            assert isinstance(await here.send("k", "PING"), LinkDown)
            await until(lambda: not here.link.up)
            server.thaw()
            await until(lambda: here.link.up)
            await here.round_trip("after")
            assert here.messages == [(OWN, b"after")]


async def test_both_sides_may_want_a_certificate(authority: Authority) -> None:
    with tls_server(authority, clients="yes") as (_, url):
        async with linked(f"{url}&ssl_certfile={authority.cert}&ssl_keyfile={authority.key}") as here:
            assert await here.send("k", "PING") == b"PONG"


async def test_a_certificate_of_somebody_else_ends_the_start(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Authority(tmp_path_factory.mktemp("other"))
    with tls_server(authority) as (_, url):
        here = build(url.replace(str(authority.ca), str(other.ca)))
        with pytest.raises(ConfigurationError, match="certificate"), trio.fail_after(PATIENCE):
            await here.link.run()
        assert here.link.statistics()["connects"] == 0


async def test_a_name_that_is_not_in_the_certificate_ends_the_start(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    elsewhere = Authority(tmp_path_factory.mktemp("elsewhere"), "redis.example.com")
    with tls_server(elsewhere) as (_, url):
        here = build(url)
        with pytest.raises(ConfigurationError, match="certificate"), trio.fail_after(PATIENCE):
            await here.link.run()
        async with linked(f"{url}&ssl_check_hostname=false") as there:
            assert await there.send("k", "PING") == b"PONG"
