"""Logits of two checkpoints on the same inputs, and how far apart rounding alone would put them.

The yardstick is measured, not guessed: the **noise floor** is the difference between the base
and the base with the neurons of each MLP permuted, which is the same function summed in another
order. A model with the same function stays within a small multiple of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, UnsupportedError
from surgery.operations.dequantize import computable
from surgery.tensor import LazyTensor
from surgery.values import noise
from surgery.verification.device import VerifyDtype, check_device
from surgery.verification.inputs import Inputs, make_inputs
from surgery.verification.runs import Run, run_all

if TYPE_CHECKING:
    import numpy
    import torch

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


def compare_logits(
    base: Checkpoint,
    other: Checkpoint,
    *,
    device: str = "auto",
    dtype: VerifyDtype = "float32",
    seed: int = 0,
    places: Mapping[str, str] | None = None,
    text: str | Path | None = None,
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
    runs = run_all(checkpoints, inputs.values, device, dtype, streamed)
    first_run = next(runs)
    if not bool(first_run.output.isfinite().all()):
        raise FormatError(
            f"{base.source.reference} gives logits that aren't finite, so nothing can be compared: "
            f"its weights hold NaN or infinity, or overflow in {dtype}; --no-logits leaves the "
            f"certificate"
        )
    if not bool(first_run.output.any()):
        raise UnsupportedError(
            f"{base.source.reference} gives nothing but zeros on {inputs.what}, so nothing can be "
            f"compared; --no-logits leaves the certificate"
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
    base: Run, other: Run, permuted: Run | None, device: str, dtype: VerifyDtype
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


def _first_departure(base: Run, other: Run, permuted: Run | None) -> str | None:

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
