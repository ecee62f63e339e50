"""Kernels for CUDA, compiled by Triton at first use: one file per op, each with the meaning of the plain op beside it.

Nothing here is imported before `longspan.ops.kernels` has chosen it: the base install has no Triton on machines without
a GPU.
"""
