"""One small tokenizer in each format."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shared.kimi_linear.tokenizer.byte_level import ByteLevelTokenizer, ByteTokenizerFile
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.tiktoken_format import TiktokenTokenizer
from shared.kimi_linear.tokenizer.tokenizer_json import JsonTokenizer
from tests.tokenizer.small_tokenizers import (
    ADDED_IDS,
    BYTE_FALLBACK,
    BYTE_LEVEL,
    VOCAB_SIZE,
    write_json,
    write_kimi,
)

MakeDirectory = Callable[[str], Path]


@pytest.fixture(scope="session")
def make_directory(tmp_path_factory: pytest.TempPathFactory) -> MakeDirectory:
    return tmp_path_factory.mktemp


@pytest.fixture(scope="session")
def kimi(make_directory: MakeDirectory) -> TiktokenTokenizer:
    return TiktokenTokenizer.from_directory(write_kimi(make_directory("kimi")), VOCAB_SIZE)


@pytest.fixture(scope="session")
def byte_level(make_directory: MakeDirectory) -> JsonTokenizer:
    directory = write_json(make_directory("byte_level"), BYTE_LEVEL)
    return JsonTokenizer.from_directory(directory, VOCAB_SIZE)


@pytest.fixture(scope="session")
def byte_fallback(make_directory: MakeDirectory) -> JsonTokenizer:
    directory = write_json(make_directory("byte_fallback"), BYTE_FALLBACK)
    return JsonTokenizer.from_directory(directory, VOCAB_SIZE)


@pytest.fixture(scope="session")
def bytes_alone() -> ByteLevelTokenizer:
    file = ByteTokenizerFile(vocab_size=VOCAB_SIZE, special_tokens=ADDED_IDS)
    return ByteLevelTokenizer(file)


@pytest.fixture(scope="session", params=["kimi", "byte_level", "byte_fallback", "bytes_alone"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of them in turn."""
    chosen: Tokenizer = request.getfixturevalue(request.param)
    return chosen
