"""The small recipe, tokenizer and text of the training tests."""

from tests.training.conftest import documents, recipe, tokenizer, tokenizer_directory

__all__ = ["documents", "recipe", "tokenizer", "tokenizer_directory"]
