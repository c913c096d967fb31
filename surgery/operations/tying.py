"""Tied heads of a checkpoint whose embedding and head come from different models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.tensor import LazyTensor

RESIZE_ONE = "resize the embeddings of one to match the other"


def unlike_vocabularies(before: Checkpoint, after: Checkpoint) -> list[str]:
    """What is wrong with the embedding of the one and the head of the other in one model."""
    own, other = before.anatomy.embedding, after.anatomy.embedding
    if own is None or other is None or before[own].shape == after[other].shape:
        return []
    return [
        (
            f"{own} is {list(before[own].shape)} in {before.source.reference}, and {other} is "
            f"{list(after[other].shape)} in {after.source.reference}: the vocabularies differ; "
            f"{RESIZE_ONE}"
        )
    ]


def separate_head(before: Checkpoint, after: Checkpoint, late: dict[str, LazyTensor]) -> bool:
    """Whether the embedding of `before` and the head of `after` are two matrices. A head that
    `after` ties to its own embedding is put into `late`.

    Raises UnsupportedError where it can't be told what the head would be called.
    """
    embedding, other = before.anatomy.embedding, after.anatomy.embedding
    head = after.anatomy.head
    if embedding is None or other is None or (head is None and not after.anatomy.tied):
        return False
    if not after.anatomy.tied:
        return True
    if before[embedding] is after[other] or before[embedding].leaf == after[other].leaf is not None:
        return False
    late[head or _name_of_head(before, after)] = after[other]
    return True


def with_tying(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config with `tie_word_embeddings` set at the top, and where it is nested."""
    key, nested = "tie_word_embeddings", config.get("text_config")
    made = {**config, key: tied}
    if isinstance(nested, Mapping) and key in nested:
        made["text_config"] = {**nested, key: tied}
    return made


def _name_of_head(before: Checkpoint, after: Checkpoint) -> str:
    from surgery.modeling.layers import head_name

    found = before.anatomy.head or (head_name(after.config) if after.config else None)
    if found is None:
        raise UnsupportedError(
            f"{after.source.reference} ties its head to its embedding, which isn't that of "
            f"{before.source.reference}, and what a head of its own would be called can't be "
            f"told: take `before` and `after` from one checkpoint"
        )
    return found
