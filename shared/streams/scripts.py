"""The Lua scripts: one file each, which begins with the invariant it protects.

Those that only give memory back, or keep what was begun going, run in a full server, too: they say
so in a line of flags. A line `--include NAME` stands for the functions of another file.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

_FOLDER: Final = Path(__file__).parent / "lua"
_INCLUDE: Final = re.compile(r"^--include (\w+)$", re.MULTILINE)


def _read(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text()


@cache
def _source(name: str) -> str:
    return _INCLUDE.sub(lambda include: _read(include[1]), _read(name))


async def run_script(
    redis: Redis, name: str, keys: list[str], *arguments: str | bytes | int
) -> Any:
    """Run a script by its file name; it is sent to the server when the server does not know it."""
    return await redis.register_script(_source(name))(keys=keys, args=list(arguments))
