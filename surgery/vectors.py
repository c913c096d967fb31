"""TaskVector: what fine-tuning did to a base, as a thing to add up, scale, store and apply."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from surgery.checkpoint import Checkpoint, Edit, Weights, joint_history
from surgery.dtypes import DTYPES
from surgery.errors import ArgumentError, FormatError, MismatchError
from surgery.hub import Source, resolve
from surgery.opening import TASK_VECTOR, open_tensors, read_json
from surgery.tensor import LazyTensor

FORMAT = 1


@dataclass(frozen=True)
class Base:
    """The checkpoint that a stored task vector belongs to: its name, for people, and what tells
    its weights from others (`Checkpoint.fingerprint`)."""

    reference: str
    fingerprint: str


@dataclass(frozen=True, eq=False, kw_only=True)
class TaskVector(Weights):
    """tau = theta_tuned - theta_base, tensor by tensor: a mapping and no model.

    Task vectors of one base add up, and take a factor: `code + 0.5 * math`, `-toxic`. A tensor
    that one of them lacks counts as zero there. Ilharco et al., arXiv 2212.04089.
    """

    stem: ClassVar[str] = "task_vector"

    base: Checkpoint | Base
    source: Source | None = None
    """Where it lies, if it was opened."""

    @property
    def base_reference(self) -> str:
        """What the base was called."""
        return self.base.reference if isinstance(self.base, Base) else self.base.source.reference

    @property
    def sources(self) -> Mapping[str, Source]:
        """Where it lies, or else what it was made of."""
        if self.source is not None:
            return {"task_vector": self.source}
        return {role: source for edit in self.history for role, source in edit.inputs.items()}

    @property
    def paths(self) -> tuple[Path, ...]:
        own = () if self.source is None else (self.source.path,)
        return (*own, *super().paths)

    def own_files(self) -> dict[str, bytes]:
        """`task_vector.json`, which says what base it belongs to."""
        table = {
            "format": FORMAT,
            "base": {"reference": self.base_reference, "fingerprint": self.base.fingerprint},
        }
        return {TASK_VECTOR: (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()}

    def require_base(self, other: Checkpoint | Base) -> None:
        """Raise MismatchError unless `other` is the base that this belongs to."""
        if self.base is not other and self.base.fingerprint != other.fingerprint:
            name = other.reference if isinstance(other, Base) else other.source.reference
            raise MismatchError(
                f"the task vector belongs to {self.base_reference} (fingerprint "
                f"{self.base.fingerprint[:12]}), and {name} has other weights "
                f"({other.fingerprint[:12]}): give the base that it was made from; to change "
                f"another model, merge: `surgery merge BASE MODEL TUNED --method task_arithmetic "
                f"--weight 1,SCALE`"
            )

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        self.require_base(other.base)
        MismatchError.raise_if(
            f"{name} is {list(self[name].shape)} in one task vector and "
            f"{list(other[name].shape)} in the other"
            for name in self
            if name in other and self[name].shape != other[name].shape
        )
        tensors = {**self.tensors, **other.tensors}
        tensors |= {
            name: combined((self[name], other[name]), (1.0, 1.0)) for name in self if name in other
        }
        return self._made(Edit("add", {}, {}), tensors, other)

    def __radd__(self, other: object) -> TaskVector:
        return self if other == 0 else NotImplemented  # what sum() starts with

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not isfinite(factor):
            raise ArgumentError(f"a task vector can't be multiplied by {factor}")
        tensors = {name: combined((tensor,), (float(factor),)) for name, tensor in self.items()}
        return self._made(Edit("scale", {"factor": factor}, {}), tensors)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1 / divisor)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other if isinstance(other, TaskVector) else NotImplemented

    def _made(
        self, edit: Edit, tensors: Mapping[str, LazyTensor], *others: TaskVector
    ) -> TaskVector:
        known = Edit("task_vector", {}, dict(self.sources))
        history = joint_history(self, *others) or (known,)
        return replace(self, tensors=tensors, history=(*history, edit), source=None)


def open_task_vector(reference: str | Path, *, headers_only: bool = False) -> TaskVector:
    """Open a directory (or a Hub repository) that `surgery task-vector` has written."""
    source = resolve(reference, headers_only=headers_only)
    path = source.path / TASK_VECTOR
    if not path.is_file():
        raise FormatError(
            f"{source.reference} has no {TASK_VECTOR}: it is no task vector; make one with "
            f"`surgery task-vector BASE TUNED -o DIR`"
        )
    base = _base(read_json(path), path)
    tensors, source = open_tensors(source, TaskVector.stem)
    FormatError.raise_if(
        f"{source.reference}: {name} is {tensor.dtype}, and an update is made of floats"
        for name, tensor in tensors.items()
        if tensor.dtype.kind != "float"
    )
    return TaskVector(tensors=tensors, base=base, source=source)


def is_task_vector(reference: str | Path) -> bool:
    """Whether that is a directory here that holds a task vector."""
    return os.path.isfile(Path(reference) / TASK_VECTOR)  # Path's own raises for a long name


def _base(table: Mapping[str, Any], path: Path) -> Base:
    found = table.get("base")
    if table.get("format") != FORMAT or not isinstance(found, Mapping):
        raise FormatError(f"{path} isn't of a format that this version knows ({FORMAT})")
    reference, fingerprint = found.get("reference"), found.get("fingerprint")
    if not isinstance(reference, str) or not isinstance(fingerprint, str):
        raise FormatError(f"{path} doesn't say which base the task vector belongs to")
    return Base(reference, fingerprint)


def combined(updates: tuple[LazyTensor, ...], scales: tuple[float, ...]) -> LazyTensor:
    """The sum of updates, each times its scale, in the type that they are computed in."""
    from surgery.kernels.updates import total_update

    dtype = DTYPES["F64" if any(update.dtype.name == "F64" for update in updates) else "F32"]
    kernel = partial(total_update, scales=scales, compute=dtype)
    return LazyTensor(updates[0].shape, dtype, inputs=updates, kernel=kernel)
