"""Is a block the identity once certain weights are zero? The stock block is run on the meta
device, without values, and zeros are followed through its operations.

Every storage is known to hold the block's input, zeros, or something else. A block passes if what
it returns is its input whatever the values are. So a norm with a bias after a sublayer, a norm
after the addition, or a scaled residual are found in the code that will run, and not by names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.anatomy.residual import writes_to_residual
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.modeling.build import class_to_build
from surgery.modeling.limits import counted
from surgery.modeling.quiet import quiet
from surgery.modeling.stock import block_modules, build_config

if TYPE_CHECKING:
    import torch

INPUT, ZERO = "input", "zero"

_KEEPS_ZERO = {
    *("neg", "clone", "_to_copy", "copy", "sum", "mean", "cumsum", "abs", "relu", "tanh", "silu"),
    *("gelu", "sqrt", "square", "erf", "flip", "roll", "repeat", "gather", "index"),
    *("index_select", "tril", "triu", "_fused_rms_norm"),
}
"""Operations that make zeros of zeros, whatever their other arguments are."""


def not_identity(checkpoint: Checkpoint, stack: str, blocks: Sequence[int]) -> dict[int, str]:
    """For those of `blocks` that wouldn't return their input if every projection that writes to
    the residual stream were zero: why not.

    Raises UnsupportedError if transformers can't build the model, or run it without values.
    """
    import torch

    model = _empty_model(checkpoint)
    modules = block_modules(model, stack)
    trace = _trace_class()()
    for module in modules.modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = _experts(module, trace)
    watched = {number: _Watched(modules[number], trace) for number in sorted(set(blocks))}
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        with quiet(), torch.no_grad(), trace:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedError(
            f"{checkpoint.source.reference}: {type(model).__name__} can't be run without values, "
            f"so whether a block would pass its input on can't be told: {error}"
        ) from error
    sizes = _zeroed_values(checkpoint, stack)
    found = {}
    for number, block in watched.items():
        why = block.why
        if why is None and block.zeroed != sizes.get(number, 0):
            why = (
                f"{sizes.get(number, 0):,} values are zeroed in the files and {block.zeroed:,} in "
                f"the model, whose names differ from those of the files"
            )
        if why is not None:
            found[number] = why
    return found


def _empty_model(checkpoint: Checkpoint) -> Any:
    import torch

    config = build_config(checkpoint.settled_config)
    for part in (config, config.get_text_config()):
        part.use_cache, part._attn_implementation = False, "eager"
    with torch.device("meta"), quiet(), counted():
        return class_to_build(checkpoint)(config).eval()


def _zeroed_values(checkpoint: Checkpoint, stack: str) -> dict[int, int]:
    """How many values of each block's files write to the residual stream."""
    sizes: dict[int, int] = {}
    for name, place in checkpoint.anatomy.places.items():
        if place.stack == stack and place.block is not None and writes_to_residual(place.inner):
            sizes[place.block] = sizes.get(place.block, 0) + checkpoint[name].numel
    return sizes


class _Watched:
    """A block with hooks: after a run `why` says why it isn't the identity; None if it is."""

    def __init__(self, block: Any, trace: Any) -> None:
        self.trace = trace
        self.why: str | None = "it isn't run at all"
        self.zeroed = 0
        self._input: Any = None
        self._spoilers: list[str] = []
        self._norms: list[tuple[str, Any]] = []
        for name, parameter in block.named_parameters():
            if writes_to_residual(name):
                self.zeroed += parameter.numel()
                trace.set(parameter, ZERO)
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        for name, module in block.named_modules():
            if name:
                norm = "norm" in type(module).__name__.lower()
                module.register_forward_hook(self._inner(name, norm))
        block.register_forward_hook(self._leave)

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._input = args[0] if args else kwargs["hidden_states"]
        self._spoilers, self._norms = [], []
        self.trace.forget(INPUT)  # that of an earlier block, which this one may be given too
        self.trace.set(self._input, INPUT)

    def _inner(self, name: str, norm: bool) -> Callable[..., None]:
        def after(_: Any, args: tuple[Any, ...], out: Any) -> None:
            made = out[0] if isinstance(out, (tuple, list)) and out else out
            if not args or not hasattr(made, "untyped_storage"):
                return
            if norm:
                self._norms.append((name, made))
            of_zeros = hasattr(args[0], "untyped_storage") and self.trace.get(args[0]) == ZERO
            if of_zeros and self.trace.get(made) != ZERO:
                self._spoilers.append(name)

        return after

    def _leave(self, _: Any, _args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, (tuple, list)) else out
        self.why = None
        if self.trace.get(out) == INPUT and out.shape == self._input.shape:
            return
        last = [name for name, made in self._norms if made is out]
        if self._spoilers:
            self.why = f"{self._spoilers[0]} makes something else of zeros, as a bias does"
        elif last:
            self.why = f"what it returns comes out of {last[0]}, behind the addition"
        else:
            self.why = (
                "what it returns isn't its input, scaled by nothing, with only the projections "
                "added that were recognised"
            )


