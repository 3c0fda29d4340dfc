"""Compiles the CPU kernels of every width of weights, for where nothing can be kept later.

    python -m shared.compile_kernels

An image is built with it: its containers have a read-only file system.
"""

from typing import Final, get_args

import models
from shared.kernels.dtypes import WeightDType
from shared.kimi_linear.engine import Engine, Room

ROOM: Final = Room(slots=2, tokens=1024)


def main() -> None:
    """Compile all; what is compiled already is left as it is."""
    for dtype in get_args(WeightDType):
        Engine.load(models.TINY, dtype, room=ROOM).warm_up()


if __name__ == "__main__":
    main()
