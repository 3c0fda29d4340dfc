"""How far results may be apart that are equal in exact arithmetic; fp32, logits of size about 10.

Largest differences seen are in `benchmarks/exactness.py`'s table.
"""

REFERENCE_LOGITS = 2e-3
"""From logits of an independent implementation."""
REFERENCE_STATE = 1e-4
SAME_MODEL_LOGITS = 5e-5
"""Between two orders of the same computation: chunks, batches, decode steps, hand-overs."""
