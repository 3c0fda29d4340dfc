"""What a model knows: bits per byte of held-out text, recall over distance, how it writes.

    python -m training prepare DIRECTORY
    python -m benchmarks.quality DIRECTORY [--model MODEL] [--json FILE]

Both scores are functions of an engine and of a way to move a state in the middle of the work, so
that what a hand-over, a codec or a cache does to quality is measured with them too.
"""

import argparse
import json
import lzma
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, get_args

import torch
from torch.nn import functional

import models
from benchmarks.byte_model import ByteModel
from benchmarks.state_moves import CODECS, HANDED_OVER, Moves, ThroughSegments, by_export
from shared.errors import CheckpointError
from shared.kernels.dtypes import WeightDTypeChoice
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from training.corpus import HELD_OUT_FILE, TRAIN_FILE, Document, read_documents
from training.recall import Fact, Question, RecallTexts, draw_facts
from training.tokenizer import EOS

RECALL_LENGTHS: Final = (256, 512, 1024, 2048, 4096, 8192)
RECALL_TOKENS: Final = 102_400
"""Of the prompts of one length: 100 questions at 1,024 tokens, fewer beyond."""
FACTS: Final = 8
"""Hidden in each text; one of them is asked for."""
ANSWER_TOKENS: Final = 24
MOVED_RECALL_TOKENS: Final = 1024
_EVERY_DOCUMENT: Final = 8
"""Of the held-out documents, for what is measured many times."""
CONTINUED_TOKENS: Final = 100

PROMPTS: Final = (
    "In the beginning",
    "And the LORD said unto Moses,",
    "Blessed is the man that",
    "And it came to pass in those days,",
    "The words of the prophet",
    "river: a large",
    "music: ",
    "courage: the quality of",
    "hacker n.\n",
    "bug n.\nAn unwanted",
)

KEPT: Final = "kept"
"""The name of no move at all: what every move is held against."""
LOSSLESS: Final[Moves] = {HANDED_OVER: by_export}


def _moved(engine: Engine, state: RequestState, moves: Moves) -> Iterator[tuple[str, RequestState]]:
    """A copy of the state by each move, and last the state itself."""
    for name, move in moves.items():
        with engine.new_state(state.capacity) as target:
            move(state, target)
            yield name, target
    yield KEPT, state


# --- bits per byte ---------------------------------------------------------------------------


def bits_of(
    engine: Engine, tokenizer: Tokenizer, documents: Sequence[Document], moves: Moves
) -> dict[str, dict[str, float]]:
    """Bits that documents take, each by itself, from one end of text to the next.

    Args:
        engine: with room for two states of the longest document.
        tokenizer: of its model.
        documents: to predict.
        moves: applied to the state in the middle of each document.

    Returns:
        Bits of each work, by the name of the move; `KEPT` is among them.
    """
    works = dict.fromkeys(document.source for document in documents)
    bits = {name: dict.fromkeys(works, 0.0) for name in (KEPT, *moves)}
    end = tokenizer.special_tokens[EOS]
    for document in documents:
        tokens = [end, *tokenizer.encode(document.text), end]
        for name, of_document in _bits(engine, tokens, moves):
            bits[name][document.source] += of_document
    return bits


def _bits(engine: Engine, tokens: Sequence[int], moves: Moves) -> Iterator[tuple[str, float]]:
    inputs, targets = tokens[:-1], torch.tensor(tokens[1:])
    middle = len(inputs) // 2
    with engine.new_state(len(inputs)) as state:
        first = engine.prefill_all_logits(inputs[:middle], state)
        for name, moved in _moved(engine, state, moves):
            logits = torch.cat((first, engine.prefill_all_logits(inputs[middle:], moved)))
            nats = functional.cross_entropy(logits, targets, reduction="sum")
            yield name, float(nats) / math.log(2)


def text_of(documents: Sequence[Document]) -> bytes:
    """Documents as one text, for what knows bytes only."""
    return b"".join(document.text.encode() + b"\n" for document in documents)


def xz_bits(text: bytes) -> int:
    """What `xz -9` makes of a text.

    The bits of a held-out text are those of the training text with it less those without it.
    """
    return 8 * len(lzma.compress(text, preset=9))


# --- recall ----------------------------------------------------------------------------------


def questions(
    tokenizer: Tokenizer, filler: Sequence[int], length: int, count: int, *, in_chat: bool
) -> Iterator[Question]:
    """Texts of `length` tokens with facts in random places; the same ones every time.

    Args:
        tokenizer: of the model.
        filler: tokens of a text, from which pieces stand between the facts.
        length: tokens of a prompt.
        count: of questions.
        in_chat: whether a user asks in a chat; else the text is to say a fact once more.
    """
    texts = RecallTexts(tokenizer)
    ask = texts.chat_question if in_chat else texts.plain_question
    source = random.Random(length)
    for _ in range(count):
        facts = draw_facts(source, FACTS)
        asked: Fact = source.choice(facts)
        start = source.randrange(max(1, len(filler) - length))
        yield ask(facts, asked, filler[start : start + length], length)


