"""The kernels of compiled.c, built where a compiler was at hand when Surgery was installed.

They do in one pass over bfloat16 what the kernels of merging.py, updates.py and selection.py do in
many, and give the same bits. Where they weren't built those do it, in a multiple of the time. They
take bytes, as numpy's uint8, and no torch, which takes longer to import than many a model takes to
merge.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from surgery.dtypes import DTYPES

if TYPE_CHECKING:
    from surgery.tensor import LazyTensor

MOST_MODELS, TILE, INTERFACE = 16, 512, 1
"""As in compiled.c."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, or None where it wasn't built, or was for another system or another state of
    compiled.c: an environment may have been copied, or the source changed without being installed
    anew, and torch gives the same bytes."""
    built = [Path(__file__).with_name(f"_compiled{suffix}") for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in built if path.is_file()), None)
    if found is None:
        return None
    try:
        loaded = ctypes.CDLL(str(found))
        interface = ctypes.c_int.in_dll(loaded, "surgery_interface").value
    except (OSError, ValueError):  # of another system; from before there was a number
        return None
    if interface != INTERFACE:
        return None
    count, number, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    addresses, numbers = ctypes.POINTER(address), ctypes.POINTER(number)
    fusing = ctypes.POINTER(Fusing)
    taken = {
        "combine": [count, count, address, addresses, number, numbers, number, address],
        "trim": [count, count, address, addresses, numbers, numbers, fusing, address],
        "drop": [
            count, count, count, address, addresses, addresses, numbers, numbers, ctypes.c_int,
            numbers, fusing, address, address, address,
        ],
        "noise": [count, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), address],
        "window": [
            count, address, address, numbers, ctypes.POINTER(count), address,
            ctypes.POINTER(count), ctypes.POINTER(ctypes.c_int),
        ],
        "products": [count, address, address, address, address],
        "finite": [count, address],
    }  # fmt: skip
    made = {"window": count, "finite": ctypes.c_int}
    for name, types in taken.items():
        function = getattr(loaded, f"surgery_{name}")
        function.argtypes, function.restype = types, made.get(name)
    return loaded


class Fusing(ctypes.Structure):
    """How weighted task vectors become one, as in compiled.c: added up and divided by `divisor`;
    or, with `elect`, those of the elected signs, and with `normalize` divided by the weights that
    counted: at least by `least`, or, if that is 0, by 1 where they are 0. Then times `scale`."""

    _fields_ = [
        ("elect", ctypes.c_int),
        ("normalize", ctypes.c_int),
        ("divisor", ctypes.c_float),
        ("least", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


def takes(tensors: Sequence[LazyTensor]) -> bool:
    """Whether there are kernels for these: of one shape, in bfloat16."""
    shape = tensors[0].shape
    return (
        len(tensors) <= 1 + MOST_MODELS
        and all(one.dtype is DTYPES["BF16"] and one.shape == shape for one in tensors)
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
    made, count = numpy.empty_like(first), len(first) // 2
    _loaded().surgery_combine(
        count, len(others), _address(first, count), _addresses(others, count), start,
        _numbers(steps), scale, _address(made, count),
    )  # fmt: skip
    return made


def trim(
    first: numpy.ndarray,
    others: Sequence[numpy.ndarray],
    bounds: Sequence[tuple[float, float]],
    weights: Sequence[float],
    fusing: Fusing,
) -> numpy.ndarray:
    """first + the differences from it, of which those of a magnitude between their bounds stay,
    weighted and fused; in float32, rounded to bfloat16."""
    made, count = numpy.empty_like(first), len(first) // 2
    _loaded().surgery_trim(
        count, len(others), _address(first, count), _addresses(others, count),
        _numbers([bound for pair in bounds for bound in pair]), _numbers(weights),
        ctypes.byref(fusing), _address(made, count),
    )  # fmt: skip
    return made


class Odds(NamedTuple):
    """With what probability entries of a model are kept: the same for all where `slope` is None,
    or by the rank of their magnitude in a row: `density` and `slope` more for each smaller one."""

    density: float
    slope: float | None


def drop(
    first: numpy.ndarray,
    others: Sequence[numpy.ndarray],
    noises: Sequence[numpy.ndarray | None],
    odds: Sequence[Odds],
    weights: Sequence[float],
    fusing: Fusing,
    *,
    width: int,
    rescale: bool,
) -> numpy.ndarray:
    """first + the differences from it, dropped at random, weighted and fused; in float32, rounded
    to bfloat16. Rows are of `width`. `noises` is uniform in [-1, 1), in float32 and as bytes; None
    for a model of which nothing is dropped. With `rescale` what is kept is divided by its odds, of
    which either all have a slope or none."""
    made, count, models = numpy.empty_like(first), len(first) // 2, len(others)
    ranked = odds[0].slope is not None
    # the scratch is this call's own: so kernels know nothing of threads
    pairs = numpy.empty(2 * width if ranked else 0, dtype=numpy.uint64)
    kept = numpy.empty(models * width if ranked else 0, dtype=numpy.float32)
    _loaded().surgery_drop(
        count, width if ranked else max(1, count), models, _address(first, count),
        _addresses(others, count),
        (ctypes.c_void_p * models)(
            *(None if noise is None else _address(noise, count, 4) for noise in noises)
        ),
        _numbers([one.density for one in odds]),
        _numbers([one.slope or 0.0 for one in odds]) if ranked else None,
        rescale, _numbers(weights), ctypes.byref(fusing), pairs.ctypes.data, kept.ctypes.data,
        _address(made, count),
    )  # fmt: skip
    return made


def noise(count: int, first: int, generator: numpy.random.PCG64DXSM) -> numpy.ndarray:
    """The noise of `count` entries from the `first` on, uniform in [-1, 1), in float32 and as
    bytes. The generator stands at the step of the first one."""
    known: Any = generator.state["state"]
    wide = known["state"], known["inc"]
    halves = [number >> shift & (1 << 64) - 1 for number in wide for shift in (64, 0)]
    made = numpy.empty(count, dtype=numpy.float32)
    _loaded().surgery_noise(count, first % 2, (ctypes.c_uint64 * 4)(*halves), made.ctypes.data)
    return made.view(numpy.uint8)


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
    count = len(base) // 2
    near = numpy.empty(count, dtype=numpy.float32)
    below = _loaded().surgery_window(
        count, _address(base, count), _address(model, count), _numbers(given), equal,
        near.ctypes.data, ctypes.byref(found), ctypes.byref(finite),
    )  # fmt: skip
    return Counted(
        below, [equal[place] for place in places], near[: found.value].copy(), bool(finite.value)
    )


def products(
    one: numpy.ndarray, other: numpy.ndarray, base: numpy.ndarray | None = None
) -> numpy.ndarray:
    """The sums of one * other in float64, or of (one - base) * (other - base), of entries TILE
    apart: (TILE,)."""
    count, sums = len(one) // 2, numpy.empty(TILE, dtype=numpy.float64)
    start = None if base is None else _address(base, count)
    _loaded().surgery_products(
        count, start, _address(one, count), _address(other, count), sums.ctypes.data
    )
    return sums


def finite(values: numpy.ndarray) -> bool:
    """Whether every value is."""
    count = len(values) // 2
    return bool(_loaded().surgery_finite(count, _address(values, count)))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _address(values: numpy.ndarray, count: int, width: int = 2) -> int:
    """Where `count` values of so many bytes lie, and no fewer: C would read on."""
    assert values.nbytes == count * width
    assert values.flags.c_contiguous
    return values.ctypes.data


def _addresses(arrays: Sequence[numpy.ndarray], count: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(_address(array, count) for array in arrays))


def _numbers(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)
