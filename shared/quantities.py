"""Amounts as people write them: `200M` bits a second, `40ms`."""

import re
from typing import Annotated, Final

from pydantic import BeforeValidator, Field

_BANDWIDTH: Final = re.compile(r"(\d+(?:\.\d+)?) ?([kmg]?)(?:bit/s|bps)?", re.IGNORECASE)
_BITS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s|)")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def parse_bandwidth(written: object) -> object:
    """Read bits a second; what is no text is left to be checked as a number.

    Raises:
        ValueError: the text is no bandwidth.
    """
    if not isinstance(written, str):
        return written
    match = _BANDWIDTH.fullmatch(written.strip())
    if match is None:
        raise ValueError("is not a bandwidth in bits a second, like 200M, 1.5G or 0")
    return float(match[1]) * _BITS[match[2].lower()]


def parse_duration(written: object) -> object:
    """Read seconds; what is no text is left to be checked as a number.

    Raises:
        ValueError: the text is no duration.
    """
    if not isinstance(written, str):
        return written
    match = _DURATION.fullmatch(written.strip())
    if match is None:
        raise ValueError("is not a time, like 40ms, 1.5s or 0")
    return float(match[1]) * _SECONDS[match[2]]


Bandwidth = Annotated[
    float,
    BeforeValidator(parse_bandwidth),
    Field(strict=True, ge=0, le=1e12, allow_inf_nan=False),
]
"""Bits a second, from a number or from text."""

Delay = Annotated[
    float, BeforeValidator(parse_duration), Field(strict=True, ge=0, le=60, allow_inf_nan=False)
]
"""Seconds up to a minute, from a number or from text."""

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
