"""How one worker codes segments: whose model, which layout, which codecs, which key."""

from dataclasses import dataclass, field
from math import prod
from typing import Final

from torch import Tensor

from shared.errors import SegmentForeignError, SegmentTooLargeError
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.messages import SegmentDescriptor
from shared.state_blob.codecs import Codec
from shared.state_blob.prefix_hash import PrefixNames, root
from shared.state_blob.segment import (
    EncodedSegment,
    SegmentIdentity,
    checksum_of,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)

_WIDEST_ELEMENT_BYTES: Final = 4
_MOST_OVERHEAD_BYTES: Final = 80 * 2**10
"""Header, metadata, padding, and what a codec adds to what it cannot compress."""


@dataclass(frozen=True, slots=True)
class LatentsPart:
    """MLA latents of the tokens [start, stop): `[mla_layers, stop - start, latent_dim]`."""

    start: int
    stop: int
    latents: Tensor


StatePart = LatentsPart | KdaSnapshot


@dataclass(frozen=True, slots=True)
class PartRange:
    """What a part is of: tokens [start, stop), and some layers of its kind."""

    start: int
    stop: int
    first_layer: int
    layers: int


def range_of(part: StatePart) -> PartRange:
    """Tell what a part is of; a snapshot covers no tokens, it is of the length at which it was."""
    if isinstance(part, KdaSnapshot):
        return PartRange(part.length, part.length, part.first_layer, part.layers)
    return PartRange(part.start, part.stop, 0, len(part.latents))


def place(part: StatePart, state: RequestState) -> None:
    """Bring a part into a state that is filled in the order of its tokens; blocks."""
    if isinstance(part, KdaSnapshot):
        state.import_snapshot(part)
    else:
        state.import_latents(part.start, part.latents)


def descriptor_of(
    part: StatePart, encoded: EncodedSegment, codec: Codec, key: str, owner: str, epoch: int
) -> SegmentDescriptor:
    """Announce a part of a state that was encoded, to be found under a key."""
    covered = range_of(part)
    return SegmentDescriptor(
        key=key,
        kind=encoded.kind,
        producer=owner,
        epoch=epoch,
        first_layer=covered.first_layer,
        layers=covered.layers,
        codec=codec.name,
        start=covered.start,
        stop=covered.stop,
        wire_bytes=len(encoded.data),
        raw_bytes=encoded.raw_bytes,
        checksum=encoded.checksum,
    )


def described(segment: SegmentDescriptor) -> dict[str, object]:
    """What a log line says of a segment."""
    return {
        "kind": segment.kind,
        "start": segment.start,
        "stop": segment.stop,
        "codec": segment.codec,
        "wire_bytes": segment.wire_bytes,
    }


@dataclass(frozen=True, slots=True)
class SegmentCoding:
    """Turns parts of states into segments and back.

    Attributes:
        fingerprint: of the model.
        layout: of the states of this worker's engine.
        key: signs what is written, and then everything read has to be signed with it.
    """

    fingerprint: str
    layout: StateLayout
    key: bytes | None = field(default=None, repr=False)

    def names(self, tokens: tuple[int, ...], tenant: bytes) -> PrefixNames:
        """Names of the prefixes of a tenant's prompt."""
        return PrefixNames(root(self.fingerprint, tenant), tokens)

    def encode(
        self, part: StatePart, names: PrefixNames, owner: str, epoch: int, codec: Codec
    ) -> EncodedSegment:
        """Encode a part of the state of the tokens that `names` names; blocks."""
        identity = self._identity(names, owner, epoch, range_of(part))
        if isinstance(part, KdaSnapshot):
            return encode_snapshot(identity, part, codec, self.key)
        return encode_latents(identity, part.latents, codec, self.key)

    def decode(self, segment: SegmentDescriptor, data: memoryview, names: PrefixNames) -> StatePart:
        """Check that a segment is the announced one, of these tokens, and decode it; blocks.

        Raises:
            SegmentError: it is not; the subclass says why.
        """
        if checksum_of(data) != segment.checksum:
            raise SegmentForeignError("the segment is not the one that was announced")
        covered = PartRange(segment.start, segment.stop, segment.first_layer, segment.layers)
        identity = self._identity(names, segment.producer, segment.epoch, covered)
        if segment.kind == "kda":
            return decode_snapshot(data, identity, self.layout, self.key)
        latents = decode_latents(data, identity, self.layout, self.key)
        return LatentsPart(segment.start, segment.stop, latents)

    def check_size(self, segment: SegmentDescriptor) -> None:
        """Refuse a segment that is larger than any coding of its part of a state.

        Raises:
            SegmentTooLargeError: it is.
        """
        elements = self._elements(segment)
        most = elements * _WIDEST_ELEMENT_BYTES * 65 // 64 + _MOST_OVERHEAD_BYTES
        if segment.wire_bytes > most:
            raise SegmentTooLargeError(
                f"{segment.wire_bytes} bytes are announced for a segment of at most {most}"
            )

    def _elements(self, segment: SegmentDescriptor) -> int:
        layout = self.layout
        if segment.kind == "mla":
            return prod(layout.latents_shape(segment.stop - segment.start))
        layers = min(segment.layers, layout.kda_layers)
        of_one_layer = prod(layout.recurrent_shape[1:]) + prod(layout.convolution_shape[1:])
        return layers * of_one_layer

    def _identity(
        self, names: PrefixNames, owner: str, epoch: int, covered: PartRange
    ) -> SegmentIdentity:
        return SegmentIdentity(
            fingerprint=self.fingerprint,
            producer=owner,
            epoch=epoch,
            start=covered.start,
            stop=covered.stop,
            parent_hash=names.at(covered.start),
            prefix_hash=names.at(covered.stop),
            first_layer=covered.first_layer,
            layers=covered.layers,
        )
