"""Kernels for the CPU, written in torch operations."""
