"""What it changes when the prefill worker's numbers are narrower than the decode worker's.

    python -m benchmarks.unlike_workers

A prompt is prefilled in other widths and continued in fp32, against a prefill in fp32. What follows
is the same text for all, so that only the state differs.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from benchmarks.exactness import MODEL, prompt_of
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.snapshot import KdaSnapshot

PROMPT_TOKENS: Final = 520
NEXT_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Moved:
    """The state of the prompt, as it leaves a prefill worker."""

    latents: Tensor
    snapshot: KdaSnapshot

    def in_bf16(self) -> "Moved":
        """As a GPU keeps its latents."""
        return Moved(self.latents.bfloat16().float(), self.snapshot)


def prefilled(engine: Engine) -> Moved:
    """Prefill the prompt."""
    prompt = prompt_of(engine, PROMPT_TOKENS)
    with engine.new_state(len(prompt)) as state:
        engine.prefill([prompt], [state])
        return Moved(state.export_latents(0, len(prompt)), state.snapshot())


def continued(engine: Engine, moved: Moved) -> Tensor:
    """Logits after each of the tokens that follow, `[NEXT_TOKENS, vocabulary]`."""
    with engine.new_state(PROMPT_TOKENS + NEXT_TOKENS) as state:
        state.import_latents(0, moved.latents)
        state.import_snapshot(moved.snapshot)
        state.finish_import(PROMPT_TOKENS)
        following = prompt_of(engine, NEXT_TOKENS)
        return torch.stack([engine.decode([token], [state])[0] for token in following])


def lines(model: Path) -> Iterator[str]:
    """A table of the errors of the logits, and how often the next token is the same."""
    wide = Engine.load(model, "float32", threads=1)
    own = prefilled(wide)
    expected = continued(wide, own)
    yield f"{'':<28}{'median error':>14}{'largest':>10}{'same next':>12}"
    yield _row("latents in bfloat16", expected, continued(wide, own.in_bf16()))
    for width in get_args(WeightDType):
        narrow = prefilled(Engine.load(model, width, threads=1))
        yield _row(f"prefilled in {width}", expected, continued(wide, narrow))


def _row(name: str, expected: Tensor, found: Tensor) -> str:
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    median, largest = float(errors.median()), float(errors.max())
    same = float((found.argmax(1) == expected.argmax(1)).double().mean())
    return f"{name:<28}{median:>14.1e}{largest:>10.1e}{same:>12.0%}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODEL, help="(default: the tests' reference)")
    for line in lines(parser.parse_args().model):
        print(line)


if __name__ == "__main__":
    main()
