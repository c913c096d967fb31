"""Grow: widen MLPs so that the function stays exactly the same.

Adila, Mazzawi, Dherin, Gonzalvo, "Grow, Don't Overwrite", arXiv 2603.08647: neurons are copied,
and the outgoing weights of each are split among its copies (see kernels/split.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal

from surgery.anatomy import MLP
from surgery.anatomy.infer import text_config
from surgery.checkpoint import Checkpoint, Edit
from surgery.errors import ArgumentError, UnsupportedError
from surgery.growth import Growth, Ranges
from surgery.operations.dequantize import scaled_weights, values
from surgery.operations.even import check_even
from surgery.operations.layers import as_ranges, parse_layers
from surgery.operations.neurons import grown_tensors
from surgery.operations.scales import check_blocks, grown_scales, neurons_in_a_block
from surgery.operations.scope import chosen_stacks, may_follow
from surgery.operations.widths import widened_along, widened_config
from surgery.quantization.fp8 import Scaled
from surgery.tensor import LazyTensor
from surgery.values import noise

Choose = Literal["first", "random", "norm"]
WIDEST = 1 << 24
"""Neurons; the widest MLPs that there are have some hundred thousand."""
ExpertKind = Literal["all", "routed", "shared"]
KERNEL_BYTES = 16
"""Rows of experts have to be a multiple of this for transformers' default kernel."""


