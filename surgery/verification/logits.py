"""Logits of two checkpoints on the same inputs, and how far apart rounding alone would put them.

The yardstick is measured, not guessed: the **noise floor** is the difference between the base
and the base with the neurons of each MLP permuted, which is the same function summed in another
order. A model with the same function stays within a small multiple of it.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, UnsupportedError
from surgery.operations.dequantize import computable
from surgery.tensor import LazyTensor
from surgery.values import noise
from surgery.verification.inputs import Inputs, make_inputs
from surgery.verification.outputs import are_logits, main_output

if TYPE_CHECKING:
    import numpy
    import torch

VerifyDtype = Literal["float32", "float64"]

NOISE_MULTIPLE = 8.0
"""A growth passes within this many noise floors. Right ones stay under 2 or 3 (two draws of the
same rounding noise, and more terms in each sum); a weight wrong by 1% gives thousands."""

MOST_NOISE = 0.01
"""Of the largest logit: more isn't rounding. A permutation that changes the function (of an MLP
that was taken for another kind) would make a yardstick that measures nothing."""


@dataclass(frozen=True)
class Logits:
    """How far the outputs of two models are apart, on `tokens` tokens (or what a model makes of
    images and sounds: rows of its output).

    `max_difference` is max |d|, `relative` divides it by max |logit|; `kl` is the divergence of
    the distributions over the vocabulary in nats, `top1` the share of tokens on which both
    choose the same. `noise_floor` is max |d| of the permuted base, None where there is no MLP
    to permute. `first_departure` names the first block whose output is further from the base's
    than noise explains. For a model without a head the hidden states stand for the logits (or
    else the first output there is), and `kl_mean`, `kl_max` and `top1` are None: they are there
    where the last axis is one of tokens or classes.
    """

    device: str
    dtype: VerifyDtype
    tokens: int
    max_difference: float
    relative: float
    kl_mean: float | None
    kl_max: float | None
    top1: float | None
    noise_floor: float | None
    first_departure: str | None
    uninitialised: tuple[str, ...]
    experts: tuple[int, int] | None = None
    """To how many routed experts a token went, and how many there are, where that shows."""
    inputs: str = "random tokens"
    """What the models ran on."""
    unreached: tuple[str, ...] = ()
    """Blocks whose MLP differs between the two and isn't run by these inputs, so that the logits
    say nothing of it: a vision tower without an image."""

    @property
    def threshold(self) -> float | None:
        """The largest difference that rounding explains."""
        return None if self.noise_floor is None else NOISE_MULTIPLE * self.noise_floor

    @property
    def same(self) -> bool:
        """Whether rounding explains the difference; without a yardstick there must be none."""
        return self.max_difference <= (self.threshold or 0.0)


@dataclass(frozen=True)
class _Run:
    """Output of a model, (tokens, vocabulary or hidden size), and of each of its blocks."""

    output: torch.Tensor
    is_logits: bool
    blocks: Mapping[str, torch.Tensor]
    missing: tuple[str, ...]
    experts: tuple[int, int] | None


def compare_logits(
    base: Checkpoint,
    other: Checkpoint,
    *,
    device: str = "auto",
    dtype: VerifyDtype = "float32",
    seed: int = 0,
    places: Mapping[str, str] | None = None,
    text: Path | None = None,
) -> Logits:
    """Run both on the same inputs: the start of `text`, or random tokens, images or sounds as the
    model takes them (`make_inputs`). One model is in memory at a time. `places` gives the names
    that blocks of the base have in `other`, where they moved.

    8-bit floats are run as what they stand for. Raises UnsupportedError if transformers can't
    build one of them, or if its weights are packed in another way.
    """
    import torch

    base, other = computable(base=base, other=other)
    device = check_device(base, other, device, dtype)
    inputs = make_inputs(base, seed=seed, text=text)
    run = partial(_run, dtype=getattr(torch, dtype), device=device, inputs=inputs.values)
    first_run = run(base)
    if not bool(first_run.output.isfinite().all()):
        raise FormatError(
            f"{base.source.reference} gives logits that aren't finite, so nothing can be compared: "
            f"its weights hold NaN or infinity, or overflow in {dtype}; --no-logits leaves the "
            f"certificate"
        )
    second = run(other)
    if first_run.output.shape != second.output.shape:
        raise UnsupportedError(
            f"outputs differ in shape: {list(first_run.output.shape)} and "
            f"{list(second.output.shape)}; the logits can't be compared"
        )
    permuted = run(_permuted(base, seed)) if base.anatomy.every_mlp else None
    moved = {
        name: second.blocks[now] for name, now in (places or {}).items() if now in second.blocks
    }
    second = replace(second, blocks={**second.blocks, **moved})
    found = _compare(first_run, second, permuted, device, dtype)
    return replace(found, inputs=inputs.what, unreached=_unreached(base, other, inputs))


def _unreached(base: Checkpoint, other: Checkpoint, inputs: Inputs) -> tuple[str, ...]:
    """The blocks whose MLP changed its shape (all, where none did) and isn't run by the inputs."""
    every = base.anatomy.every_mlp
    names = [(mlp, name) for mlp in every for name in mlp.tensors if name in other]
    grown = [mlp for mlp, name in names if other[name].shape != base[name].shape] or every
    blocks = [
        f"{mlp.stack}.{mlp.block}"
        for mlp in grown
        if (mlp.stack, mlp.block, mlp.kind) in (inputs.unreached or ())
    ]
    return tuple(dict.fromkeys(blocks))


