"""A model directory's tokenizer is found by its file, and brings nothing in from outside."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.kimi_linear.tokenizer.byte_level import BYTE_TOKENIZER_FILE, ByteLevelTokenizer
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from shared.kimi_linear.tokenizer.tiktoken_format import TiktokenTokenizer
from shared.kimi_linear.tokenizer.tokenizer_json import JsonTokenizer
from tests.tokenizer.small_tokenizers import BYTE_LEVEL, VOCAB_SIZE, write_json, write_kimi


def write_bytes_alone(directory: Path) -> Path:
    (directory / BYTE_TOKENIZER_FILE).write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return directory


def write_byte_level(directory: Path) -> Path:
    return write_json(directory, BYTE_LEVEL)


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, VOCAB_SIZE) is None


def test_the_first_of_several_formats_counts(tmp_path: Path) -> None:
    formats = {
        write_bytes_alone: ByteLevelTokenizer,
        write_byte_level: JsonTokenizer,
        write_kimi: TiktokenTokenizer,
    }
    for write, expected in formats.items():
        assert isinstance(load_tokenizer(write(tmp_path), VOCAB_SIZE), expected)


@pytest.mark.parametrize("write", [write_kimi, write_byte_level, write_bytes_alone])
def test_loading_and_encoding_open_no_socket(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    script = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, _: opened.append(event) if 'socket' in event else None)\n"
        "from shared.kimi_linear.tokenizer.loading import load_tokenizer\n"
        f"load_tokenizer({str(write(tmp_path))!r}, {VOCAB_SIZE}).encode('The quick brown fox')\n"
        "sys.exit(bool(opened))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_what_the_gateway_needs_of_a_model_does_not_load_torch() -> None:
    modules = (
        *("config", "tokenizer.loading", "detokenizer", "chat_template"),
        *("fingerprint", "presets", "state_layout"),
    )
    imports = ", ".join(f"shared.kimi_linear.{module}" for module in modules)
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
