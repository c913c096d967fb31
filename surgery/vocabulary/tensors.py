"""The tensors of several models that have a row for each token: whether they fit together, and
the same with their rows in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from surgery.checkpoint import Checkpoint
from surgery.errors import MismatchError, UnsupportedError
from surgery.tensor import LazyTensor
from surgery.vocabulary.places import unknown_token_tensors
from surgery.vocabulary.rows import Piece, arranged, common_type, reshaped


def check_places(
    every: Sequence[Checkpoint], places: Sequence[Mapping[str, int]], moving: Sequence[bool]
) -> None:
    """Refuse what may follow the vocabulary and isn't known to, and rows that don't fit."""
    UnsupportedError.raise_if(
        problem
        for model, known, moves in zip(every, places, moving, strict=True)
        if moves
        for problem in unknown_token_tensors(model, known)
    )
    MismatchError.raise_if(
        problem
        for model, known in zip(every, places, strict=True)
        for name, axis in known.items()
        for other in every
        for problem in _misfit(name, axis, model, other, first=other is every[0])
    )


def _misfit(
    name: str, axis: int, model: Checkpoint, other: Checkpoint, *, first: bool
) -> Iterator[str]:
    """What is wrong with a tensor of `model` beside that of `other`; sizes are compared with
    those of the first model alone."""
    mine, theirs = model[name], _tensor(other, name)
    if theirs is None:
        yield f"{name} is in {model.source.reference} and not in {other.source.reference}"
    elif first and axis == 0 and mine.shape[1:] != theirs.shape[1:]:
        yield (
            f"{name} has rows of {list(theirs.shape[1:])} in {other.source.reference} and of "
            f"{list(mine.shape[1:])} in {model.source.reference}: models of different widths have "
            f"no rows in common"
        )
    elif first and mine.dtype.kind != "float":
        yield f"{name} is {mine.dtype} in {model.source.reference}, and no matrix of weights"


def _tensor(model: Checkpoint, name: str) -> LazyTensor | None:
    """A model's tensor; its embedding for the head that it ties to that."""
    if name in model:
        return model[name]
    embedding = model.anatomy.embedding
    if embedding is None or not model.anatomy.tied or not name.endswith(".weight"):
        return None
    return model[embedding]


def aligned_tensors(
    every: Sequence[Checkpoint],
    places: Sequence[Mapping[str, int]],
    at: int,
    pieces: Sequence[Piece],
) -> dict[str, LazyTensor]:
    """The model's tensors that have a row for each token, with the rows `pieces`."""
    tensors = {}
    needed = {at, *(holder for piece in pieces for holder in piece.holders)}
    for name, axis in places[at].items():
        sources = {}
        for other in sorted(needed):
            tensor = _tensor(every[other], name)
            assert tensor is not None
            sources[other] = reshaped(tensor, (tensor.numel,)) if axis else tensor
        own = sources[at]
        # the first keeps its type, which is the result's; others hold what they are given exactly
        dtype = common_type([t.dtype for t in sources.values()]) if at else own.dtype
        made = arranged(sources, pieces, own, dtype)
        tensors[name] = reshaped(made, (1, made.numel)) if axis else made
    return tensors
