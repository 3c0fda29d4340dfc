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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, get_args

import torch
from torch.nn import functional

import models
from benchmarks.byte_model import ByteModel
from shared.errors import CheckpointError
from shared.kernels.dtypes import WeightDTypeChoice
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from training.corpus import HELD_OUT_FILE, TRAIN_FILE, Document, read_documents
from training.recall import Fact, RecallTexts, draw_facts
from training.tokenizer import EOS

RECALL_LENGTHS: Final = (256, 512, 1024, 2048, 4096, 8192)
FACTS: Final = 8
"""Hidden in each text; one of them is asked for."""
ANSWER_TOKENS: Final = 24
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

Move = Callable[[RequestState, RequestState], None]
"""Fills an empty state with what another state of the same engine holds."""


def by_export(source: RequestState, target: RequestState) -> None:
    """The move of a hand-over, without a codec: nothing is lost."""
    target.import_latents(source.export_latents(0, source.length))
    target.import_snapshot(source.snapshot())


# --- bits per byte ---------------------------------------------------------------------------


def bits_of(
    engine: Engine, tokenizer: Tokenizer, documents: Sequence[Document], move: Move | None = None
) -> dict[str, float]:
    """Bits that each work's documents take, each by itself, from one end of text to the next.

    Args:
        engine: with room for two states of the longest document.
        tokenizer: of its model.
        documents: to predict.
        move: applied to the state in the middle of each document.
    """
    bits = {document.source: 0.0 for document in documents}
    end = tokenizer.special_tokens[EOS]
    for document in documents:
        bits[document.source] += _bits(engine, [end, *tokenizer.encode(document.text), end], move)
    return bits


def _bits(engine: Engine, tokens: Sequence[int], move: Move | None) -> float:
    inputs, targets = tokens[:-1], torch.tensor(tokens[1:])
    middle = len(inputs) // 2 if move else 0
    with ExitStack() as held:
        state = held.enter_context(engine.new_state(len(inputs)))
        logits = []
        if move and middle:
            logits.append(engine.prefill_all_logits(inputs[:middle], state))
            state = _moved(engine, state, move, held)
        logits.append(engine.prefill_all_logits(inputs[middle:], state))
        nats = functional.cross_entropy(torch.cat(logits), targets, reduction="sum")
    return float(nats) / math.log(2)


def _moved(engine: Engine, state: RequestState, move: Move, held: ExitStack) -> RequestState:
    target = held.enter_context(engine.new_state(state.capacity))
    move(state, target)
    return target


def text_of(documents: Sequence[Document]) -> bytes:
    """Documents as one text, for what knows bytes only."""
    return b"".join(document.text.encode() + b"\n" for document in documents)


def xz_bits(train: bytes, held_out: bytes) -> int:
    """What `xz -9` adds to the training text's size when the held-out text follows it."""
    return 8 * (
        len(lzma.compress(train + held_out, preset=9)) - len(lzma.compress(train, preset=9))
    )


# --- recall ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that ends where the answer is to be written."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """What has to be written, to the end of the turn."""


def questions(
    tokenizer: Tokenizer, filler: Sequence[int], length: int, count: int
) -> Iterator[Question]:
    """Texts of `length` tokens with facts in random places; the same ones every time."""
    texts = RecallTexts(tokenizer)
    source = random.Random(length)
    for _ in range(count):
        facts = draw_facts(source, FACTS)
        asked: Fact = source.choice(facts)
        start = source.randrange(max(1, len(filler) - length))
        prompt = texts.prompt(facts, asked, filler[start : start + length], length)
        yield Question(tuple(prompt), tuple(texts.answer(asked)))


def recall(engine: Engine, asked: Sequence[Question], move: Move | None = None) -> float:
    """The part of the questions that greedy text answers, word for word.

    Args:
        engine: with room for two states of the longest question.
        asked: one after the other.
        move: applied to the state after each prompt.
    """
    return sum(_is_answered(engine, question, move) for question in asked) / len(asked)


def _is_answered(engine: Engine, question: Question, move: Move | None) -> bool:
    found = greedy(engine, question.prompt, len(question.answer), move)
    return tuple(found) == question.answer


def greedy(
    engine: Engine, prompt: Sequence[int], count: int, move: Move | None = None
) -> list[int]:
    """The likeliest `count` tokens, one after the other; `move` is applied after the prompt."""
    with ExitStack() as held:
        state = held.enter_context(engine.new_state(len(prompt) + count))
        logits = engine.prefill([prompt], [state])[0]
        if move:
            state = _moved(engine, state, move, held)
        tokens: list[int] = []
        while True:
            tokens.append(int(logits.argmax()))
            if len(tokens) == count:
                return tokens
            logits = engine.decode(tokens[-1:], [state])[0]


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
    answered: float
    handed_over: float


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
        yield "| recall at tokens | questions | answered | handed over |"
        yield "|---|---|---|---|"
        for point in self.recall:
            shown = f"{point.answered:.1%} | {point.handed_over:.1%}"
            yield f"| {point.tokens:,} | {point.questions} | {shown} |"
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
    model = bits_of(engine, tokenizer, held_out)
    handed_over = bits_of(engine, tokenizer, held_out, by_export)
    trained = text_of(train)
    counted = ByteModel(trained)
    rows = []
    for work in (*model, "all"):
        chosen = [document for document in held_out if work in (document.source, "all")]
        text = text_of(chosen)
        rows.append(
            TextQuality(
                work=work,
                held_out_bytes=len(text),
                model=_total(model, work) / len(text),
                handed_over=_total(handed_over, work) / len(text),
                xz=xz_bits(trained, text) / len(text),
                five_gram=counted.bits_per_byte(text),
            )
        )
    return tuple(rows)


def _total(bits: Mapping[str, float], work: str) -> float:
    return sum(bits.values()) if work == "all" else bits[work]


def recall_quality(
    engine: Engine, tokenizer: Tokenizer, held_out: Sequence[Document], count: int
) -> tuple[RecallQuality, ...]:
    """The table of recall, with held-out text between the facts."""
    filler = tokenizer.encode("\n".join(document.text for document in held_out))
    rows = []
    for length in RECALL_LENGTHS:
        asked = list(questions(tokenizer, filler, length, count))
        rows.append(
            RecallQuality(length, count, recall(engine, asked), recall(engine, asked, by_export))
        )
    return tuple(rows)


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
    parser.add_argument("--questions", type=int, default=100, help="at each length")
    parser.add_argument("--json", type=Path, help="file for all figures and samples")
    return parser


if __name__ == "__main__":
    main()
