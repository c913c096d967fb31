"""The certificate: from weights alone, for every input, an edited checkpoint computes what its
base does.

Grown: in every widened MLP the rows of up and gate are bitwise those of their sources, and the
columns of a source neuron's copies sum to its column in exact arithmetic; every other tensor is
bitwise what it was. So each hidden neuron's copies have its activation and together its effect.
What else goes by neuron (a depthwise convolution, a norm over them all) is copied bitwise too.
Where a norm or an activation looks at all neurons there are as many copies of each, so that means
over them are what they were.

Expanded: every tensor of the base is bitwise what it was, at its new place; in every new block
the projections that write to the residual stream are zero, and all else is bitwise the source's.
That such a block returns its input is followed in the code that will run
(`modeling/identity.py`).

Nothing is assumed of how the weights were made: they are read and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from threading import Lock

from surgery.anatomy import Projection
from surgery.checkpoint import Checkpoint
from surgery.expansion import Expansion
from surgery.growth import Growth
from surgery.measure import BLOCK_ELEMENTS
from surgery.operations.dequantize import values
from surgery.parallel import Progress, run_all
from surgery.tensor import LazyTensor
from surgery.verification.checks import Check, DownColumns, DownRows, Rows, UpColumns, Zero
from surgery.verification.columns import columns_of

Relation = Sequence[Growth] | Expansion
"""How a checkpoint was made of its base so that it has the same function."""


@dataclass(frozen=True)
class Certificate:
    """What was compared, and what didn't hold: `failures` has a sentence for each tensor."""

    grown_mlps: int
    tensors_compared: int
    bytes_compared: int
    failures: tuple[str, ...]
    new_blocks: int = 0

    @property
    def holds(self) -> bool:
        return not self.failures

    @property
    def what(self) -> str:
        """What was edited, in a few words."""
        if self.new_blocks:
            return f"{self.new_blocks:,} new block{'' if self.new_blocks == 1 else 's'}"
        return f"{self.grown_mlps:,} grown MLP{'' if self.grown_mlps == 1 else 's'}"


