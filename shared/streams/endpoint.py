"""Where a Redis listens and how to log in there, as redis-py reads it from a URL."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from redis.asyncio import BlockingConnectionPool

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server, for clients that open their own connections.

    Attributes:
        path: of its unix socket; None where it is reached by `host` and `port`.
        tls: how its certificate is checked; None for a connection in the clear.
        db: the number of the database to select.
    """

    host: str
    port: int
    path: str | None = None
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0

    @classmethod
    def of(cls, url: str) -> "Endpoint":
        """Read a URL: `redis://`, `rediss://` with redis-py's `ssl_` options, or `unix://`.

        Raises:
            ValueError: it is none of these.
            OSError: a file of certificates or keys cannot be read.
        """
        pool = BlockingConnectionPool.from_url(url)
        # Made and never opened: it holds the defaults and the TLS context that redis-py would use.
        model: Any = cast("Any", pool).make_connection()
        encryption = getattr(model, "ssl_context", None)
        return cls(
            host=getattr(model, "host", ""),
            port=int(getattr(model, "port", 0)),
            path=getattr(model, "path", None),
            tls=encryption.get() if encryption else None,
            username=model.username,
            password=model.password,
            db=int(model.db),
        )

    async def open(self, make_protocol: Callable[[], ProtocolT]) -> ProtocolT:
        """Connect, without logging in.

        Raises:
            OSError: nobody listens there, or its certificate is refused.
        """
        loop = asyncio.get_running_loop()
        if self.path is not None:
            _, protocol = await loop.create_unix_connection(make_protocol, self.path)
        else:
            _, protocol = await loop.create_connection(
                make_protocol, self.host, self.port, ssl=self.tls
            )
        return protocol
