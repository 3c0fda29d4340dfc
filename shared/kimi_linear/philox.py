"""The random numbers of sampling: Philox 4x64-10, a generator whose state is a key and a counter.

Number n of a sequence needs none of those before it, so a request that another worker continues
draws what it would have drawn (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
"""

from typing import Final

_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_INCREMENTS: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD: Final = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to a seed and a position, with 53 random bits.

    It is the first number of numpy's `Philox(key=(seed, position))`. Python's integers make the
    128-bit products plain: up to batches of about 32 they are faster than arrays of 64-bit words,
    for one request thirty times.

    Args:
        seed: taken modulo 2**64.
        position: in [0, 2**64).
    """
    key = seed & _WORD, position
    counter = 1, 0, 0, 0
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * counter[0], _MULTIPLIERS[1] * counter[2]
        counter = (
            second >> 64 ^ counter[1] ^ key[0],
            second & _WORD,
            first >> 64 ^ counter[3] ^ key[1],
            first & _WORD,
        )
        key = (key[0] + _KEY_INCREMENTS[0]) & _WORD, (key[1] + _KEY_INCREMENTS[1]) & _WORD
    return (counter[0] >> 11) * 2.0**-53
