"""The tokenizer of a model directory, in whatever format it is."""

from pathlib import Path

from shared.kimi_linear.tokenizer.byte_level import BYTE_TOKENIZER_FILE, ByteLevelTokenizer
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.tiktoken_format import TIKTOKEN_FILE, TiktokenTokenizer
from shared.kimi_linear.tokenizer.tokenizer_json import TOKENIZER_JSON_FILE, JsonTokenizer

_FORMATS = {
    TIKTOKEN_FILE: TiktokenTokenizer.from_directory,
    TOKENIZER_JSON_FILE: JsonTokenizer.from_directory,
    BYTE_TOKENIZER_FILE: ByteLevelTokenizer.from_directory,
}
"""The file that gives a format away, the one that counts first."""


def load_tokenizer(directory: str | Path, vocab_size: int) -> Tokenizer | None:
    """Load the tokenizer of a model directory; None if it has none that is known here.

    Nothing is downloaded, and no code of the directory is run.

    Args:
        directory: of the model.
        vocab_size: of the model; no token may have an id outside it.

    Raises:
        CheckpointError: there is one, but it is incomplete, damaged, for another vocabulary, or of
            a kind whose tokens stand for different bytes in different places.
    """
    root = Path(directory)
    present = (load for file, load in _FORMATS.items() if (root / file).exists())
    load = next(present, None)
    return None if load is None else load(root, vocab_size)
