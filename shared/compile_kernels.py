"""Compiles the CPU kernels of every width of weights, for where nothing can be kept later.

    python -m shared.compile_kernels

An image is built with it: its containers have a read-only file system.
"""

from tempfile import TemporaryDirectory
from typing import Final, get_args

import models
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.presets import write_random_checkpoint

ROOM: Final = Room(slots=2, tokens=1024)


def main() -> None:
    """Compile all; what is compiled already is left as it is.

    Heads of one model are made of whole tiles of matrix units, as those of large models are, and
    those of the other are not.
    """
    with TemporaryDirectory() as whole:
        write_random_checkpoint(whole, "tiny")
        for dtype in get_args(WeightDType):
            for model in (models.TINY, whole):
                Engine.load(model, dtype, room=ROOM).warm_up()


if __name__ == "__main__":
    main()
