"""Task vectors of checkpoints: made of a pair, and applied to a base.

Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Literal

from surgery.anatomy import Role
from surgery.checkpoint import Checkpoint, Edit
from surgery.dtypes import DTYPES, DType
from surgery.errors import ArgumentError, MismatchError, UnsupportedError
from surgery.merging.finite import checked_after, finite
from surgery.operations.dequantize import computable
from surgery.operations.pairs import check_pair, tied_head
from surgery.tensor import LazyTensor
from surgery.vectors import TaskVector


def task_vector(
    base: Checkpoint, tuned: Checkpoint, *, dtype: Literal["float32", "tuned"] = "float32"
) -> TaskVector:
    """tau = theta_tuned - theta_base of every float tensor, computed in float32 (float64 for
    float64 inputs).

    It is stored as it was computed, or, with `dtype="tuned"`, rounded to the type that the tuned
    tensor has, which halves the size of a bfloat16 model's. Raises MismatchError or
    UnsupportedError before any tensor is read.
    """
    if dtype not in ("float32", "tuned"):
        raise ArgumentError(f"dtype is {dtype!r}, and has to be 'float32' or 'tuned'")
    base, tuned = computable(base=base, tuned=tuned)
    check_pair(base, tuned)
    if tied_head(tuned, base) is not None and not tuned.anatomy.tied:
        raise UnsupportedError(
            f"{tuned.source.reference} has a head of its own, and {base.source.reference} ties it "
            f"to the embedding: the base has nothing that the head's update could be added to"
        )
    head, embedding = base.anatomy.head, tuned.anatomy.embedding
    tensors = {}
    for name, tensor in base.items():
        if tensor.dtype.kind != "float" or base.anatomy.places[name].role is Role.BUFFER:
            continue
        stored = name if name in tuned or name != head or embedding is None else embedding
        tensors[name] = _difference(
            finite(base, name),
            finite(tuned, stored),
            tuned[stored].dtype if dtype == "tuned" else None,
        )
    edit = Edit("task_vector", {"dtype": dtype}, {"base": base.source, "tuned": tuned.source})
    return TaskVector(tensors=tensors, base=base, history=(*base.history, *tuned.history, edit))


def apply(
    base: Checkpoint,
    *vectors: TaskVector,
    scale: float | Sequence[float] = 1.0,
) -> Checkpoint:
    """theta_base + the sum of scale_i * tau_i, rounded once, to the types of the base.

    `scale` is one number for all task vectors or one for each; a negative one unlearns. The
    result is the base in all else. Raises MismatchError if a task vector belongs to other
    weights, ArgumentError, or UnsupportedError. (Of a base whose headers alone were fetched the
    weights can't be compared, and it is taken on trust.)
    """
    scales = _scales(scale, len(vectors))
    (base,) = computable(base=base)
    problems = [problem for vector in vectors for problem in _problems(base, vector)]
    MismatchError.raise_if(dict.fromkeys(problems))
    if not base.source.remote_headers:
        for vector in vectors:
            vector.require_base(base)
    tensors = {}
    for name in dict.fromkeys(name for vector in vectors for name in vector):
        having = [(v[name], s) for v, s in zip(vectors, scales, strict=True) if name in v]
        tensors[name] = _applied(finite(base, name), having, base[name].dtype)
    inputs = {"base": base.source}
    for at, vector in enumerate(vectors, 1):
        for role, source in vector.sources.items():
            inputs[f"task_vector_{at}" + ("" if role == "task_vector" else f"_{role}")] = source
    edit = Edit("apply", {"scale": list(scales)}, inputs)
    return base.edited(edit, tensors, base.settled_config, others=vectors)


def _difference(base: LazyTensor, tuned: LazyTensor, dtype: DType | None) -> LazyTensor:
    """tuned - base, in `dtype`, or else as it is computed."""
    from surgery.kernels.merging import difference

    wide = DTYPES["F64" if "F64" in (base.dtype.name, tuned.dtype.name) else "F32"]
    stored = dtype or wide
    kernel = partial(difference, compute=wide, dtype=stored)
    return LazyTensor(tuned.shape, stored, inputs=(base, tuned), kernel=kernel)


def _applied(
    base: LazyTensor, updates: Sequence[tuple[LazyTensor, float]], dtype: DType
) -> LazyTensor:
    from surgery.kernels.updates import apply_updates

    taus = tuple(tau for tau, _ in updates)
    wide = DTYPES["F64" if any(t.dtype.name == "F64" for t in (base, *taus)) else "F32"]
    kernel = partial(
        apply_updates,
        scales=tuple(scale for _, scale in updates),
        compute=wide,
        dtype=dtype,
    )
    inputs, checked, _ = checked_after((base, *taus), kernel)
    return LazyTensor(base.shape, dtype, inputs=inputs, kernel=checked)


def _scales(scale: float | Sequence[float], count: int) -> tuple[float, ...]:
    given = tuple(scale) if isinstance(scale, Sequence) else (scale,) * count
    problems = [f"scale is {s!r}, and has to be a finite number" for s in given if not _number(s)]
    if not count:
        problems.append("there is no task vector to apply")
    elif len(given) != count:
        problems.append(
            f"scale has {len(given)} values, and there are {count} task vectors: give one for "
            f"each, or one for all"
        )
    ArgumentError.raise_if(dict.fromkeys(problems))
    return tuple(float(value) for value in given)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _problems(base: Checkpoint, vector: Mapping[str, LazyTensor]) -> list[str]:
    """Where a task vector doesn't fit the base."""
    where = base.source.reference
    return [
        f"{name} of the task vector isn't in {where}"
        if name not in base
        else f"{name} is {list(vector[name].shape)} in the task vector and "
        f"{list(base[name].shape)} in {where}"
        for name in vector
        if name not in base or vector[name].shape != base[name].shape
    ]