def _experts(module: Any, trace: Any) -> Callable[..., Any]:
    """Experts without values: which tokens they get depends on those. What they return is zeros
    if the last projection of each is, and its bias, for routing only weighs and adds."""
    import torch

    names = [name for name, _ in module.named_parameters()]
    last = [name for name in names if "down" in name or "output" in name or "w2" in name]
    all_zero = bool(last) and all(writes_to_residual(name) for name in last)

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made = torch.empty_like(hidden)
        if all_zero:
            trace.set(made, ZERO)
        return made

    return forward


def _trace_class() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """What each storage holds, as far as it is known. Views share one, and need no rule."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.labels: dict[int, tuple[str | None, Any]] = {}

        def get(self, tensor: Any) -> str | None:
            label = self.labels.get(tensor.untyped_storage()._cdata, (None, None))[0]
            if label == INPUT and not (tensor.is_contiguous() and _is_whole(tensor)):
                return None  # a part of it, or its values in another order
            return label

        def set(self, tensor: Any, label: str | None) -> None:
            storage = tensor.untyped_storage()  # kept, so that no other gets its address
            self.labels[storage._cdata] = label, storage

        def forget(self, label: str) -> None:
            self.labels = {at: held for at, held in self.labels.items() if held[0] != label}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            name = func._schema.name.removeprefix("aten::")
            if name == "_local_scalar_dense":
                return 1  # the mask, which is ones, is the one thing that models ask about
            given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
            storages = {tensor.untyped_storage()._cdata for tensor in given}
            label = _label(name.rstrip("_"), args, kwargs, self.get)
            entered = [(t.shape, t.dtype) for t in given if self.get(t) == INPUT]
            out = func(*args, **kwargs)
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            for at, tensor in enumerate(made):
                known = label if at == 0 else None  # later results are statistics
                if known == INPUT and (tensor.shape, tensor.dtype) != entered[0]:
                    known = None
                if tensor.untyped_storage()._cdata not in storages:
                    self.set(tensor, known)
                elif func._schema.is_mutable and known != self.get(tensor):
                    self.set(tensor, known if _is_whole(tensor) else None)
            return out

    return Trace


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its storage."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def _label(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    get: Callable[[Any], str | None],
) -> str | None:
    """What an operation's result holds, by what its arguments hold; None for anything else."""
    import torch

    labels = [get(a) if isinstance(a, torch.Tensor) else None for a in args]
    first = labels[0] if labels else None
    others = labels[1:]
    if name in ("add", "sub"):
        if set(labels[:2]) == {INPUT, ZERO} and kwargs.get("alpha", 1) == 1:
            return INPUT if name == "add" or first == INPUT else None
        return ZERO if labels[:2] == [ZERO, ZERO] else None
    if name in ("clone", "_to_copy") and first == INPUT:
        return INPUT
    if name == "copy":
        return others[0]
    if name in ("cat", "stack"):
        return ZERO if all(get(tensor) == ZERO for tensor in args[0]) else None
    if name in ("mul", "mm", "bmm", "mv"):
        return ZERO if ZERO in labels else None
    if name in ("addmm", "baddbmm"):
        return ZERO if first == ZERO and ZERO in others else None
    if name == "convolution":
        return ZERO if ZERO in labels[:2] and (args[2] is None or labels[2] == ZERO) else None
    if name == "native_layer_norm":
        unbiased = len(args) < 4 or args[3] is None or labels[3] == ZERO
        return ZERO if first == ZERO and unbiased else None
    if name == "div":
        return ZERO if first == ZERO and ZERO not in others else None
    if name == "pow":
        return ZERO if first == ZERO and isinstance(args[1], (int, float)) and args[1] > 0 else None
    if name == "where":
        return ZERO if labels[1:] == [ZERO, ZERO] else None
    return ZERO if name in _KEEPS_ZERO and first == ZERO else None
