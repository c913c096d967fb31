"""The kernels of compiled.c, built where a compiler was at hand when Surgery was installed.

They do in one pass over bfloat16 what the kernels of merging.py and selection.py do in many, and
give the same bits. Where they weren't built those do it, in up to three times the time. They take
bytes, as numpy's uint8, and no torch, which takes longer to import than many a model takes to merge.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy

from surgery.dtypes import DTYPES

if TYPE_CHECKING:
    from surgery.tensor import LazyTensor

MOST_MODELS = 16
"""As in compiled.c."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, or None where it wasn't built, or was for another system: an environment may
    have been copied, and torch gives the same bytes."""
    built = [Path(__file__).with_name(f"_compiled{suffix}") for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in built if path.is_file()), None)
    if found is None:
        return None
    try:
        loaded = ctypes.CDLL(str(found))
    except OSError:
        return None
    count, number, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    addresses, numbers = ctypes.POINTER(address), ctypes.POINTER(number)
    loaded.surgery_combine.restype = None
    loaded.surgery_combine.argtypes = [
        count, count, address, addresses, number, numbers, number, address
    ]  # fmt: skip
    loaded.surgery_trim.restype = None
    loaded.surgery_trim.argtypes = [
        count, count, address, addresses, numbers, numbers, ctypes.c_int, ctypes.c_int, number,
        number, number, address,
    ]  # fmt: skip
    loaded.surgery_window.restype = count
    loaded.surgery_window.argtypes = [
        count, address, address, numbers, ctypes.POINTER(count), address, ctypes.POINTER(count),
        ctypes.POINTER(ctypes.c_int),
    ]  # fmt: skip
    loaded.surgery_square.restype = ctypes.c_double
    loaded.surgery_square.argtypes = [count, address, address]
    loaded.surgery_finite.restype = ctypes.c_int
    loaded.surgery_finite.argtypes = [count, address]
    return loaded


def takes(tensors: Sequence[LazyTensor]) -> bool:
    """Whether there are kernels for these, which are of one shape."""
    return (
        len(tensors) <= 1 + MOST_MODELS
        and all(tensor.dtype is DTYPES["BF16"] for tensor in tensors)
        and library() is not None
    )


def combine(
    first: numpy.ndarray,
    others: Sequence[numpy.ndarray],
    start: float,
    steps: Sequence[float],
    scale: float,
) -> numpy.ndarray:
    """first + scale * (start * first + the sum of steps[i] * (others[i] - first)), in float32,
    rounded to bfloat16."""
    made = numpy.empty_like(first)
    _loaded().surgery_combine(
        len(first) // 2, len(others), first.ctypes.data, _addresses(others), start,
        _numbers(steps), scale, made.ctypes.data,
    )  # fmt: skip
    return made


def trim(
    first: numpy.ndarray,
    others: Sequence[numpy.ndarray],
    bounds: Sequence[tuple[float, float]],
    weights: Sequence[float],
    *,
    elect: bool,
    normalize: bool,
    divisor: float,
    least: float,
    scale: float,
) -> numpy.ndarray:
    """first + scale * the differences from it, of which those of a magnitude between their bounds
    stay, fused as `fuse` of merging.py does; in float32, rounded to bfloat16.

    Without `elect` the sum is divided by `divisor`. With `elect` and `normalize` it is divided by
    the weights that counted: at least by `least`, or, if that is 0, by 1 where they are 0.
    """
    made = numpy.empty_like(first)
    _loaded().surgery_trim(
        len(first) // 2, len(others), first.ctypes.data, _addresses(others),
        _numbers([bound for pair in bounds for bound in pair]), _numbers(weights), elect,
        normalize, divisor, least, scale, made.ctypes.data,
    )  # fmt: skip
    return made


class Counted(NamedTuple):
    """What `window` found."""

    below: int
    equal: list[int]
    near: numpy.ndarray
    finite: bool


def window(base: numpy.ndarray, model: numpy.ndarray, marks: Sequence[float]) -> Counted:
    """Of the magnitudes of model - base, in float32: how many are below the first of the up to
    three `marks`, which ascend, how many equal each, those between the first and the last that
    equal none, and whether all of them are finite."""
    places = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}[len(marks)]
    given = [nan] * 3
    for place, mark in zip(places, marks, strict=True):
        given[place] = mark
    equal = (ctypes.c_int64 * 3)()
    found, finite = ctypes.c_int64(), ctypes.c_int()
    near = numpy.empty(len(base) // 2, dtype=numpy.float32)
    below = _loaded().surgery_window(
        len(near), base.ctypes.data, model.ctypes.data, _numbers(given), equal, near.ctypes.data,
        ctypes.byref(found), ctypes.byref(finite),
    )  # fmt: skip
    return Counted(
        below, [equal[place] for place in places], near[: found.value].copy(), bool(finite.value)
    )


def square(base: numpy.ndarray, model: numpy.ndarray) -> float:
    """||model - base||^2: of differences in float32, summed up in float64."""
    found: float = _loaded().surgery_square(len(base) // 2, base.ctypes.data, model.ctypes.data)
    return found


def finite(values: numpy.ndarray) -> bool:
    """Whether every value is."""
    return bool(_loaded().surgery_finite(len(values) // 2, values.ctypes.data))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _addresses(arrays: Sequence[numpy.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _numbers(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)
