"""How far results are apart that are equal in exact arithmetic, and what narrow weights cost.

    python -m benchmarks.exactness --dtype float32 --dtype bfloat16

Prints both tables, for the reference checkpoint of the tests unless another is named.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.expert_choices import ExpertChoices
from shared.kernels.batch import PAGE_TOKENS
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState

MODEL: Final = Path(__file__).parents[1] / "tests" / "reference" / "kimi_linear_small"
LENGTHS: Final = (1, 64, 65, 200, 520)
"""Of prompts; the last is more than the engine computes at once."""
CUTS: Final = (1, 63, 64, 65, 127, 128, 130)
STEPS: Final = 32
WINDOW: Final = 1024
LONG: Final = 8 * WINDOW

Way = Callable[[Engine, Sequence[int], ExitStack], tuple[Tensor, RequestState]]
"""A way to compute a prompt: logits after its last token, and a state to go on from."""


def prompt_of(engine: Engine, length: int) -> list[int]:
    """The same tokens every time."""
    generator = torch.Generator().manual_seed(length)
    tokens: list[int] = torch.randint(
        engine.config.vocab_size, (length,), generator=generator
    ).tolist()
    return tokens


# --- ways to compute a prompt --------------------------------------------------------------------


def at_once(engine: Engine, prompt: Sequence[int], held: ExitStack) -> tuple[Tensor, RequestState]:
    """One forward pass."""
    state = held.enter_context(engine.new_state(len(prompt) + STEPS))
    return engine.prefill([prompt], [state])[0], state


def in_chunks(size: int) -> Way:
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


def in_scattered_pages(
    engine: Engine, prompt: Sequence[int], held: ExitStack
) -> tuple[Tensor, RequestState]:
    """One forward pass, with latents in pages no two of which are neighbours."""
    state = scattered_state(engine, len(prompt) + STEPS, held)
    return engine.prefill([prompt], [state])[0], state


def scattered_state(engine: Engine, tokens: int, held: ExitStack) -> RequestState:
    """A state whose pages are every other one of those that an engine without requests has."""
    pages = ceil(tokens / PAGE_TOKENS)
    with ExitStack() as others:
        single = [others.enter_context(engine.new_state(PAGE_TOKENS)) for _ in range(2 * pages)]
        others.enter_context(engine.new_state(engine.capacity - 2 * pages * PAGE_TOKENS))
        for state in single[::2]:
            state.release()
        return held.enter_context(engine.new_state(tokens))


def half_decoded(guests: int) -> Way:
    """The first half as a prompt, the second token by token in a batch with so many others."""

    def prefill(
        engine: Engine, prompt: Sequence[int], held: ExitStack
    ) -> tuple[Tensor, RequestState]:
        state = held.enter_context(engine.new_state(len(prompt) + STEPS))
        others = [held.enter_context(engine.new_state(len(prompt) + 1)) for _ in range(guests)]
        if others:
            engine.prefill([[token] for token in range(guests)], others)
        half = len(prompt) // 2
        if half:
            engine.prefill([prompt[:half]], [state])
        for token in prompt[half:]:
            logits = engine.decode([token, *range(guests)], [state, *others])
        return logits[0], state

    return prefill


def in_two(cut: int) -> Way:
    """The first `cut` tokens, then the others."""
    return _moved_or_not(cut, moves=False)


def handed_over(cut: int) -> Way:
    """The same, with the state exported in between, and imported into another slot and pages."""
    return _moved_or_not(cut, moves=True)


def _moved_or_not(cut: int, *, moves: bool) -> Way:
    def prefill(
        engine: Engine, prompt: Sequence[int], held: ExitStack
    ) -> tuple[Tensor, RequestState]:
        state = held.enter_context(engine.new_state(len(prompt) + STEPS))
        here = min(cut, len(prompt) - 1)
        if here:
            engine.prefill([prompt[:here]], [state])
        if here and moves:
            state = moved(engine, state, held)
        return engine.prefill([prompt[here:]], [state])[0], state

    return prefill


def moved(engine: Engine, state: RequestState, held: ExitStack) -> RequestState:
    """A new state of the same engine that takes in all that another one exports."""
    new = held.enter_context(engine.new_state(state.capacity))
    new.import_latents(0, state.export_latents(0, state.length))
    new.import_snapshot(state.snapshot())
    new.finish_import(state.length)
    return new


# --- the same computation in another order -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a way gave for one prompt."""

    logits: Tensor
    """After the prompt, `[vocabulary]`."""
    text: tuple[int, ...]
    """The `STEPS` most likely tokens, one after the other."""

    @classmethod
    def of(cls, way: Way, engine: Engine, prompt: Sequence[int]) -> "Outcome":
        """Compute the prompt and go on."""
        with ExitStack() as held:
            first, state = logits, _ = way(engine, prompt, held)
            text: list[int] = []
            for _ in range(STEPS):
                text.append(int(logits.argmax()))
                logits = engine.decode(text[-1:], [state])[0]
            return cls(first, tuple(text))


@dataclass(frozen=True, slots=True)
class Difference:
    """Between ways to compute the same, over all prompts."""

    logits: float
    """Largest absolute difference of a logit."""
    texts: int
    equal_texts: int


