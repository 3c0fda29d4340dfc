"""The `prfaas` command: finds the subcommand and says in words why it failed."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Final

from services.cli import complete, demo, doctor, init_model, up, wan
from services.cli.console import warn
from shared.errors import PrfaasError

Command = Callable[[list[str]], int]

COMMANDS: Final[dict[str, Command]] = {
    "up": up.run,
    "complete": complete.run,
    "doctor": doctor.run,
    "init-model": init_model.run,
    "demo": demo.run,
    "wan": wan.run,
}

_SUMMARY: Final = """\
  up          run a whole system on this machine
  complete    complete a text on a running system
  doctor      say what is missing or misconfigured
  init-model  write a model of random weights
  demo        start a system, complete a prompt, stop
  wan         forward connections over a link of limited bandwidth and delay
"""


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand and exit with its status."""
    given = _parser().parse_args(arguments)
    command: Command = COMMANDS[given.command]
    status = 1
    try:
        status = command(given.arguments)
    except* PrfaasError as failures:
        for failure in _leaves(failures):
            warn(f"prfaas: {failure}")
    except* KeyboardInterrupt:
        status = demo.INTERRUPTED_STATUS
    sys.exit(status)


def _leaves(failures: BaseExceptionGroup[PrfaasError]) -> Iterator[PrfaasError]:
    for failure in failures.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            yield from _leaves(failure)
        else:
            yield failure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfaas",
        description="Prefill-as-a-Service for Kimi Linear.",
        epilog=f"commands:\n{_SUMMARY}\n`prfaas COMMAND --help` lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    return parser


if __name__ == "__main__":
    main()
