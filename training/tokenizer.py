"""Makes the tokenizer: byte pairs merged over the training text, in the published Kimi format."""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from tokenizers import Regex
from tokenizers import Tokenizer as TrainedTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from shared.kimi_linear.chat_template import END, MIDDLE, OPENINGS
from shared.kimi_linear.tokenizer.tiktoken_format import (
    KIMI_WORDS,
    TIKTOKEN_FILE,
    TOKENIZER_CONFIG_FILE,
)

BOS: Final = "[BOS]"
EOS: Final = "[EOS]"
PAD: Final = "[PAD]"
SPECIAL_TOKENS: Final = (
    BOS,
    EOS,
    END,
    *dict.fromkeys(OPENINGS.values()),
    MIDDLE,
    PAD,
)
"""Kimi's, in the order of their ids, which follow those of the ordinary tokens."""


def train_ranks(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Merge byte pairs until there are `vocab_size` tokens with the special ones.

    Returns:
        Ids of the ordinary tokens by their bytes: the single bytes first, then in order of merging.
    """
    trained = TrainedTokenizer(BPE())
    words = Split(Regex(KIMI_WORDS), behavior="isolated")
    trained.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    byte_of = _bytes_of_characters()
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[character] for character in token) for token, _ in by_id]
    single = [bytes((byte,)) for byte in range(256)]
    merged = [token for token in tokens if len(token) > 1]
    return {token: rank for rank, token in enumerate((*single, *merged))}


def write_tokenizer(directory: Path, ranks: Mapping[bytes, int]) -> None:
    """Write `tiktoken.model` and `tokenizer_config.json`."""
    lines = [b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items()]
    (directory / TIKTOKEN_FILE).write_bytes(b"".join(lines))
    added = {
        str(len(ranks) + n): {"content": token, "special": True}
        for n, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (directory / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _bytes_of_characters() -> dict[str, int]:
    """What byte each character of byte-level BPE stands for.

    Printable ones of Latin-1 stand for themselves; the others are, in order, U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }
