"""Which codec a worker writes each part of a state in: as set, or by the link it will cross."""

from collections.abc import Callable
from typing import Final

from shared.kimi_linear.snapshot import KdaSnapshot
from shared.policy.codec_choice import CodecRates, choose_codec
from shared.settings import WorkerSettings
from shared.state_blob.codecs import CODECS, Codec, codec_named
from shared.state_transfer.segment_coding import StatePart
from shared.state_transfer.state_writer import WrittenSegment
from shared.streams.link_statistics import LinkStatistics
from shared.streams.region_terms import RegionTerms

_LOSSLESS: Final = "zstd"
_ALWAYS_READABLE: Final = "raw"

_USUAL_RATES: Final = CodecRates(encode=4e8, decode=6e8, ratio=0.9)
"""Of zstd on the states of one processor core, before anything was measured."""
_NEWS: Final = 0.2
"""Weight of a measurement in the running rates."""


class SegmentCodecs:
    """The codecs of one worker's segments.

    Args:
        settings: name the codecs, or leave the choice to the slowest link.
        links: over which the region's states are pulled.
        terms: of the region: what its readers can read.
    """

    def __init__(self, settings: WorkerSettings, links: LinkStatistics, terms: RegionTerms) -> None:
        self._latent_codec = settings.latent_codec
        self._state_codec = settings.state_codec
        self._links = links
        self._terms = terms
        self._rates = _USUAL_RATES

    async def chosen(self, raw_bytes: int) -> Callable[[StatePart], Codec]:
        """Choose for a state of so many bytes; gives the codec of each of its parts."""
        readable = await self._terms.readable([codec.name for codec in CODECS])
        automatic = await self._automatic(raw_bytes)

        def usable(wanted: str) -> Codec:
            for name in (automatic if wanted == "auto" else wanted, _LOSSLESS):
                if name in readable:
                    return codec_named(name)
            return codec_named(_ALWAYS_READABLE)

        latent_codec, state_codec = usable(self._latent_codec), usable(self._state_codec)
        return lambda part: state_codec if isinstance(part, KdaSnapshot) else latent_codec

    async def _automatic(self, raw_bytes: int) -> str:
        if "auto" not in (self._latent_codec, self._state_codec):
            return _LOSSLESS
        links = await self._links.read_all()
        bandwidths = [link.bandwidth for link in links.values() if link.bandwidth]
        return choose_codec(min(bandwidths, default=None), raw_bytes, self._rates)

    def measured(self, written: WrittenSegment) -> None:
        """Learn from a segment how fast and how dense zstd is here."""
        segment, seconds = written.segment, written.encode_seconds
        if segment.codec != _LOSSLESS or not segment.raw_bytes or seconds <= 0:
            return
        self._rates = CodecRates(
            encode=_towards(self._rates.encode, segment.raw_bytes / seconds),
            decode=self._rates.decode,
            ratio=_towards(self._rates.ratio, segment.wire_bytes / segment.raw_bytes),
        )


def _towards(average: float, news: float) -> float:
    return average + _NEWS * (news - average)
