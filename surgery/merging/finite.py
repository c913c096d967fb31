"""Inputs that hold NaN or infinity: found as they are read, and named."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


def finite(model: Checkpoint, name: str) -> LazyTensor:
    """The tensor `name` of `model`, before it is rounded if it is a rounding (its `exact`), whose
    reading fails where it isn't finite: arithmetic would spread one NaN to its whole row, or drop
    it without a word."""
    tensor = model[name]
    return known_finite(tensor.exact or tensor, f"{name} of {model.source.reference}")


def known_finite(tensor: LazyTensor, where: str) -> LazyTensor:
    """`tensor`, called `where` in the error that its reading ends with if it isn't finite."""
    kernel = partial(_require_finite, where=where)
    return LazyTensor(tensor.shape, tensor.dtype, inputs=(tensor,), kernel=kernel)


def unchecked(tensor: LazyTensor) -> LazyTensor:
    """What `finite` was given: bytes that are only copied stay a copy from file to file."""
    checked = isinstance(tensor.kernel, partial) and tensor.kernel.func is _require_finite
    return tensor.inputs[0] if checked else tensor


def _require_finite(rows: torch.Tensor, *, where: str) -> torch.Tensor:
    if not rows.numel():
        return rows
    low, high = rows.aminmax()  # NaN if there is one; many times faster than isfinite
    if not float(low) > float("-inf") or not float(high) < float("inf"):
        raise FormatError(
            f"{where} holds NaN or infinity, and nothing can be computed of that: the file is "
            f"damaged, or training diverged"
        )
    return rows
