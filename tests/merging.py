"""What the tests of merging share: tensors in memory as lazy tensors, and one merged tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgery.dtypes import DTYPES
from surgery.merging.job import Job
from surgery.merging.methods import METHODS, joint_problems
from surgery.merging.parameters import resolve
from surgery.tensor import LazyTensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
NEEDED = {
    "nearswap": {"t": 0.01},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6},
    "della_linear": {"density": 0.6},
}
"""Parameters that have no default."""


@dataclass(frozen=True, eq=False)
class Held:
    """A leaf whose rows are in memory."""

    values: torch.Tensor

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        rows = self.values.reshape(tensor.shape_of(tensor.rows))
        return rows[start:stop].clone()


def held(values: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(values.shape), DTYPES[NAMES[values.dtype]], leaf=Held(values))


def lazily(
    method: str,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    *,
    seed: int = 0,
    name: str = "w",
    matrix: bool = True,
    factor: float | None = None,
    bare: bool = False,
    **given: Any,
) -> LazyTensor:
    """One tensor merged, as a lazy tensor."""
    chosen = METHODS[method]
    values, problems = resolve(chosen.parameters, {**NEEDED.get(method, {}), **given}, len(models))
    assert not problems + joint_problems(chosen, values, len(models))
    first = models[0] if base is None else base
    job = Job(
        name=name,
        base=None if base is None else held(base),
        models=tuple(held(model) for model in models),
        parameters=values,
        dtype=DTYPES[NAMES[first.dtype]],
        seed=seed,
        matrix=matrix,
        scale=values.get("lambda", 1.0) if factor is None else factor,
        bare=bare,
    )
    return chosen.build(job)


def merged(
    method: str, base: torch.Tensor | None, models: list[torch.Tensor], **how: Any
) -> torch.Tensor:
    """One tensor merged."""
    return lazily(method, base, models, **how).whole()


def case(
    shape: tuple[int, ...] = (6, 5),
    models: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    step: float = 0.1,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base, and fine-tunes of it."""
    torch.manual_seed(seed)
    base = torch.randn(shape)
    return base.to(dtype), [(base + step * torch.randn(shape)).to(dtype) for _ in range(models)]


def with_base(method: str) -> bool:
    return METHODS[method].base != "none"


def model_count(method: str) -> int:
    """Three models, or as many as the method takes."""
    return METHODS[method].models[1] or 3