def recall(engine: Engine, asked: Sequence[Question], moves: Moves) -> dict[str, float]:
    """The part of the questions that greedy text answers, word for word.

    Args:
        engine: with room for two states of the longest question and its answer.
        asked: one after the other.
        moves: applied to the state after each prompt.

    Returns:
        The part, by the name of the move; `KEPT` is among them.
    """
    answered = dict.fromkeys((KEPT, *moves), 0)
    for question in asked:
        count = len(question.answer)
        with engine.new_state(len(question.prompt) + count) as state:
            logits = engine.prefill([question.prompt], [state])[0]
            for name, moved in _moved(engine, state, moves):
                found = tuple(_greedy_after(engine, logits, moved, count))
                answered[name] += found == question.answer
    return {name: count / len(asked) for name, count in answered.items()}


def greedy(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest `count` tokens after a prompt, one after the other."""
    with engine.new_state(len(prompt) + count) as state:
        return _greedy_after(engine, engine.prefill([prompt], [state])[0], state, count)


def _greedy_after(
    engine: Engine, logits: torch.Tensor, state: RequestState, count: int
) -> list[int]:
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(engine.decode(tokens[-1:], [state])[0].argmax()))
    return tokens


# --- writing ---------------------------------------------------------------------------------


def loop_in(tokens: Sequence[int], least: int = 12, times: int = 3) -> tuple[int, ...] | None:
    """A piece of text that comes `times` times in a row, over at least `least` tokens together."""
    for period in range(1, len(tokens) // times + 1):
        repeats = max(times, math.ceil(least / period))
        run = 0
        for place in range(period, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            if run >= period * (repeats - 1):
                return tuple(tokens[place + 1 - period : place + 1])
    return None


# --- the report ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Bits per byte of one work, or of all."""

    work: str
    held_out_bytes: int
    model: float
    handed_over: float
    """With the state moved in the middle of each document."""
    xz: float
    five_gram: float


@dataclass(frozen=True, slots=True)
class RecallQuality:
    """Part of the questions answered at one length."""

    tokens: int
    questions: int
    in_chat: float
    """Questions of a user, answered word for word."""
    handed_over: float
    """The same, with the state moved after the prompt."""
    said_again: float
    """Facts that a text without a question is to say once more."""


@dataclass(frozen=True, slots=True)
class MoveQuality:
    """What one way to move a state costs: against `KEPT`, which moves nothing."""

    name: str
    state_bytes: float
    """Of a state in the middle of a document, as it moves; 0 for none."""
    bits_per_byte: float
    """With the state moved in the middle of each document."""
    recall: float
    """Questions of a chat at `MOVED_RECALL_TOKENS`, with the state moved after the prompt."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model writes after a prompt, always the likeliest token."""

    prompt: str
    text: str
    loop: str | None


@dataclass(frozen=True, slots=True)
class Quality:
    """All of it."""

    text: tuple[TextQuality, ...]
    recall: tuple[RecallQuality, ...]
    moves: tuple[MoveQuality, ...]
    samples: tuple[Sample, ...]

    def lines(self) -> Iterator[str]:
        """Tables in Markdown."""
        yield "| bits per byte | bytes | model | handed over | xz -9 | 5-gram |"
        yield "|---|---|---|---|---|---|"
        for row in self.text:
            figures = (row.model, row.handed_over, row.xz, row.five_gram)
            shown = " | ".join(f"{figure:.3f}" for figure in figures)
            yield f"| {row.work} | {row.held_out_bytes:,} | {shown} |"
        yield ""
        yield "| recall at tokens | questions | in a chat | handed over | said again |"
        yield "|---|---|---|---|---|"
        for point in self.recall:
            parts = (point.in_chat, point.handed_over, point.said_again)
            shown = " | ".join(f"{part:.0%}" for part in parts)
            yield f"| {point.tokens:,} | {point.questions} | {shown} |"
        yield ""
        yield "| state moved | bytes | bits per byte | recall |"
        yield "|---|---|---|---|"
        for way in self.moves:
            bits = f"{way.bits_per_byte:.4f}"
            yield f"| {way.name} | {way.state_bytes:,.0f} | {bits} | {way.recall:.0%} |"
        for sample in self.samples:
            yield f"\n> {sample.prompt}\n{sample.text}"
            if sample.loop is not None:
                yield f"(it repeats {sample.loop!r})"


def text_quality(
    engine: Engine,
    tokenizer: Tokenizer,
    train: Sequence[Document],
    held_out: Sequence[Document],
) -> tuple[TextQuality, ...]:
    """The table of bits per byte: each work, then all of them."""
    bits = bits_of(engine, tokenizer, held_out, LOSSLESS)
    trained = text_of(train)
    counted, trained_bits = ByteModel(trained), xz_bits(trained)
    rows = []
    for work in (*bits[KEPT], "all"):
        chosen = [document for document in held_out if work in (document.source, "all")]
        text = text_of(chosen)
        rows.append(
            TextQuality(
                work=work,
                held_out_bytes=len(text),
                model=_total(bits[KEPT], work) / len(text),
                handed_over=_total(bits[HANDED_OVER], work) / len(text),
                xz=(xz_bits(trained + text) - trained_bits) / len(text),
                five_gram=counted.bits_per_byte(text),
            )
        )
    return tuple(rows)


def _total(bits: Mapping[str, float], work: str) -> float:
    return sum(bits.values()) if work == "all" else bits[work]


def recall_quality(
    engine: Engine, tokenizer: Tokenizer, held_out: Sequence[Document], most: int
) -> tuple[RecallQuality, ...]:
    """The table of recall, of at most so many questions, with held-out text between the facts."""
    filler = tokenizer.encode("\n".join(document.text for document in held_out))
    rows = []
    for length in RECALL_LENGTHS:
        count = min(most, RECALL_TOKENS // length)
        chat = list(questions(tokenizer, filler, length, count, in_chat=True))
        plain = list(questions(tokenizer, filler, length, count, in_chat=False))
        in_chat = recall(engine, chat, LOSSLESS)
        said_again = recall(engine, plain, {})
        rows.append(
            RecallQuality(length, count, in_chat[KEPT], in_chat[HANDED_OVER], said_again[KEPT])
        )
    return tuple(rows)


def move_quality(
    engine: Engine, tokenizer: Tokenizer, held_out: Sequence[Document], most: int
) -> tuple[MoveQuality, ...]:
    """The table of ways to move a state, on some of the documents and questions."""
    coded = {name: ThroughSegments(engine, *codecs) for name, codecs in CODECS.items()}
    moves: Moves = {HANDED_OVER: by_export, **coded}
    documents = held_out[::_EVERY_DOCUMENT]
    bits = bits_of(engine, tokenizer, documents, moves)
    moved = {name: through.moved_bytes / len(documents) for name, through in coded.items()}
    filler = tokenizer.encode("\n".join(document.text for document in held_out))
    asked = list(questions(tokenizer, filler, MOVED_RECALL_TOKENS, most, in_chat=True))
    answered = recall(engine, asked, moves)
    size = len(text_of(documents))
    return tuple(
        MoveQuality(name, moved.get(name, 0.0), _total(bits[name], "all") / size, answered[name])
        for name in (KEPT, *moves)
    )


def samples(engine: Engine, tokenizer: Tokenizer) -> tuple[Sample, ...]:
    """What is written after each of the fixed prompts."""
    written = []
    for prompt in PROMPTS:
        tokens = greedy(engine, tokenizer.encode(prompt), CONTINUED_TOKENS)
        loop = loop_in(tokens)
        written.append(
            Sample(
                prompt, tokenizer.decode(tokens), None if loop is None else tokenizer.decode(loop)
            )
        )
    return tuple(written)


def main() -> None:
    """Measure a model and print the tables."""
    given = _parser().parse_args()
    longest = max(RECALL_LENGTHS) + ANSWER_TOKENS
    engine = Engine.load(
        given.model, given.dtype, threads=given.threads, room=Room(slots=4, tokens=4 * longest)
    )
    tokenizer = load_tokenizer(given.model, engine.config.vocab_size)
    if tokenizer is None:
        raise CheckpointError(f"{given.model} has no tokenizer")
    train = read_documents(given.directory / TRAIN_FILE)
    held_out = read_documents(given.directory / HELD_OUT_FILE)
    quality = Quality(
        text=text_quality(engine, tokenizer, train, held_out),
        recall=recall_quality(engine, tokenizer, held_out, given.questions),
        moves=move_quality(engine, tokenizer, held_out, given.questions),
        samples=samples(engine, tokenizer),
    )
    print("\n".join(quality.lines()))
    if given.json:
        given.json.write_text(json.dumps(asdict(quality), indent=2, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="of `python -m training prepare`")
    parser.add_argument("--model", type=Path, default=models.TINY)
    parser.add_argument("--dtype", choices=get_args(WeightDTypeChoice), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=100, help="at most, at each length")
    parser.add_argument("--json", type=Path, help="file for all figures and samples")
    return parser


if __name__ == "__main__":
    main()