def grow(
    base: Checkpoint,
    *,
    factor: float | None = None,
    width: int | None = None,
    layers: str = "all",
    scope: str | None = None,
    experts: ExpertKind = "all",
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

    In a model of several parts `scope` says which stacks grow (see anatomy/scopes.py): the language
    model where there is one beside towers for other inputs, unless given; all stacks of an
    encoder-decoder. MLPs whose width is set by the same key of the config grow along.

    In a mixture every expert grows, routed and shared, and plain layers too; `experts` takes
    the "routed" or the "shared" ones alone. Experts that lie in one tensor copy the same neurons.
    A shared MLP that is as wide as several routed experts together stays so.

    Where a norm goes over the neurons of an MLP, or its activation goes by all of them (Gemma 3n),
    its width can be multiplied by a whole number only, and zero neurons are refused.

    Weights of 8-bit floats with scales are copied as they are, in the blocks that share a scale,
    and the scales of outgoing weights are split; what such a layout doesn't allow is refused.

    Raises ArgumentError or UnsupportedError before any tensor is written. Only `choose="norm"`
    reads tensors here.
    """
    _check_arguments(base, factor, width, experts, multiple_of, choose, symmetry_break, seed)
    scaled = scaled_weights(base)
    stacks, left = chosen_stacks(base, scope)
    mlps = _chosen(base, stacks, layers, experts)
    units = _units(base, mlps, scaled, symmetry_break)
    widths = _new_widths(base, mlps, factor, width, multiple_of)
    growths = [
        _growth(base, mlp, wide, choose, seed, unit)
        for mlp, wide, unit in zip(mlps, widths, units, strict=True)
    ]
    check_even(growths)
    check_blocks(base, growths, scaled)
    follow = may_follow(base, mlps, scope)
    others = [
        _growth(base, mlp, _new_width(mlp, factor, width, multiple_of), choose, seed, unit)
        for mlp in (follow if layers.strip() == "all" and experts == "all" else ())
        if (width is None or width > mlp.width) and (unit := _unit(base, mlp, scaled))
        if not mlp.even_because or _new_width(mlp, factor, width, multiple_of) % mlp.width == 0
    ]
    if uniform:
        growths, config, companions = _settled_alike(base, growths, others, follow)
    else:
        growths, config, companions = _settled(base, growths, others)
    check_even(growths)
    check_blocks(base, growths, scaled)
    tensors: dict[str, LazyTensor] = {}
    for growth in growths:
        tensors |= grown_tensors(base, growth, symmetry_break, seed, unsplit=scaled)
        tensors |= grown_scales(base, growth, scaled)
    edit = Edit(
        "grow",
        {
            "factor": factor if width is not None or factor is not None else 2.0,
            "width": width,
            "layers": layers,
            **({} if scope is None else {"scope": scope}),
            **({} if experts == "all" else {"experts": experts}),
            "multiple_of": multiple_of,
            "choose": choose,
            "symmetry_break": symmetry_break,
            "seed": seed,
            "uniform": uniform,
        },
        {"base": base.source},
        {"mlps": [growth.as_json() for growth in growths]},
    )
    return base.edited(edit, tensors, config, companions, notes=left + _notes(base, growths))


_Settled = tuple[list[Growth], dict[str, Any], dict[str, Path | bytes]]
"""Growths, and the config and the companion files after them."""


def _settled(base: Checkpoint, growths: list[Growth], others: Sequence[Growth]) -> _Settled:
    """With those of `others` that a key of the config widens along, if stock classes can load the
    result so; else without them."""
    if along := widened_along(base, growths, others):
        with suppress(UnsupportedError):  # the refusal without them is the one to tell
            together = [*growths, *along]
            return together, *widened_config(base, together, stock=True)
    return growths, *widened_config(base, growths)


def _settled_alike(
    base: Checkpoint, growths: list[Growth], others: Sequence[Growth], follow: Sequence[MLP]
) -> _Settled:
    """With zero neurons so that stock classes can load the result: also for MLPs that may follow,
    where a key widens them along and `others` doesn't say how they grow."""
    ways: list[list[Growth]] = []
    for kinds in (True, False):  # one key may set the widths of several kinds
        padded = _padded(base, growths, kinds=kinds)
        padded += widened_along(base, padded, others or _zeros(padded, follow))
        if padded not in ways:
            ways.append(padded)
    for way in ways[:-1]:
        with suppress(UnsupportedError):
            check_even(way)
            return way, *widened_config(base, way, stock=True)
    return ways[-1], *widened_config(base, ways[-1], stock=True)


def _zeros(growths: Sequence[Growth], follow: Sequence[MLP]) -> list[Growth]:
    """Zero neurons for MLPs that are as wide as one that grows was."""
    taken, widths = {growth.mlp for growth in growths}, defaultdict(set)
    for growth in growths:
        widths[growth.mlp.width].add(growth.width)
    return [
        Growth(mlp, wide, (), padding=wide - mlp.width)
        for mlp in follow
        if mlp not in taken and not mlp.even_because and len(widths[mlp.width]) == 1
        for wide in widths[mlp.width]
    ]


def _notes(base: Checkpoint, growths: Sequence[Growth]) -> tuple[str, ...]:
    """Widths of experts that transformers' default kernel for them refuses."""
    odd = set()
    for growth in growths:
        dtype = base[growth.mlp.down.weight].dtype
        per_row = 8 * KERNEL_BYTES // dtype.bits
        if growth.mlp.kind == "routed" and growth.width % per_row:
            odd.add((growth.width, dtype.name, per_row))
    return tuple(
        f"experts of width {width:,} in {dtype} have rows that aren't multiples of "
        f"{KERNEL_BYTES} bytes, which transformers' default kernel (grouped_mm) refuses: load with "
        f"experts_implementation='eager', or grow with multiple_of={per_row}"
        for width, dtype, per_row in sorted(odd)
    )


def _check_arguments(
    base: Checkpoint,
    factor: float | None,
    width: int | None,
    experts: str,
    multiple_of: int,
    choose: str,
    symmetry_break: float,
    seed: int,
) -> None:
    whole = {"width": width, "multiple_of": multiple_of, "seed": seed}
    numbers = {"factor": factor, "symmetry_break": symmetry_break}
    problems = [
        f"{name} is {value!r}, and has to be a whole number"
        for name, value in whole.items()
        if value is not None and type(value) is not int
    ]
    problems += [
        f"{name} is {value!r}, and has to be a number"
        for name, value in numbers.items()
        if value is not None and not isinstance(value, (int, float))
    ]
    ArgumentError.raise_if(problems)
    if factor is not None and width is not None:
        problems.append("give either factor or width, not both")
    if factor is not None and not (isfinite(factor) and factor > 1):
        problems.append(f"factor is {factor}, and has to be above 1: growth adds neurons")
    if experts not in ("all", "routed", "shared"):
        problems.append(f"experts is {experts!r}, and has to be 'all', 'routed' or 'shared'")
    if multiple_of < 1:
        problems.append(f"multiple_of is {multiple_of}, and has to be at least 1")
    if choose not in ("first", "random", "norm"):
        problems.append(f"choose is {choose!r}, and has to be 'first', 'random' or 'norm'")
    if not 0 <= symmetry_break < 0.5:
        problems.append(f"symmetry_break is {symmetry_break}, and has to be in [0, 0.5)")
    elif symmetry_break and base.quantization is None:
        for mlp in base.anatomy.every_mlp:
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


def _chosen(base: Checkpoint, stacks: Sequence[str], layers: str, experts: ExpertKind) -> list[MLP]:
    """The MLPs of the chosen layers. Raises with the reason for each that can't be grown."""
    anatomy = base.anatomy
    by_block: dict[tuple[str, int | None], list[MLP]] = defaultdict(list)
    for mlp in anatomy.every_mlp:
        by_block[mlp.stack, mlp.block].append(mlp)
    chosen: list[MLP] = []
    refused: list[str] = []
    for stack in stacks:
        for block in parse_layers(layers, anatomy.stacks[stack]):
            where = f"{stack}.{block}"
            wanted = [m for m in by_block[stack, block] if experts in ("all", m.kind)]
            if reason := anatomy.no_growth.get((stack, block)):
                refused.append(f"{where} can't be grown: {reason}")
            elif not wanted and layers.strip() != "all":
                kind = "MLP" if experts == "all" else f"{experts} expert"
                refused.append(f"{where} can't be grown: it has no {kind}")
            chosen += wanted
    whole = [s for s in stacks if not any(text.startswith(f"{s}.") for text in refused)]
    if refused and whole:
        refused.append(f"--scope leaves them out: {', '.join(whole)} can be grown")
    UnsupportedError.raise_if(refused)
    if not chosen:
        raise UnsupportedError(f"{base.source.reference} has no {experts} experts")
    return chosen


def _new_widths(
    base: Checkpoint,
    mlps: Sequence[MLP],
    factor: float | None,
    width: int | None,
    multiple_of: int,
) -> list[int]:
    """The new width of each MLP. DeepSeek's shared experts are one MLP, as wide as so many routed
    ones as a key of the config says: it grows by as much, or the config couldn't tell."""
    routed = {(mlp.stack, mlp.block): mlp for mlp in mlps if mlp.kind == "routed"}
    shared = _shared_counts(base.config)
    widths = []
    for mlp in mlps:
        one = routed.get((mlp.stack, mlp.block)) if mlp.kind == "shared" else None
        times = mlp.width // one.width if one is not None else 1
        if one is not None and mlp.width == times * one.width and times in shared:
            widths.append(times * _new_width(one, factor, width, multiple_of))
        else:
            widths.append(_new_width(mlp, factor, width, multiple_of))
    return widths


def _shared_counts(config: Mapping[str, Any]) -> set[int]:
    return {v for k, v in text_config(config).items() if "shared_expert" in k and type(v) is int}


def _new_width(mlp: MLP, factor: float | None, width: int | None, multiple_of: int) -> int:
    wanted = width if width is not None else _times(mlp.width, 2 if factor is None else factor)
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


@lru_cache(maxsize=32)  # a mixture has thousands of experts that grow alike
def _times(width: int, factor: float) -> int:
    return ceil(width * Fraction(str(factor)))  # 1.1 means 11/10


def _units(
    base: Checkpoint, mlps: Sequence[MLP], scaled: Mapping[str, Scaled], symmetry_break: float
) -> list[int]:
    """How many neurons of each MLP have to be copied together."""
    units, refused = [], []
    for mlp in mlps:
        try:
            units.append(neurons_in_a_block(base, mlp, scaled))
        except UnsupportedError as error:
            refused += [f"{mlp.stack}.{mlp.block} can't be grown: {p}" for p in error.problems]
    if scaled and symmetry_break:
        refused.append(
            f"{base.source.reference} holds 8-bit floats, which have to be copied as they are: "
            f"symmetry_break needs `surgery dequantize` first"
        )
    UnsupportedError.raise_if(dict.fromkeys(refused))
    return units


def _unit(base: Checkpoint, mlp: MLP, scaled: Mapping[str, Scaled]) -> int:
    """The same for one that need not grow: 0 where it can't."""
    try:
        return neurons_in_a_block(base, mlp, scaled)
    except UnsupportedError:
        return 0


def _growth(base: Checkpoint, mlp: MLP, width: int, choose: Choose, seed: int, unit: int) -> Growth:
    rounds, rest = divmod(width - mlp.width, mlp.width)
    copied = [(0, mlp.width)] * rounds + list(_some(base, mlp, rest, choose, seed, unit))
    return Growth(mlp, width, tuple(copied))


def _some(base: Checkpoint, mlp: MLP, count: int, choose: Choose, seed: int, unit: int) -> Ranges:
    """`count` of the MLP's neurons, as ranges in ascending order: whole runs of `unit`."""
    if count == 0:
        return ()
    if choose == "first":
        return ((0, count),)
    if choose == "random":
        scores = noise((mlp.width // unit,), seed, f"choose:{mlp.down.weight}").read()
    else:
        from surgery.measure import neuron_norms

        scores = neuron_norms(values(base), mlp).reshape(-1, unit).sum(1)
    best = scores.argsort(descending=True, stable=True)[: count // unit]
    return tuple((unit * start, unit * stop) for start, stop in as_ranges(sorted(best.tolist())))


def _padded(base: Checkpoint, growths: Sequence[Growth], *, kinds: bool = True) -> list[Growth]:
    """The growths, with zero neurons for every MLP that is narrower than the widest of its kind
    and stack, whether it was to grow or not. Without `kinds`: than the widest of its stack and of
    the width that it had, plain or an expert."""

    def alike(mlp: MLP) -> tuple[str, str | int]:
        return mlp.stack, mlp.kind if kinds else mlp.width

    chosen = {growth.mlp: growth for growth in growths}
    wanted = {alike(growth.mlp) for growth in growths}
    everything = [
        chosen.get(mlp) or Growth(mlp, mlp.width, ())
        for mlp in base.anatomy.every_mlp
        if alike(mlp) in wanted
    ]
    most: dict[tuple[str, str | int], int] = defaultdict(int)
    for growth in everything:
        most[alike(growth.mlp)] = max(most[alike(growth.mlp)], growth.width)
    padded = []
    for growth in everything:
        wide = most[alike(growth.mlp)]
        if wide > growth.mlp.width:
            padded.append(replace(growth, width=wide, padding=growth.padding + wide - growth.width))
    return padded
