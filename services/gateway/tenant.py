"""Who a request belongs to, for what must not be shared: the API key that it came with.

Whether a cached state was there shows in how long a prompt takes, so that tenants who share it
could find out what others have sent. The salt that keeps them apart is derived here; nothing in a
request's body can set it.
"""

from hashlib import blake2b
from typing import Final

from aiohttp import web
from aiohttp.hdrs import AUTHORIZATION

SHARED: Final = b""
"""The tenant of requests without an API key, or of all of them where sharing is allowed."""

_SALT_BYTES: Final = 16


def tenant_of(http_request: web.Request, *, share_prefixes: bool) -> bytes:
    """Give the salt of a request's tenant; it tells nothing of the key."""
    credentials = http_request.headers.get(AUTHORIZATION, "")
    if share_prefixes or not credentials:
        return SHARED
    return blake2b(
        credentials.encode("utf-8", "surrogateescape"),
        digest_size=_SALT_BYTES,
        person=b"prfaas tenant",
    ).digest()
