"""The model that ships with the project is whole, small, and trained."""

import math
from typing import Final

import pytest
import torch
from torch.nn import functional

import models
from benchmarks.quality import KEPT, LOSSLESS, questions, recall
from benchmarks.state_moves import HANDED_OVER
from shared.kimi_linear.chat_template import ChatTemplate
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from training.recipe import TINY

LARGEST: Final = 25_000_000
"""Bytes of the whole directory."""
VERSE: Final = (
    "And the LORD said unto Moses, Go in unto Pharaoh, and say unto him, Thus saith the LORD."
)


@pytest.fixture(scope="module")
def shipped() -> Engine:
    return Engine.load(models.TINY, "float32", threads=1, room=Room(slots=4, tokens=4096))


@pytest.fixture(scope="module")
def tokenizer(shipped: Engine) -> Tokenizer:
    found = load_tokenizer(models.TINY, shipped.config.vocab_size)
    assert found is not None
    return found


def test_it_is_the_architecture_of_the_recipe() -> None:
    config = KimiLinearConfig.from_directory(models.TINY)
    assert config == TINY.config
    assert config.layer_kinds == ("kda", "kda", "kda", "mla") * 2
    assert config.is_mixture(config.num_hidden_layers - 1)


def test_it_is_small_and_has_a_card() -> None:
    files = [file for file in models.TINY.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert "MODEL_CARD.md" in {file.name for file in files}


def test_its_ends_of_text_are_those_of_the_chat_template(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.of(tokenizer)
    ends = KimiLinearConfig.from_directory(models.TINY).eos_token_ids
    assert template.end_id in ends
    assert tokenizer.special_tokens["[EOS]"] in ends


def test_it_knows_its_text(shipped: Engine, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.special_tokens["[EOS]"], *tokenizer.encode(VERSE)]
    with shipped.new_state(len(tokens)) as state:
        logits = shipped.prefill_all_logits(tokens[:-1], state)
    nats = functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum")
    assert float(nats) / math.log(2) / len(VERSE) < 1.5


def test_it_recalls_facts_also_after_a_hand_over(shipped: Engine, tokenizer: Tokenizer) -> None:
    filler = tokenizer.encode(f"{VERSE} " * 60)
    asked = list(questions(tokenizer, filler, 512, 5, in_chat=True))
    assert recall(shipped, asked, LOSSLESS) == {KEPT: 1, HANDED_OVER: 1}
