"""The training data of a step: a function of the recipe and the step, so that a run can resume."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.kimi_linear.tokenizer.interface import Tokenizer
from training.corpus import Document
from training.escapes import with_loops
from training.own_loops import PROMPT, own_loops
from training.recall import RecallTexts, WeightedTokens, draw_facts
from training.recipe import Recipe
from training.tokenizer import EOS

Tokens = NDArray[np.int32]

GOLDEN_RATIO: Final = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, cover the unit interval as evenly as numbers in a row can."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """R sequences of the same length.

    Attributes:
        inputs: `[R, T]`, int64.
        targets: `[R, T]`, the token after each.
        weights: `[R, T]`, what the prediction of each target counts; below 0, what it counts that
            the target is not predicted.
        is_answer: `[R, T]`, whether the target answers a question.
        is_recall: `[R]`.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    is_answer: Tensor
    is_recall: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, in the order above."""
        return self.inputs, self.targets, self.weights, self.is_answer, self.is_recall

    @property
    def is_text(self) -> Tensor:
        """`[R, T]`, whether the target is scored as text."""
        return (self.weights == 1) & ~self.is_recall.unsqueeze(-1)

    def shards(self, count: int) -> "list[TrainingBatch]":
        """Divide the sequences among `count` batches."""
        parts = (x.chunk(count) for x in self.tensors)
        return [TrainingBatch(*tensors) for tensors in zip(*parts, strict=True)]


def tokenized(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[str, Tokens]:
    """The documents of each work one after the other, each with an end of text behind it."""
    end = tokenizer.special_tokens[EOS]
    works: dict[str, list[int]] = {}
    for document in documents:
        works.setdefault(document.source, []).extend((*tokenizer.encode(document.text), end))
    return {source: np.array(ids, dtype=np.int32) for source, ids in works.items()}


class Batches:
    """Makes the batches of a recipe."""

    def __init__(self, recipe: Recipe, works: Mapping[str, Tokens], tokenizer: Tokenizer) -> None:
        self._recipe = recipe
        self._works = works
        self._recall = RecallTexts(tokenizer)

    def batch(self, step: int) -> TrainingBatch:
        """The data of a step."""
        phase = self._recipe.phase(step)
        rows = self._recipe.step_tokens // phase.length
        first = step * (self._recipe.step_tokens // self._recipe.phases[0].length)
        return self._stack([self._sequence(first + row, step) for row in range(rows)])

    def own_texts(self, step: int, parameters: Mapping[str, Tensor]) -> TrainingBatch:
        """What the model as it is at a step makes of prompts of that step."""
        count, weight = self._recipe.own_texts, self._recipe.own_loop_weight
        prompts = [self._prompt(step * count + n, f"own {step} {n}") for n in range(count)]
        texts = own_loops(parameters, self._recipe.config, prompts, weight)
        return self._stack([(text, False) for text in texts])

    def _prompt(self, number: int, seed: str) -> list[int]:
        source = random.Random(seed)
        return self._text(number, source, source.randint(*PROMPT))

    def _sequence(self, number: int, step: int) -> tuple[WeightedTokens, bool]:
        phase = self._recipe.phase(step)
        source = random.Random(f"{self._recipe.seed} {number}")
        length = phase.length + 1
        text = self._text(number, source, length)
        if number % self._recipe.recall_every:
            if phase.loops_every and source.randrange(phase.loops_every) == 0:
                weights = phase.escape_weight, phase.loop_weight
                return with_loops(source, text, length, *weights), False
            return WeightedTokens(text, [1.0] * length), False
        if phase.drills:
            return self._recall.drill(source, phase.facts, length, phase.answer_weight), True
        facts = draw_facts(source, phase.facts)
        asked = source.sample(facts * phase.times_asked, len(facts) * phase.times_asked)
        weight = phase.answer_weight
        if source.random() < phase.chat_part:
            some = asked[: phase.asked_in_chat]
            return self._recall.chat(facts, some, text, length, weight, phase.key_weight), True
        return self._recall.plain(facts, asked, text, length, weight), True

    def _text(self, number: int, source: random.Random, length: int) -> list[int]:
        """A window of one work; windows of successive numbers cover the works evenly."""
        shares = self._recipe.shares
        work = self._works[source.choices(list(shares), list(shares.values()))[0]]
        start = int(number * GOLDEN_RATIO % 1 * (len(work) - length))
        return [int(token) for token in work[start : start + length]]

    def _stack(self, sequences: Sequence[tuple[WeightedTokens, bool]]) -> TrainingBatch:
        ids = torch.tensor([tokens.ids for tokens, _ in sequences])
        weights = torch.tensor([tokens.weights for tokens, _ in sequences])
        is_recall = torch.tensor([is_recall for _, is_recall in sequences])
        return TrainingBatch(
            inputs=ids[:, :-1],
            targets=ids[:, 1:],
            weights=weights[:, 1:],
            is_answer=(weights[:, 1:] > 1) & is_recall.unsqueeze(-1),
            is_recall=is_recall,
        )
