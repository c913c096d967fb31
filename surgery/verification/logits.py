"""Logits of two checkpoints on the same inputs, and how far apart rounding alone would put them.

The yardstick is measured, not guessed: the **noise floor** is the difference between the base
and the base with the neurons of each MLP permuted, which is the same function summed in another
order. A model with the same function stays within a small multiple of it.
"""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, SurgeryError, UnsupportedError
from surgery.operations.dequantize import computable
from surgery.tensor import LazyTensor
from surgery.values import noise
from surgery.verification.inputs import Inputs, make_inputs
from surgery.verification.outputs import are_logits, main_output

if TYPE_CHECKING:
    import numpy
    import torch

    from surgery.modeling.build import Built

VerifyDtype = Literal["float32", "float64"]

NOISE_MULTIPLE = 8.0
"""A growth passes within this many noise floors. Right ones stay under 2 or 3 (two draws of the
same rounding noise, and more terms in each sum); a weight wrong by 1% gives thousands."""

BESIDE_WEIGHTS = 600_000_000
"""Bytes that verification takes beside weights: libraries, activations, buffers."""

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
    streamed: bool = False
    """Whether the weights were read as they were needed, or each model loaded whole."""

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
    streamed: bool


def compare_logits(
    base: Checkpoint,
    other: Checkpoint,
    *,
    device: str = "auto",
    dtype: VerifyDtype = "float32",
    seed: int = 0,
    places: Mapping[str, str] | None = None,
    text: Path | None = None,
    streamed: bool | None = None,
) -> Logits:
    """Run both on the same inputs: the start of `text`, or random tokens, images or sounds as the
    model takes them (`make_inputs`). `places` gives the names that blocks of the base have in
    `other`, where they moved.

    `streamed`: the models run side by side, and a module has its weights while it runs, so that
    they needn't fit into memory, and what both have in common is read once. False loads one
    model after the other, which gives the same figures bit for bit; None does so where the
    loader of a family can't do without the values of its weights.

    8-bit floats are run as what they stand for. Raises UnsupportedError if transformers can't
    build one of them, if its weights are packed in another way, or if memory isn't enough.
    """
    base, other = computable(base=base, other=other)
    device = check_device(base, other, device, dtype, streamed=streamed is not False)
    checkpoints = [base, other]
    if base.anatomy.every_mlp:
        checkpoints.append(_permuted(base, seed))
    inputs = make_inputs(base, seed=seed, text=text)
    runs = _runs(checkpoints, inputs.values, device, dtype, streamed)
    first_run = next(runs)
    if not bool(first_run.output.isfinite().all()):
        raise FormatError(
            f"{base.source.reference} gives logits that aren't finite, so nothing can be compared: "
            f"its weights hold NaN or infinity, or overflow in {dtype}; --no-logits leaves the "
            f"certificate"
        )
    second = next(runs)
    if first_run.output.shape != second.output.shape:
        raise UnsupportedError(
            f"outputs differ in shape: {list(first_run.output.shape)} and "
            f"{list(second.output.shape)}; the logits can't be compared"
        )
    permuted = next(runs, None)
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


def check_device(
    base: Checkpoint,
    other: Checkpoint,
    device: str,
    dtype: VerifyDtype,
    *,
    streamed: bool = True,
) -> str:
    """The device to run on. Raises UnsupportedError if it isn't there or too small, where the
    process would be killed for memory after minutes."""
    device = _pick_device(device, dtype)
    _check_size((base, other), device, dtype, streamed=streamed)
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


def memory_needed(checkpoint: Checkpoint, dtype: VerifyDtype, *, streamed: bool = True) -> int:
    """Bytes that running a checkpoint takes, about: its largest module in `dtype`, while it is
    made, and memory for those that come next; or all of its weights, and one tensor."""
    size = 8 if dtype == "float64" else 4
    if streamed:
        from surgery.modeling.build import KEPT_BUFFERS

        waiting = min(KEPT_BUFFERS, 3 * size * checkpoint.numel)
        return BESIDE_WEIGHTS + waiting + 2 * size * _largest_module(checkpoint)
    largest = max((tensor.numel for tensor in checkpoint.values()), default=0)
    return size * (checkpoint.numel + 2 * largest)


