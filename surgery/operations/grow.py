"""Grow: widen MLPs so that the function stays exactly the same.

Adila, Mazzawi, Dherin, Gonzalvo, "Grow, Don't Overwrite", arXiv 2603.08647: neurons are copied,
and the outgoing weights of each are split among its copies (see kernels/split.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import ceil, isfinite
from typing import Literal

from surgery.anatomy import MLP, Projection
from surgery.checkpoint import Checkpoint, Edit
from surgery.errors import ArgumentError, UnsupportedError
from surgery.growth import Growth, Ranges
from surgery.operations.layers import as_ranges, parse_layers
from surgery.operations.pairs import check_unquantized
from surgery.operations.widths import widened_config
from surgery.tensor import LazyTensor, gather
from surgery.values import noise, table, zeros

Choose = Literal["first", "random", "norm"]
MANY_RUNS = 64
"""Runs of copied columns beyond which one lookup of all columns is faster than a slice each."""
WIDEST = 1 << 24
"""Neurons; the widest MLPs that there are have some hundred thousand."""


def grow(
    base: Checkpoint,
    *,
    factor: float | None = None,
    width: int | None = None,
    layers: str = "all",
    multiple_of: int = 1,
    choose: Choose = "first",
    symmetry_break: float = 0.0,
    seed: int = 0,
    uniform: bool = False,
) -> Checkpoint:
    """The checkpoint with wider MLPs in the chosen layers, and the same function.

    The new width is `factor` times the old (2 unless given) or `width`, rounded up to
    `multiple_of`. Where not every neuron is copied equally often, `choose` says which are: the
    first, a seeded random choice, or those of the largest ||incoming|| * ||outgoing||.
    `symmetry_break` in (0, 0.5) splits outgoing weights unequally, 1/2 + e and 1/2 - e, so that
    training can tell the copies apart. Layers of different widths need a modeling file beside
    the shards, which is added; with `uniform` the other layers are padded with zero neurons
    instead, so that any loader can read the result.

    Raises ArgumentError or UnsupportedError before any tensor is written. Only `choose="norm"`
    reads tensors here.
    """
    _check_arguments(base, factor, width, multiple_of, choose, symmetry_break)
    check_unquantized(base=base)
    mlps = _chosen(base, layers)
    growths = [
        _growth(base, mlp, _new_width(mlp, factor, width, multiple_of), choose, seed)
        for mlp in mlps
    ]
    if uniform:
        growths = _padded(base, growths)
    tensors: dict[str, LazyTensor] = {}
    for growth in growths:
        tensors |= _grown_tensors(base, growth, symmetry_break, seed)
    config, companions = widened_config(base, growths)
    edit = Edit(
        "grow",
        {
            "factor": factor if width is not None or factor is not None else 2.0,
            "width": width,
            "layers": layers,
            "multiple_of": multiple_of,
            "choose": choose,
            "symmetry_break": symmetry_break,
            "seed": seed,
            "uniform": uniform,
        },
        {"base": base.source},
        {"mlps": [growth.as_json() for growth in growths]},
    )
    return base.edited(edit, tensors, config, companions)


def _check_arguments(
    base: Checkpoint,
    factor: float | None,
    width: int | None,
    multiple_of: int,
    choose: str,
    symmetry_break: float,
) -> None:
    problems = []
    if factor is not None and width is not None:
        problems.append("give either factor or width, not both")
    if factor is not None and not (isfinite(factor) and factor > 1):
        problems.append(f"factor is {factor}, and has to be above 1: growth adds neurons")
    if multiple_of < 1:
        problems.append(f"multiple_of is {multiple_of}, and has to be at least 1")
    if choose not in ("first", "random", "norm"):
        problems.append(f"choose is {choose!r}, and has to be 'first', 'random' or 'norm'")
    if not 0 <= symmetry_break < 0.5:
        problems.append(f"symmetry_break is {symmetry_break}, and has to be in [0, 0.5)")
    elif symmetry_break:
        for mlp in base.anatomy.mlps.values():
            dtype = base[mlp.down.weight].dtype
            if dtype.kind == "float" and symmetry_break < _resolution(dtype.name):
                problems.append(
                    f"symmetry_break is {symmetry_break}, and {dtype} weights can't be split that "
                    f"finely: give at least {_resolution(dtype.name):.2g}"
                )
                break
    ArgumentError.raise_if(problems)


def _resolution(dtype: str) -> float:
    """Shares are multiples of ulp(w), which is at most this part of w."""
    return {"BF16": 2**-7, "F16": 2**-10, "F32": 2**-23, "F64": 2**-52}[dtype]


def _chosen(base: Checkpoint, layers: str) -> list[MLP]:
    """The MLPs of the chosen layers. Raises with the reason for each that can't be grown."""
    anatomy = base.anatomy
    stacks = sorted({stack for stack, _ in (*anatomy.mlps, *anatomy.no_growth)})
    if not stacks:
        raise UnsupportedError(
            f"{base.source.reference} has no MLP that was recognised: `surgery inspect` shows "
            f"what was found"
        )
    chosen: list[MLP] = []
    refused: list[str] = []
    for stack in stacks:
        for block in parse_layers(layers, anatomy.stacks[stack]):
            where = f"{stack}.{block}"
            if reason := anatomy.no_growth.get((stack, block)):
                refused.append(f"{where} can't be grown: {reason}")
            elif mlp := anatomy.mlps.get((stack, block)):
                chosen.append(mlp)
            elif layers.strip() != "all":
                refused.append(f"{where} can't be grown: it has no MLP")
    UnsupportedError.raise_if(refused)
    return chosen


