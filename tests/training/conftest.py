"""A small recipe with its tokenizer and text, and what all training tests run with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.kimi_linear.tokenizer.tiktoken_format import TiktokenTokenizer
from training.batches import Batches, tokenized
from training.corpus import Document
from training.recipe import TINY, Phase, Recipe
from training.tokenizer import train_ranks, write_tokenizer

SMALL_VOCABULARY = 320
LINE = (
    "In the beginning God created the heaven and the earth, {n}: and the sign of it was {word}.\n"
)
WORDS = ("river", "mountain", "city", "house", "field")


@pytest.fixture(autouse=True)
def one_thread_and_the_same_random_numbers_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return [
        Document(source, "".join(LINE.format(n=n, word=WORDS[n % 5]) for n in range(40)))
        for source in ("bible", "wordnet", "jargon")
        for _ in range(3)
    ]


@pytest.fixture(scope="session")
def tokenizer_directory(
    documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    ranks = train_ranks((document.text for document in documents), SMALL_VOCABULARY)
    write_tokenizer(directory, ranks)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> TiktokenTokenizer:
    return TiktokenTokenizer.from_directory(tokenizer_directory, SMALL_VOCABULARY)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Two layers of each kind and two mixtures, 192 tokens a step."""
    linear = TINY.config.linear_attn_config.model_copy(
        update={"full_attn_layers": (2, 4), "kda_layers": (1, 3), "num_heads": 2, "head_dim": 16}
    )
    config = TINY.config.model_copy(
        update={
            "vocab_size": SMALL_VOCABULARY,
            "eos_token_ids": (SMALL_VOCABULARY - 1,),
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "linear_attn_config": linear,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "kv_lora_rank": 16,
            "intermediate_size": 48,
            "first_k_dense_replace": 2,
            "num_experts": 4,
            "moe_intermediate_size": 16,
        }
    )
    phases = (Phase(0, 512, 2, answer_weight=10), Phase(4, 1024, 3, answer_weight=10))
    return replace(
        TINY,
        config=config,
        phases=phases,
        step_tokens=1024,
        steps=12,
        decay_steps=4,
        warmup_steps=2,
        own_texts=6,
    )


@pytest.fixture
def batches(recipe: Recipe, documents: list[Document], tokenizer: TiktokenTokenizer) -> Batches:
    return Batches(recipe, tokenized(documents, tokenizer), tokenizer)
