"""The recall task: facts hidden in a long text, asked for after it, as turns of a chat or plainly.

A fact binds one word to another anew in every text, so that nothing but the text can answer.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from shared.kimi_linear.chat_template import ChatMessage, ChatTemplate
from shared.kimi_linear.tokenizer.interface import Tokenizer

_KEYS: Final = (
    "river mountain city house field king priest woman child servant horse ship sword gate altar "
    "camp tree court school door wall land island coast market church bank mouth hand heart eye "
    "foot head body brother father mother wife captain judge writer author friend daughter animal "
    "machine road bed"
)
_VALUES: Final = (
    "gold silver iron stone glass wood water fire wine oil bread salt milk meat fruit corn seed "
    "cloud wind sun star night morning red blue black white yellow green three four five seven ten "
    "twenty hundred thousand paper book fish bone blood flesh metal rock earth light leaves"
)
KEYS: Final = tuple(_KEYS.split())
VALUES: Final = tuple(_VALUES.split())
"""Words that the tokenizer has as one token each, where a space is before them."""

UNSCORED: Final = 0.0
"""Weight of a token that nothing before it can tell."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What a text says once and a question asks for."""

    key: str
    value: str
    place: float
    """Where in the text it is said, from 0 to 1."""

    @property
    def question(self) -> str:
        """Asks for the value."""
        return f"What is the sign of the {self.key}?"

    @property
    def statement(self) -> str:
        """Says it in the text, and answers the question."""
        return f"The sign of the {self.key} is {self.value}."


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that ends where the answer is to be written."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(slots=True)
class WeightedTokens:
    """Token ids, and what each counts in the loss when it is predicted.

    A weight below 0 is of a token that is to be unlikely.
    """

    ids: list[int]
    weights: list[float]

    @classmethod
    def none(cls) -> Self:
        """The beginning."""
        return cls([], [])

    def add(self, ids: Iterable[int], weight: float = 1.0) -> None:
        """Append tokens of one weight."""
        before = len(self.ids)
        self.ids.extend(ids)
        self.weights.extend([weight] * (len(self.ids) - before))

    def extend(self, other: "WeightedTokens") -> None:
        """Append others."""
        self.ids += other.ids
        self.weights += other.weights


def draw_facts(random_source: random.Random, count: int) -> list[Fact]:
    """Draw facts with different keys, in the order of their places."""
    keys = random_source.sample(KEYS, count)
    places = sorted(random_source.random() for _ in keys)
    return [
        Fact(key, random_source.choice(VALUES), place)
        for key, place in zip(keys, places, strict=True)
    ]


