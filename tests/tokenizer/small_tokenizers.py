"""Small tokenizers in the formats that models carry, made where a test needs them."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

Content = dict[str, Any]

VOCAB_SIZE: Final = 1024

TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "  indented    text\n\n\twith\r\nlines 1234567 ",
    "Übermäßig höfliche Straße, naïve café",
    "月之暗面 Kimi 线性注意力。ひらがな と カタカナ 한국어",
    "emoji 😀👩‍👩‍👧 and e\u0301 and <|im_end|>",
)

_LATIN: Final = (
    *("th", "he", "the", " t", " th", " the", "in", "er", "qu", "aa", "aaaa", "  ", "    "),
    *("\n\n", "12", "123", "'s", "im", "<|", "|>", "im_", "en", "end"),
)
_OTHER: Final = ("é", "月", "之", "月之", "😀")
MERGED: Final = (
    *(token.encode() for token in _LATIN),
    *(token.encode()[:length] for token in _OTHER for length in range(2, len(token.encode()) + 1)),
)
"""What bytes are merged to; some tokens end inside a character."""

RANKS: Final[Mapping[bytes, int]] = {
    token: rank
    for rank, token in enumerate(dict.fromkeys((*(bytes((n,)) for n in range(256)), *MERGED)))
}
FIRST_ADDED: Final = len(RANKS)
ADDED: Final = (
    ("[BOS]", True),
    ("[EOS]", True),
    ("<|im_end|>", True),
    ("<|im_user|>", True),
    ("<|im_assistant|>", True),
    ("<|im_system|>", True),
    ("<|im_middle|>", True),
    ("<|tool_call_begin|>", False),
)
ADDED_IDS: Final = {name: FIRST_ADDED + place for place, (name, _) in enumerate(ADDED)}


# --- tiktoken.model --------------------------------------------------------------------------


def tiktoken_lines(ranks: Mapping[bytes, int] = RANKS) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]


def tokenizer_config() -> Content:
    decoder = {
        str(ADDED_IDS[name]): {"content": name, "special": special, "lstrip": False}
        for name, special in ADDED
    }
    return {"added_tokens_decoder": decoder, "model_max_length": 1048576}


def write_kimi(
    directory: Path, lines: list[bytes] | None = None, config: Content | None = None
) -> Path:
    """Write a directory as published; a test may replace the lines or the configuration."""
    content = b"\n".join(tiktoken_lines() if lines is None else lines) + b"\n"
    (directory / "tiktoken.model").write_bytes(content)
    chosen = tokenizer_config() if config is None else config
    (directory / "tokenizer_config.json").write_text(json.dumps(chosen))
    return directory


# --- tokenizer.json --------------------------------------------------------------------------


def _train_byte_level() -> Content:
    """A byte-level BPE that was trained on the texts."""
    tokenizer = Tokenizer(BPE())
    words = Regex(r"\p{N}{1,3}|[^\s\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


def _train_byte_fallback() -> Content:
    """A BPE of characters that falls back to bytes and puts no space before a text."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        limit_alphabet=60,
        special_tokens=["<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    content = _trained(tokenizer, trainer)
    # The trainer can only add them as special; in models they are part of the vocabulary alone.
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return content


def _trained(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> Content:
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([name for name, special in ADDED if special])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name, shown in ADDED if not shown])
    content: Content = json.loads(tokenizer.to_str())
    return content


BYTE_LEVEL: Final = _train_byte_level()
BYTE_FALLBACK: Final = _train_byte_fallback()


def write_json(directory: Path, content: Content) -> Path:
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory
