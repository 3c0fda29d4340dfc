"""Valid segments of every codec, signed and not, each with the reader that accepts it."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import torch

from shared.errors import SegmentError
from shared.state_blob.codecs import codecs_for
from shared.state_blob.segment import (
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)
from tests.state_blob.independent_writer import HEADER_BYTES, payload_after, sealed
from tests.state_blob.states import (
    KEY,
    LATENTS,
    LATENTS_IDENTITY,
    LAYOUT,
    SNAPSHOT,
    SNAPSHOT_IDENTITY,
)


@dataclass(frozen=True)
class Sample:
    """A valid segment, and the reader that accepts it."""

    data: bytes
    key: bytes | None
    read: Callable[[bytes, bytes | None], list[torch.Tensor]]

    @property
    def metadata(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgpack.unpackb(self.data[HEADER_BYTES : self.metadata_stop])
        return fields

    @property
    def payload(self) -> bytes:
        return self.data[self.payload_start :]

    @property
    def metadata_stop(self) -> int:
        return HEADER_BYTES + int.from_bytes(self.data[12:16], "little")

    @property
    def payload_start(self) -> int:
        return -(-self.metadata_stop // 64) * 64

    def refusal(self, data: bytes) -> type[SegmentError] | None:
        """Tell why the reader refuses the data; any other error is a failure of the test."""
        try:
            self.read(data, self.key)
        except SegmentError as error:
            return type(error)
        return None

    def sealed(
        self, metadata: dict[str, Any] | bytes | None = None, payload: bytes | None = None
    ) -> bytes:
        """Rebuild the segment around other parts, with lengths and a seal that match them."""
        fields = self.metadata if metadata is None else metadata
        packed = fields if isinstance(fields, bytes) else msgpack.packb(fields)
        payload = self.payload if payload is None else payload
        preamble = self.data[:12] + struct.pack("<IQ", len(packed), len(payload))
        return sealed(preamble + bytes(48) + payload_after(packed, payload), self.key)


def read_latents(data: bytes, key: bytes | None) -> list[torch.Tensor]:
    latents = decode_latents(data, LATENTS_IDENTITY, LAYOUT, key)
    assert latents.shape == (2, 11, 5)
    assert latents.dtype == torch.bfloat16
    return [latents]


def read_snapshot(data: bytes, key: bytes | None) -> list[torch.Tensor]:
    snapshot = decode_snapshot(data, SNAPSHOT_IDENTITY, LAYOUT, key)
    assert (snapshot.length, snapshot.first_layer) == (75, 1)
    assert snapshot.recurrent.shape == (2, 1, 4, 4)
    assert snapshot.recurrent.dtype == torch.float32
    assert snapshot.convolution.shape == (2, 12, 3)
    assert snapshot.convolution.dtype == torch.bfloat16
    return [snapshot.recurrent, snapshot.convolution]


def _samples() -> dict[str, Sample]:
    samples = {}
    for key in (None, KEY):
        signed = "" if key is None else " signed"
        for codec in codecs_for("mla"):
            data = encode_latents(LATENTS_IDENTITY, LATENTS, codec, key).data
            samples[f"latents {codec.name}{signed}"] = Sample(data, key, read_latents)
        for codec in codecs_for("kda"):
            data = encode_snapshot(SNAPSHOT_IDENTITY, SNAPSHOT, codec, key).data
            samples[f"snapshot {codec.name}{signed}"] = Sample(data, key, read_snapshot)
    return samples


SAMPLES: Final = _samples()
