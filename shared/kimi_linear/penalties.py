"""What changes logits before a token is chosen: a request's biases, and its own history.

Order and meaning are vLLM's: the bias, then the repetition penalty on every token of prompt and
text, then the frequency and the presence penalty on the tokens of the text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from shared.messages import Sampling

_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """The tokens that penalties look at. It grows by copying: who holds one sees it unchanged."""

    seen: NDArray[np.int64]
    """Ids of the tokens in prompt or text, once each, ascending."""
    counts: NDArray[np.int64]
    """How often each of `seen` is in the text."""

    @classmethod
    def of(cls, prompt: Sequence[int], text: Sequence[int]) -> Self:
        """Look through a prompt and the text that follows it."""
        said = np.array(text, dtype=np.int64)
        seen = np.union1d(np.array(prompt, dtype=np.int64), said)
        return cls(seen, np.bincount(np.searchsorted(seen, said), minlength=len(seen)))

    def followed_by(self, token_id: int) -> "History":
        """The history with one more token of text."""
        place = int(np.searchsorted(self.seen, token_id))
        if token_id in self.seen[place : place + 1]:
            seen, counts = self.seen, self.counts.copy()
        else:
            seen, counts = np.insert(self.seen, place, token_id), np.insert(self.counts, place, 0)
        counts[place] += 1
        return History(seen, counts)


def reads_history(sampling: Sampling) -> bool:
    """Whether the tokens so far matter to the next one's logits."""
    return (
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0
    )


def apply_bias(logits: NDArray[np.float32], bias: Iterable[tuple[int, float]]) -> None:
    """Add to the logits of some tokens, in place.

    Args:
        logits: `[vocabulary]`.
        bias: token ids, each once, and what is added.
    """
    token_ids, amounts = zip(*bias, strict=True)
    places = np.array(token_ids)
    _replace(logits, places, logits[places] + np.array(amounts))


def apply_penalties(logits: NDArray[np.float32], sampling: Sampling, history: History) -> None:
    """Make the tokens of a history less likely (or more, by the penalties' signs), in place.

    A logit that was seen is divided by the repetition penalty where it is positive, and multiplied
    by it elsewhere (Keskar et al., CTRL, 2019, section 4.1; the second case is usage since). One
    that was said n times then loses n times the frequency penalty, and once the presence penalty.

    Args:
        logits: `[vocabulary]`.
        sampling: the penalties.
        history: of tokens below `vocabulary`.
    """
    seen = logits[history.seen].astype(np.float64)
    factor = sampling.repetition_penalty
    with np.errstate(over="ignore"):
        repeated = np.where(seen > 0, seen / factor, seen * factor)
    often = sampling.frequency_penalty * history.counts
    once = sampling.presence_penalty * (history.counts > 0)
    _replace(logits, history.seen, repeated - often - once)


def _replace(
    logits: NDArray[np.float32], places: NDArray[np.int64], values: NDArray[np.float64]
) -> None:
    """Store values so that a possible token stays possible, and an impossible one impossible."""
    possible = np.isfinite(logits[places])
    logits[places] = np.where(possible, values.clip(-_LARGEST, _LARGEST), -np.inf)
