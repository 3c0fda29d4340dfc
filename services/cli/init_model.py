"""`prfaas init-model`: writes a model of random weights, to try the system without a download."""

import argparse
from pathlib import Path
from typing import get_args

from services.cli.console import say
from services.cli.errors import CommandError
from shared.kimi_linear.presets import PresetName, write_random_checkpoint


def run(arguments: list[str]) -> int:
    """Write the model directory; gives the exit status."""
    given = _parser().parse_args(arguments)
    try:
        write_random_checkpoint(given.directory, given.preset, given.seed)
    except OSError as error:
        raise CommandError(f"{given.directory}: {error.strerror}") from None
    say(f"{given.directory}: a {given.preset} model of random weights, seed {given.seed}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfaas init-model",
        description="Write a model of random weights in the published layout.",
    )
    parser.add_argument("directory", type=Path, help="made if it does not exist, else empty")
    parser.add_argument(
        "--preset",
        choices=get_args(PresetName),
        default="tiny",
        help="its size (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    return parser
