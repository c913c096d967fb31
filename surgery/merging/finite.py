"""Inputs that hold NaN or infinity: found as they are read, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError
from surgery.files import as_bytes
from surgery.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy
    import torch

Inputs = tuple[LazyTensor, ...]
Kernel = Callable[..., "torch.Tensor"]
Tally = Callable[..., tuple["torch.Tensor", float]] | None
Measure = Callable[[Inputs], Any]


def finite(model: Checkpoint, name: str) -> LazyTensor:
    """`values_of` whose reading fails where they aren't finite: arithmetic would spread one NaN to
    its whole row, or drop it without a word."""
    return known_finite(values_of(model, name), called(model, name))


def values_of(model: Checkpoint, name: str) -> LazyTensor:
    """The tensor `name` of `model`, before it is rounded if it is a rounding (its `exact`)."""
    tensor = model[name]
    return tensor.exact or tensor


def called(model: Checkpoint, name: str) -> str:
    """What a tensor is called in an error."""
    return f"{name} of {model.source.reference}"


def known_finite(tensor: LazyTensor, where: str) -> LazyTensor:
    """`tensor`, called `where` in the error that its reading ends with if it isn't finite."""
    from surgery.kernels import compiled

    return LazyTensor(
        tensor.shape,
        tensor.dtype,
        inputs=(tensor,),
        kernel=partial(_require_finite, where=where),
        direct=_if_finite if compiled.takes((tensor,)) else None,
    )


def unchecked(tensor: LazyTensor) -> LazyTensor:
    """What `finite` was given: bytes that are only copied stay a copy from file to file."""
    return tensor.inputs[0] if _check_of(tensor) is not None else tensor


def names_of(inputs: Inputs) -> tuple[str | None, ...]:
    """What each is called if reading it fails where it isn't finite; None if it doesn't."""
    checks = map(_check_of, inputs)
    return tuple(None if check is None else check.keywords["where"] for check in checks)


def require_finite(rows: Sequence[torch.Tensor], names: Sequence[str | None]) -> None:
    """Raise FormatError if some rows with a name aren't finite."""
    for part, name in zip(rows, names, strict=True):
        if name is not None:
            _require_finite(part, where=name)


def checked_after(
    inputs: Inputs, kernel: Kernel, tally: Tally = None
) -> tuple[Inputs, Kernel, Tally]:
    """Inputs that are looked at only where the rows made of them aren't finite: one look in the
    place of one at every input. For kernels in which whatever isn't finite shows in the result."""
    names = names_of(inputs)
    if not any(names):
        return inputs, kernel, tally
    return tuple(map(unchecked, inputs)), *looking_after(names, kernel, tally)


def looking_after(
    names: tuple[str | None, ...], kernel: Kernel, tally: Tally = None
) -> tuple[Kernel, Tally]:
    """A kernel and a tally that look at their inputs, called `names`, where what they make isn't
    finite. One without a name isn't looked at."""
    return (
        partial(_look_after, kernel=kernel, names=names),
        None if tally is None else partial(_tally_after, tally=tally, names=names),
    )


def checked_in_measure(inputs: Inputs, measure: Measure) -> tuple[Inputs, Measure]:
    """Inputs that are looked at as they are measured, and not again by the kernel."""
    checked = partial(_measure_checked, measure=measure, checked=inputs)
    return tuple(map(unchecked, inputs)), checked


def _check_of(tensor: LazyTensor) -> partial[torch.Tensor] | None:
    kernel = tensor.kernel
    return kernel if isinstance(kernel, partial) and kernel.func is _require_finite else None


def _look_after(
    *rows: torch.Tensor,
    kernel: Callable[..., torch.Tensor],
    names: Sequence[str | None],
    **options: Any,
) -> torch.Tensor:
    made = kernel(*rows, **options)
    if not _is_finite(made):  # or they were all finite, and the result is too large for its type
        require_finite(rows, names)
    return made


def _tally_after(
    *rows: torch.Tensor,
    tally: Callable[..., tuple[torch.Tensor, float]],
    names: Sequence[str | None],
) -> tuple[torch.Tensor, float]:
    made, number = tally(*rows)
    if not _is_finite(made):
        require_finite(rows, names)
    return made, number


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


def _if_finite(values: numpy.ndarray) -> numpy.ndarray | None:
    from surgery.kernels import compiled

    return values if compiled.finite(values) else None


def _is_finite(rows: torch.Tensor) -> bool:
    import numpy
    import torch

    from surgery.kernels import compiled

    if not rows.numel():
        return True
    if rows.dtype == torch.bfloat16 and rows.is_contiguous() and compiled.library() is not None:
        return compiled.finite(numpy.frombuffer(as_bytes(rows), numpy.uint8))
    low, high = rows.aminmax()  # NaN if there is one; many times faster than isfinite
    return float(low) > float("-inf") and float(high) < float("inf")