def check_device(base: Checkpoint, other: Checkpoint, device: str, dtype: VerifyDtype) -> str:
    """The device to run on. Raises UnsupportedError if it isn't there or too small for one of
    the models, which would be killed for memory after minutes."""
    device = _pick_device(device, dtype)
    _check_size(base, other, device, dtype)
    return device


def _pick_device(device: str, dtype: VerifyDtype) -> str:
    """ "auto" is CUDA, or Apple's MPS (which has no float64), or the CPU."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if cuda else "mps" if mps and dtype == "float32" else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UnsupportedError(f"there is no {device} device here: use --device cpu or auto")
    if device == "mps" and dtype == "float64":
        raise UnsupportedError("MPS has no float64: use --device cpu")
    return device


def memory_needed(checkpoint: Checkpoint, dtype: VerifyDtype) -> int:
    """Bytes that running a checkpoint takes, about: its weights in `dtype`, and one tensor."""
    size = 8 if dtype == "float64" else 4
    largest = max((tensor.numel for tensor in checkpoint.values()), default=0)
    return size * (checkpoint.numel + 2 * largest)


def _check_size(base: Checkpoint, other: Checkpoint, device: str, dtype: VerifyDtype) -> None:
    import psutil
    import torch

    need = max(memory_needed(base, dtype), memory_needed(other, dtype))
    have = psutil.virtual_memory().available
    if device == "cuda":
        have = torch.cuda.mem_get_info()[0]
    if need > have:
        raise UnsupportedError(
            f"comparing logits in {dtype} takes about {need / 1e9:,.1f} GB of memory, and "
            f"{have / 1e9:,.1f} GB are free on {device}: --no-logits leaves the certificate, "
            f"which is proof enough for the weights"
        )


def _run(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    inputs: Mapping[str, torch.Tensor],
) -> _Run:

    from surgery.modeling.build import build_model

    built = build_model(checkpoint, dtype, device)
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if (found := main_output(output)) is not None:
            kept[name] = found[1].detach().to("cpu")

    for stack in checkpoint.anatomy.stacks:
        for number, block in enumerate(_blocks(built.model, stack)):
            name = f"{stack}.{number}"
            block.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
    routed = _watch_experts(built.model)
    output, is_logits = _outputs(built.model, inputs)
    experts = (sum(len(seen) for seen, _ in routed), sum(count for _, count in routed))
    seen = experts if all(seen for seen, _ in routed) and routed else None
    rows = output.to("cpu").reshape(-1, output.shape[-1] if output.dim() else 1)
    run = _Run(rows, is_logits, kept, built.missing, seen)
    del built
    gc.collect()
    return run


def _watch_experts(model: Any) -> list[tuple[set[int], int]]:
    """For every module of routed experts, how many it has, and which of them tokens went to: the
    first argument of whole numbers is the choice of the router."""

    def watch(module: Any, given: tuple[Any, ...], named: dict[str, Any], seen: set[int]) -> None:
        for value in (*given, *named.values()):
            if hasattr(value, "is_floating_point") and not value.is_floating_point():
                seen.update(n for n in value.unique().tolist() if 0 <= n < module.num_experts)
                return

    found: list[tuple[set[int], int]] = []
    for module in model.modules():
        count = getattr(module, "num_experts", None)
        if type(module).__name__.endswith("Experts") and type(count) is int:
            seen: set[int] = set()
            module.register_forward_pre_hook(partial(watch, seen=seen), with_kwargs=True)
            found.append((seen, count))
    return found


def _blocks(model: Any, stack: str) -> Any:
    """The modules of a stack; none where the model has no list of them by that name."""
    from surgery.modeling.stock import block_modules

    try:
        return block_modules(model, stack)
    except UnsupportedError:
        return ()


def _outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The output that is compared, and whether it is logits."""
    import torch

    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    for name, value in inputs.items():
        dtype = model.dtype if value.is_floating_point() else value.dtype
        options[name] = value.to(model.device, dtype)
    exact = _float64_throughout() if model.dtype == torch.float64 else nullcontext()
    try:
        with torch.inference_mode(), exact, torch.random.fork_rng():
            torch.manual_seed(0)  # a model may draw: which patches are masked, say
            found = main_output(model(**options))
    except Exception as error:  # of any type: sizes in the config that contradict each other
        raise UnsupportedError(
            f"transformers can't run the {type(model).__name__} of this config: {error}; "
            f"--no-logits leaves the certificate"
        ) from error
    if found is None:
        raise UnsupportedError(f"{type(model).__name__} returns no tensor that can be compared")
    name, value = found
    return value, are_logits(name, value, model.config)