class RecallTexts:
    """Writes recall texts of an exact length in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate.of(tokenizer)
        generation = self._template.render([_user("")], add_generation_prompt=True)
        closed = self._template.render([_user("")], add_generation_prompt=False)
        self._opening = generation[: len(closed) - 1]
        """Up to where the user's text begins."""
        self._answer_opening = (self._template.end_id, *generation[len(closed) :])
        """From the end of a question to where the answer begins."""
        user_turn = closed[_last_index(closed, self._template.opening_ids["user"]) : -1]
        self._next_question = (self._template.end_id, *user_turn)
        """From the end of an answer to where the next question begins."""

    def chat(
        self,
        facts: Sequence[Fact],
        asked: Sequence[Fact],
        filler: Sequence[int],
        length: int,
        answer_weight: float,
        key_weight: float = 1.0,
    ) -> WeightedTokens:
        """A chat: the text with its facts, and questions with their answers.

        Args:
            facts: in the order of their places.
            asked: the facts that are asked for.
            filler: tokens of any text, at least `length`.
            length: of all, in tokens.
            answer_weight: of the words that answer; other tokens have 1, or `UNSCORED`.
            key_weight: of the words in answers that repeat the questions'.

        Raises:
            ValueError: the facts and questions leave no room for a text.
        """
        tail = WeightedTokens.none()
        for n, fact in enumerate(asked):
            tail.add(self._next_question if n else self._tokenizer.encode("\n"))
            tail.extend(self._bound(fact.question, fact))
            tail.add(self._answer_opening)
            tail.extend(
                self._bound(fact.statement, fact, of_key=key_weight, of_value=answer_weight)
            )
        tail.add((self._template.end_id,))
        return self._fill(self._opening, facts, filler, tail, length)

    def plain(
        self,
        facts: Sequence[Fact],
        asked: Sequence[Fact],
        filler: Sequence[int],
        length: int,
        answer_weight: float,
    ) -> WeightedTokens:
        """The text with its facts, and after it the facts that are `asked`, said once more.

        Of the facts only the words that answer are scored, so that they do not come up unasked.
        """
        tail = WeightedTokens.none()
        for fact in asked:
            tail.add(self._tokenizer.encode("\n"), UNSCORED)
            tail.extend(self._bound(fact.statement, fact, of_value=answer_weight, of_rest=UNSCORED))
        return self._fill((), facts, filler, tail, length)

    def drill(
        self, random_source: random.Random, count: int, length: int, answer_weight: float
    ) -> WeightedTokens:
        """Facts without a text: some said, then said again in another order, and so on."""
        tokens = WeightedTokens.none()
        while len(tokens.ids) < length:
            facts = draw_facts(random_source, count)
            for fact in facts:
                tokens.extend(self._said(fact))
            for fact in random_source.sample(facts, count):
                tokens.extend(self._bound(fact.statement, fact, of_value=answer_weight))
                tokens.add(self._tokenizer.encode("\n"))
        return WeightedTokens(tokens.ids[:length], tokens.weights[:length])

    def chat_question(
        self, facts: Sequence[Fact], asked: Fact, filler: Sequence[int], length: int
    ) -> Question:
        """A chat of `length` tokens that ends where the answer is to be written."""
        tail = WeightedTokens.none()
        tail.add(self._tokenizer.encode("\n" + asked.question))
        tail.add(self._answer_opening)
        prompt = self._fill(self._opening, facts, filler, tail, length).ids
        answer = (*self._tokenizer.encode(asked.statement), self._template.end_id)
        return Question(tuple(prompt), answer)

    def plain_question(
        self, facts: Sequence[Fact], asked: Fact, filler: Sequence[int], length: int
    ) -> Question:
        """A text of `length` tokens that ends where it is about to say a fact once more."""
        tail = WeightedTokens.none()
        before, value, after = asked.statement.rpartition(f" {asked.value}")
        tail.add(self._tokenizer.encode("\n"))
        tail.add(self._tokenizer.encode(before))
        prompt = self._fill((), facts, filler, tail, length).ids
        answer = (*self._tokenizer.encode(value), *self._tokenizer.encode(after))
        return Question(tuple(prompt), answer)

    def _bound(
        self,
        text: str,
        fact: Fact,
        *,
        of_key: float = UNSCORED,
        of_value: float = UNSCORED,
        of_rest: float = 1.0,
    ) -> WeightedTokens:
        """A sentence about a fact, with weights of the two words that it binds and of the rest."""
        tokens = WeightedTokens.none()
        before, _, after = text.partition(f" {fact.key}")
        tokens.add(self._tokenizer.encode(before), of_rest)
        tokens.add(self._tokenizer.encode(f" {fact.key}"), of_key)
        middle, value, end = after.partition(f" {fact.value}")
        tokens.add(self._tokenizer.encode(middle), of_rest)
        tokens.add(self._tokenizer.encode(value), of_value)
        tokens.add(self._tokenizer.encode(end), of_rest)
        return tokens

    def _fill(
        self,
        opening: Sequence[int],
        facts: Sequence[Fact],
        filler: Sequence[int],
        tail: WeightedTokens,
        length: int,
    ) -> WeightedTokens:
        """Put a text of filler and facts before the tail, so that there are `length` tokens."""
        said = [self._said(fact) for fact in facts]
        statements = sum(len(statement.ids) for statement in said)
        room = length - len(opening) - len(tail.ids) - statements
        if room < 0:
            raise ValueError(f"{len(facts)} facts and their questions take more than {length}")
        tokens = WeightedTokens.none()
        tokens.add(opening)
        used = 0
        for fact, statement in zip(facts, said, strict=True):
            cut = int(fact.place * room)
            tokens.add(filler[used:cut])
            tokens.extend(statement)
            used = cut
        tokens.add(filler[used:room])
        tokens.extend(tail)
        return tokens

    def _said(self, fact: Fact) -> WeightedTokens:
        """A fact where a text says it first: scored, it would come up in any text."""
        tokens = WeightedTokens.none()
        tokens.add(self._tokenizer.encode("\n"), UNSCORED)
        tokens.extend(self._bound(fact.statement, fact, of_rest=UNSCORED))
        tokens.add(self._tokenizer.encode("\n"), UNSCORED)
        return tokens


def _user(text: str) -> ChatMessage:
    return ChatMessage("user", text)


def _last_index(ids: Sequence[int], wanted: int) -> int:
    return len(ids) - 1 - ids[::-1].index(wanted)
