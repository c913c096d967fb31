"""LoRA extraction: what fine-tuning changed, as the adapter of a given rank that is nearest to it.

Of each weight matrix the update tau = theta_tuned - theta_base is cut to its first singular
directions, the best that any matrix of that rank can do (Eckart and Young).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from threading import Lock
from typing import TYPE_CHECKING, Literal

from surgery.checkpoint import Checkpoint, Edit, joint_history
from surgery.dtypes import DTYPES, DType
from surgery.errors import ArgumentError, UnsupportedError
from surgery.lora.adapter import PREFIX
from surgery.lora.modules import Matrix, Modules, find_modules, is_head
from surgery.lora.written import LoraAdapter, Part, Rest, adapter_config
from surgery.merging.finite import finite, unchecked
from surgery.operations.dequantize import computable
from surgery.operations.pairs import check_pair, tied_head
from surgery.parallel import Progress, run_all
from surgery.tensor import LazyTensor
from surgery.values import held, noise, zeros

if TYPE_CHECKING:
    import torch

Method = Literal["exact", "randomized"]
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def extract_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: Sequence[str] | None = None,
    method: Method = "exact",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    save_rest: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LoraAdapter:
    """The LoRA adapter of `rank` that is nearest to `tuned` on `base`, for PEFT to load.

    With `energy` (0.95) every module gets the smallest rank that keeps this part of ||tau||^2,
    and no more than `rank`. `modules` are patterns of names, and every linear layer of the blocks
    by default. Decomposed in float64, "exact" or, for low ranks many times faster, "randomized".

    What isn't in those modules is reported in `rest`; with `save_rest` it goes along whole
    (modules_to_save, biases) where PEFT can hold it. Every input is read here, one matrix in
    memory for each of the `threads`. Raises ArgumentError, MismatchError or UnsupportedError.
    """
    plan = _Plan.make(base, tuned, rank, energy, modules, method, dtype, save_rest, seed)
    parts: dict[str, tuple[Part, LazyTensor, LazyTensor]] = {}
    moved: dict[str, float] = {}
    lock = Lock()

    def work(name: str) -> None:
        matrix, pair = plan.matrices.get(name), plan.pairs[name]
        if matrix is not None:
            found = _decomposed(matrix, pair, plan)
            with lock:
                if found is not None:
                    parts[name] = found
        else:
            relative = _relative(pair)
            with lock:
                moved[name] = relative
        if progress is not None:
            progress(pair[1].nbytes)

    run_all(iter(plan.pairs), work, threads)
    if not parts:
        raise UnsupportedError(
            f"{base.source.reference} and {tuned.source.reference} don't differ in any of the "
            f"{len(plan.matrices):,} matrices: there is nothing to extract"
        )
    return plan.adapter(parts, {name: size for name, size in moved.items() if size > 0})


def outline_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: Sequence[str] | None = None,
    method: Method = "exact",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    save_rest: bool = False,
) -> LoraAdapter:
    """What `extract_lora` would make at most, from headers alone: an adapter of zeros, in which
    every matrix has changed and nothing else."""
    plan = _Plan.make(base, tuned, rank, energy, modules, method, dtype, save_rest, 0)
    parts = {}
    for name, matrix in plan.matrices.items():
        out, into = _outputs_first(matrix, base[name].shape)
        most = plan.most(matrix)
        stored = zeros((most, into), plan.dtype), zeros((out, most), plan.dtype)
        parts[name] = (Part(name, matrix.module, most, 1.0, 0.0), *stored)
    return plan.adapter(parts, {})


@dataclass(frozen=True, eq=False)
class _Plan:
    """An extraction that has been checked."""

    base: Checkpoint
    tuned: Checkpoint
    rank: int | None
    energy: float | None
    method: Method
    dtype: DType
    save_rest: bool
    seed: int
    modules: Modules
    matrices: Mapping[str, Matrix]
    pairs: Mapping[str, tuple[LazyTensor, LazyTensor]]
    """Every tensor of floats before and after, by its name."""

    @classmethod
    def make(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        rank: int | None,
        energy: float | None,
        patterns: Sequence[str] | None,
        method: Method,
        dtype: str,
        save_rest: bool,
        seed: int,
    ) -> _Plan:
        _check_arguments(rank, energy, method, dtype)
        base, tuned = computable(base=base, tuned=tuned)
        check_pair(base, tuned)
        found = find_modules(base, patterns)
        return cls(
            base, tuned, rank, energy, method, DTYPES[STORED[dtype]], save_rest, seed, found,
            {matrix.name: matrix for matrix in found.matrices},
            _pairs(base, tuned),
        )  # fmt: skip

    def most(self, matrix: Matrix) -> int:
        """The highest rank that a matrix may get."""
        full = min(self.base[matrix.name].shape)
        return full if self.rank is None else min(self.rank, full)

    def adapter(
        self,
        parts: Mapping[str, tuple[Part, LazyTensor, LazyTensor]],
        moved: Mapping[str, float],
    ) -> LoraAdapter:
        moved = {name: moved[name] for name in self.pairs if name in moved}  # threads mix them
        tensors = {}
        for name in self.matrices:
            if name in parts:
                part, a, b = parts[name]
                tensors[f"{PREFIX}{part.module}.lora_A.weight"] = a
                tensors[f"{PREFIX}{part.module}.lora_B.weight"] = b
        extracted = tuple(parts[name][0] for name in self.matrices if name in parts)
        saved, kept = self._saved(moved, {part.module for part in extracted})
        rest = tuple(Rest(name, size, name in kept) for name, size in moved.items())
        tied = any(map(self._tied_to, kept))
        config = adapter_config(self.base, extracted, self.modules, saved, tied=tied)
        edit = Edit(
            "lora",
            {
                "rank": self.rank,
                "energy": self.energy,
                "method": self.method,
                "dtype": self.dtype.torch_name,
                "save_rest": self.save_rest,
                **({"seed": self.seed} if self.method == "randomized" else {}),
            },
            {"base": self.base.source, "tuned": self.tuned.source},
            {
                "modules": [part.as_json() for part in extracted],
                "rest": [r.as_json() for r in rest],
            },
        )
        return LoraAdapter(
            tensors={**tensors, **saved},
            history=(*joint_history(self.base, self.tuned), edit),
            config=config,
            parts=extracted,
            rest=rest,
        )

    def _saved(
        self, moved: Mapping[str, float], taken: set[str]
    ) -> tuple[dict[str, LazyTensor], set[str]]:
        """The tensors that go along whole, by PEFT's names, and which of `moved` are in there:
        biases of the modules that were taken apart, and modules that PEFT can replace."""
        saved: dict[str, LazyTensor] = {}
        kept: set[str] = set()
        untied = {
            name: (name.rpartition(".")[0], "weight") for name in moved if name not in self.base
        }
        owners = self.modules.owners | untied  # a head that the base hasn't got
        on_disk = {owner: name for name, owner in owners.items()}
        for name in moved if self.save_rest else ():
            module, parameter = owners.get(name, ("", ""))
            layer = self.modules.layers.get(module)
            if module in taken and parameter == "bias":
                saved[f"{PREFIX}{module}.base_layer.bias"] = unchecked(self.pairs[name][1])
                kept.add(name)
            elif layer is not None and layer.whole and module not in taken:
                every = {p: on_disk.get((module, p), "") for p in layer.parameters}
                if all(there in self.pairs for there in every.values()):
                    found = {p: unchecked(self.pairs[there][1]) for p, there in every.items()}
                    also = self._tied_to(name)
                    saved |= {
                        f"{PREFIX}{m}.{p}": t for m in (module, *also) for p, t in found.items()
                    }
                    kept.add(name)
        return saved, kept

    def _tied_to(self, name: str) -> list[str]:
        """The head that goes with an embedding: of a tied pair PEFT would replace one alone."""
        tied = self.base.anatomy.tied and self.tuned.anatomy.tied
        if not tied or name != self.base.anatomy.embedding:
            return []
        return [m for m, layer in self.modules.layers.items() if layer.linear and is_head(m)]


def _pairs(base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Base and tuned tensor of every name; a head that one ties is its embedding."""
    own = tied_head(tuned, base)
    return {
        name: (_of(base, name), _of(tuned, name))
        for name in (*base, *((own,) if own is not None else ()))
        if name not in base or base[name].dtype.kind == "float"
    }


