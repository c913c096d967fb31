"""Two checkpoints that belong together: one was made from the other by training."""

from __future__ import annotations

from surgery.anatomy.infer import text_config
from surgery.checkpoint import Checkpoint, share_anatomy
from surgery.errors import MismatchError, UnsupportedError
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
    where = f"{base.source.reference} (base) and {tuned.source.reference} (tuned)"
    share_anatomy(base, tuned)
    problems = []
    types = [text_config(model.config).get("model_type") for model in (base, tuned)]
    if None not in types and types[0] != types[1]:
        problems.append(
            f"{where} are different architectures: model_type is {types[0]} and {types[1]}"
        )
    if base.anatomy.head is not None and not base.anatomy.tied and tuned.anatomy.tied:
        problems.append(
            f"{base.source.reference} (base) has a head of its own, and {tuned.source.reference} "
            f"(tuned) ties it to the embedding: one matrix can't follow both"
        )
    excused = {tied_head(tuned, base)}
    if base.anatomy.tied:  # its own head is the embedding, stored a second time
        excused.add(tied_head(base, tuned))
    problems += [
        f"{name} is in {have.source.reference} and not in {lack.source.reference}"
        for have, lack in ((base, tuned), (tuned, base))
        for name in have
        if name not in lack.tensors and name not in excused
    ]
    common = [(name, one, tuned[name]) for name, one in base.items() if name in tuned.tensors]
    problems += [
        f"{name} is {list(one.shape)} in {base.source.reference} and {list(other.shape)} in "
        f"{tuned.source.reference}"
        + (
            f"; the vocabularies differ: {vocabularies}"
            if name in (base.anatomy.embedding, base.anatomy.head)
            and one.shape[1:] == other.shape[1:]
            else ""
        )
        for name, one, other in common
        if one.shape != other.shape
    ]
    problems += [
        f"{name} is {one.dtype} in {base.source.reference} and {other.dtype} in "
        f"{tuned.source.reference}: one is a number to scale, and the other isn't"
        for name, one, other in common
        if one.dtype.kind != other.dtype.kind
    ]
    MismatchError.raise_if(problems)


def tied_head(has: Checkpoint, lacks: Checkpoint) -> str | None:
    """The head that `has` stores and `lacks` ties to its embedding, if that is how it is."""
    head = has.anatomy.head
    embedding = lacks.anatomy.embedding
    if head is None or head in lacks or not lacks.anatomy.tied or embedding is None:
        return None
    return head