def certify(
    base: Checkpoint,
    other: Checkpoint,
    relation: Relation,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Compare `other` with `base`, tensor by tensor, as `relation` says it was made of it. Of
    8-bit floats in what was grown what they stand for is compared, in float32.

    Raises UnsupportedError if the blocks of an expansion can't be followed.
    """
    if isinstance(relation, Expansion):
        return _certify_expansion(base, other, relation, threads, progress)
    wider = {name for growth in relation for name in growth.mlp.tensors}
    base, other = values(base, wider), values(other, wider)
    failures: dict[str, str] = {}
    missing = [f"{name} is missing in the grown checkpoint" for name in base if name not in other]
    missing += [f"{name} isn't in the base" for name in other if name not in base]
    uneven = [
        f"{growth.mlp.stack}.{growth.mlp.block}: {why}, and these aren't all copied as often"
        for growth in relation
        if (why := growth.mlp.even_because) and not growth.even
    ]
    _run(_checks(base, other, relation, failures), failures, threads, progress)
    return Certificate(
        grown_mlps=len(relation),
        tensors_compared=sum(1 for name in base if name in other),
        bytes_compared=sum(tensor.nbytes for tensor in other.values()),
        failures=(*missing, *uneven, *(failures[name] for name in base if name in failures)),
    )


def _certify_expansion(
    base: Checkpoint,
    other: Checkpoint,
    expansion: Expansion,
    threads: int | None,
    progress: Progress | None,
) -> Certificate:
    from surgery.modeling.identity import not_identity

    places = base.anatomy.places.items()
    wanted = {name: (name, False) for name, place in places if place.stack != expansion.stack}
    wanted |= expansion.tensors(base.anatomy)
    sources = sorted({expansion.sources[block] for block in expansion.new})
    missing = [
        f"a copy of block {block} doesn't return its input: {why}"
        for block, why in not_identity(base, expansion.stack, sources).items()
    ]
    missing += [f"{n} is missing in the expanded checkpoint" for n in wanted if n not in other]
    missing += [f"{name} has no source in the base" for name in other if name not in wanted]
    failures: dict[str, str] = {}
    checks: list[Check] = []
    for name, (source, is_zero) in wanted.items():
        if name not in other:
            continue
        old, new = base[source], other[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            failures[name] = (
                f"{name} is {new.dtype} {list(new.shape)}, and should be {old.dtype} "
                f"{list(old.shape)}"
            )
            continue
        kind = Zero if is_zero else Check
        checks += [kind(name, old, new, rows) for rows in new.blocks(BLOCK_ELEMENTS)]
    _run(checks, failures, threads, progress)
    return Certificate(
        grown_mlps=0,
        tensors_compared=sum(1 for name in wanted if name in other),
        bytes_compared=sum(tensor.nbytes for tensor in other.values()),
        failures=(*missing, *(failures[name] for name in wanted if name in failures)),
        new_blocks=len(expansion.new),
    )


def _run(
    checks: Sequence[Check],
    failures: dict[str, str],
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Make all comparisons; what is wrong goes into `failures`, the first for each tensor."""
    lock = Lock()

    def work(check: Check) -> None:
        start, stop = check.rows
        wrong = check.run(start, stop)
        if wrong is not None:
            with lock:
                failures.setdefault(check.name, f"{check.name}: {wrong}")
        if progress is not None:
            progress(check.nbytes)

    run_all(iter(checks), work, threads)


def _checks(
    base: Checkpoint,
    grown: Checkpoint,
    growths: Sequence[Growth],
    failures: dict[str, str],
) -> list[Check]:
    """All comparisons; a tensor whose shape or type is wrong goes into `failures` instead."""
    of_tensor: dict[str, tuple[Growth, Projection, int]] = {}
    for growth in growths:
        for name, projection, axis in growth.mlp.axes():
            of_tensor[name] = growth, projection, axis
    checks: list[Check] = []
    for name, tensor in base.items():
        if name not in grown:
            continue
        shape = tensor.shape
        if name in of_tensor:
            growth, _, axis = of_tensor[name]
            shape = growth.shape(shape, axis)
        wanted, found = (tensor.dtype, list(shape)), (grown[name].dtype, list(grown[name].shape))
        if wanted != found:
            failures[name] = (
                f"{name} is {found[0]} {found[1]}, and should be {wanted[0]} {wanted[1]}"
            )
        elif name in of_tensor:
            checks += _grown_checks(name, tensor, grown[name], *of_tensor[name])
        else:
            checks += [
                Check(name, tensor, grown[name], rows) for rows in tensor.blocks(BLOCK_ELEMENTS)
            ]
    return checks


def _grown_checks(
    name: str,
    base: LazyTensor,
    grown: LazyTensor,
    growth: Growth,
    projection: Projection,
    axis: int,
) -> Iterator[Check]:
    import numpy
    import torch

    columns = axis > 0 and axis == len(base.shape) - 1
    wide = projection
    if not columns:
        wide = replace(wide, experts=projection.pieces(base.shape, axis))
    sources = wide.indices(growth.sources(), growth.mlp.width, below=not columns)
    if not columns and (each := prod(base.shape[axis + 1 : -1])) != 1:  # rows of a kernel
        rows_of = each * sources[:, None] + numpy.arange(each)
        sources = numpy.where(sources[:, None] >= 0, rows_of, -1).reshape(-1)
    if projection is growth.mlp.down:
        if not columns:
            for rows in base.blocks(BLOCK_ELEMENTS):
                yield DownRows(name, base, grown, rows, sources)
            return
        apart = columns_of(sources, *growth.shares(), base.width)
        for rows in grown.blocks(BLOCK_ELEMENTS):
            yield DownColumns(name, base, grown, rows, apart)
    elif columns:
        for rows in grown.blocks(BLOCK_ELEMENTS):
            yield UpColumns(name, base, grown, rows, torch.from_numpy(sources))
    else:
        for rows in grown.blocks(BLOCK_ELEMENTS):
            yield Rows(name, base, grown, rows, sources)