def _largest_module(checkpoint: Checkpoint) -> int:
    """Elements of the largest tensor, with the experts of a block counted as one: the loader
    packs them."""
    together: Counter[str] = Counter()
    for name, tensor in checkpoint.items():
        stack = next((s for s in checkpoint.anatomy.stacks if name.startswith(f"{s}.")), "")
        inner = name.removeprefix(f"{stack}.").split(".") if stack else []
        numbered = [at for at, part in enumerate(inner) if at and part.isdigit()]
        together[".".join([stack, *inner[: numbered[0]]]) if numbered else name] += tensor.numel
    return max(together.values(), default=0)


def _check_size(
    checkpoints: Sequence[Checkpoint], device: str, dtype: VerifyDtype, *, streamed: bool
) -> None:
    import psutil
    import torch

    need = max(memory_needed(one, dtype, streamed=streamed) for one in checkpoints)
    have = psutil.virtual_memory().available
    if device == "cuda":
        have = torch.cuda.mem_get_info()[0]
    if need > have:
        how = "a module at a time" if streamed else "a model at a time"
        raise UnsupportedError(
            f"comparing logits in {dtype}, {how}, takes about {need / 1e9:,.1f} GB of memory, and "
            f"{have / 1e9:,.1f} GB are free on {device}: --no-logits leaves the certificate, "
            f"which is proof enough for the weights"
        )


def _runs(
    checkpoints: Sequence[Checkpoint],
    inputs: Mapping[str, torch.Tensor],
    device: str,
    dtype: VerifyDtype,
    streamed: bool | None,
) -> Iterator[_Run]:
    """What comes out of each, in order: of all at once, or of one model after the other."""
    import torch

    from surgery.modeling.build import build_deferred, build_model

    kind = getattr(torch, dtype)
    inputs = {
        name: value.to(device, kind if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    if streamed is not False:
        from surgery.modeling.deferred import UndeferrableError
        from surgery.modeling.streaming import run_together

        try:
            models = [_Watched(one, build_deferred(one, kind, device)) for one in checkpoints]
        except UndeferrableError as error:
            if streamed:
                raise UnsupportedError(
                    f"{checkpoints[0].source.reference} can't be run a module at a time: {error}"
                ) from error
            _check_size(checkpoints, device, dtype, streamed=False)
        else:
            runs = [partial(model.run, inputs, streamed=True) for model in models]
            with torch.random.fork_rng(devices=[]):
                yield from run_together([model.built.model for model in models], runs, device)
            return
    for checkpoint in checkpoints:
        yield _Watched(checkpoint, build_model(checkpoint, kind, device)).run(inputs)
        gc.collect()


class _Watched:
    """A model, with hooks that keep what its blocks return and where its routers send tokens."""

    def __init__(self, checkpoint: Checkpoint, built: Built) -> None:
        self.built = built
        self._blocks: dict[str, torch.Tensor] = {}
        for stack in checkpoint.anatomy.stacks:
            for number, block in enumerate(_blocks(built.model, stack)):
                block.register_forward_hook(partial(self._keep, f"{stack}.{number}"))
        self._routed = _watch_experts(built.model)

    def _keep(self, name: str, _module: Any, _given: Any, output: Any) -> None:
        if (found := main_output(output)) is not None:  # moved later: a device needn't wait for it
            self._blocks[name] = found[1].detach().clone()

    def run(self, inputs: Mapping[str, torch.Tensor], *, streamed: bool = False) -> _Run:
        """Run it once."""
        output, is_logits = _outputs(self.built.model, inputs)
        seen = [len(experts) for experts, _ in self._routed]
        experts = (sum(seen), sum(n for _, n in self._routed)) if seen and all(seen) else None
        return _Run(
            output.to("cpu").reshape(-1, output.shape[-1] if output.dim() else 1),
            is_logits,
            {name: hidden.to("cpu") for name, hidden in self._blocks.items()},
            self.built.missing,
            experts,
            streamed,
        )


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
    options |= inputs
    exact = _float64_throughout() if model.dtype == torch.float64 else nullcontext()
    try:
        with torch.inference_mode(), exact, torch.random.fork_rng():
            torch.manual_seed(0)  # a model may draw: which patches are masked, say
            found = main_output(model(**options))
    except SurgeryError:  # of a file that is read meanwhile
        raise
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
        if (mlp.stack, mlp.block) in base.anatomy.no_growth:
            continue  # something that isn't understood may go by its neurons too
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
        streamed=base.streamed,
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
