"""The Lua scripts: one file each, with the invariant it protects in its first line."""

from functools import cache
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

_FOLDER = Path(__file__).parent / "lua"


@cache
def _source(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text()


async def run_script(
    redis: Redis, name: str, keys: list[str], *arguments: str | bytes | int
) -> Any:
    """Run a script by its file name; it is sent to the server when the server does not know it."""
    return await redis.register_script(_source(name))(keys=keys, args=list(arguments))
