"""Writes segments by FORMAT.md alone, with nothing of the code that is tested.

    python -m tests.state_blob.independent_writer

writes the golden files anew. They change only with the format version.
"""

import hmac
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from tests.state_blob.states import KEY, LATENTS_IDENTITY, SNAPSHOT_IDENTITY

GOLDEN: Final = Path(__file__).parent / "golden"
PREAMBLE: Final = struct.Struct("<4sHBBIIQ")
CHECKSUM: Final = slice(24, 40)
MAC: Final = slice(40, 72)
HEADER_BYTES: Final = 72
RAW, ZSTD, BF16_STATE, INT8_LATENT = range(4)
SIGNED: Final = 1


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as a segment stores it; bfloat16 as the integers of its bits."""

    name: str
    dtype: str
    elements: NDArray[Any]


def raw(elements: NDArray[Any]) -> bytes:
    return elements.tobytes()


def zstd(elements: NDArray[Any]) -> bytes:
    planes = elements.reshape(-1, 1).view(np.uint8).T.tobytes()
    return zstandard.ZstdCompressor().compress(planes)


def write(
    kind: int,
    codec: int,
    identity: dict[str, Any],
    tensors: Sequence[WrittenTensor],
    raw_bytes: int,
    key: bytes | None = None,
) -> bytes:
    encode: Callable[[NDArray[Any]], bytes] = raw if codec == RAW else zstd
    payload, entries = b"", []
    for tensor in tensors:
        encoded = encode(tensor.elements)
        payload += bytes(-len(payload) % 8) + encoded
        entries.append(
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.elements.shape),
                "wire_bytes": len(encoded),
            }
        )
    metadata = msgpack.packb(identity | {"raw_bytes": raw_bytes, "tensors": entries})
    flags = 0 if key is None else SIGNED
    preamble = PREAMBLE.pack(b"PRFS", 2, kind, codec, flags, len(metadata), len(payload))
    return sealed(preamble + bytes(48) + payload_after(metadata, payload), key)


def payload_after(metadata: bytes, payload: bytes) -> bytes:
    return metadata + bytes(-(HEADER_BYTES + len(metadata)) % 64) + payload


def sealed(data: bytes, key: bytes | None = None) -> bytes:
    """Put the right checksum, and with a key the right MAC, into a segment."""
    checksum = xxhash.xxh3_128_digest(data[: CHECKSUM.start] + data[HEADER_BYTES:])
    start = data[: CHECKSUM.start] + checksum
    mac = data[MAC] if key is None else hmac.digest(key, start + data[HEADER_BYTES:], "sha256")
    return start + mac + data[HEADER_BYTES:]


def steps(*shape: int) -> NDArray[np.float32]:
    count = int(np.prod(shape))
    return ((np.arange(count) - count // 3) / 8).astype("<f4").reshape(shape)


def bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of numbers that need no more: those here are eighths below 64."""
    bits = numbers.view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2")


def golden_files() -> dict[str, bytes]:
    latents = bf16(steps(2, 11, 5))
    recurrent, convolution = steps(2, 1, 4, 4), bf16(steps(2, 12, 3))
    exact_latents = [WrittenTensor("latents", "bfloat16", latents)]
    int8_latents = [
        WrittenTensor("latents", "int8", np.arange(-55, 55, dtype=np.int8).reshape(2, 11, 5)),
        WrittenTensor("scales", "float32", (np.arange(10) / 4).astype("<f4").reshape(2, 5)),
    ]
    exact_state = [
        WrittenTensor("recurrent", "float32", recurrent),
        WrittenTensor("convolution", "bfloat16", convolution),
    ]
    bf16_state = [WrittenTensor("recurrent", "bfloat16", bf16(recurrent)), exact_state[1]]
    of_latents, of_state = asdict(LATENTS_IDENTITY), asdict(SNAPSHOT_IDENTITY)
    return {
        "latents_raw": write(1, RAW, of_latents, exact_latents, 220),
        "latents_zstd": write(1, ZSTD, of_latents, exact_latents, 220),
        "latents_int8-latent": write(1, INT8_LATENT, of_latents, int8_latents, 220),
        "latents_signed": write(1, RAW, of_latents, exact_latents, 220, KEY),
        "snapshot_raw": write(2, RAW, of_state, exact_state, 272),
        "snapshot_zstd": write(2, ZSTD, of_state, exact_state, 272),
        "snapshot_bf16-state": write(2, BF16_STATE, of_state, bf16_state, 272),
    }


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, data in golden_files().items():
        (GOLDEN / f"{name}.segment").write_bytes(data)


if __name__ == "__main__":
    main()
