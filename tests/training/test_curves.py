"""The curves show the log, the later entry of a step that was run twice."""

from typing import Any
from xml.etree import ElementTree

from training.curves import curves_of, svg


def entry(step: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "recall_accuracy": accuracy, **more}


def test_a_step_that_was_run_again_counts_once() -> None:
    log = [entry(1, 0.0), entry(2, 0.0), entry(2, 1.0, held_out={"bible": 2.5})]
    (text,), (recall,) = curves_of(log)
    assert text.points == ((2, 2.5),)
    assert recall.points == ((2, 0.5),)


def test_the_image_is_well_formed() -> None:
    log = [entry(n, 0.5, held_out={"bible": 3 - n / 100}) for n in range(1, 60)]
    assert ElementTree.fromstring(svg(log)).tag.endswith("svg")
