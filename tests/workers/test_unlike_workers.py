"""Workers of other widths, codecs and keys understand each other, or are told why not."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from services.prefill_worker.prefill import PrefillHandler
from shared.errors import LostSegmentError, SegmentSignatureError
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.presets import write_random_checkpoint
from shared.kimi_linear.request_state import RequestState
from shared.messages import SegmentDescriptor, SegmentReady
from shared.state_blob.codecs import ZSTD
from shared.state_transfer.segment_coding import LatentsPart, SegmentCoding, descriptor_of
from shared.state_transfer.state_import import StateImport
from shared.state_transfer.state_reader import StateReader
from shared.streams.bulk_reader import BulkReader
from shared.streams.job_queue import JobQueue
from shared.streams.state_store import StateStore
from tests.streams.conftest import begin_next
from tests.workers.conftest import PROMPT, StartPrefill, job

pytestmark = pytest.mark.asyncio

KEY = "a secret of both regions"


@dataclass
class Transfer:
    """A state's way from a prefill worker to an engine."""

    queue: JobQueue
    store: StateStore
    bulk: BulkReader

    async def published(self, prefill: PrefillHandler) -> list[SegmentDescriptor]:
        """The state of the prompt, as the worker has announced it."""
        await self.queue.enqueue(job(), 10)
        await prefill.run(await begin_next(self.queue))
        events = await self.store.events("r1").read()
        return [event.segment for event in events if isinstance(event, SegmentReady)]

    async def restore(
        self, segments: list[SegmentDescriptor], coding: SegmentCoding, state: RequestState
    ) -> None:
        reader, names = StateReader(self.bulk, coding), coding.names(PROMPT, b"")
        async with StateImport(lambda segment: reader.read(segment, names), state) as pieces:
            for segment in segments:
                pieces.add(segment)
            await pieces.finish()
        state.finish_import(len(PROMPT))


@pytest.fixture
def transfer(queue: JobQueue, store: StateStore, bulk: BulkReader) -> Transfer:
    return Transfer(queue, store, bulk)


def drift(engine: Engine, state: RequestState) -> float:
    """Largest difference of the next logits, of those of a state that did not move."""
    with engine.new_state(len(PROMPT) + 1) as own:
        engine.prefill([PROMPT], [own])
        expected, found = engine.decode([7], [own]), engine.decode([7], [state])
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("settings", "codecs", "bound"),
    [
        ({"latent_codec": "raw", "state_codec": "raw"}, {"raw"}, 1e-5),
        ({"latent_codec": "zstd", "state_codec": "zstd"}, {"zstd"}, 1e-5),
        ({"latent_codec": "auto", "state_codec": "bf16-state"}, {"zstd", "bf16-state"}, 0.05),
        ({"latent_codec": "int8-latent", "state_codec": "raw"}, {"int8-latent", "raw"}, 0.05),
    ],
)
async def test_a_state_in_any_codec_is_restored_within_what_the_codec_keeps(
    settings: dict[str, str],
    codecs: set[str],
    bound: float,
    engine: Engine,
    start_prefill: StartPrefill,
    transfer: Transfer,
    coding: SegmentCoding,
) -> None:
    segments = await transfer.published(start_prefill(**settings))
    assert {segment.codec for segment in segments} == codecs
    with engine.new_state(len(PROMPT) + 1) as state:
        await transfer.restore(segments, coding, state)
        assert drift(engine, state) < bound


@pytest.mark.parametrize(("width", "bound"), [("bfloat16", 0.5), ("int8", 0.5)])
async def test_a_prefill_in_narrow_weights_is_continued_in_wide_ones(
    width: WeightDType, bound: float, engine: Engine, tmp_path: Path
) -> None:
    write_random_checkpoint(tmp_path / "tiny", "tiny", seed=5)
    narrow = Engine.load(tmp_path / "tiny", width, threads=1)
    assert narrow.fingerprint == engine.fingerprint
    assert narrow.layout.signature == engine.layout.signature
    with narrow.new_state(len(PROMPT)) as computed, engine.new_state(len(PROMPT) + 1) as continued:
        narrow.prefill([PROMPT], [computed])
        continued.import_latents(0, computed.export_latents(0, len(PROMPT)))
        continued.import_snapshot(computed.snapshot())
        continued.finish_import(len(PROMPT))
        assert 0 < drift(engine, continued) < bound


async def test_latents_in_half_the_width_are_widened_by_the_reader(
    engine: Engine, coding: SegmentCoding
) -> None:
    """As a GPU writes them, and a CPU keeps them."""
    names = coding.names(PROMPT, b"")
    with engine.new_state(len(PROMPT)) as state:
        engine.prefill([PROMPT], [state])
        latents = state.export_latents(0, 64).to(torch.bfloat16)
    written = LatentsPart(0, 64, latents)
    encoded = coding.encode(written, names, "r1", 1, ZSTD)
    segment = descriptor_of(written, encoded, ZSTD, "k", "r1", 1)
    part = coding.decode(segment, memoryview(bytearray(encoded.data)), names)
    assert isinstance(part, LatentsPart)
    assert part.latents.dtype == torch.float32
    assert torch.equal(part.latents, latents.float())


async def test_what_is_signed_is_read_with_the_key_only(
    engine: Engine,
    start_prefill: StartPrefill,
    transfer: Transfer,
    coding: SegmentCoding,
) -> None:
    segments = await transfer.published(start_prefill(state_key=KEY))
    signed, other = replace(coding, key=KEY.encode()), replace(coding, key=b"another secret key")
    with engine.new_state(len(PROMPT) + 1) as state:
        await transfer.restore(segments, signed, state)
    with engine.new_state(len(PROMPT) + 1) as state:
        with pytest.raises(LostSegmentError) as refused:
            await transfer.restore(segments, other, state)
        assert isinstance(refused.value.cause, SegmentSignatureError)


async def test_a_reader_with_a_key_refuses_what_is_not_signed(
    engine: Engine,
    prefill: PrefillHandler,
    transfer: Transfer,
    coding: SegmentCoding,
) -> None:
    segments = await transfer.published(prefill)
    with engine.new_state(len(PROMPT) + 1) as state:
        with pytest.raises(LostSegmentError) as refused:
            await transfer.restore(segments, replace(coding, key=KEY.encode()), state)
        assert isinstance(refused.value.cause, SegmentSignatureError)
