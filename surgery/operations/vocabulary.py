"""Align vocabularies: models whose embeddings differ in rows get the same rows in the same order,
matched by the tokens' strings, so that they can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from surgery.checkpoint import Checkpoint, Edit
from surgery.errors import ArgumentError, MismatchError, UnsupportedError
from surgery.operations.mergeable import MATCH_ROWS
from surgery.operations.pairs import check_unquantized
from surgery.vocabulary.places import resized_config, token_tensors, unknown_token_tensors
from surgery.vocabulary.rows import Matching, Rows, unmoved
from surgery.vocabulary.target import (
    Target,
    rounded_up,
    translated,
    translated_generation,
    translation,
    union,
    with_tokenizer,
)
from surgery.vocabulary.tensors import aligned_tensors, check_places
from surgery.vocabulary.tokens import (
    Vocabulary,
    read_vocabularies,
    read_vocabulary,
    tokenizer_files,
    try_vocabularies,
)

Tokenizer = Literal["base", "union"] | Checkpoint
SHOWN = 3
"""Tokens that a message names."""


def align_vocabulary(
    models: Sequence[Checkpoint],
    *,
    base: Checkpoint | None = None,
    tokenizer: Tokenizer,
    pad_to_multiple_of: int | None = None,
) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The base and the models with the same rows of embeddings, heads and heads' biases, in the
    order of one tokenizer, whose files all of them get.

    `tokenizer` is "base" (the first model's if there is no base), "union" (the base's, then the
    others' tokens in the order of models and ids), or the checkpoint whose tokenizer it is. Rows
    go by the token's string. A token that a model lacks gets the base's row, so that its task
    vector is zero there; if the base lacks it too, or there is none, the row of the one model
    that has it, or the average of the rows of those that have it, in float32 and rounded once.
    This is what mergekit documents. A base that lacks a token is filled in the same way.

    Rows without a token (padding, ids left out) are those of the tokenizer's owner: each model
    keeps its own if it has none there either, and else gets the base's or the owner's. With
    "union", new tokens take padding over first. `pad_to_multiple_of` rounds the rows up, with
    zeros in every model. A model whose rows don't move keeps its tensors untouched.

    Raises ArgumentError, NotFoundError, FormatError, MismatchError or UnsupportedError before
    any tensor is read.
    """
    _check_arguments(models, base, tokenizer, pad_to_multiple_of)
    roles = _roles(models, base)
    every = list(roles.values())
    check_unquantized(**roles)
    places = [token_tensors(model) for model in every]
    UnsupportedError.raise_if(_without_embedding(every))
    vocabularies = read_vocabularies(every)
    rows = _rows_of(every, vocabularies)
    target = _target(every, vocabularies, rows, tokenizer, pad_to_multiple_of)
    matching = Matching(rows, target.rows, target.kept, base is not None, target.owner)
    if target.owner is None:
        MismatchError.raise_if(_unheard_of(matching, tokenizer))
    found = [matching.pieces(at) for at in range(len(every))]
    moving = [not unmoved(pieces, at, rows[at].count) for at, (pieces, _) in enumerate(found)]
    check_places(every, places, moving)
    details = _details(target, roles, rows, [counts for _, counts in found])
    edit = _edit(roles, tokenizer, target, pad_to_multiple_of, details)
    owner = None if isinstance(tokenizer, str) else tokenizer
    aligned = []
    for at, (pieces, _) in enumerate(found):
        tensors = aligned_tensors(every, places, at, pieces) if moving[at] else {}
        names = owner if at == 0 else None  # the result's special tokens are the owner's
        config, companions, notes = _with_vocabulary(every[at], vocabularies[at], target, names)
        notes += _notes(target, rows) if at == 0 else ()
        aligned.append(every[at].edited(edit, tensors, config, companions, notes))
    return (None, aligned) if base is None else (aligned[0], aligned[1:])


def check_same_tokens(models: Sequence[Checkpoint], base: Checkpoint | None) -> None:
    """Raise MismatchError for models that agree in rows and not in what those rows mean: a token
    with two ids, or an id with two tokens. Rows of padding in one that have a token in another
    are no contradiction, and neither is a model whose tokenizer isn't there or can't be read."""
    every = [m for m in _roles(models, base).values() if m.anatomy.embedding is not None]
    known = [
        (model, Rows.of(_row_count(model), vocabulary.ids))
        for model, vocabulary in zip(every, try_vocabularies(every), strict=True)
        if isinstance(vocabulary, Vocabulary)  # else its rows are taken to be what others' are
    ]
    problems: dict[str, None] = {}
    for (a, rows), (b, others) in combinations(known, 2):
        problems |= dict.fromkeys(_contradiction(a, rows, b, others))
    MismatchError.raise_if(problems)


def _contradiction(a: Checkpoint, rows: Rows, b: Checkpoint, others: Rows) -> Iterator[str]:
    if rows.ids == others.ids:
        return
    moved = [
        f"{token!r} is {row} and {others.ids[token]}"
        for token, row in rows.ids.items()
        if others.ids.get(token, row) != row
    ]
    renamed = [
        f"{row} is {token!r} and {others.names[row]!r}"
        for token, row in rows.ids.items()
        if token not in others.ids and row in others.names and others.names[row] not in rows.ids
    ]
    if moved or renamed:
        found = moved or renamed
        more = "" if len(found) <= SHOWN else f", and {len(found) - SHOWN:,} more"
        yield (
            f"{a.source.reference} and {b.source.reference} give tokens different ids: "
            f"{', '.join(found[:SHOWN])}{more}; {MATCH_ROWS}"
        )


