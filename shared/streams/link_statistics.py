"""How fast the links between regions are, as those who pull over them have measured."""

from collections.abc import Mapping
from dataclasses import asdict, astuple
from math import isfinite
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis

from shared.policy.link_estimate import LinkEstimate, TransferSample
from shared.streams import keys
from shared.streams.scripts import run_script

LINK_MILLISECONDS: Final = 24 * 3600 * 1000
"""Time to live of a link's statistics since its last transfer."""

_MOST_LINKS: Final = 1000
_TRIES: Final = 16
"""Of an update that others come before: among so many transfers one more says little."""

_ESTIMATE: Final = TypeAdapter(LinkEstimate)


class LinkStatistics:
    """The links that are accounted for in one region's Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def record(self, link: str, sample: TransferSample) -> bool:
        """Take a transfer that ends now into account.

        Args:
            link: its name, the same for all transfers over it.
            sample: what was measured.

        Returns:
            Whether it was; not if very many others end in the same moment.

        Raises:
            ValueError: the sample is no transfer.
        """
        for _ in range(_TRIES):
            fields, now = await self._read(link)
            after = _read_estimate(fields).observe(sample, now)
            if await self._replace(link, fields.get(b"samples", b"0"), after):
                return True
        return False

    async def read_all(self) -> Mapping[str, LinkEstimate]:
        """What is known of each link."""
        found: Any = await self._redis.zrange(keys.LINKS, 0, _MOST_LINKS - 1)
        names = [name.decode() for name in found]
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(keys.link(name))
        answers = await pipeline.execute() if names else []
        return {
            name: _read_estimate(fields)
            for name, fields in zip(names, answers, strict=True)
            if fields
        }

    async def _read(self, link: str) -> tuple[Mapping[bytes, bytes], float]:
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hgetall(keys.link(link))
        pipeline.time()
        fields, (seconds, microseconds) = await pipeline.execute()
        return fields, seconds + microseconds / 1e6

    async def _replace(self, link: str, samples_before: bytes, after: LinkEstimate) -> bool:
        fields = {name: value for name, value in asdict(after).items() if value is not None}
        replaced = await run_script(
            self._redis,
            "replace_link",
            [keys.link(link), keys.LINKS],
            samples_before,
            LINK_MILLISECONDS,
            link,
            *(str(part) for field in fields.items() for part in field),
        )
        return bool(replaced)


def _read_estimate(fields: Mapping[bytes, bytes]) -> LinkEstimate:
    """Read a link's hash; one that is not what it should be is begun anew."""
    text = {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in fields.items()
    }
    try:
        estimate = _ESTIMATE.validate_strings(text)
    except ValidationError:
        return LinkEstimate()
    numbers = [number for number in astuple(estimate) if number is not None]
    return (
        estimate if all(isfinite(number) and number >= 0 for number in numbers) else LinkEstimate()
    )
