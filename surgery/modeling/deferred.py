"""Weights that aren't there yet: tensors that remember how they come about from lazy ones.

transformers' loader renames tensors, casts them, and stacks, splits or turns them on the way into
a model. Given deferred tensors it does all that as ever, and nothing is read: what it did is
recorded, and done when the weight is needed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from surgery.tensor import FileSpan, LazyTensor

_aten = torch.ops.aten
_CAST, _STACK, _CAT = _aten._to_copy.default, _aten.stack.default, _aten.cat.default
_SAME = (_aten.detach.default, _aten.alias.default)
_KNOWN_LATER = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_local = threading.local()


class UndeferrableError(Exception):
    """The loader did something to a weight that can't be put off."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation on deferred tensors; the result number `part` if it has several."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    part: int | None = None


class Deferred(torch.Tensor):
    """A tensor with a shape and a type, and the recipe of its values: a lazy tensor, or a step.

    Where an operation needs the values outside of `recording`, they are made for it (`made_by`).
    """

    recipe: LazyTensor | Step
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, tensor: LazyTensor) -> Deferred:
        """The values of a lazy tensor."""
        like = torch.empty(tensor.shape, dtype=tensor.dtype.torch, device="meta")
        return cls.made(tensor, like)

    @classmethod
    def made(
        cls, recipe: LazyTensor | Step, like: torch.Tensor, device: torch.device | str = "cpu"
    ) -> Deferred:
        """What `recipe` makes, of the shape and type of `like`."""
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device(device)
        )
        made.recipe = recipe
        return made

    def on(self, device: torch.device | str) -> Deferred:
        """The same values, to be made on that device."""
        return Deferred.made(self.recipe, _shape_only(self), device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0].on(args[0].device)
        if getattr(_local, "failures", None) is None or _needs_values(func, args):
            return func(*_mapped(args, values_of), **_mapped(kwargs, values_of))
        if func._schema.is_mutable and not _mutates_none_of_ours(func, args, kwargs):
            raise _failure(f"{func} writes into a weight")
        if func._schema.is_mutable:
            return func(*_mapped(args, values_of), **_mapped(kwargs, values_of))
        return _recorded(func, args, kwargs)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Inside it, in this thread, operations on deferred tensors are put off. Raises
    UndeferrableError at its end if one couldn't be, even if its own error was swallowed."""
    _local.failures = []
    try:
        yield
    except Exception as error:
        if _local.failures:
            raise _local.failures[0] from error
        raise
    else:
        if _local.failures:
            raise _local.failures[0]
    finally:
        _local.failures = None


class Means(Protocol):
    """How values are made on `device`: lazy tensors read whole, in their own type or another, and
    memory."""

    @property
    def device(self) -> torch.device: ...

    def read(self, tensor: LazyTensor, dtype: torch.dtype | None) -> torch.Tensor: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True)
class Plain:
    """Means of torch alone."""

    device: torch.device

    def read(self, tensor: LazyTensor, dtype: torch.dtype | None) -> torch.Tensor:
        return tensor.whole().to(device=self.device, dtype=dtype)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)


def evaluate(deferred: Deferred, means: Means) -> torch.Tensor:
    """The values, to be made `apart`."""
    recipe = deferred.recipe
    if isinstance(recipe, LazyTensor):
        return means.read(recipe, None)
    if recipe.func is _CAST and isinstance(source := recipe.args[0].recipe, LazyTensor):
        return means.read(source, recipe.kwargs.get("dtype"))
    if _joins(deferred):
        out = means.empty(deferred.shape, deferred.dtype)
        _fill(out, deferred, means)
        return out

    def value(item: Any) -> Any:
        if isinstance(item, Deferred):
            return evaluate(item, means)
        if isinstance(item, torch.Tensor):
            return item.to(means.device)
        return means.device if isinstance(item, torch.device) else item

    result = recipe.func(*_mapped(recipe.args, value), **_mapped(recipe.kwargs, value))
    made: torch.Tensor = result if recipe.part is None else result[recipe.part]
    return made


def _joins(deferred: Deferred) -> bool:
    """Whether the values are those of other deferred tensors side by side: packed experts."""
    recipe = deferred.recipe
    if isinstance(recipe, LazyTensor) or recipe.func not in (_STACK, _CAT):
        return False
    return deferred.is_contiguous() and all(
        isinstance(part, Deferred) and part.dtype == deferred.dtype and part.dim() > 0
        for part in recipe.args[0]
    )


