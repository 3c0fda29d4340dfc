"""How much of a state's way is hidden behind its prefill.

Exposed is the time from the end of prefill to the first token that decode computes, at the client.
Serial is what the same state takes on the same link when it is published only then, and pulled only
after that, over as many connections.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final

from benchmarks.two_regions import Answer, Link, TwoRegions, tokens_of
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.messages import SegmentDescriptor
from shared.policy.segment_size import cut_latents
from shared.state_blob.codecs import codec_named
from shared.state_transfer.segment_coding import LatentsPart, SegmentCoding, StatePart
from shared.state_transfer.state_import import StateImport
from shared.state_transfer.state_reader import StateReader
from shared.state_transfer.state_writer import StateWriter, WrittenSegment
from shared.streams.bulk_reader import BulkReader
from shared.streams.connection import connect
from shared.streams.prefix_index import PrefixIndex
from shared.streams.state_store import StateStore

_OWNER: Final = "serial"


@dataclass(frozen=True, slots=True)
class Overlap:
    """One prompt on one link; times in seconds."""

    link: Link
    tokens: int
    answer: Answer
    prefill: float
    exposed: float
    publish: float
    """To code and store the whole state."""
    pull: float
    """To pull and restore it, and to decode a token."""

    @property
    def serial(self) -> float:
        """From the end of prefill to the first decoded token, one thing after the other."""
        return self.publish + self.pull


class SerialTransfer:
    """Moves the state of a prompt that the system has cached, one thing after the other."""

    def __init__(self, regions: TwoRegions, engine: Engine, prompt: tuple[int, ...]) -> None:
        self._regions = regions
        self._engine = engine
        self._coding = SegmentCoding(engine.fingerprint, engine.layout)
        self._names = self._coding.names(prompt, b"")

    async def segments(self) -> list[SegmentDescriptor]:
        """Of the state at the prompt's last whole block."""
        async with connect(self._regions.prefill_url) as redis:
            match = await PrefixIndex(redis).match(self._names.blocks, None)
        return [*(node.latents for node in match.hit), *match.hit[-1].snapshot]

    async def pull(self, segments: Sequence[SegmentDescriptor], state: RequestState) -> float:
        """Bring segments over the link into a state, and decode a token; gives the seconds."""
        async with BulkReader(self._regions.linked_url) as bulk:
            await bulk.round_trip()  # the connection is there, as a worker's would be
            reader = StateReader(bulk, self._coding)
            started = monotonic()
            async with StateImport(
                lambda segment: reader.read(segment, self._names), state
            ) as pieces:
                for segment in segments:
                    pieces.add(segment)
                await pieces.finish()
            state.finish_import(segments[-1].stop)
            self._engine.decode([0], [state])
            return monotonic() - started

    async def publish(self, state: RequestState, length: int, codec: str) -> float:
        """Code and store the first `length` tokens of a state; gives the seconds."""
        parts: asyncio.Queue[StatePart | None] = asyncio.Queue()
        for start, stop in cut_latents(0, length):
            parts.put_nowait(LatentsPart(start, stop, state.export_latents(start, stop)))
        async with connect(self._regions.prefill_url) as redis:
            store = StateStore(redis, "prefill")

            async def write(written: WrittenSegment) -> None:
                await store.write(_OWNER, written.segment, written.data)

            writer = StateWriter(
                self._coding, self._names, _OWNER, 1, lambda _: codec_named(codec), write
            )
            started = monotonic()
            parts.put_nowait(None)
            await writer.write_all(parts)
            seconds = monotonic() - started
            await store.release(_OWNER)
        return seconds


async def measure_overlap(
    regions: TwoRegions, engine: Engine, link: Link, length: int, seed: int
) -> Overlap:
    """Ask for two tokens after a new prompt, then move its state once more, serially.

    Args:
        regions: the system, which nobody else uses.
        engine: of the same model, with room for the prompt.
        link: to set between the regions.
        length: of the prompt, more than a block.
        seed: of its tokens.
    """
    await regions.set_link(link)
    prompt = tuple(tokens_of(length, seed, engine.config.vocab_size))
    answer = await regions.complete(prompt, 2)
    serial = SerialTransfer(regions, engine, prompt)
    segments = await serial.segments()
    with engine.new_state(length + 1) as state:
        pull = await serial.pull(segments, state)
        publish = await serial.publish(state, segments[-1].stop, segments[0].codec)
    return Overlap(
        link=link,
        tokens=length,
        answer=answer,
        prefill=answer.timings["prefill"] / 1e3,
        exposed=answer.arrivals[1] - _prefill_ended(regions, answer),
        publish=publish,
        pull=pull,
    )


def _prefill_ended(regions: TwoRegions, answer: Answer) -> float:
    return max(
        line.at
        for line in regions.log_lines("prefill_worker", answer.request_id)
        if line.event == "chunk prefilled"
    )
