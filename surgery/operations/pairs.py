"""Two checkpoints that belong together: one was made from the other by training."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.checkpoint import Checkpoint, share_anatomy
from surgery.errors import MismatchError, UnsupportedError
from surgery.operations.causes import find_causes
from surgery.quantization.schemes import Quantization

RESIZE = "the vocabularies differ: give both models the same rows first"


def check_unquantized(**models: Checkpoint) -> None:
    """Raise UnsupportedError for packed weights, of which nothing can be computed."""
    UnsupportedError.raise_if(
        refusal(model, role, found)
        for role, model in models.items()
        if (found := model.quantization) is not None
    )


def refusal(model: Checkpoint, role: str, found: Quantization) -> str:
    """That nothing can be computed of a model's weights as they are stored, and what to do."""
    return (
        f"{model.source.reference} ({role}) is quantized: {found}; arithmetic on packed weights is "
        f"meaningless: {found.remedy}"
    )


def check_pair(base: Checkpoint, tuned: Checkpoint, *, vocabularies: str = RESIZE) -> None:
    """Raise MismatchError unless both have the same architecture, names and shapes.

    A head that one of them stores and the other ties to its embedding is no difference.
    `vocabularies` says what to do about embeddings that differ in rows.
    """
    share_anatomy(base, tuned)
    causes = list(find_causes(base, tuned))
    explained = {name for cause in causes for name in cause.explains}
    problems = [cause.said for cause in causes]
    if base.anatomy.head is not None and not base.anatomy.tied and tuned.anatomy.tied:
        problems.append(
            f"{base.source.reference} (base) has a head of its own, and {tuned.source.reference} "
            f"(tuned) ties it to the embedding: one matrix can't follow both"
        )
    common = [(name, one, tuned[name]) for name, one in base.items() if name in tuned.tensors]
    reshaped = {
        name: f"{list(one.shape)} in {base.source.reference} and {list(other.shape)} in "
        f"{tuned.source.reference}"
        for name, one, other in common
        if one.shape != other.shape
    }
    rows = [name for name in reshaped if _differ_in_rows(name, base, tuned)]
    problems += [
        f"{name} is {reshaped.pop(name)}; the vocabularies differ: {vocabularies}" for name in rows
    ]
    excused = {tied_head(tuned, base)}
    if base.anatomy.tied:  # its own head is the embedding, stored a second time
        excused.add(tied_head(base, tuned))
    for have, lack in ((base, tuned), (tuned, base)):
        where = f"in {have.source.reference} and not in {lack.source.reference}"
        lacking = [name for name in have if name not in lack.tensors and name not in excused]
        together, alone = _together(lacking, explained)
        if together:
            problems.append(f"{len(together):,} tensors are {where}, {together[0]} first")
        problems += [f"{name} is {where}" for name in alone]
    together, alone = _together(reshaped, explained)
    if together:
        first = f"{together[0]} first: {reshaped[together[0]]}"
        problems.append(f"{len(together):,} tensors differ in shape, {first}")
    problems += [f"{name} is {reshaped[name]}" for name in alone]
    problems += [
        f"{name} is {one.dtype} in {base.source.reference} and {other.dtype} in "
        f"{tuned.source.reference}: one is a number to scale, and the other isn't"
        for name, one, other in common
        if one.dtype.kind != other.dtype.kind
    ]
    MismatchError.raise_if(problems)


def _differ_in_rows(name: str, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether it is a vocabulary's tensor, and its rows are alike and not as many."""
    of_tokens = name in (base.anatomy.embedding, base.anatomy.head)
    return of_tokens and base[name].shape[1:] == tuned[name].shape[1:]


def _together(names: Iterable[str], explained: set[str]) -> tuple[list[str], list[str]]:
    """The tensors that one line tells of, for a cause was said; and those with a line each."""
    kept = list(names)
    together = [name for name in kept if name in explained]
    if len(together) < 2:
        return [], kept
    return together, [name for name in kept if name not in explained]


def tied_head(has: Checkpoint, lacks: Checkpoint) -> str | None:
    """The head that `has` stores and `lacks` ties to its embedding, if that is how it is."""
    head = has.anatomy.head
    embedding = lacks.anatomy.embedding
    if head is None or head in lacks or not lacks.anatomy.tied or embedding is None:
        return None
    return head
