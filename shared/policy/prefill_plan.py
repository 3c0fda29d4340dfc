"""Where a prefill cuts its prompt, and where it keeps a KDA snapshot for the prompts to come.

A recurrent state can be reused at exactly the length at which it was kept. Two lengths are worth
it: the last whole block of a prompt, for the next turn of the same conversation, and the point
where a prompt leaves another that was seen before, for further prompts with the same beginning
(Marconi, arXiv 2411.19379).
"""

from dataclasses import dataclass

from shared.state_blob.prefix_hash import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of a prompt, computed together."""

    start: int
    stop: int
    keeps_snapshot: bool
    """Whether the KDA state at `stop` is kept in the prefix cache."""


def most_reusable_tokens(length: int) -> int:
    """Tokens of a prompt that a cached prefix may cover: whole blocks, and never all of them.

    The last token has to be computed in any case, for its logits.
    """
    return (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def plan_chunks(
    length: int, cached: int, chunk_tokens: int, known: int | None
) -> tuple[Chunk, ...]:
    """Cut the tokens [cached, length) of a prompt into chunks.

    Args:
        length: of the prompt, at least 1.
        cached: tokens whose state is there: whole blocks, fewer than `length`.
        chunk_tokens: most tokens of a chunk, whole blocks.
        known: tokens of the longest prefix, in whole blocks, that was seen in another prompt;
            None keeps no snapshots.

    Returns:
        Neighbouring chunks from `cached` to `length`. Those before the last whole block of the
        prompt are whole blocks.
    """
    kept = set[int]()
    if known is not None:
        last_block = most_reusable_tokens(length)
        kept = {point for point in (min(known, last_block), last_block) if point > cached}
    chunks: list[Chunk] = []
    start = cached
    while start < length:
        stop = min(start + chunk_tokens, *(point for point in kept if point > start), length)
        chunks.append(Chunk(start, stop, keeps_snapshot=stop in kept))
        start = stop
    return tuple(chunks)
