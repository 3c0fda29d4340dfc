"""Draws the curves of a run's log as SVG.

python -m training.curves LOG SVG
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

NAMESPACE: Final = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT, MARGIN = 760, 260, 48
SMOOTHED: Final = 25
"""Steps whose mean is a point of the curves that are known at every step."""
COLORS: Final = ("#1b6ca8", "#c8553d", "#588157", "#6d597a")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one quantity over the steps."""

    name: str
    points: tuple[Point, ...]


def curves_of(entries: Sequence[dict[str, Any]]) -> tuple[tuple[Curve, ...], tuple[Curve, ...]]:
    """Bits per byte of each held-out work, and the part of recall questions answered.

    A run that was resumed from before its end has some steps twice: the later entries count.
    """
    by_step = {entry["step"]: entry for entry in entries}
    ordered = [by_step[step] for step in sorted(by_step)]
    measured = [entry for entry in ordered if "held_out" in entry]
    works = measured[0]["held_out"] if measured else ()
    text = tuple(
        Curve(work, tuple((entry["step"], entry["held_out"][work]) for entry in measured))
        for work in works
    )
    return text, (Curve("answers found in training", _smoothed(ordered, "recall_accuracy")),)


def _smoothed(entries: Sequence[dict[str, Any]], name: str) -> tuple[Point, ...]:
    points = []
    for start in range(0, len(entries), SMOOTHED):
        some = entries[start : start + SMOOTHED]
        points.append((some[-1]["step"], sum(entry[name] for entry in some) / len(some)))
    return tuple(points)


def chart(title: str, curves: Sequence[Curve], top: float, limits: tuple[float, float]) -> str:
    """One chart, `top` pixels below the image's edge; values outside the limits are cut off."""
    last = max((x for curve in curves for x, _ in curve.points), default=1)
    low, high = limits
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> str:
        part = (min(max(y, low), high) - low) / (high - low)
        right, down = MARGIN + x / last * inner_width, MARGIN + (1 - part) * inner_height
        return f"{right:.1f},{top + down:.1f}"

    parts = [_text(MARGIN, top + MARGIN - 16, title)]
    for n in range(5):
        value = low + (high - low) * n / 4
        line = f"{place(0, value)} {place(last, value)}"
        parts.append(f'<polyline points="{line}" fill="none" stroke="#ddd"/>')
        parts.append(_text(4, float(place(0, value).split(",")[1]) + 4, f"{value:.2f}"))
        step = last * n / 4
        parts.append(_text(MARGIN + inner_width * n / 4, top + HEIGHT - 28, f"{step:.0f}"))
    for n, curve in enumerate(curves):
        color = COLORS[n % len(COLORS)]
        points = " ".join(place(x, y) for x, y in curve.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(WIDTH - 220, top + MARGIN + 14 + 16 * n, curve.name, color))
    return "\n".join(parts)


def _text(x: float, y: float, content: str, color: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}">{content}</text>'


def svg(entries: Sequence[dict[str, Any]]) -> str:
    """The image of a log's curves over the steps."""
    text, recall = curves_of(entries)
    return "\n".join(
        (
            f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {2 * HEIGHT}" font-size="12">',
            f'<rect width="{WIDTH}" height="{2 * HEIGHT}" fill="white"/>',
            chart("held-out text, bits per byte (a sample)", text, 0, (1.0, 3.0)),
            chart("recall over steps, part of the answers", recall, HEIGHT, (0.0, 1.0)),
            "</svg>\n",
        )
    )


def main() -> None:
    """Draw a log."""
    parser = argparse.ArgumentParser(prog="python -m training.curves", description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("svg", type=Path)
    given = parser.parse_args()
    entries = [json.loads(line) for line in given.log.read_text(encoding="utf-8").splitlines()]
    given.svg.write_text(svg(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
