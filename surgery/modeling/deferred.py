"""Weights that aren't there yet: tensors that remember how they come about from lazy ones.

transformers' loader renames tensors, casts them, and stacks, splits or turns them on the way into
a model. Given deferred tensors it does all that as ever, and nothing is read: what it did is
recorded, and done when the weight is needed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.tensor import FileSpan, LazyTensor

_aten = torch.ops.aten
_CAST = _aten._to_copy.default
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
            return func(*_mapped(args, _values), **_mapped(kwargs, _values))
        if func._schema.is_mutable and not _mutates_none_of_ours(func, args, kwargs):
            raise _failure(f"{func} writes into a weight")
        if func._schema.is_mutable:
            return func(*_mapped(args, _values), **_mapped(kwargs, _values))
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


Read = Callable[[LazyTensor, torch.dtype | None], torch.Tensor]
"""How the values of a lazy tensor are had: whole, in its own type or another, on the device."""


def evaluate(deferred: Deferred, read: Read, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values: lazy tensors as `read` gives them on `device`, where all steps are taken. To be
    called `apart`."""
    return _evaluate(deferred.recipe, read, torch.device(device))


def _evaluate(recipe: LazyTensor | Step, read: Read, device: torch.device) -> torch.Tensor:
    if isinstance(recipe, LazyTensor):
        return read(recipe, None)
    if recipe.func is _CAST and isinstance(source := recipe.args[0].recipe, LazyTensor):
        return read(source, recipe.kwargs.get("dtype"))

    def value(item: Any) -> Any:
        if isinstance(item, Deferred):
            return _evaluate(item.recipe, read, device)
        if isinstance(item, torch.Tensor):
            return item.to(device)
        return device if isinstance(item, torch.device) else item

    result = recipe.func(*_mapped(recipe.args, value), **_mapped(recipe.kwargs, value))
    made: torch.Tensor = result if recipe.part is None else result[recipe.part]
    return made


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


def settle(model: Any, device: str) -> None:
    """Bring a model built of deferred tensors to `device`: what it holds besides weights is made,
    and the weights will be made there."""
    moved: dict[int, torch.Tensor] = {}
    target = torch.empty(0, device=device).device  # with its number, as tensors there have it

    def there(item: torch.Tensor) -> torch.Tensor:
        if id(item) in moved:  # tied
            return moved[id(item)]
        if isinstance(item, Deferred) and isinstance(item, torch.nn.Parameter):
            return torch.nn.Parameter(item.on(target), requires_grad=False)
        values: torch.Tensor = _values(item).to(target)
        if isinstance(item, torch.nn.Parameter):
            return torch.nn.Parameter(values, requires_grad=False)
        return values

    kept = []  # so that no id is given twice
    for module in model.modules():
        for name, item in [*module._parameters.items(), *module._buffers.items()]:
            ready = item is None or isinstance(item, torch.nn.Parameter)
            if not (ready if device == "cpu" else item is None):
                kept.append(item)
                moved[id(item)] = there(item)
                setattr(module, name, moved[id(item)])


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


def _values(item: Any) -> Any:
    if not isinstance(item, Deferred):
        return item
    make = getattr(_local, "make", None)
    if make is not None:
        return make(item)
    device = item.device

    def read(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.Tensor:
        return tensor.whole().to(device=device, dtype=dtype)

    with apart():
        return evaluate(item, read, device)


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