def _fill(out: torch.Tensor, deferred: Deferred, means: Means) -> None:
    """Put the values into `out`. Of what is joined one part is in memory besides, not all."""
    if not _joins(deferred):
        out.copy_(evaluate(deferred, means))
        return
    assert isinstance(deferred.recipe, Step)
    parts, dim = (*deferred.recipe.args, 0)[:2]
    at = 0
    for number, part in enumerate(parts):
        if deferred.recipe.func is _STACK:
            _fill(out.select(dim, number), part, means)
        else:
            _fill(out.narrow(dim, at, part.shape[dim]), part, means)
            at += part.shape[dim]


def sources(deferred: Deferred) -> Iterator[LazyTensor]:
    """The lazy tensors that the values are made of."""
    if isinstance(deferred.recipe, LazyTensor):
        yield deferred.recipe
        return
    for item in _flat((deferred.recipe.args, deferred.recipe.kwargs)):
        if isinstance(item, Deferred):
            yield from sources(item)


def same_values(deferred: Deferred) -> Hashable:
    """A key that two deferred tensors share only if their values are the same: the same bytes of
    a file, or the same lazy tensor, and the same steps."""
    recipe = deferred.recipe
    if isinstance(recipe, LazyTensor):
        if isinstance(recipe.leaf, FileSpan):
            return recipe.leaf, recipe.shape, recipe.dtype
        return id(recipe)
    steps = (_hashable(recipe.args), _hashable(recipe.kwargs))
    return (str(recipe.func), *steps, recipe.part)


def _hashable(item: Any) -> Hashable:
    if isinstance(item, Deferred):
        return same_values(item)
    if isinstance(item, torch.Tensor):
        return id(item)
    if isinstance(item, (tuple, list)):
        return tuple(_hashable(one) for one in item)
    if isinstance(item, Mapping):
        return tuple((key, _hashable(one)) for key, one in sorted(item.items()))
    return str(item)


def _recorded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation, put off: its shape is found without values."""

    def shape_of(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return _shape_only(item)
        return torch.device("meta") if isinstance(item, torch.device) else item

    try:
        shapes = func(*_mapped(args, shape_of), **_mapped(kwargs, shape_of))
    except NotImplementedError as error:
        raise _failure(f"{func} has no result before its values are there") from error
    if isinstance(shapes, torch.Tensor):
        return Deferred.made(Step(func, args, kwargs), shapes)
    return type(shapes)(
        Deferred.made(Step(func, args, kwargs, part), shape) for part, shape in enumerate(shapes)
    )


def _needs_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether what it returns, or the shape of that, hangs on values (`equal`, `item`)."""
    if func is _aten.index.Tensor:  # by numbers its shape is known, by a mask it isn't
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if any(tag in func.tags for tag in _KNOWN_LATER):
        return True
    return not all("Tensor" in str(result.type) for result in func._schema.returns)


def _mutates_none_of_ours(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    written = (a.name for a in func._schema.arguments if a.is_write)
    return not any(isinstance(item, Deferred) for n in written for item in _flat(given.get(n)))


def _failure(why: str) -> UndeferrableError:
    error = UndeferrableError(why)
    _local.failures.append(error)
    return error


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside it weights are made as if no model was running: they are ordinary tensors, and modes
    that swap types or operations aren't for them."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def made_by(make: Callable[[Deferred], torch.Tensor]) -> Iterator[None]:
    """Inside it, in this thread, `make` gives the values of weights that operations need."""
    _local.make = make
    try:
        yield
    finally:
        del _local.make


def values_of(item: Any) -> Any:
    """Values in the place of a deferred tensor, and anything else as it is."""
    if not isinstance(item, Deferred):
        return item
    make = getattr(_local, "make", None)
    if make is not None:
        return make(item)
    with apart():
        return evaluate(item, Plain(item.device))


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _mapped(item: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(item, (tuple, list)):
        return type(item)(_mapped(one, change) for one in item)
    if isinstance(item, dict):
        return {key: _mapped(one, change) for key, one in item.items()}
    return change(item)


def _flat(item: Any) -> Iterator[Any]:
    if isinstance(item, (tuple, list)):
        for one in item:
            yield from _flat(one)
    elif isinstance(item, Mapping):
        for one in item.values():
            yield from _flat(one)
    else:
        yield item
