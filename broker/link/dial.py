"""Opening connections: redis-py knows the handshakes, we take over what it has opened."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import trio
from redis.asyncio import connection as opener
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from broker.link.base import LinkDown, LinkError
from broker.link.connection import Connection
from broker.link.event_loop import run_in_asyncio
from broker.link.target import Address, Target


class Refused(LinkDown):
    """Redis is there and will not have us; ``mend`` says what a person can do."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.mend = mend


def refusal(error: LinkError) -> LinkError:
    """``error`` as a refusal, when that is what it is."""
    text, code = str(error), error.code
    if code == "NOAUTH":
        return Refused("Redis wants a password", "write redis://user:password@host or redis://:password@host")
    if code == "WRONGPASS":
        return Refused("Redis does not accept user and password", "correct them, or the user in Redis")
    if code == "NOPERM":
        return Refused(
            f"the user may not do what the broker needs: {text}",
            "grant it what docs/cluster.md lists (ACL SETUSER)",
        )
    return error


class Dialer:
    """Opens connections to the servers of one target."""

    def __init__(self, target: Target, connect_timeout: float) -> None:
        self._timeout = connect_timeout
        # RESP2: with RESP3, messages may stand between the answers of commands, and lanes gain nothing by it.
        # Retries stay off, which is the default of a bare connection: one would repeat a write.
        self._options: dict[str, Any] = {
            "protocol": 2,
            "driver_info": None,
            "socket_connect_timeout": connect_timeout,
            "socket_timeout": connect_timeout,
        }
        self._data = {"username": target.username, "password": target.password, "db": target.db}
        self._sentinel = {"username": target.sentinel_username, "password": target.sentinel_password}
        self._path = target.path
        self._class: type[opener.AbstractConnection] = opener.Connection
        if target.path is not None:
            self._class = opener.UnixDomainSocketConnection
        elif target.tls is not None:
            self._class = opener.SSLConnection
            self._options |= {
                "ssl_ca_certs": target.tls.ca_certs,
                "ssl_cert_reqs": target.tls.cert_reqs,
                "ssl_check_hostname": target.tls.check_hostname,
                "ssl_certfile": target.tls.certfile,
                "ssl_keyfile": target.tls.keyfile,
                "ssl_password": target.tls.password,
            }

    async def open(
        self, connection: Connection, address: Address | None, *, to_sentinel: bool = False
    ) -> None:
        """Connect, authenticate, hand over. Raises :class:`LinkDown`, or of these :class:`Refused`.

        ``address``: ``None`` for the socket in the file system.
        """
        options = self._options | (self._sentinel if to_sentinel else self._data)
        if address is not None:
            options |= {"host": address.host, "port": address.port}
        else:
            options["path"] = self._path
        try:
            with trio.fail_after(self._timeout):
                writer = await run_in_asyncio(_open, self._class(**options))
        except asyncio.CancelledError:
            raise LinkDown("the bridge has ended") from None
        except trio.TooSlowError:
            raise LinkDown(f"no connection within {self._timeout:g} s") from None
        except AuthenticationError as error:
            raise Refused(
                f"Redis does not accept user and password: {error}", "correct them, or the user in Redis"
            ) from error
        except NoPermissionError as error:
            raise refusal(LinkDown(f"NOPERM {error}")) from error
        except ResponseError as error:
            if "DB index" in str(error):
                raise Refused(f"Redis says: {error}", "give a database that it has") from error
            raise LinkDown(str(error)) from error
        except (RedisError, OSError) as error:
            if _is_untrusted(error):
                raise Refused(
                    f"the certificate of the server cannot be trusted: {error}",
                    "give the authority's file: ?ssl_ca_certs=/path/ca.pem",
                ) from error
            raise LinkDown(str(error) or type(error).__name__) from error
        connection.attach(writer)


async def _open(connection: Any) -> asyncio.StreamWriter:
    """Connect in asyncio, and take the transport out of redis-py's hands."""
    try:
        await connection.connect()
        writer: asyncio.StreamWriter = connection._writer
        connection._writer = connection._reader = None
    finally:
        connection._close()
    return writer


def _is_untrusted(error: BaseException | None) -> bool:
    """Whether the certificate was what went wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
