"""What shows that a segment is whole, and that somebody with the key wrote it."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from shared.errors import SegmentChecksumError, SegmentSignatureError
from shared.state_blob.coding import ReadableBuffer
from shared.state_blob.header import (
    CHECKSUM_START,
    HEADER_BYTES,
    MAC_BYTES,
    MAC_START,
    Header,
)

LEAST_KEY_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Seal:
    """The last two fields of a header."""

    checksum: bytes
    """XXH3-128 of everything but itself and the MAC: finds accidents, not forgers."""
    mac: bytes
    """HMAC-SHA256 of everything but itself, the checksum included; zeros without a key."""


def seal(preamble: bytes, content: Sequence[ReadableBuffer], key: bytes | None) -> Seal:
    """Seal a segment.

    Args:
        preamble: the header before the checksum.
        content: all that follows the header, in pieces.
        key: to sign with, or None.

    Raises:
        ValueError: the key is shorter than `LEAST_KEY_BYTES`.
    """
    checksum = _checksum(preamble, *content)
    mac = bytes(MAC_BYTES) if key is None else _mac(key, preamble, checksum, *content)
    return Seal(checksum, mac)


def check_seal(header: Header, segment: memoryview, key: bytes | None) -> None:
    """Check that a segment is what was written, by somebody with the key if there is one.

    Args:
        header: of the segment.
        segment: all of it.
        key: of this reader; without one, signed segments are taken unverified.

    Raises:
        SegmentChecksumError: the content does not match the checksum.
        SegmentSignatureError: there is a key and the segment is not signed with it, or the segment
            has a MAC and says it has none.
        ValueError: the key is shorter than `LEAST_KEY_BYTES`.
    """
    preamble, content = segment[:CHECKSUM_START], segment[HEADER_BYTES:]
    found = Seal(bytes(segment[CHECKSUM_START:MAC_START]), bytes(segment[MAC_START:HEADER_BYTES]))
    if _checksum(preamble, content) != found.checksum:
        raise SegmentChecksumError("segment does not match its checksum")
    if not header.signed and any(found.mac):
        raise SegmentSignatureError("segment has a MAC that it does not tell of")
    if key is None:
        return
    if not header.signed:
        raise SegmentSignatureError("segment is not signed")
    if not hmac.compare_digest(_mac(key, preamble, found.checksum, content), found.mac):
        raise SegmentSignatureError("segment is not signed with this reader's key")


def _checksum(*parts: ReadableBuffer) -> bytes:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _mac(key: bytes, *parts: ReadableBuffer) -> bytes:
    if len(key) < LEAST_KEY_BYTES:
        raise ValueError(f"a key has at least {LEAST_KEY_BYTES} bytes, not {len(key)}")
    digest = hmac.new(key, digestmod="sha256")
    for part in parts:
        digest.update(part)
    return digest.digest()
