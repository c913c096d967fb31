"""LiNeS: scale the update of each block with its depth, so that a fine-tuned model keeps what it
learnt and remembers what it knew. Wang et al., arXiv 2410.17146."""

from __future__ import annotations

from functools import lru_cache, partial
from math import isfinite
from typing import Any, Literal

from surgery.anatomy import Anatomy, Place, Role
from surgery.anatomy.scopes import names_in_scope
from surgery.checkpoint import Checkpoint, Edit
from surgery.dtypes import DTYPES, DType
from surgery.errors import ArgumentError
from surgery.merging.finite import Kernel, Tally, called, finite, looking_after, values_of
from surgery.operations.dequantize import computable
from surgery.operations.pairs import check_pair, tied_head
from surgery.tensor import LazyTensor

Outside = Literal["alpha", "depth"]
ALIGN_FIRST = (
    "`surgery merge BASE TUNED --method task_arithmetic --lines ALPHA,BETA --tokenizer union` "
    "matches rows by token, and scales as lines does"
)


def lines(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    alpha: float,
    beta: float | None = None,
    outside: Outside = "alpha",
    scope: str | None = None,
) -> Checkpoint:
    """theta = theta_base + lambda(l) * (theta_tuned - theta_base), block by block.

    lambda(l) = alpha + beta * (l - 1) / (L - 1) for block l = 1..L of each stack (eq. 3);
    `beta` is 1 - alpha unless given, so that the last block keeps its whole update. Tensors
    outside the blocks get alpha; with `outside="depth"` the final norm and the head get
    alpha + beta. With `scope` ("language", "vision", "encoder", the name of a stack; see
    anatomy/scopes.py) only the updates of those tensors are scaled, and the others stay as they
    are in `tuned`. The result has the dtypes, the config and the companion files of `tuned`.

    Raises ArgumentError, MismatchError or UnsupportedError, before any tensor is read.
    """
    ArgumentError.raise_if(
        f"{name} is {value}, and has to be a finite number"
        for name, value in (("alpha", alpha), ("beta", beta))
        if value is not None and not isfinite(value)
    )
    beta = 1 - alpha if beta is None else beta
    if outside not in ("alpha", "depth"):
        raise ArgumentError(f"outside is {outside!r}, and has to be 'alpha' or 'depth'")
    stored = base
    base, tuned = computable(base=base, tuned=tuned)
    check_pair(base, tuned, vocabularies=ALIGN_FIRST)
    anatomy = tuned.anatomy
    meant = names_in_scope(anatomy, scope)
    scales = {
        name: scale_of(place, anatomy, alpha, beta, outside)
        for name, place in anatomy.places.items()
    }
    if anatomy.tied and anatomy.head is not None and anatomy.embedding is not None:
        scales[anatomy.head] = scales[anatomy.embedding]  # stored twice, and stays equal
    head = tied_head(tuned, base)
    starts = {head: base.anatomy.embedding or ""}
    tensors = {
        name: _scaled_update(base, starts.get(name, name), tuned, name, scales[name])
        for name, tensor in tuned.items()
        if tensor.dtype.kind == "float" and anatomy.places[name].role is not Role.BUFFER
        if name in meant
    }
    edit = Edit(
        "lines",
        {"alpha": alpha, "beta": beta, "outside": outside}
        | ({} if scope is None else {"scope": scope}),
        {"base": base.source, "tuned": tuned.source},
        {
            "scales": {
                stack: [depth_scale(block, depth, alpha, beta) for block in range(depth)]
                for stack, depth in anatomy.stacks.items()
                if scope is None or any(anatomy.places[name].stack == stack for name in meant)
            },
            "outside": {
                name: scales[name]
                for name, place in anatomy.places.items()
                if place.stack is None and name in tensors
            },
        },
    )
    notes = base.notes[len(stored.notes) :]  # that it was dequantized
    if not anatomy.stacks:
        flat = f"no blocks were recognised, so that every tensor has the factor {alpha:g}"
        notes += (f"{tuned.source.reference}: {flat}; a file for --anatomy can name them",)
    return tuned.edited(edit, tensors, tuned.settled_config, notes=notes, others=[base])


def depth_scale(block: int, depth: int, alpha: float, beta: float) -> float:
    """lambda for the block counted from 0, of `depth` blocks. One block alone is the last."""
    return alpha + beta * (block / (depth - 1) if depth > 1 else 1)


def scale_of(place: Place, anatomy: Anatomy, alpha: float, beta: float, outside: Outside) -> float:
    """lambda for a tensor: by its depth in a stack, or by `outside`."""
    if place.stack is not None and place.block is not None:
        return depth_scale(place.block, anatomy.stacks[place.stack], alpha, beta)
    late = place.role in (Role.NORM, Role.HEAD)
    return alpha + beta if outside == "depth" and late else alpha


def _scaled_update(
    base: Checkpoint, start: str, tuned: Checkpoint, name: str, scale: float
) -> LazyTensor:
    """`start` of base + scale * (`name` of tuned - `start` of base), in the type of `name`."""
    from surgery.kernels import compiled
    from surgery.kernels.updates import scale_and_square_bytes

    like = tuned[name]
    inputs = values_of(base, start), values_of(tuned, name)
    kernel, tally = _kernels(scale, inputs[0].dtype, inputs[1].dtype, like.dtype)
    if scale in (0, 1):  # one of the inputs as it is, and the other isn't seen in the result
        inputs = finite(base, start), finite(tuned, name)
    else:
        kernel, tally = looking_after((called(base, start), called(tuned, name)), kernel, tally)
    plain = like.dtype is DTYPES["BF16"] and compiled.takes(inputs)
    direct = partial(scale_and_square_bytes, scale=scale) if plain else None
    return LazyTensor(
        like.shape, like.dtype, inputs=inputs, kernel=kernel, tally=tally, direct=direct
    )


@lru_cache(maxsize=1 << 12)  # the tensors of a block have the same ones
def _kernels(scale: float, base: DType, tuned: DType, dtype: DType) -> tuple[Kernel, Tally]:
    from surgery.kernels.updates import scale_and_square, scale_update

    compute = max(base, tuned, key=lambda one: one.bits).compute
    how: dict[str, Any] = {"scale": scale, "compute": compute, "dtype": dtype}
    return partial(scale_update, **how), partial(scale_and_square, **how)
