"""Kernels for NVIDIA GPUs, written in Triton.

What was verified: each kernel gives what its plain form gives, and the whole model through them the
reference's logits, in Triton's interpreter; and each compiles for sm_80 and sm_90 at the published
model's shapes within the shared memory of a block (`python -m benchmarks.compiled_kernels` prints
how much each takes). The tests make the interpreter's matrix products in bf16 and tf32 what those
of tensor cores are.

What was not: none of them has run on a GPU, and their speed is unmeasured.

Only `dispatch` imports from here, for a CUDA device: a run on a CPU never loads Triton.
"""
