"""Pulls the state of a prompt into this worker's own memory, while it is still being computed."""

import asyncio
from typing import Self

from services.decode_worker.prefill_watch import PrefillWatch
from shared.errors import SegmentForeignError, SegmentShapeError, StateLostError
from shared.kimi_linear.request_state import RequestState
from shared.messages import (
    Manifest,
    PrefillDone,
    PrefillStarted,
    SegmentDescriptor,
    SegmentReady,
)
from shared.state_transfer.state_import import Imported, Read, StateImport, nothing_more


class StatePull:
    """One try at getting the state of a prompt; what is under way ends with the block.

    Args:
        watch: of the prefill that makes the state.
        read: gives a segment of the prefill region.
        state: to pull into; cleared, or with the latents of `covered` tokens.
        covered: tokens whose latents need not be pulled.
        length: of the prompt.
        fingerprint: of the model.
        imported: told of each segment that is in its place.
    """

    def __init__(
        self,
        watch: PrefillWatch,
        read: Read,
        state: RequestState,
        *,
        covered: int,
        length: int,
        fingerprint: str,
        imported: Imported = nothing_more,
    ) -> None:
        self._watch = watch
        self._import = StateImport(read, state, imported)
        self._state = state
        self._covered = covered
        self._length = length
        self._fingerprint = fingerprint
        self._asked: set[str] = set()
        self._tokens = 0
        self._layers = 0

    @property
    def raw_bytes(self) -> int:
        """Of the segments pulled so far, decoded."""
        return self._import.raw_bytes

    @property
    def wire_bytes(self) -> int:
        """Of the segments pulled so far, as they came."""
        return self._import.wire_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._import.clear()

    async def manifest(self) -> Manifest:
        """Pull what is announced until all of the state is, and give what closes it.

        Raises:
            StateLostError: the state, or the prefill that makes it, is gone, damaged or stuck.
            GenerationError, CancelledJobError, UnavailableError: see `PrefillWatch.progress`.
        """
        while True:
            match await self._watch.progress():
                case PrefillStarted():
                    await self._import.clear()
                    self._asked.clear()
                    self._tokens = self._layers = 0
                case SegmentReady(segment=segment):
                    self._ask_for(segment)
                case PrefillDone(manifest=manifest):
                    self._check_manifest(manifest)
                    for segment in manifest.segments:
                        self._ask_for(segment)
                    return manifest
            self._import.check()

    async def finish(self) -> None:
        """Wait for what is still under way; the state is whole then.

        Raises:
            StateLostError: a segment is gone, damaged, or not all of the prompt is covered.
            UnavailableError: the prefill region does not answer.
        """
        await self._import.finish()
        await asyncio.to_thread(self._state.finish_import, self._length)

    def _ask_for(self, segment: SegmentDescriptor) -> None:
        if segment.key in self._asked:
            return
        self._check_place(segment)
        self._asked.add(segment.key)
        if segment.kind == "kda" or segment.stop > self._covered:
            self._import.add(segment)

    def _check_place(self, segment: SegmentDescriptor) -> None:
        """Refuse what does not continue the segments before it: each part is pulled once."""
        if segment.kind == "kda":
            follows = segment.stop == self._length and segment.first_layer == self._layers
            self._layers += segment.layers
        else:
            follows = segment.start == self._tokens < segment.stop <= self._length
            self._tokens = segment.stop
        if not follows:
            raise SegmentShapeError(f"segment {segment.key} does not follow those before it")

    def _check_manifest(self, manifest: Manifest) -> None:
        if manifest.fingerprint != self._fingerprint:
            raise SegmentForeignError(
                f"state of model {manifest.fingerprint}, this worker runs {self._fingerprint}"
            )
        if not self._asked.issubset(segment.key for segment in manifest.segments):
            raise StateLostError("segments were announced that are not in the manifest")
