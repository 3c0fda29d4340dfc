"""How far results are apart that are equal in exact arithmetic, and what narrow weights cost.

`python -m benchmarks.exactness` prints both tables for the reference checkpoint of the tests.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState

MODEL: Final = Path(__file__).parents[1] / "tests" / "reference" / "kimi_linear_small"
LENGTHS: Final = (1, 63, 64, 65, 200, 700)
CUTS: Final = (1, 63, 64, 65, 127, 128, 130)
STEPS: Final = 32
WINDOW: Final = 1024

Variant = Callable[[Engine, Sequence[int], ExitStack], tuple[Tensor, RequestState]]
"""A way to prefill a prompt: logits after its last token, and its state."""


def prompt_of(engine: Engine, length: int) -> list[int]:
    """The same tokens every time."""
    generator = torch.Generator().manual_seed(length)
    tokens: list[int] = torch.randint(
        engine.config.vocab_size, (length,), generator=generator
    ).tolist()
    return tokens


# --- the same computation in another order -----------------------------------------------------


def at_once(engine: Engine, prompt: Sequence[int], held: ExitStack) -> tuple[Tensor, RequestState]:
    """One forward pass."""
    state = held.enter_context(engine.new_state(len(prompt) + STEPS))
    return engine.prefill([prompt], [state])[0], state


def in_chunks(size: int) -> Variant:
    """Chunk by chunk."""

    def prefill(
        engine: Engine, prompt: Sequence[int], held: ExitStack
    ) -> tuple[Tensor, RequestState]:
        state = held.enter_context(engine.new_state(len(prompt) + STEPS))
        for start in range(0, len(prompt), size):
            logits = engine.prefill([prompt[start : start + size]], [state])
        return logits[0], state

    return prefill


def packed(engine: Engine, prompt: Sequence[int], held: ExitStack) -> tuple[Tensor, RequestState]:
    """In one forward pass with three other prompts."""
    others = [prompt_of(engine, length) for length in (5, 64, 130)]
    prompts = [*others[:2], prompt, others[2]]
    states = [held.enter_context(engine.new_state(len(one) + STEPS)) for one in prompts]
    return engine.prefill(prompts, states)[2], states[2]


def by_steps(engine: Engine, prompt: Sequence[int], held: ExitStack) -> tuple[Tensor, RequestState]:
    """Half as a prompt, half token by token in a batch with others."""
    state = held.enter_context(engine.new_state(len(prompt) + STEPS))
    guests = [held.enter_context(engine.new_state(len(prompt) + 1)) for _ in range(3)]
    engine.prefill([[token] for token in (1, 2, 3)], guests)
    half = len(prompt) // 2
    if half:
        engine.prefill([prompt[:half]], [state])
    for token in prompt[half:]:
        logits = engine.decode([4, token, 5, 6], [guests[0], state, *guests[1:]])
    return logits[1], state


def handed_over(cut: int) -> Variant:
    """The state exported after `cut` tokens and imported into another slot and other pages."""

    def prefill(
        engine: Engine, prompt: Sequence[int], held: ExitStack
    ) -> tuple[Tensor, RequestState]:
        first = held.enter_context(engine.new_state(len(prompt)))
        second = held.enter_context(engine.new_state(len(prompt) + STEPS))
        here = min(cut, len(prompt) - 1)
        if not here:
            return engine.prefill([prompt], [second])[0], second
        engine.prefill([prompt[:here]], [first])
        second.import_latents(first.export_latents(0, here))
        second.import_snapshot(first.snapshot())
        return engine.prefill([prompt[here:]], [second])[0], second

    return prefill


@dataclass(frozen=True, slots=True)
class Difference:
    """What a variant did to logits and text, over all lengths."""

    logits: float
    """Largest absolute difference of a logit."""
    same_text: bool
    """Whether all greedy continuations are equal."""


def compare(engine: Engine, variants: Sequence[Variant]) -> Difference:
    """Hold variants against one forward pass."""
    largest, same = 0.0, True
    for length in LENGTHS:
        prompt = prompt_of(engine, length)
        with ExitStack() as held:
            expected, state = at_once(engine, prompt, held)
            text = greedy(engine, expected, state)
            for variant in variants:
                logits, other = variant(engine, prompt, held)
                largest = max(largest, float((logits - expected).abs().max()))
                same = same and greedy(engine, logits, other) == text
    return Difference(largest, same)


def greedy(engine: Engine, logits: Tensor, state: RequestState) -> list[int]:
    """The `STEPS` most likely tokens, one after the other."""
    text: list[int] = []
    for _ in range(STEPS):
        text.append(int(logits.argmax()))
        logits = engine.decode(text[-1:], [state])[0]
    return text


# --- narrow weights ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drift:
    """What narrow weights did to the logits after each of `WINDOW` successive tokens."""

    relative_error: float
    """Median over the tokens of |narrow - wide| / |wide|, both as vectors."""
    agreement: float
    """Share of tokens with the same most likely next one."""


def logits_after_every_token(directory: Path, dtype: WeightDType, tokens: Sequence[int]) -> Tensor:
    """`[T, vocabulary]`."""
    engine = Engine.load(directory, dtype)
    with engine.new_state(len(tokens)) as state:
        return engine.prefill_all_logits(tokens, state)


def drift(wide: Tensor, narrow: Tensor) -> list[Drift]:
    """Compare logits `[T, vocabulary]` window by window."""
    error = (narrow - wide).norm(dim=-1) / wide.norm(dim=-1)
    agreement = (narrow.argmax(dim=-1) == wide.argmax(dim=-1)).float()
    return [
        Drift(float(errors.median()), float(agreements.mean()))
        for errors, agreements in zip(
            torch.split(error, WINDOW), torch.split(agreement, WINDOW), strict=True
        )
    ]


# --- tables ------------------------------------------------------------------------------------


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    engine = Engine.load(MODEL, "float32")
    orders: dict[str, list[Variant]] = {
        f"chunks of {', '.join(map(str, CUTS))}": [in_chunks(size) for size in CUTS],
        "packed with three other prompts": [packed],
        "half prefilled, half decoded in a batch": [by_steps],
        f"handed over after {', '.join(map(str, CUTS))}": [handed_over(cut) for cut in CUTS],
    }
    print(f"fp32, prompts of {', '.join(map(str, LENGTHS))} tokens, against one forward pass\n")
    print(f"{'':50} largest logit difference  greedy text of {STEPS}")
    for name, variants in orders.items():
        found = compare(engine, variants)
        print(f"{name:50} {found.logits:24.1e}  {'equal' if found.same_text else 'DIFFERENT'}")

    tokens = prompt_of(engine, 8 * WINDOW)
    wide = logits_after_every_token(MODEL, "float32", tokens)
    print(f"\nnarrow weights with fp32 states against fp32, {len(tokens)} tokens\n")
    print(f"{'':10} {'tokens':>14} median relative error  same most likely token")
    for dtype in ("bfloat16", "int8"):
        windows = drift(wide, logits_after_every_token(MODEL, dtype, tokens))
        for number in (0, len(windows) // 2, len(windows) - 1):
            span = f"{number * WINDOW}-{(number + 1) * WINDOW}"
            window = windows[number]
            print(f"{dtype:10} {span:>14} {window.relative_error:21.3f} {window.agreement:23.1%}")


if __name__ == "__main__":
    main()
