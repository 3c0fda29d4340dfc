"""Kernels for NVIDIA GPUs, written in Triton.

What was verified: each kernel gives what its plain form gives, and the whole model through them the
reference's logits, in Triton's interpreter; and each compiles for sm_80 and sm_90 at the published
model's shapes within the shared memory of a block (`python -m benchmarks.compiled_kernels` prints
how much each takes). The interpreter multiplies the bits of bf16 as integers, so there matrix
products are tested in fp32 and fp16.

What was not: none of them has run on a GPU, their products of bf16 are untested, and their speed is
unmeasured.

Only `dispatch` imports from here, for a CUDA device: a run on a CPU never loads Triton.
"""
