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


class PrefixNames:
    """Names of all prefixes of a sequence of tokens.

    Args:
        root: the name of the empty prefix.
        tokens: ids in [0, 2**32).

    Attributes:
        blocks: names of the prefixes of whole blocks, the shortest first.

    Raises:
        ValueError: `root` is not 16 bytes long, or a token is no such id.
    """

    def __init__(self, root: bytes, tokens: Sequence[int]) -> None:
        _check_name(root)
        self._root = root
        self._packed = _pack(tokens)
        names: list[bytes] = []
        name = root
        for stop in range(_PACKED_BLOCK_BYTES, len(self._packed) + 1, _PACKED_BLOCK_BYTES):
            name = _name_block(name, self._packed[stop - _PACKED_BLOCK_BYTES : stop])
            names.append(name)
        self.blocks = tuple(names)

    def at(self, length: int) -> bytes:
        """Name the first `length` tokens, 16 bytes.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= 4 * length <= len(self._packed):
            raise ValueError(f"no prefix of {length} tokens in {len(self._packed) // 4}")
        whole, rest = divmod(length, BLOCK_TOKENS)
        name = self.blocks[whole - 1] if whole else self._root
        if not rest:
            return name
        return _name_block(name, self._packed[4 * (length - rest) : 4 * length])


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
