"""What each codec of state segments makes of a model's states: size, speed, and what is lost.

    python -m benchmarks.codecs --preset medium --tokens 4096

The states are those of a random checkpoint after a random prompt. Speeds are of one core, of whole
segments with their checksum, in bytes of the state before encoding.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, get_args

import torch
from torch import Tensor

from benchmarks.checkpoint import random_checkpoint
from benchmarks.exactness import prompt_of
from benchmarks.kept_files import WORKDIR
from benchmarks.processor import Processor
from shared.kernels.torch_dtypes import TORCH_DTYPES
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.presets import PresetName
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.policy.segment_size import SEGMENT_BYTES
from shared.state_blob.codecs import CODECS, ZSTD, Codec, codecs_for
from shared.state_blob.header import SegmentIdentity
from shared.state_blob.kinds import SegmentKind
from shared.state_blob.segment import (
    EncodedSegment,
    decode_latents,
    decode_snapshot,
    encode_latents,
    encode_snapshot,
)

TEXT_TOKENS: Final = 256
EXPLANATION: Final = f"""\
{TEXT_TOKENS} greedy tokens against those of the lossless state with fp32 latents: relative error of
the logits after one token; how often the most likely next token is the same on the lossless text;
the first token at which the text differs when each follows its own.
The weights are random: the best two tokens are often about as good, and so are experts. Greedy text
tips more easily than a trained model's, and one other token changes all that follow.
"""


# --- a state in pieces ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """What one segment holds, and whose it says it is."""

    identity: SegmentIdentity
    content: Tensor | KdaSnapshot

    @property
    def raw_bytes(self) -> int:
        """Before encoding."""
        if isinstance(self.content, Tensor):
            return self.content.nbytes
        return self.content.recurrent.nbytes + self.content.convolution.nbytes

    def encoded(self, codec: Codec) -> EncodedSegment:
        """As a segment."""
        if isinstance(self.content, Tensor):
            return encode_latents(self.identity, self.content, codec)
        return encode_snapshot(self.identity, self.content, codec)

    def decoded(self, data: bytearray, layout: StateLayout) -> Tensor | KdaSnapshot:
        """From such a segment."""
        if isinstance(self.content, Tensor):
            return decode_latents(data, self.identity, layout)
        return decode_snapshot(data, self.identity, layout)


def pieces_of_latents(latents: Tensor) -> list[Piece]:
    """Latents `[mla_layers, tokens, latent_dim]`, cut by tokens."""
    layers, tokens, _ = latents.shape
    most_tokens = max(1, SEGMENT_BYTES // latents[:, 0].nbytes)
    return [
        Piece(_identity(start, start + part.shape[1], 0, layers), part.contiguous())
        for start, part in zip(
            range(0, tokens, most_tokens), torch.split(latents, most_tokens, dim=1), strict=True
        )
    ]


def pieces_of_snapshot(snapshot: KdaSnapshot) -> list[Piece]:
    """The states of all KDA layers, cut by layers."""
    return [
        Piece(_identity(piece.length, piece.length, piece.first_layer, piece.layers), piece)
        for piece in snapshot.split(SEGMENT_BYTES)
    ]


def _identity(start: int, stop: int, first_layer: int, layers: int) -> SegmentIdentity:
    return SegmentIdentity(
        fingerprint="benchmark",
        producer="benchmark",
        epoch=1,
        start=start,
        stop=stop,
        parent_hash=bytes(16),
        prefix_hash=bytes(16),
        first_layer=first_layer,
        layers=layers,
    )


# --- size and speed ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of all pieces of one kind: median over the rounds."""

    ratio: float
    """Bytes before encoding by bytes of the segments."""
    encode: float
    """MB of the state before encoding, a second."""
    decode: float


def cost(pieces: Sequence[Piece], codec: Codec, layout: StateLayout, rounds: int) -> Cost:
    """Encode and decode all pieces, so many times."""
    raw_bytes = sum(piece.raw_bytes for piece in pieces)
    segments = [bytearray(piece.encoded(codec).data) for piece in pieces]

    def encode() -> None:
        for piece in pieces:
            piece.encoded(codec)

    def decode() -> None:
        for piece, data in zip(pieces, segments, strict=True):
            piece.decoded(data, layout)

    return Cost(
        ratio=raw_bytes / sum(map(len, segments)),
        encode=raw_bytes / 1e6 / _median_seconds(encode, rounds),
        decode=raw_bytes / 1e6 / _median_seconds(decode, rounds),
    )


