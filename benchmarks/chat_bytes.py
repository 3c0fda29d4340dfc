"""What a chat of some turns sends over the link, with and without the prefix cache."""

from dataclasses import dataclass

from benchmarks.two_regions import TwoRegions, tokens_of

TURNS = 10
QUESTION_TOKENS = 200
ANSWER_TOKENS = 100


@dataclass(frozen=True, slots=True)
class ChatBytes:
    """A whole chat."""

    to_prefill: int
    """Bytes to the prefill region: jobs, requests, and what answers added to states."""
    from_prefill: int
    """Bytes from the prefill region: states."""
    cached_tokens: tuple[int, ...]
    """Of each turn's prompt."""
    prompt_tokens: tuple[int, ...]
    text: tuple[int, ...]
    """Everything that was said."""


async def measure_chat(regions: TwoRegions, vocabulary: int, turns: int = TURNS) -> ChatBytes:
    """Hold a chat of some turns; its questions are the same every time."""
    before = await regions.carried_bytes()
    said: tuple[int, ...] = ()
    cached: list[int] = []
    prompts: list[int] = []
    for turn in range(turns):
        prompt = (*said, *tokens_of(QUESTION_TOKENS, turn + 1, vocabulary))
        answer = await regions.complete(prompt, ANSWER_TOKENS)
        cached.append(answer.cached_tokens)
        prompts.append(len(prompt))
        said = (*prompt, *answer.token_ids)
        await regions.settled()
    after = await regions.carried_bytes()
    return ChatBytes(
        to_prefill=after[0] - before[0],
        from_prefill=after[1] - before[1],
        cached_tokens=tuple(cached),
        prompt_tokens=tuple(prompts),
        text=said,
    )
