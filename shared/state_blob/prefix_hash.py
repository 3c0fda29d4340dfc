"""Names for token prefixes: a hash chain over blocks of tokens; it knows no tensors.

The name of a prefix is a digest over the tokens of its last block and the name of all before it.
Whole blocks therefore have names that every longer prompt shares, fit for the keys of a prefix
cache.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

BLOCK_TOKENS: Final = 64
DIGEST_BYTES: Final = 16

_PACKED_BLOCK_BYTES: Final = 4 * BLOCK_TOKENS


def root(fingerprint: str, salt: bytes = b"") -> bytes:
    """Name the empty prefix of a model's prompts.

    Args:
        fingerprint: of the model's configuration and weights.
        salt: separates prefixes that must not be shared, such as those of different tenants.

    Returns:
        A digest of 16 bytes.
    """
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"prfaas root")
    digest.update(struct.pack("<Q", len(salt)))
    digest.update(salt)
    digest.update(fingerprint.encode())
    return digest.digest()


def extend(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name the prefix that one more block makes of the prefix called `parent`.

    Args:
        parent: the name of a prefix of whole blocks, 16 bytes.
        tokens: 1 to 64 token ids below 2**32; fewer than 64 only at the end of a prefix.

    Returns:
        A digest of 16 bytes.

    Raises:
        ValueError: `parent` or `tokens` are not as described.
    """
    _check_name(parent)
    if not 1 <= len(tokens) <= BLOCK_TOKENS:
        raise ValueError(f"a block holds 1 to {BLOCK_TOKENS} tokens, not {len(tokens)}")
    return _name_block(parent, _pack(tokens))


class PrefixHasher:
    """Names a prefix that grows; the name depends on its tokens, not on how they arrived.

    Args:
        root: the name to start from: that of the empty prefix, or of any prefix of whole blocks.

    Raises:
        ValueError: `root` is not 16 bytes long.
    """

    def __init__(self, root: bytes) -> None:
        _check_name(root)
        self._whole_blocks = root
        self._rest = b""

    def update(self, tokens: Sequence[int]) -> None:
        """Append tokens to the prefix.

        Raises:
            ValueError: a token id is not in [0, 2**32); the prefix is then as it was.
        """
        packed = self._rest + _pack(tokens)
        whole = len(packed) - len(packed) % _PACKED_BLOCK_BYTES
        for start in range(0, whole, _PACKED_BLOCK_BYTES):
            block = packed[start : start + _PACKED_BLOCK_BYTES]
            self._whole_blocks = _name_block(self._whole_blocks, block)
        self._rest = packed[whole:]

    def digest(self) -> bytes:
        """Return the name of the prefix so far, 16 bytes; more tokens may follow."""
        return _name_block(self._whole_blocks, self._rest) if self._rest else self._whole_blocks


def _check_name(name: bytes) -> None:
    if len(name) != DIGEST_BYTES:
        raise ValueError(f"a prefix has a name of {DIGEST_BYTES} bytes, not {len(name)}")


def _name_block(parent: bytes, packed: bytes) -> bytes:
    digest = blake2b(parent, digest_size=DIGEST_BYTES, person=b"prfaas block")
    digest.update(packed)
    return digest.digest()


def _pack(tokens: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"token ids are integers below 2**32: {error}") from None
