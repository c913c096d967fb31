"""A model without weights that runs: what is made of its parameters are zeros of the right shape,
and matrix products cost nothing. What inputs a model takes, and which of its modules they
go through, is told by running it, before its weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError, UnsupportedError
from surgery.modeling.build import class_to_build
from surgery.modeling.limits import counted
from surgery.modeling.quiet import quiet
from surgery.modeling.stock import block_modules, build_config

if TYPE_CHECKING:
    import torch


MOST_VALUES = 1 << 26
"""Values that may be made: more come of inputs that weren't meant."""
LARGE = 1 << 14


@dataclass(frozen=True)
class Attempt:
    """What came of a run: a result, or an error with the innermost module that was running and
    the shapes of the tensors that it got."""

    result: Any
    called: frozenset[str]
    error: Exception | None = None
    module: Any = None
    shapes: tuple[tuple[int, ...], ...] = ()


class HollowModel:
    """The model of a checkpoint's config, with parameters that take no memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            self.model = _empty(checkpoint)
        except SurgeryError:
            raise
        except Exception as error:  # of any type: the config is a stranger's
            raise UnsupportedError(
                f"{checkpoint.source.reference}: transformers can't build a model of this config: "
                f"{error}; --no-logits leaves the certificate"
            ) from error
        self.config = self.model.config

    @cached_property
    def accepts(self) -> Mapping[str, bool]:
        """The named arguments of `forward`, and whether each has to be given."""
        return self.names("forward")

    def names(self, method: str) -> Mapping[str, bool]:
        """The same of another method."""
        return _named(getattr(self.model, method))

    def run(self, values: Mapping[str, Any], method: str = "forward") -> tuple[Any, frozenset[str]]:
        """What a method returns for these arguments, and the names of all modules that were
        called. Raises whatever the model raises."""
        attempt = self.attempt(values, method)
        if attempt.error is not None:
            raise attempt.error
        return attempt.result, attempt.called

    def attempt(self, values: Mapping[str, Any], method: str = "forward") -> Attempt:
        """Run a method (`forward`, `get_image_features`) with these arguments, of which it gets
        those that it has names for; what it raises is part of the answer."""
        import torch

        called: set[str] = set()
        running: list[tuple[Any, tuple[Any, ...]]] = []
        hooks = _watch(self.model, called, running)
        run = getattr(self.model, method) if method != "forward" else self.model
        names = self.names(method)
        given = {name: value for name, value in values.items() if name in names}
        try:
            with (
                quiet(),
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                _unchecked(),
                _shapes_only(),
            ):
                torch.manual_seed(0)
                result = run(**given)
        except Exception as error:  # noqa: BLE001  models raise all there is
            module, tensors = running[-1] if running else (None, ())
            shapes = tuple(tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor))
            return Attempt(None, frozenset(called), error, module, shapes)
        finally:
            for hook in hooks:
                hook.remove()
        return Attempt(result, frozenset(called))

    def module_of(self, stack: str, block: int, inner: str) -> str | None:
        """The name of the module that holds the parameter `inner` of a block, as it is on disk;
        of the closest one around it that is there and is called. None where there is no block."""
        from torch import nn

        try:
            blocks = block_modules(self.model, stack)
        except UnsupportedError:
            return None
        if block >= len(blocks):
            return None
        names: dict[int, str] = {id(module): name for name, module in self.model.named_modules()}
        modules = dict(blocks[block].named_modules())
        path = inner
        while path:
            path = path.rpartition(".")[0]
            found = modules.get(path)
            if found is not None and not isinstance(found, (nn.ModuleList, nn.ModuleDict)):
                return names[id(found)]
        return names[id(blocks[block])]


def _watch(model: Any, called: set[str], running: list[tuple[Any, tuple[Any, ...]]]) -> list[Any]:
    """Hooks that keep the names of modules that are called, and those that run, with what they
    got, the innermost last. One that raises stays."""

    def enter(module: Any, given: tuple[Any, ...], name: str) -> None:
        called.add(name)
        running.append((module, given))

    def leave(*_: Any) -> None:
        running.pop()

    return [
        hook
        for name, module in model.named_modules(remove_duplicate=False)
        for hook in (
            module.register_forward_pre_hook(partial(enter, name=name)),
            module.register_forward_hook(leave),
        )
    ]


def _named(function: Any) -> dict[str, bool]:
    parameters = inspect.signature(function).parameters.values()
    return {
        one.name: one.default is inspect.Parameter.empty
        for one in parameters
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }


def _empty(checkpoint: Checkpoint) -> Any:
    import torch

    config = build_config(checkpoint.settled_config)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    cls = class_to_build(checkpoint)
    with torch.device("meta"), quiet(), counted():
        model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with quiet(), torch.random.fork_rng(devices=[]):
        model.initialize_weights()  # buffers that aren't in files: rotary frequencies, positions
    return model.eval()


@contextmanager
def _unchecked() -> Iterator[None]:
    """Distributions aren't asked whether their parameters may be so: there are no values."""
    from torch.distributions import Distribution

    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _shapes_only() -> Any:
    """Inside it parameters and what is made of them have shapes and no values (they are on
    "meta", and say that they are on the CPU). Whole numbers, which models ask about, are real:
    those that are made of such tensors are zeros."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    products = {
        *(functional.linear, functional.scaled_dot_product_attention, torch.einsum),
        *(functional.conv1d, functional.conv2d, functional.conv3d),
        *(torch.matmul, torch.mm, torch.bmm, torch.baddbmm, torch.addmm),
        *(torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__),
    }
    get_device = torch.Tensor.device.__get__

    def nowhere(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta")

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor

    def settled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_floating_point() else real(tensor)

    class ShapesOnly(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func == get_device:
                return torch.device("cpu")
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if func not in products and not any(tensor.is_meta for tensor in tensors):
                if sum(tensor.numel() for tensor in tensors) > LARGE:
                    _check_size(func, args, kwargs)
                return func(*args, **kwargs)
            name = getattr(func, "__name__", "")
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                return args[0]  # in place: the shape stays, and there are no values
            if name.startswith("new_") and name != "new_tensor":
                return func(*args, **{**kwargs, "device": kwargs.get("device") or "cpu"})
            if func is functional.embedding and not args[0].is_meta and args[0].numel():
                _check_range(args[0], args[1] if len(args) > 1 else kwargs["weight"])
            if name in ("expand_as", "view_as", "reshape_as") and not args[0].is_meta:
                return getattr(args[0], name.removesuffix("_as"))(args[1].shape)
            if (
                func is functional.grid_sample
            ):  # on "meta" it is taken apart, at a hundred times the cost
                return _sampled(*args, **kwargs)
            if name == "__getitem__":
                return args[0].to("meta")[_as_index(args[1])]
            try:
                made = func(*tree_map_only(torch.Tensor, nowhere, args),
                            **tree_map_only(torch.Tensor, nowhere, kwargs))  # fmt: skip
            except Exception:  # it asks for values, or it is wrong on zeros too
                if sum(tensor.numel() for tensor in tensors) > MOST_VALUES:
                    raise
                made = func(*tree_map_only(torch.Tensor, real, args),
                            **tree_map_only(torch.Tensor, real, kwargs))  # fmt: skip
            return tree_map_only(torch.Tensor, settled, made)

    return ShapesOnly()


def _sampled(input: torch.Tensor, grid: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    import torch

    shape = (*input.shape[:2], *grid.shape[1:-1])
    return torch.empty(shape, dtype=input.dtype, device="meta")


def _check_size(func: Any, args: Any, kwargs: Any) -> None:
    """A mask that is taken for another kind of mask can ask for more memory than there is."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    try:
        made = func(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args),
                    **tree_map_only(torch.Tensor, lambda t: t.to("meta"), kwargs))  # fmt: skip
    except Exception:  # noqa: BLE001  how much it makes depends on values
        return
    sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
    if max(sizes, default=0) > MOST_VALUES:
        raise MemoryError(f"an operation would make {max(sizes):,} values")


def _check_range(ids: torch.Tensor, table: torch.Tensor) -> None:
    if not 0 <= int(ids.min()) <= int(ids.max()) < table.shape[0]:
        raise IndexError(f"there are {table.shape[0]} rows, and {int(ids.max())} is looked up")


def _as_index(index: Any) -> Any:
    """An index of something without values: how many a mask takes has to be counted before."""
    import torch

    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if not isinstance(part, torch.Tensor) or part.is_meta:
            found.append(part)
        elif part.dtype == torch.bool and part.dim():
            found += [at.to("meta") for at in part.nonzero(as_tuple=True)]
        else:
            found.append(part.to("meta") if part.dim() else part.item())
    return tuple(found)
