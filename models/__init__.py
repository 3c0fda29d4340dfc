"""Models that ship with the project."""

from pathlib import Path
from typing import Final

TINY: Final = Path(__file__).parent / "tiny"
"""A small trained Kimi Linear; its MODEL_CARD.md says what it can do."""