def _new_width(mlp: MLP, factor: float | None, width: int | None, multiple_of: int) -> int:
    exact = Fraction(str(2 if factor is None else factor))  # 1.1 means 11/10
    wanted = width if width is not None else ceil(mlp.width * exact)
    rounded = -(-wanted // multiple_of) * multiple_of
    if rounded <= mlp.width:
        raise ArgumentError(
            f"{mlp.stack}.{mlp.block} has an MLP of width {mlp.width:,}, and {rounded:,} isn't "
            f"wider; growth only adds neurons"
        )
    if rounded > WIDEST:
        raise ArgumentError(
            f"{mlp.stack}.{mlp.block} would have an MLP of width {rounded:,}, and {WIDEST:,} is "
            f"the largest that can be meant"
        )
    return rounded


def _growth(base: Checkpoint, mlp: MLP, width: int, choose: Choose, seed: int) -> Growth:
    rounds, rest = divmod(width - mlp.width, mlp.width)
    copied = [(0, mlp.width)] * rounds + list(_some(base, mlp, rest, choose, seed))
    return Growth(mlp, width, tuple(copied))


def _some(base: Checkpoint, mlp: MLP, count: int, choose: Choose, seed: int) -> Ranges:
    """`count` of the MLP's neurons, as ranges in ascending order."""
    if count == 0:
        return ()
    if choose == "first":
        return ((0, count),)
    if choose == "random":
        scores = noise((mlp.width,), seed, f"choose:{mlp.down.weight}").read()
    else:
        from surgery.measure import neuron_norms

        scores = neuron_norms(base, mlp)
    best = scores.argsort(descending=True, stable=True)[:count]
    return as_ranges(sorted(best.tolist()))


def _padded(base: Checkpoint, growths: Sequence[Growth]) -> list[Growth]:
    """The growths, with zero neurons for every layer that is narrower than the widest of its
    stack, whether it was to grow or not."""
    chosen = {(growth.mlp.stack, growth.mlp.block): growth for growth in growths}
    stacks = {growth.mlp.stack for growth in growths}
    everything = [
        chosen.get(key) or Growth(mlp, mlp.width, ())
        for key, mlp in base.anatomy.mlps.items()
        if mlp.stack in stacks
    ]
    most = {s: max(g.width for g in everything if g.mlp.stack == s) for s in stacks}
    padded = []
    for growth in everything:
        wide = most[growth.mlp.stack]
        if wide > growth.mlp.width:
            padded.append(replace(growth, width=wide, padding=wide - growth.width))
    return padded


def _grown_tensors(
    base: Checkpoint, growth: Growth, symmetry_break: float, seed: int
) -> dict[str, LazyTensor]:
    tensors = {}
    for up in growth.mlp.ups:
        tensors[up.weight] = (
            _wider_columns(base[up.weight], growth)
            if up.in_out
            else _more_rows(base[up.weight], growth, up)
        )
        if up.bias is not None:
            tensors[up.bias] = _more_rows(base[up.bias], growth, up)
    down = growth.mlp.down
    tensors[down.weight] = _split(base[down.weight], down, growth, symmetry_break, seed)
    return tensors


def _more_rows(tensor: LazyTensor, growth: Growth, up: Projection) -> LazyTensor:
    """Rows 0 to p and the copied ones, for each of the stacked parts; then rows of zeros."""
    p = growth.mlp.width
    runs: list[tuple[int, int, int]] = []
    for part in range(up.parts):
        at = part * p
        runs += [(0, at + start, at + stop) for start, stop in ((0, p), *growth.copied)]
        if growth.padding:
            runs.append((1, 0, growth.padding))
    inputs: tuple[LazyTensor, ...] = (tensor,)
    if growth.padding:
        inputs += (zeros((growth.padding, *tensor.shape[1:]), tensor.dtype),)
    return gather(inputs, tuple(runs), (up.parts * growth.width, *tensor.shape[1:]))


def _wider_columns(tensor: LazyTensor, growth: Growth) -> LazyTensor:
    import torch

    from surgery.kernels.columns import take_columns

    sources = torch.from_numpy(growth.sources())
    return LazyTensor(
        (tensor.shape[0], growth.width),
        tensor.dtype,
        inputs=(tensor,),
        kernel=partial(take_columns, sources=sources),
    )


def _split(
    tensor: LazyTensor, down: Projection, growth: Growth, symmetry_break: float, seed: int
) -> LazyTensor:
    """The down projection, with the weights of every source split among its copies."""
    import torch

    from surgery.kernels.split import Dyadic, split_columns, split_rows

    ordinals, copies = growth.shares()
    sources = growth.sources().clip(min=0)
    draws = int(copies.max()) - 1 if symmetry_break else 0
    draw = [noise(tensor.shape, seed, f"{down.weight}:{m}") for m in range(draws)]
    if not down.in_out:
        of_column = torch.from_numpy(ordinals), torch.from_numpy(copies)
        p, dtype = growth.mlp.width, tensor.dtype.torch
        runs = ((0, p), *growth.copied)
        plain = not symmetry_break and len(runs) <= MANY_RUNS
        kernel = partial(
            split_columns,
            sources=torch.from_numpy(sources),
            ordinals=of_column[0],
            copies=of_column[1],
            symmetry_break=symmetry_break,
            dyadic=Dyadic.plan(runs, *of_column, p, dtype) if plain else None,
        )
        shape = (tensor.shape[0], growth.width)
        return LazyTensor(shape, tensor.dtype, inputs=(tensor, *draw), kernel=kernel)
    shape = (growth.width, tensor.shape[1])
    of_rows = tuple((0, start, stop) for start, stop in ((0, growth.mlp.width), *growth.copied))
    if growth.padding:
        of_rows += ((0, 0, 1),) * growth.padding  # any row: none of it is shared out
    rows = [gather((source,), of_rows, shape) for source in (tensor, *draw)]
    return LazyTensor(
        shape,
        tensor.dtype,
        inputs=(rows[0], table(ordinals), table(copies), *rows[1:]),
        kernel=partial(split_rows, symmetry_break=symmetry_break),
    )
