"""Why two checkpoints don't belong together, where headers and configs tell: one line for what
would else be a line for every tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from surgery.anatomy.infer import text_config
from surgery.checkpoint import Checkpoint

STRANGERS = "give models that were made from one base"
SAME_PARTS = "give models that have the same parts, under the same names"
SAME_SHAPE = (
    "give models of one shape; if one was {1} from the other, give its own base, or {0} the "
    "other in the same way first"
)


class Cause(NamedTuple):
    """What two checkpoints differ in as wholes, and the tensors that differ by it."""

    said: str
    explains: Collection[str]


def find_causes(base: Checkpoint, tuned: Checkpoint) -> Iterator[Cause]:
    """Model types, hidden sizes, vocabularies, numbers of blocks and widths of MLPs that differ.
    Growth is spoken of only where nothing else than growth can be meant."""
    if base.anatomy is tuned.anatomy:  # shared, since all headers agree: of 100,000 tensors perhaps
        return
    strangers = [*_model_types(base, tuned), *_hidden_sizes(base, tuned)]
    yield from strangers
    yield from _vocabularies(base, tuned)
    verbs = (("expand", "expanded"), ("grow", "grown"))
    expanded, grown = ("" if strangers else f": {SAME_SHAPE.format(*verb)}" for verb in verbs)
    yield from _blocks(base, tuned, expanded)
    yield from _widths(base, tuned, grown)


def _model_types(base: Checkpoint, tuned: Checkpoint) -> Iterator[Cause]:
    one, two = (text_config(model.config).get("model_type") for model in (base, tuned))
    if None not in (one, two) and one != two:
        yield Cause(
            f"{base.source.reference} (base) and {tuned.source.reference} (tuned) are different "
            f"architectures: model_type is {one} and {two}",
            {*base, *tuned},
        )


def _hidden_sizes(base: Checkpoint, tuned: Checkpoint) -> Iterator[Cause]:
    """Every two sizes once, though many parts of a model may differ so."""
    ours, theirs = _hidden_of_parts(base), _hidden_of_parts(tuned)
    sizes = {part: (theirs[part], ours[part]) for part in ours if part in theirs}
    for size, other in dict.fromkeys(these for these in sizes.values() if these[0] != these[1]):
        parts = {part for part, these in sizes.items() if these == (size, other)}
        where = "" if None in parts else f" (in {', '.join(sorted(filter(None, parts)))})"
        places = base.anatomy.places.items()
        yield Cause(
            f"{tuned.source.reference} has a hidden size of {size}, {base.source.reference} of "
            f"{other}{where}: {STRANGERS}",
            {name for name, place in places if name in tuned and place.stack in parts},
        )


def _hidden_of_parts(model: Checkpoint) -> dict[str | None, int]:
    """The hidden size of every stack, and that outside the stacks (None)."""
    anatomy = model.anatomy
    sizes: dict[str | None, int] = {}
    if anatomy.embedding is not None:
        sizes = dict.fromkeys((None, *anatomy.stacks), model[anatomy.embedding].shape[-1])
    return sizes | {mlp.stack: mlp.hidden for mlp in anatomy.every_mlp}


def _vocabularies(base: Checkpoint, tuned: Checkpoint) -> Iterator[Cause]:
    """Those of embeddings that differ in more than rows: of the others it is said with the tensor,
    and what to do about it."""
    ours, theirs = base.anatomy.embedding, tuned.anatomy.embedding
    if ours is None or theirs is None:
        return
    (rows, *width), (other, *other_width) = tuned[theirs].shape, base[ours].shape
    if rows != other and (ours != theirs or width != other_width):
        yield Cause(
            f"{tuned.source.reference} has a vocabulary of {rows} rows, {base.source.reference} of "
            f"{other}",
            (),
        )


def _blocks(base: Checkpoint, tuned: Checkpoint, advice: str) -> Iterator[Cause]:
    for stack in dict.fromkeys([*base.anatomy.stacks, *tuned.anatomy.stacks]):
        both = sorted((tuned, base), key=lambda model: model.anatomy.stacks.get(stack, 0))
        (fewer, low), (more, high) = ((model, model.anatomy.stacks.get(stack, 0)) for model in both)
        if low == high or (low == 0 and any(name.startswith(f"{stack}.") for name in fewer)):
            continue  # the latter is a list that wasn't recognised as blocks
        do = advice if low else advice and f": {SAME_PARTS}"
        places = more.anatomy.places.items()
        yield Cause(
            f"{more.source.reference} has {high} blocks of {stack or 'the model'}, "
            f"{fewer.source.reference} has {low or 'none of that name'}{do}",
            {
                n
                for n, at in places
                if at.stack == stack and at.block is not None and at.block >= low
            },
        )


def _widths(base: Checkpoint, tuned: Checkpoint, advice: str) -> Iterator[Cause]:
    ours, theirs = ({m.down.weight: m for m in x.anatomy.all_mlps} for x in (base, tuned))
    common = [(mlp, theirs[name]) for name, mlp in ours.items() if name in theirs]
    differing = [(mlp, other) for mlp, other in common if mlp.width != other.width]
    if differing:
        some = f" ({len(differing)} of {len(common)} MLPs)" if len(differing) < len(common) else ""
        yield Cause(
            f"{tuned.source.reference} has MLPs of {_span([b.width for _, b in differing])}, "
            f"{base.source.reference} of {_span([a.width for a, _ in differing])}{some}{advice}",
            {name for pair in differing for mlp in pair for name in mlp.tensors},
        )


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low} to {high}"
