"""Arithmetic on tensors: no names, no files, the paper cited.

Every kernel computes in float32 (float64 for float64 inputs) and rounds once. It uses only
single operations that IEEE 754 rounds correctly (add, subtract, multiply; no `lerp`, `addcmul` or
`alpha=`, which fuse on some processors and in some vector widths), so that the same rows give
the same bits on every machine, at any thread count and in any blocks.
"""
