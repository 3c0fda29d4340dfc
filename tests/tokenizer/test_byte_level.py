"""Bytes are tokens; special tokens stand for no text."""

import json
from pathlib import Path

import pytest

from shared.errors import CheckpointError
from shared.kimi_linear.tokenizer.byte_level import (
    BYTE_TOKENIZER_FILE,
    ByteLevelTokenizer,
    ByteTokenizerFile,
)

TOKENIZER = ByteLevelTokenizer(ByteTokenizerFile(vocab_size=320, special_tokens={"<|eos|>": 257}))


def test_special_and_unused_tokens_stand_for_no_text() -> None:
    assert TOKENIZER.decode([104, 257, 105, 319]) == "hi"
    assert TOKENIZER.token_bytes(257) == b""


def test_invalid_bytes_are_replaced() -> None:
    assert TOKENIZER.decode([0xC3, 0x28]) == "\ufffd("


def test_the_tokenizer_is_read_from_its_file(tmp_path: Path) -> None:
    content = {"type": "byte-level", "vocab_size": 300, "special_tokens": {"<|pad|>": 299}}
    (tmp_path / BYTE_TOKENIZER_FILE).write_text(json.dumps(content))
    tokenizer = ByteLevelTokenizer.from_directory(tmp_path, vocab_size=320)
    assert tokenizer.vocab_size == 300
    assert tokenizer.special_tokens == {"<|pad|>": 299}
    assert tokenizer.encode("hé") == (104, 195, 169)


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        '{"type": "bpe", "vocab_size": 300}',
        '{"type": "byte-level", "vocab_size": 255}',
        '{"type": "byte-level", "vocab_size": 321}',
        '{"type": "byte-level", "vocab_size": 300, "special_tokens": {"x": 300}}',
        '{"type": "byte-level", "vocab_size": 300, "special_tokens": {"x": 65}}',
        '{"type": "byte-level", "vocab_size": 300, "merges": []}',
    ],
)
def test_a_file_that_is_not_a_byte_tokenizers_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / BYTE_TOKENIZER_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=BYTE_TOKENIZER_FILE):
        ByteLevelTokenizer.from_directory(tmp_path, vocab_size=320)
