"""Quality is scored by what the model says, and a lossless move changes none of it."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.quality import (
    ANSWER_TOKENS,
    KEPT,
    bits_of,
    greedy,
    loop_in,
    questions,
    recall,
    xz_bits,
)
from benchmarks.state_moves import CODECS, ThroughSegments, by_export
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.tokenizer.tiktoken_format import TiktokenTokenizer
from training.corpus import Document
from training.parameters import export_checkpoint, initial_parameters
from training.recipe import Recipe
from training.tokenizer import EOS


@pytest.fixture(scope="module")
def engine(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = tmp_path_factory.mktemp("model")
    export_checkpoint(directory, initial_parameters(recipe.config, seed=1), recipe.config)
    return Engine.load(directory, "float32", threads=1, room=Room(slots=4, tokens=8192))


def forget(source: RequestState, target: RequestState) -> None:
    """A move that loses what the recurrent states hold."""
    target.import_latents(0, source.export_latents(0, source.length))
    snapshot = source.snapshot()
    snapshot.recurrent.zero_()
    target.import_snapshot(snapshot)
    target.finish_import(source.length)


def test_bits_are_those_of_every_token_from_one_end_of_text_to_the_next(
    engine: Engine, tokenizer: TiktokenTokenizer, documents: list[Document]
) -> None:
    document = documents[0]
    end = tokenizer.special_tokens[EOS]
    tokens = [end, *tokenizer.encode(document.text), end]
    with engine.new_state(len(tokens)) as state:
        logits = engine.prefill_all_logits(tokens[:-1], state)
    nats = functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum")
    found = bits_of(engine, tokenizer, [document], {})
    assert found[KEPT]["bible"] == pytest.approx(float(nats) / math.log(2))


def test_a_hand_over_changes_no_bits_and_a_lossy_move_does(
    engine: Engine, tokenizer: TiktokenTokenizer, documents: list[Document]
) -> None:
    moves = {"exported": by_export, "forgotten": forget}
    bits = bits_of(engine, tokenizer, documents[:2], moves)
    assert bits["exported"] == bits[KEPT]
    assert bits["forgotten"]["bible"] != pytest.approx(bits[KEPT]["bible"], rel=1e-6)


def test_lossless_codecs_change_no_bits_and_lossy_ones_hardly_any(
    engine: Engine, tokenizer: TiktokenTokenizer, documents: list[Document]
) -> None:
    moves = {name: ThroughSegments(engine, *codecs) for name, codecs in CODECS.items()}
    bits = bits_of(engine, tokenizer, documents[:1], moves)
    kept = bits[KEPT]["bible"]
    assert bits["raw"]["bible"] == bits["zstd"]["bible"] == kept
    for lossy in ("bf16-state", "int8-latent"):
        assert bits[lossy]["bible"] != kept
        assert bits[lossy]["bible"] == pytest.approx(kept, rel=1e-2)
    sizes = [moves[name].moved_bytes for name in ("raw", "zstd", "bf16-state, int8-latent")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("in_chat", [False, True])
def test_questions_have_their_length_and_the_same_texts_every_time(
    tokenizer: TiktokenTokenizer, in_chat: bool
) -> None:
    filler = tokenizer.encode("the waters of the earth. " * 400)
    asked = list(questions(tokenizer, filler, 600, 5, in_chat=in_chat))
    assert asked == list(questions(tokenizer, filler, 600, 5, in_chat=in_chat))
    assert {len(question.prompt) for question in asked} == {600}
    for question in asked:
        prompt, answer = map(tokenizer.decode, (question.prompt, question.answer))
        stem = "" if in_chat else prompt.rpartition("\n")[2]
        assert stem + answer in prompt


def test_recall_counts_exact_answers(engine: Engine, tokenizer: TiktokenTokenizer) -> None:
    filler = tokenizer.encode("the waters of the earth. " * 400)
    wrong = next(questions(tokenizer, filler, 600, 1, in_chat=True))
    said = greedy(engine, wrong.prompt, 6)
    right = type(wrong)(wrong.prompt, tuple(said))
    assert recall(engine, [wrong, right], {"exported": by_export}) == {KEPT: 0.5, "exported": 0.5}
    assert len(wrong.answer) <= ANSWER_TOKENS + 40


def test_a_loop_is_a_piece_that_comes_three_times_in_a_row() -> None:
    assert loop_in([1, 2, 3, 4] * 3) == (1, 2, 3, 4)
    assert loop_in([7] * 12) == (7,)
    assert loop_in([7] * 11) is None
    assert loop_in([9, 8, *[1, 2, 3, 4, 5] * 3, 6]) == (1, 2, 3, 4, 5)
    assert loop_in([1, 2, 3, 4] * 2) is None
    assert loop_in(list(range(100))) is None


def test_xz_finds_held_out_text_in_the_training_text() -> None:
    text = Path(__file__).read_bytes()
    assert xz_bits(text + text) - xz_bits(text) < xz_bits(text) / 5