def _float64_throughout() -> Any:
    """Inside it, code that asks for float32 (norms, softmax, rotary embeddings) gets float64:
    else float64 would be no more exact than float32."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Float64(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func is torch.Tensor.float:
                return args[0].double()
            swap = {torch.float32: torch.float64}
            args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
            kwargs = {
                key: swap.get(value, value) if isinstance(value, torch.dtype) else value
                for key, value in kwargs.items()
            }
            return func(*args, **kwargs)

    return Float64()


def _permuted(base: Checkpoint, seed: int) -> Checkpoint:
    """The base with the neurons of every MLP in another order: the same function."""
    tensors: dict[str, LazyTensor] = {}
    for mlp in base.anatomy.every_mlp:
        order = noise((mlp.width,), seed, f"permute:{mlp.down.weight}").read().argsort().numpy()
        for name, projection, axis in mlp.axes():
            index = projection.indices(order, mlp.width, below=projection.flat)
            tensors[name] = _reordered(base[name], index, axis)
    return replace(base, tensors={**base.tensors, **tensors})


def _reordered(tensor: LazyTensor, index: numpy.ndarray, axis: int) -> LazyTensor:
    import torch

    return LazyTensor(
        tensor.shape,
        tensor.dtype,
        inputs=(tensor,),
        kernel=partial(torch.index_select, dim=axis, index=torch.from_numpy(index)),
        rowwise=False,
    )


def _compare(
    base: _Run, other: _Run, permuted: _Run | None, device: str, dtype: VerifyDtype
) -> Logits:

    scale = float(base.output.abs().max())
    difference = _distance(base.output, other.output)
    floor = None
    if permuted is not None:
        floor = _noise_floor(base.output, permuted.output)
    kl_mean = kl_max = top1 = None
    if base.is_logits and other.is_logits:
        p, q = (run.output.double().log_softmax(-1) for run in (base, other))
        divergence = (p.exp() * (p - q)).sum(-1).clamp_(min=0)
        kl_mean, kl_max = float(divergence.mean()), float(divergence.max())
        top1 = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    return Logits(
        device=device,
        dtype=dtype,
        tokens=base.output.shape[0],
        max_difference=difference,
        relative=difference / scale if scale else 0.0,
        kl_mean=kl_mean,
        kl_max=kl_max,
        top1=top1,
        noise_floor=floor,
        first_departure=_first_departure(base, other, permuted),
        uninitialised=tuple(sorted({*base.missing, *other.missing})),
        experts=base.experts,
    )


def _first_departure(base: _Run, other: _Run, permuted: _Run | None) -> str | None:

    if permuted is None:
        return None
    for name, hidden in base.blocks.items():
        if name not in other.blocks or other.blocks[name].shape != hidden.shape:
            return name
        floor = _noise_floor(hidden, permuted.blocks[name])
        if not _distance(hidden, other.blocks[name]) <= NOISE_MULTIPLE * floor:
            return name
    return None


def _noise_floor(output: torch.Tensor, permuted: torch.Tensor) -> float:
    """How far rounding alone puts outputs apart. A tiny model can come out without any noise; a
    rounding or two is always allowed."""
    import torch

    scale = float(output.abs().max())
    noise = max(_distance(output, permuted), torch.finfo(output.dtype).eps * scale)
    return min(noise, MOST_NOISE * scale / NOISE_MULTIPLE)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b|; infinite where a NaN stands in one and not in the other."""
    gap = (a.double() - b.double()).abs()
    return float(gap.nan_to_num(nan=float("inf")).max())
