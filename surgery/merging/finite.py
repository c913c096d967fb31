"""Inputs that hold NaN or infinity: found as they are read, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

Inputs = tuple[LazyTensor, ...]
Kernel = Callable[..., "torch.Tensor"]
Tally = Callable[..., tuple["torch.Tensor", float]] | None
Measure = Callable[[Inputs], Any]


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
    return tensor.inputs[0] if _check_of(tensor) is not None else tensor


def checked_after(
    inputs: Inputs, kernel: Kernel, tally: Tally = None
) -> tuple[Inputs, Kernel, Tally]:
    """Inputs that are looked at only where the rows made of them aren't finite: one look in the
    place of one at every input. For kernels in which whatever isn't finite shows in the result."""
    checks = tuple(map(_check_of, inputs))
    if not any(checks):
        return inputs, kernel, tally
    return (
        tuple(map(unchecked, inputs)),
        partial(_look_after, kernel=kernel, checks=checks),
        None if tally is None else partial(_tally_after, tally=tally, checks=checks),
    )


def checked_in_measure(inputs: Inputs, measure: Measure) -> tuple[Inputs, Measure]:
    """Inputs that are looked at as they are measured, and not again by the kernel."""
    checked = partial(_measure_checked, measure=measure, checked=inputs)
    return tuple(map(unchecked, inputs)), checked


Check = Callable[["torch.Tensor"], "torch.Tensor"]


def _check_of(tensor: LazyTensor) -> Check | None:
    kernel = tensor.kernel
    checks = isinstance(kernel, partial) and kernel.func is _require_finite
    return kernel if checks else None


def _look_after(
    *rows: torch.Tensor,
    kernel: Callable[..., torch.Tensor],
    checks: Sequence[Check | None],
    **options: Any,
) -> torch.Tensor:
    made = kernel(*rows, **options)
    if not _is_finite(made):  # or they were all finite, and the result is too large for its type
        _check_all(rows, checks)
    return made


def _tally_after(
    *rows: torch.Tensor,
    tally: Callable[..., tuple[torch.Tensor, float]],
    checks: Sequence[Check | None],
) -> tuple[torch.Tensor, float]:
    made, number = tally(*rows)
    if not _is_finite(made):
        _check_all(rows, checks)
    return made, number


def _check_all(rows: Sequence[torch.Tensor], checks: Sequence[Check | None]) -> None:
    for part, check in zip(rows, checks, strict=True):
        if check is not None:
            check(part)


def _measure_checked(
    _: tuple[LazyTensor, ...],
    *,
    measure: Callable[[tuple[LazyTensor, ...]], Any],
    checked: tuple[LazyTensor, ...],
) -> Any:
    return measure(checked)


def _require_finite(rows: torch.Tensor, *, where: str) -> torch.Tensor:
    if not _is_finite(rows):
        raise FormatError(
            f"{where} holds NaN or infinity, and nothing can be computed of that: the file is "
            f"damaged, or training diverged"
        )
    return rows


def _is_finite(rows: torch.Tensor) -> bool:
    if not rows.numel():
        return True
    low, high = rows.aminmax()  # NaN if there is one; many times faster than isfinite
    return float(low) > float("-inf") and float(high) < float("inf")
