"""How far results may be apart, in one place.

In brackets: the most that was seen, on a processor with AVX2 and one thread. The reference model's
logits have a standard deviation of 1, the largest is about 5. `python -m benchmarks.exactness`
measures the differences between orders of computation, and those of narrow weights.
"""

from typing import Final

from shared.kernels.dtypes import WeightDType

REFERENCE_LOGITS: Final = 2e-4
"""Of fp32 logits from those of an independent implementation (2.3e-5)."""
REFERENCE_STATE: Final = 1e-4
"""Of a number in a state from that of an independent implementation (2.0e-5)."""

SAME_MODEL_LOGITS: Final = 5e-5
"""Of fp32 logits between two orders of the same computation: chunks, batches, steps (7.4e-6)."""

# What narrow weights do to logits, against those of fp32 weights, in any 1,024 successive tokens.
# A token's error is relative, |narrow - wide| / |wide| over its logits as vectors; agreement is the
# share of tokens with the same most likely next one.

DRIFT_MEDIAN_ERROR: Final[dict[WeightDType, float]] = {"bfloat16": 0.12, "int8": 0.20}
"""(0.085 and 0.14)"""
DRIFT_AGREEMENT: Final[dict[WeightDType, float]] = {"bfloat16": 0.68, "int8": 0.58}
"""(0.73 and 0.66)"""
DRIFT_GROWTH: Final = 1.3
"""Of the median error from the first to the second half of 8,192 tokens (1.1)."""

ROUNDING_ERROR: Final[dict[WeightDType, float]] = {"bfloat16": 0.10, "int8": 0.20}
"""Of every single token, with the experts that fp32 weights choose (0.052 and 0.11)."""
ROUNDING_AGREEMENT: Final[dict[WeightDType, float]] = {"bfloat16": 0.92, "int8": 0.88}
"""With the experts that fp32 weights choose (0.96 and 0.92)."""
