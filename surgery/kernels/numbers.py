"""Bytes of tensors as numbers of numpy, which has no bfloat16."""

from __future__ import annotations

import numpy

from surgery.dtypes import DTYPES, DType


def widened(values: numpy.ndarray) -> numpy.ndarray:
    """Values of bfloat16, given as bytes or as they lie in 16 bits, in float32: its upper half."""
    return (values.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)


def in_float64(values: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    """The bytes of floats of `dtype`, in float64."""
    if dtype is DTYPES["BF16"]:
        return widened(values).astype(numpy.float64)
    own = {"F16": numpy.float16, "F32": numpy.float32, "F64": numpy.float64}[dtype.name]
    return values.view(own).astype(numpy.float64)