def _median_seconds(work: Callable[[], None], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return median(seconds)


# --- what is lost --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loss:
    """Logits and text after a state that went through a codec, against the lossless state's."""

    largest_error: float
    """Of the logits after one token, |lossy - lossless| / |lossless| as vectors."""
    median_error: float
    agreement: float
    """Share of the tokens of the lossless text after which the most likely next one is the same."""
    divergence: int | None
    """First token at which the text differs when each follows its own."""


def losses(
    engine: Engine, parts: Sequence[Piece], first: int, choices: Sequence[Sequence[Codec]]
) -> list[Loss]:
    """Go on from the states that codecs leave, once with the lossless text and once freely.

    Args:
        engine: that goes on.
        parts: of the state.
        first: the token after it.
        choices: of each kind the first codec that is for it is taken.
    """
    every = [[ZSTD], *choices]
    with ExitStack() as held:
        states = [held.enter_context(restored(engine, parts, codecs)) for codecs in every]
        lossless_text, *texts = greedy(engine, first, states)
    lossless_logits, *logits = [
        logits_after(engine, parts, codecs, lossless_text) for codecs in every
    ]
    return [
        _loss(*found, lossless_logits, lossless_text) for found in zip(logits, texts, strict=True)
    ]


def _loss(logits: Tensor, text: list[int], lossless_logits: Tensor, lossless: list[int]) -> Loss:
    errors = (logits - lossless_logits).norm(dim=-1) / lossless_logits.norm(dim=-1)
    same = logits.argmax(dim=-1) == lossless_logits.argmax(dim=-1)
    differs = [one != other for one, other in zip(text, lossless, strict=True)]
    return Loss(
        largest_error=float(errors.max()),
        median_error=float(errors.median()),
        agreement=float(same.float().mean()),
        divergence=differs.index(True) if any(differs) else None,
    )


def restored(engine: Engine, parts: Sequence[Piece], codecs: Sequence[Codec]) -> RequestState:
    """A state from pieces that went each through the first of the codecs that is for its kind."""
    stop = max(piece.identity.stop for piece in parts)
    state = engine.new_state(stop + TEXT_TOKENS)
    for piece in parts:
        kind: SegmentKind = "mla" if isinstance(piece.content, Tensor) else "kda"
        codec = next(codec for codec in codecs if kind in codec.kinds)
        part = piece.decoded(bytearray(piece.encoded(codec).data), engine.layout)
        if isinstance(part, Tensor):
            state.import_latents(piece.identity.start, part)
        else:
            state.import_snapshot(part)
    state.finish_import(stop)
    return state


def greedy(engine: Engine, first: int, states: Sequence[RequestState]) -> list[list[int]]:
    """For each state the most likely tokens, of which the first is known."""
    texts = [[first] for _ in states]
    for _ in range(TEXT_TOKENS - 1):
        logits = engine.decode([text[-1] for text in texts], states)
        for text, token in zip(texts, logits.argmax(dim=-1).tolist(), strict=True):
            text.append(token)
    return texts


def logits_after(
    engine: Engine, parts: Sequence[Piece], codecs: Sequence[Codec], text: Sequence[int]
) -> Tensor:
    """Logits after each token of a text that follows the state, `[T, vocabulary]`."""
    with restored(engine, parts, codecs) as state:
        return engine.prefill_all_logits(text, state)


# --- tables --------------------------------------------------------------------------------------


def cost_table(
    parts: Sequence[tuple[str, SegmentKind, list[Piece], StateLayout]], rounds: int
) -> Iterator[str]:
    """A row for each codec of each kind and dtype."""
    yield f"{'state':24}{'codec':14}{'ratio':>8}{'encode MB/s':>14}{'decode MB/s':>14}"
    for name, kind, pieces, layout in parts:
        for codec in codecs_for(kind):
            found = cost(pieces, codec, layout, rounds)
            yield (
                f"{name:24}{codec.name:14}{found.ratio:8.2f}{found.encode:14.0f}{found.decode:14.0f}"
            )


def loss_table(engine: Engine, parts: Sequence[Piece], first: int) -> Iterator[str]:
    """A row for each lossy codec, and one for all of them together."""
    lossy = [codec for codec in CODECS if not codec.lossless]
    rows = [*([codec] for codec in lossy), lossy]
    yield f"{'codecs':28}{'largest':>10}{'median':>10}{'same next':>11}{'text differs':>14}"
    found = losses(engine, parts, first, [[*codecs, ZSTD] for codecs in rows])
    for codecs, lost in zip(rows, found, strict=True):
        where = "never" if lost.divergence is None else f"at {lost.divergence}"
        yield (
            f"{', '.join(codec.name for codec in codecs):28}{lost.largest_error:10.2e}"
            f"{lost.median_error:10.2e}{lost.agreement:11.1%}{where:>14}"
        )


def main() -> None:
    """Print the tables."""
    given = _parser().parse_args()
    model = given.model or random_checkpoint(given.workdir, given.preset)
    engine = Engine.load(model, "float32", threads=given.threads)
    with ExitStack() as held:
        state = held.enter_context(engine.new_state(given.tokens))
        first = int(engine.prefill([prompt_of(engine, given.tokens)], [state])[0].argmax())
        snapshot, latents = state.snapshot(), state.export_latents(0, given.tokens)
    narrow = replace(engine.layout, latent_dtype="bfloat16")
    parts: list[tuple[str, SegmentKind, list[Piece], StateLayout]] = [
        ("KDA states, fp32", "kda", pieces_of_snapshot(snapshot), engine.layout),
        ("latents, fp32", "mla", pieces_of_latents(latents.float()), engine.layout),
        ("latents, bf16", "mla", pieces_of_latents(latents.to(TORCH_DTYPES["bfloat16"])), narrow),
    ]
    print(Processor.of_this_machine())
    print(f"model {Path(model).name}, a random prompt of {given.tokens} tokens")
    print(f"one core, median of {given.rounds}, segments of at most {SEGMENT_BYTES >> 20} MiB\n")
    torch.set_num_threads(1)
    for line in cost_table(parts, given.rounds):
        print(line, flush=True)
    torch.set_num_threads(given.threads)
    print(f"\n{EXPLANATION}")
    for line in loss_table(engine, parts[0][2] + parts[1][2], first):
        print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codecs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="states of this model")
    parser.add_argument(
        "--preset",
        choices=get_args(PresetName),
        default="medium",
        help="of the random checkpoint that is written otherwise (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of the prompt (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", default=WORKDIR, help="(default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
