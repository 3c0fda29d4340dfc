"""What `python -m benchmarks.exactness` lists as not mattering does not matter, in fp32."""

from pathlib import Path

import pytest

from benchmarks.exactness import PROPERTIES, Property
from shared.kimi_linear.engine import Engine
from tests.model.tolerances import SAME_MODEL_LOGITS


@pytest.fixture(scope="module")
def engine(reference_directory: Path) -> Engine:
    """An engine without any other requests."""
    return Engine.load(reference_directory, "float32")


@pytest.mark.parametrize("tested", PROPERTIES, ids=lambda tested: tested.name)
def test_logits_are_within_the_tolerance_and_texts_equal(engine: Engine, tested: Property) -> None:
    difference = tested.difference(engine, lengths=[65])
    assert difference.logits < SAME_MODEL_LOGITS
    assert difference.equal_texts == difference.texts == len(tested.pairs)