@dataclass(frozen=True, slots=True)
class Property:
    """Something that does not matter in exact arithmetic: pairs of ways that differ in it alone."""

    name: str
    pairs: tuple[tuple[Way, Way], ...]

    def difference(self, engine: Engine, lengths: Sequence[int] = LENGTHS) -> Difference:
        """Hold the ways of each pair against each other, for prompts of these lengths."""
        largest, texts, equal_texts = 0.0, 0, 0
        for prompt in (prompt_of(engine, length) for length in lengths):
            ways = dict.fromkeys(way for pair in self.pairs for way in pair)
            outcomes = {way: Outcome.of(way, engine, prompt) for way in ways}
            for one, other in ((outcomes[one], outcomes[other]) for one, other in self.pairs):
                largest = max(largest, float((one.logits - other.logits).abs().max()))
                equal_texts += one.text == other.text
                texts += 1
        return Difference(largest, texts, equal_texts)


HAND_OVER: Final = Property(
    "a hand-over between two chunks",
    tuple((handed_over(cut), in_two(cut)) for cut in (1, 64, 130)),
)
PROPERTIES: Final = (
    Property("how a prompt is cut into chunks", tuple((in_chunks(size), at_once) for size in CUTS)),
    Property("prompts that are packed with it", ((packed, at_once),)),
    Property("prefill or decode of its second half", ((half_decoded(guests=0), at_once),)),
    Property(
        "requests that it is decoded with",
        tuple((half_decoded(guests), half_decoded(guests=0)) for guests in (1, 7)),
    ),
    Property("which pages hold its latents", ((in_scattered_pages, at_once),)),
    HAND_OVER,
)


# --- narrow weights ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drift:
    """What narrow weights did to the logits after each of `WINDOW` successive tokens.

    The error of one token's logits is relative, |narrow - wide| / |wide| as vectors.
    """

    median_error: float
    largest_error: float
    divergence: float
    """Mean Kullback-Leibler divergence of the narrow from the wide distribution, in nats."""
    agreement: float
    """Share of tokens with the same most likely next one."""


def logits_after_every_token(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """`[T, vocabulary]`."""
    with engine.new_state(len(tokens)) as state:
        return engine.prefill_all_logits(tokens, state)


def drift(wide: Tensor, narrow: Tensor) -> list[Drift]:
    """Compare logits `[T, vocabulary]` window by window."""
    return [
        _drift_of_window(*windows)
        for windows in zip(torch.split(wide, WINDOW), torch.split(narrow, WINDOW), strict=True)
    ]


def _drift_of_window(wide: Tensor, narrow: Tensor) -> Drift:
    errors = (narrow - wide).norm(dim=-1) / wide.norm(dim=-1)
    divergence = functional.kl_div(
        narrow.log_softmax(dim=-1), wide.log_softmax(dim=-1), log_target=True, reduction="batchmean"
    )
    agreement = (narrow.argmax(dim=-1) == wide.argmax(dim=-1)).float().mean()
    return Drift(float(errors.median()), float(errors.max()), float(divergence), float(agreement))


# --- tables --------------------------------------------------------------------------------------


def order_table(engines: Sequence[Engine]) -> Iterator[str]:
    """A row for each property, a column for each engine."""
    yield f"prompts of {', '.join(map(str, LENGTHS))} tokens"
    yield f"largest difference of a logit, and how many greedy texts of {STEPS} tokens are equal"
    yield ""
    yield f"{'what should not matter':38}" + "".join(f"{engine.dtype:>20}" for engine in engines)
    for tested in PROPERTIES:
        found = [tested.difference(engine) for engine in engines]
        cells = [f"{one.logits:.1e}  {one.equal_texts:2}/{one.texts:2}" for one in found]
        yield f"{tested.name:38}" + "".join(f"{cell:>20}" for cell in cells)


def drift_table(exact: Engine, engines: Sequence[Engine]) -> Iterator[str]:
    """Rows for the first, a middle and the last window of a long text, for each engine."""
    tokens, choices = prompt_of(exact, LONG), ExpertChoices()
    with choices.recorded():
        wide = logits_after_every_token(exact, tokens)
    yield f"logits against those of {exact.dtype} weights: relative error of a token's, divergence"
    yield "of its distribution, and how often the most likely token is the same"
    yield ""
    yield (
        f"{'weights':10}{'experts':>12}{'tokens':>12}"
        f"{'median':>10}{'largest':>10}{'KL, nats':>10}{'same token':>12}"
    )
    for engine in engines:
        for experts, held in (("its own", nullcontext()), (exact.dtype, choices.repeated())):
            with held:
                windows = drift(wide, logits_after_every_token(engine, tokens))
            for number in (0, len(windows) // 2, len(windows) - 1):
                named = f"{engine.dtype:10}{experts:>12}{_span(number):>12}"
                yield named + _drift_cells(windows[number])


def _span(window: int) -> str:
    return f"{window * WINDOW}-{(window + 1) * WINDOW}"


def _drift_cells(found: Drift) -> str:
    return (
        f"{found.median_error:10.3f}{found.largest_error:10.3f}{found.divergence:10.4f}"
        f"{found.agreement:12.1%}"
    )


def main() -> None:
    """Print the tables."""
    given = _parser().parse_args()
    dtypes: list[WeightDType] = list(dict.fromkeys(given.dtype or get_args(WeightDType)))
    torch.set_num_threads(given.threads)
    engines = [Engine.load(given.model, dtype) for dtype in dtypes]
    for line in order_table(engines):
        print(line, flush=True)
    narrow = [engine for engine in engines if engine.dtype != "float32"]
    if narrow:
        print()
        for line in drift_table(Engine.load(given.model, "float32"), narrow):
            print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=get_args(WeightDType),
        help="of the weights; may be repeated (default: all)",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", default=MODEL, help="compute with this model"
    )
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
