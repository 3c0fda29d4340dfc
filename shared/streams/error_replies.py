"""Error replies of a Redis server as redis-py's exceptions, for clients that parse RESP themselves.

Redis-py strips the code off some of its messages; here each keeps its whole text.
"""

from types import MappingProxyType
from typing import Final

from redis import exceptions

_BY_CODE: Final = MappingProxyType(
    {
        "LOADING": exceptions.BusyLoadingError,
        "NOAUTH": exceptions.AuthenticationError,
        "NOPERM": exceptions.NoPermissionError,
        "OOM": exceptions.OutOfMemoryError,
        "READONLY": exceptions.ReadOnlyError,
        "WRONGPASS": exceptions.AuthenticationError,
    }
)
_BY_TEXT: Final = MappingProxyType(
    {
        "ERR max number of clients reached": exceptions.ConnectionError,
        "ERR invalid password": exceptions.AuthenticationError,
    }
)


def error_of(line: bytes) -> exceptions.RedisError:
    """Give the exception of an error line, without its leading `-`."""
    text = line.decode("utf-8", "replace")
    code = text.partition(" ")[0]
    kind = _BY_TEXT.get(text) or _BY_CODE.get(code) or exceptions.ResponseError
    return kind(text)