def _edit(
    roles: Mapping[str, Checkpoint],
    tokenizer: Tokenizer,
    target: Target,
    multiple: int | None,
    details: Mapping[str, Any],
) -> Edit:
    """A model whose tokenizer it is goes by its role among the inputs: where it lies is theirs."""
    inputs = {role: model.source for role, model in roles.items()}
    whose: str = tokenizer if isinstance(tokenizer, str) else "tokenizer"
    if isinstance(tokenizer, Checkpoint) and target.owner is None:
        inputs["tokenizer"] = tokenizer.source
    elif isinstance(tokenizer, Checkpoint):
        whose = list(roles)[target.owner or 0]
    return Edit("vocabulary", {"tokenizer": whose, "pad_to_multiple_of": multiple}, inputs, details)


def _check_arguments(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    tokenizer: object,
    multiple: object,
) -> None:
    problems = []
    if not models and base is None:
        problems.append("there are no models to align")
    if tokenizer not in ("base", "union") and not isinstance(tokenizer, Checkpoint):
        problems.append(
            f"tokenizer is {tokenizer!r}, and has to be 'base', 'union' or a checkpoint"
        )
    if multiple is not None and not (type(multiple) is int and multiple >= 1):
        problems.append(f"pad_to_multiple_of is {multiple!r}, and has to be a number from 1 on")
    ArgumentError.raise_if(problems)


def _roles(models: Sequence[Checkpoint], base: Checkpoint | None) -> dict[str, Checkpoint]:
    roles = {f"model_{at}": model for at, model in enumerate(models, 1)}
    return roles if base is None else {"base": base, **roles}


def _row_count(model: Checkpoint) -> int:
    assert model.anatomy.embedding is not None
    return model[model.anatomy.embedding].shape[0]


def _rows_of(every: Sequence[Checkpoint], vocabularies: Sequence[Vocabulary]) -> list[Rows]:
    return [Rows.of(_row_count(m), v.ids) for m, v in zip(every, vocabularies, strict=True)]


def _without_embedding(every: Sequence[Checkpoint]) -> list[str]:
    return [p for m in every if m.anatomy.embedding is None for p in unknown_token_tensors(m, {})]


def _target(
    every: Sequence[Checkpoint],
    vocabularies: Sequence[Vocabulary],
    rows: Sequence[Rows],
    tokenizer: Tokenizer,
    multiple: int | None,
) -> Target:
    if tokenizer == "union":
        return union(every, vocabularies, rows, multiple)
    owner = 0 if isinstance(tokenizer, str) else _number_of(tokenizer, every)
    if owner is not None:
        kept, vocabulary, files = rows[owner].count, vocabularies[owner], every[owner]
    else:
        assert isinstance(tokenizer, Checkpoint)
        vocabulary, files = read_vocabulary(tokenizer), tokenizer
        named = max(vocabulary.ids.values(), default=-1) + 1
        kept = named if files.anatomy.embedding is None else _row_count(files)
    return Target(vocabulary, tokenizer_files(files), kept, rounded_up(kept, multiple), owner)


def _number_of(tokenizer: Checkpoint, every: Sequence[Checkpoint]) -> int | None:
    """Which of the models it is, by where its files lie."""
    for at, model in enumerate(every):
        if model is tokenizer or (
            model.source.path.resolve() == tokenizer.source.path.resolve()
            and tokenizer_files(model) == tokenizer_files(tokenizer)
        ):
            return at
    return None


def _unheard_of(matching: Matching, tokenizer: Tokenizer) -> Iterator[str]:
    assert isinstance(tokenizer, Checkpoint)
    if tokens := matching.nowhere():
        yield (
            f"{tokenizer.source.reference}, whose tokenizer was asked for, has {len(tokens):,} "
            f"tokens that none of the models has a row for ({_shown(tokens)}): pass the tokenizer "
            f"of one of the models, or union"
        )


def _with_vocabulary(
    model: Checkpoint, own: Vocabulary, target: Target, owner: Checkpoint | None
) -> tuple[dict[str, Any], dict[str, Path | bytes], tuple[str, ...]]:
    """The config and the companions of a model that has the target's vocabulary, and notes."""
    config = resized_config(model.config, _row_count(model), target.count)
    companions = with_tokenizer(model, target.files)
    if own.ids == target.vocabulary.ids:
        return config, companions, ()
    translate = translation(own, target.vocabulary)
    config = translated(config, translate, {} if owner is None else owner.config)
    files, notes = translated_generation(model, translate, owner)
    return config, companions | files, notes


def _notes(target: Target, rows: Sequence[Rows]) -> tuple[str, ...]:
    tokens = _without_row(target, rows)
    if not tokens:
        return target.notes
    note = f"tokens that no model has a row for: {len(tokens):,} ({_shown(tokens)}); where there is"
    return (*target.notes, f"{note} room for one, it is zeros")


def _shown(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:SHOWN])) + (", ..." if len(tokens) > SHOWN else "")


def _without_row(target: Target, rows: Sequence[Rows]) -> list[str]:
    return [t for t in target.vocabulary.ids if not any(t in own.ids for own in rows)]


def _details(
    target: Target,
    roles: Mapping[str, Checkpoint],
    rows: Sequence[Rows],
    counts: Sequence[Counter[str]],
) -> dict[str, Any]:
    return {
        "rows": target.count,
        "tokens": len(target.vocabulary.ids),
        "new_tokens": target.added,
        "tokens_without_a_row": len(_without_row(target, rows)),
        "models": {
            role: {"rows_before": own.count, **dict(sorted(found.items()))}
            for role, own, found in zip(roles, rows, counts, strict=True)
        },
    }
