"""Bytes are tokens; special tokens are neither text nor reachable by text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CheckpointError, InvalidRequestError
from shared.kimi_linear.tokenizer import (
    BYTE_TOKENIZER_FILE,
    ByteLevelTokenizer,
    ByteTokenizerFile,
    load_tokenizer,
)

TOKENIZER = ByteLevelTokenizer(ByteTokenizerFile(vocab_size=320, special_tokens={"<|eos|>": 257}))


@given(st.text())
def test_decoding_undoes_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_names_of_special_tokens_are_text() -> None:
    assert 257 not in TOKENIZER.encode("<|eos|>")


def test_special_and_unused_tokens_stand_for_no_text() -> None:
    assert TOKENIZER.decode([104, 257, 105, 319]) == "hi"
    assert TOKENIZER.token_bytes(257) == b""


def test_invalid_bytes_are_replaced() -> None:
    assert TOKENIZER.decode([0xC3, 0x28]) == "\ufffd("


def test_half_a_surrogate_pair_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="character 1"):
        TOKENIZER.encode("a\ud800")


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_the_tokenizer_is_read_from_its_file(tmp_path: Path) -> None:
    content = {"type": "byte-level", "vocab_size": 300, "special_tokens": {"<|pad|>": 299}}
    (tmp_path / BYTE_TOKENIZER_FILE).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocab_size == 300
    assert tokenizer.encode("hé") == (104, 195, 169)


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        '{"type": "bpe", "vocab_size": 300}',
        '{"type": "byte-level", "vocab_size": 255}',
        '{"type": "byte-level", "vocab_size": 300, "special_tokens": {"x": 300}}',
        '{"type": "byte-level", "vocab_size": 300, "special_tokens": {"x": 65}}',
        '{"type": "byte-level", "vocab_size": 300, "merges": []}',
    ],
)
def test_a_file_that_is_not_a_byte_tokenizers_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / BYTE_TOKENIZER_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=BYTE_TOKENIZER_FILE):
        load_tokenizer(tmp_path)


def test_what_the_gateway_needs_of_a_model_does_not_load_torch() -> None:
    modules = ("config", "tokenizer", "detokenizer", "fingerprint", "presets", "state_layout")
    imports = ", ".join(f"shared.kimi_linear.{module}" for module in modules)
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
