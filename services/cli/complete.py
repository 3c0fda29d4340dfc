"""`prfaas complete`: asks a running system for a completion and shows it as it comes."""

import argparse
import asyncio
import sys
from typing import Final

from services.cli.completion_stream import CompletionOptions, stream_completion
from services.cli.timeline import timeline

DEFAULT_URL: Final = "http://127.0.0.1:8000"


def run(arguments: list[str]) -> int:
    """Print one completion and where its time went; gives the exit status."""
    given = _parser().parse_args(arguments)
    options = CompletionOptions(
        url=given.url.rstrip("/"),
        prompt=given.prompt,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        seed=given.seed,
    )
    asyncio.run(show_completion(options, shows_timeline=not given.no_timeline))
    return 0


async def show_completion(options: CompletionOptions, *, shows_timeline: bool = True) -> None:
    """Print a completion as it comes, then its timeline.

    Raises:
        CommandError: there is no completion, or only a part of one.
    """
    printer = _Printer()
    try:
        summary = await stream_completion(options, printer.take)
    finally:
        printer.end_line()
    if shows_timeline:
        print(f"\n{timeline(summary)}", flush=True)


def printable(text: str) -> str:
    """Make control characters visible: a model's text must not steer the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}"
        for letter in text
    )


class _Printer:
    """Prints text as it comes; a program at the other end of a pipe gets it unchanged."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._printed = False

    def take(self, text: str) -> None:
        print(printable(text) if self._is_terminal else text, end="", flush=True)
        self._printed = self._printed or bool(text)

    def end_line(self) -> None:
        if self._printed:
            print(flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfaas complete",
        description="Complete a text, streamed, and show where the time went.",
    )
    parser.add_argument("prompt", help="the text to complete")
    parser.add_argument("--url", default=DEFAULT_URL, help="gateway (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="tokens to write at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, help="0 takes the likeliest token; the server's if unset"
    )
    parser.add_argument("--seed", type=int, help="makes sampling repeatable; random if unset")
    parser.add_argument("--no-timeline", action="store_true", help="print the text alone")
    return parser