def _of(model: Checkpoint, name: str) -> LazyTensor:
    return finite(model, name if name in model else model.anatomy.embedding or "")


def _decomposed(
    matrix: Matrix, pair: tuple[LazyTensor, LazyTensor], plan: _Plan
) -> tuple[Part, LazyTensor, LazyTensor] | None:
    """A and B of one matrix, or None if it hasn't changed."""
    import numpy

    from surgery.kernels.low_rank import OVERSAMPLING, balanced, leading_directions

    update = pair[1].whole().double().sub_(pair[0].whole())
    if matrix.in_out:
        update = update.mT.contiguous()
    whole = float(numpy.add.reduce(numpy.square(update.numpy()).reshape(-1)))
    if whole == 0:
        return None
    most, width = plan.most(matrix), min(update.shape)
    sketch = None
    if plan.method == "randomized" and most + OVERSAMPLING < width:
        shape = (update.shape[1], most + OVERSAMPLING)
        sketch = noise(shape, plan.seed, f"lora:{matrix.name}").read().double()
    left, values, right = leading_directions(update, sketch)
    shares = numpy.cumsum(numpy.square(values[:most].numpy())) / whole
    rank = most
    if plan.energy is not None:
        rank = min(most, int(numpy.searchsorted(shares, plan.energy)) + 1)
    a, b = balanced(left[:, :rank], values[:rank], right[:rank])
    part = Part(matrix.name, matrix.module, rank, min(1.0, float(shares[rank - 1])), sqrt(whole))
    return part, _stored(a, plan.dtype), _stored(b, plan.dtype)


def _stored(factor: torch.Tensor, dtype: DType) -> LazyTensor:
    return held(factor.to(dtype.torch).contiguous())


def _outputs_first(matrix: Matrix, shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[1], shape[0]) if matrix.in_out else (shape[0], shape[1])


def _relative(pair: tuple[LazyTensor, LazyTensor]) -> float:
    """||tau|| / ||theta_base||, or ||tau|| if the base is zero."""
    from surgery.merging.measures import gram

    update = sqrt(gram(pair, from_base=True)[0, 0])
    size = float(gram(pair[:1], from_base=False)[0, 0])
    return update / sqrt(size) if size else update


def _check_arguments(rank: int | None, energy: float | None, method: str, dtype: str) -> None:
    problems = []
    if rank is None and (energy is None or method == "randomized"):
        problems.append("rank is missing: how many directions each update may keep")
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        problems.append(f"rank is {rank}, and has to be at least 1")
    if energy is not None and not (isfinite(energy) and 0 < energy <= 1):
        problems.append(f"energy is {energy}, and has to be above 0 and at most 1")
    if method not in ("exact", "randomized"):
        problems.append(f"method is {method!r}, and has to be 'exact' or 'randomized'")
    if dtype not in STORED:
        problems.append(f"dtype is {dtype!r}, and has to be one of {', '.join(STORED)}")
    ArgumentError.raise_if(problems)
