"""What moving states costs, and what hides it: everything in one run.

    python -m benchmarks.transport

(a) the speed of a socket, and ours beside it; (b) how much of a state's way is exposed after its
prefill, on shaped links; (c) what a chat sends with and without the prefix cache; (d) how much of a
link's bandwidth is used; and a trace of one request.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import uvloop

from benchmarks import pull_speed
from benchmarks.chat_bytes import ANSWER_TOKENS, QUESTION_TOKENS, TURNS, ChatBytes, measure_chat
from benchmarks.checkpoint import random_checkpoint
from benchmarks.kept_files import WORKDIR
from benchmarks.link_use import measure_link_use
from benchmarks.overlap import Overlap, measure_overlap
from benchmarks.processor import Processor
from benchmarks.request_trace import trace_lines
from benchmarks.two_regions import LINKS, TwoRegions, megabytes, table_row, two_regions
from benchmarks.valkey_server import valkey_server
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine, Room

LENGTHS: Final = (2048, 8192, 16384)
VALUE_BYTES: Final = 64 * 2**20


async def pull_speeds(rounds: int) -> AsyncIterator[str]:
    """(a) Ours beside a raw socket and redis-py."""
    yield "(a) a local Valkey"
    with valkey_server() as server:
        for line in pull_speed.table(await pull_speed.measure(server.urls, rounds=rounds)):
            yield line


async def overlaps(
    regions: TwoRegions, model: Path, lengths: tuple[int, ...]
) -> AsyncIterator[str]:
    """(b) What of a state's way is exposed, and a trace of the last request."""
    engine = Engine.load(model, "float32", threads=2, room=Room(1, max(lengths) + 64))
    yield "(b) from the end of prefill to the first decoded token; serial: published, then pulled"
    yield table_row("", "prefill", "exposed", "publish", "pull", "exposed part")
    last: Overlap | None = None
    for number, link in enumerate(LINKS):
        for length in lengths:
            last = await measure_overlap(regions, engine, link, length, 1000 * number + length)
            seconds = (last.prefill, last.exposed, last.publish, last.pull)
            yield table_row(
                f"{link}, {length} tokens",
                *(f"{part:.3f} s" for part in seconds),
                f"{last.exposed / last.serial:.1%}",
            )
    if last is not None:
        yield f"a request of {last.tokens} tokens over {last.link}"
        for line in trace_lines(regions, last.answer):
            yield line


async def chats(model: Path) -> AsyncIterator[str]:
    """(c) The same chat, without and with the prefix cache."""
    yield (
        f"(c) a chat of {TURNS} turns, {QUESTION_TOKENS} tokens asked and {ANSWER_TOKENS} answered "
        "in each"
    )
    yield table_row("", "to prefill", "from prefill", "cached tokens")
    measured: list[ChatBytes] = []
    for prefix_cache in (False, True):
        async with two_regions(model, LINKS[0], prefix_cache=prefix_cache) as regions:
            vocabulary = KimiLinearConfig.from_directory(model).vocab_size
            measured.append(await measure_chat(regions, vocabulary))
        yield _chat_row("with cache" if prefix_cache else "without cache", measured[-1])
    without, with_cache = measured
    yield table_row(
        "without / with",
        f"{without.to_prefill / with_cache.to_prefill:.2f}",
        f"{without.from_prefill / with_cache.from_prefill:.2f}",
    )
    yield "the same was said" if without.text == with_cache.text else "OTHER TEXT WAS SAID"


def _chat_row(name: str, chat: ChatBytes) -> str:
    cached = f"{sum(chat.cached_tokens)} of {sum(chat.prompt_tokens)}"
    return table_row(name, megabytes(chat.to_prefill), megabytes(chat.from_prefill), cached)


async def link_uses(regions: TwoRegions) -> AsyncIterator[str]:
    """(d) One large value over each link."""
    yield f"(d) one value of {VALUE_BYTES / 2**20:g} MiB over a link"
    for link in LINKS:
        use = await measure_link_use(regions, link, VALUE_BYTES)
        yield table_row(str(link), f"{use.seconds:.2f} s", f"{use.part:.1%} used")


async def _report(arguments: argparse.Namespace) -> None:
    model = random_checkpoint(arguments.workdir)
    chat_model = random_checkpoint(arguments.workdir, "small")
    print(Processor.of_this_machine(), flush=True)
    await _print(pull_speeds(arguments.rounds))
    async with two_regions(model, LINKS[0], prefill_threads=2) as regions:
        await _print(overlaps(regions, model, tuple(arguments.prompt)))
        await _print(link_uses(regions))
    await _print(chats(chat_model))


async def _print(lines: AsyncIterator[str]) -> None:
    print()
    async for line in lines:
        print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompt", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=pull_speed.ROUNDS)
    parser.add_argument("--workdir", type=Path, default=WORKDIR, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_report(arguments))


if __name__ == "__main__":
    main()
