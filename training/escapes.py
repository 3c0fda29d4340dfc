"""Text that gets stuck and goes on: what teaches a small model to leave a loop.

A model that looks up what came before copies itself for ever once it has repeated itself. Here a
piece of a text comes several times in a row. From the third time on its tokens are to be unlikely
(unlikelihood training, arXiv 1908.04319), and what leaves the repetition counts more than other
text. The second time counts nothing: a text may say a thing twice.
"""

import random
from typing import Final

from training.recall import UNSCORED, WeightedTokens

PIECE: Final = (1, 32)
"""Least and most tokens that are repeated."""
REPEATS: Final = (2, 5)
"""How often they come again."""
BETWEEN: Final = (40, 120)
"""Tokens of the text before the next repetition."""


def with_loops(
    random_source: random.Random,
    text: list[int],
    length: int,
    escape_weight: float,
    loop_weight: float,
) -> WeightedTokens:
    """A text of `length` tokens with loops in it.

    Args:
        random_source: draws the loops.
        text: at least `length` tokens.
        length: of all.
        escape_weight: of the first token behind a repetition; other tokens of the text have 1.
        loop_weight: of the tokens that are to be unlikely, which have it with a minus sign.
    """
    tokens = WeightedTokens.none()
    start, weight = 0, 1.0
    while len(tokens.ids) < length:
        stop = start + random_source.randint(*BETWEEN)
        tokens.add(text[start : start + 1], weight)
        tokens.add(text[start + 1 : stop])
        piece = text[stop - random_source.randint(*PIECE) : stop]
        tokens.add(piece, UNSCORED)
        tokens.add(piece * (random_source.randint(*REPEATS) - 1), -loop_weight)
        start, weight = stop, escape_weight
    return WeightedTokens(tokens.ids[:length], tokens.weights[:length])
