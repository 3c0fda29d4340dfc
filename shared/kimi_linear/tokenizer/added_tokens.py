"""Tokens that a model directory adds to the vocabulary its text is made of."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from shared.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One added token."""

    token_id: int
    content: str
    """Its name, and its text if it is visible."""
    special: bool
    """Whether it stands for no text. Those that do (tool calls, for instance) are visible ones."""

    @property
    def visible_bytes(self) -> bytes:
        """The UTF-8 that it stands for."""
        return b"" if self.special else self.content.encode()


def check_added_tokens(
    tokens: Sequence[AddedToken], ordinary: Container[int], vocab_size: int, source: str
) -> None:
    """Hold added tokens against the vocabulary and each other.

    Args:
        tokens: the added tokens.
        ordinary: ids that text is encoded to.
        vocab_size: ids have to be below it.
        source: file and field that they come from, for the error.

    Raises:
        CheckpointError: an id is outside the vocabulary or taken, or a name occurs twice.
    """
    ids: set[int] = set()
    names: set[str] = set()
    for token in tokens:
        shown = f"{source}: {token.content!r:.80} has id {token.token_id}"
        if not 0 <= token.token_id < vocab_size:
            raise CheckpointError(f"{shown}, outside the vocabulary of {vocab_size}")
        if token.token_id in ordinary:
            raise CheckpointError(f"{shown}, which is that of an ordinary token")
        if token.token_id in ids or token.content in names:
            raise CheckpointError(f"{shown}: an id or a name occurs twice")
        ids.add(token.token_id)
        names.add(token.content)
