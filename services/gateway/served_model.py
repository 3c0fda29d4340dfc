"""What the gateway knows of the model: its name, its limits and its tokenizer, but no weights."""

import time
from dataclasses import dataclass
from typing import Self

from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.tokenizer.interface import Tokenizer
from shared.kimi_linear.tokenizer.loading import load_tokenizer
from shared.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model behind this gateway."""

    name: str
    created: int
    """When it began to be served, in seconds since 1970."""
    vocab_size: int
    max_length: int
    """Tokens of prompt and answer together."""
    end_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    """None serves prompts of token ids only."""

    @classmethod
    def load(cls, settings: GatewaySettings) -> Self:
        """Read the model directory.

        Raises:
            CheckpointError: its configuration or its tokenizer cannot be used.
        """
        config = KimiLinearConfig.from_directory(settings.model)
        return cls(
            name=settings.served_model_name or settings.model.resolve().name,
            created=int(time.time()),
            vocab_size=config.vocab_size,
            max_length=config.model_max_length,
            end_token_ids=config.eos_token_ids,
            tokenizer=load_tokenizer(settings.model, config.vocab_size),
        )
