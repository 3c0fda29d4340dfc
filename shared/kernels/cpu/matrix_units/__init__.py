"""Products on processors with units that multiply matrices of bf16 (Intel's AMX)."""
