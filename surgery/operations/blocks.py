"""Compose: a checkpoint whose blocks come from several models, renamed and not copied.

mergekit calls it a passthrough merge of slices, the Hub a frankenmerge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.anatomy import Corrections, Role
from surgery.anatomy.infer import WIDTHS_KEY, text_config
from surgery.checkpoint import Checkpoint, Edit, joint_history
from surgery.errors import ArgumentError, MismatchError, UnsupportedError
from surgery.growth import Growth
from surgery.modeling.widths import MODELING_FILE
from surgery.operations.at_once import KEYS, grown_at_once
from surgery.operations.block_config import (
    Block,
    composed_config,
    depth_in_config,
    unchecked,
    unlike_settings,
)
from surgery.operations.pairs import check_unquantized
from surgery.operations.tying import separate_head, unlike_vocabularies, with_tying
from surgery.operations.widths import settle_widths, stock_widths, widened_config
from surgery.tensor import LazyTensor

_TOWER = re.compile(
    r"(^|[._])(vision|visual|vit|image|audio|speech|clip|siglip|multi_modal|mm_|connector)",
    re.IGNORECASE,
)


def compose(
    blocks: Sequence[Block],
    *,
    before: Checkpoint | None = None,
    after: Checkpoint | None = None,
) -> Checkpoint:
    """The checkpoint whose block i is block `blocks[i]` = (checkpoint, number) of another.

    Tensors before the blocks (embeddings) are those of `before`, by default the first block's
    checkpoint, and those behind them (final norm, head) those of `after`, by default the last
    block's. Config, companion files and a vision or audio tower are those of `before`; the
    number of layers and all that goes by layer follow the blocks. Nothing is computed.

    Raises ArgumentError, MismatchError or UnsupportedError, before any tensor is read.
    """
    if not blocks:
        raise ArgumentError("blocks is empty, and a model has at least one")
    before = blocks[0][0] if before is None else before
    after = blocks[-1][0] if after is None else after
    made = assemble(blocks, before, after)
    models = distinct(before, *(model for model, _ in blocks), after)
    label = {id(model): f"model_{at}" for at, model in enumerate(models, 1)}
    edit = Edit(
        "compose",
        {"blocks": len(blocks)},
        {label[id(model)]: model.source for model in models},
        {
            "blocks": [[label[id(model)], at] for model, at in blocks],
            "before": label[id(before)],
            "after": label[id(after)],
        },
    )
    return replace(made, history=(*joint_history(*models), edit))


def assemble(blocks: Sequence[Block], before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """What `compose` makes, without an edit of its own in the history."""
    models = distinct(before, *(model for model, _ in blocks), after)
    check_unquantized(**{f"model {at}": model for at, model in enumerate(models, 1)})
    stack = _shared_stack(models)
    _check_there(blocks, stack)
    if any(not model.config.keys().isdisjoint(KEYS) for model in models):
        return _assembled_grown(blocks, before, after, stack)
    names = {id(model): names_by_block(model, stack) for model in models}
    MismatchError.raise_if(
        [
            *_unlike(blocks, before, stack, names),
            *_unlike_outside(before, after, stack),
            *unlike_vocabularies(before, after),
            *unlike_settings(models),
        ]
    )
    _check_sides(before, after)
    tensors, untied = _tensors(blocks, before, after, stack)
    config = composed_config(before, after, blocks, stack)
    if untied and config:
        config = with_tying(config, tied=False)
    notes = dict.fromkeys(note for model in models for note in model.notes)
    notes |= dict.fromkeys(unchecked(config))
    corrections = _corrections(blocks, models, stack)
    draft = replace(
        before, tensors=tensors, config=config, notes=tuple(notes), corrections=corrections
    )
    return _with_widths(draft, models, stack)


def _tensors(
    blocks: Sequence[Block], before: Checkpoint, after: Checkpoint, stack: str
) -> tuple[dict[str, LazyTensor], bool]:
    """All tensors by their new names, and whether there is a head of its own now."""
    models = distinct(*(model for model, _ in blocks))
    names = {id(model): names_by_block(model, stack) for model in models}
    early = _on_one_side(before, stack, late=False)
    late = _on_one_side(after, stack, late=True)
    untied = before is not after and separate_head(before, after, late)
    inside = {
        f"{stack}.{new}.{inner}" if stack else f"{new}.{inner}": model[name]
        for new, (model, at) in enumerate(blocks)
        for inner, name in names[id(model)][at].items()
    }
    return _in_order(before, {**early, **late}, inside, stack), untied


def _assembled_grown(
    blocks: Sequence[Block], before: Checkpoint, after: Checkpoint, stack: str
) -> Checkpoint:
    """The same of models some of which were grown so that layers differ by keys of our own: what
    their stock models make, grown by as much at once."""
    stock = {
        id(model): model if model.config.keys().isdisjoint(KEYS) else grown_at_once(model, ())[0]
        for model in (before, *(model for model, _ in blocks), after)
    }
    plain = [(stock[id(model)], at) for model, at in blocks]
    draft = assemble(plain, stock[id(before)], stock[id(after)])
    tensors, _ = _tensors(blocks, before, after, stack)
    growths = []
    for mlp in draft.anatomy.all_mlps:
        axis, name = mlp.down.axis(down=True), mlp.down.weight
        width = tensors[name].shape[axis] // (draft[name].shape[axis] // mlp.width)
        if width != mlp.width:
            growths.append(Growth(mlp, width, (), padding=width - mlp.width))
    config, companions = widened_config(draft, growths) if growths else (None, None)
    return replace(
        draft,
        tensors=tensors,
        config=draft.config if config is None else config,
        companions=draft.companions if companions is None else companions,
    )


def _corrections(blocks: Sequence[Block], models: Sequence[Checkpoint], stack: str) -> Corrections:
    """What a user says of the models' anatomies, of the blocks by their new numbers."""
    total = Corrections()
    for model in models:
        numbers: dict[int, list[int]] = {}
        for new, (own, old) in enumerate(blocks):
            if own is model:
                numbers.setdefault(old, []).append(new)
        total += model.corrections.moved(stack, numbers)
    return total


def distinct(*models: Checkpoint) -> list[Checkpoint]:
    """The models, each once, in the order in which they first come."""
    return list({id(model): model for model in models}.values())


def main_stack(model: Checkpoint) -> str:
    """The one stack of blocks of the language model. Raises UnsupportedError if there are
    several, or if the files have another number of blocks than the config."""
    stacks = model.anatomy.stacks
    own = [stack for stack in stacks if not _TOWER.search(stack)]
    if len(own) != 1:
        found = f"several stacks of blocks ({', '.join(own)})" if own else "no stack of blocks"
        if stacks and not own:
            found = f"no stack of blocks but those that read images or sounds ({', '.join(stacks)})"
        raise UnsupportedError(
            f"{model.source.reference} has {found}, and blocks are taken from models with one"
        )
    says, has = depth_in_config(model), stacks[own[0]]
    if says is not None and says != has:
        raise UnsupportedError(
            f"{model.source.reference}: {own[0]} has {has} blocks in the files, and the config "
            f"gives {says} layers: what the others are can't be told (layers that predict "
            f"further tokens, perhaps)"
        )
    return own[0]


def names_by_block(model: Checkpoint, stack: str) -> list[dict[str, str]]:
    """For every block of a stack the full names of its tensors, by their names inside it."""
    found: list[dict[str, str]] = [{} for _ in range(model.anatomy.stacks[stack])]
    for name, place in model.anatomy.places.items():
        if place.stack == stack and place.block is not None:
            found[place.block][place.inner] = name
    return found


def _shared_stack(models: Sequence[Checkpoint]) -> str:
    """The name of the stack that all models have. Raises with all that don't belong together."""
    stacks: list[str] = []
    refused: list[str] = []
    for model in models:
        try:
            stacks.append(main_stack(model))
        except UnsupportedError as error:
            refused.extend(error.problems)
    UnsupportedError.raise_if(refused)
    types = [text_config(model.config).get("model_type") for model in models]
    own = models[0].source.reference
    MismatchError.raise_if(
        [
            f"{model.source.reference} and {own} are different architectures: model_type is "
            f"{kind} and {types[0]}"
            for model, kind in zip(models, types, strict=True)
            if kind != types[0]
        ]
        + [
            f"the blocks are called {stack} in {model.source.reference} and {stacks[0]} in {own}: "
            f"save both with the same class"
            for model, stack in zip(models, stacks, strict=True)
            if stack != stacks[0]
        ]
    )
    return stacks[0]


def _check_there(blocks: Sequence[Block], stack: str) -> None:
    ArgumentError.raise_if(
        f"{model.source.reference} has no block {at}: its {model.anatomy.stacks[stack]} blocks "
        f"are 0 to {model.anatomy.stacks[stack] - 1}"
        for model, at in _each_once(blocks)
        if not 0 <= at < model.anatomy.stacks[stack]
    )


def _each_once(blocks: Sequence[Block]) -> list[Block]:
    return list({(id(model), at): (model, at) for model, at in blocks}.values())


def _unlike(
    blocks: Sequence[Block],
    before: Checkpoint,
    stack: str,
    names: Mapping[int, list[dict[str, str]]],
) -> list[str]:
    """Where blocks are like none of `before`, in the names and shapes of their tensors. The
    width of an MLP may differ."""
    own = names[id(before)]
    like: dict[str, set[tuple[Any, ...]]] = {}
    for block in own:
        for inner, name in block.items():
            like.setdefault(inner, set()).add(_form(before[name]))
    problems = []
    for model, at in _each_once(blocks):
        if model is before:
            continue
        block = names[id(model)][at]
        mlp = model.anatomy.mlps.get((stack, at))
        widening = set(mlp.tensors) if mlp is not None else set()
        off = min((block.keys() ^ other.keys() for other in own), key=len)
        if off:
            problems.append(
                f"{stack}.{at} of {model.source.reference} isn't like any block of "
                f"{before.source.reference}: only one of them has {', '.join(sorted(off))}"
            )
        problems += [
            f"{name} is {_said(_form(model[name]))} in {model.source.reference}, and in the "
            f"blocks of {before.source.reference} it is "
            + " or ".join(sorted(map(_said, like[inner])))
            for inner, name in block.items()
            if inner in like and name not in widening and _form(model[name]) not in like[inner]
        ]
    return problems


def _form(tensor: LazyTensor) -> tuple[Any, ...]:
    """What has to agree of two tensors: their kind of number, and their shape."""
    return (tensor.dtype.kind, tensor.shape)


def _said(form: tuple[Any, ...]) -> str:
    return f"{form[0]} {list(form[1])}"


def _check_sides(before: Checkpoint, after: Checkpoint) -> None:
    """Raise UnsupportedError for tensors outside the blocks on which side of them can't be told,
    where it matters."""
    if before is not after:
        UnsupportedError.raise_if(
            f"{name} of {model.source.reference} is outside the blocks, and whether before or "
            f"behind them can't be told: take `before` and `after` from one checkpoint"
            for model in (before, after)
            for name, place in model.anatomy.places.items()
            if place.stack is None and place.role is Role.UNKNOWN and not _TOWER.search(name)
        )


def _unlike_outside(before: Checkpoint, after: Checkpoint, stack: str) -> list[str]:
    """Where what stands behind the blocks of `after` isn't like what it takes the place of.
    Heads are looked at by `unlike_vocabularies`."""
    own, other = (_on_one_side(model, stack, late=True) for model in (before, after))
    heads = {before.anatomy.head, after.anatomy.head}
    pairs = ((before, after, own, other), (after, before, other, own))
    return [
        f"{name} is in {has.source.reference} and not in {lacks.source.reference}"
        for has, lacks, here, there in pairs
        for name in here
        if name not in there and name not in heads
    ] + [
        f"{name} is {_said(_form(other[name]))} in {after.source.reference} and "
        f"{_said(_form(tensor))} in {before.source.reference}"
        for name, tensor in own.items()
        if name in other and name not in heads and _form(tensor) != _form(other[name])
    ]


def _on_one_side(model: Checkpoint, stack: str, *, late: bool) -> dict[str, LazyTensor]:
    """The tensors of a model before its blocks, or those behind them: the head and the norms
    that aren't in a tower."""
    return {
        name: model[name]
        for name, place in model.anatomy.places.items()
        if place.stack != stack
        if late == (place.role in (Role.NORM, Role.HEAD) and not _TOWER.search(place.stack or name))
    }


def _in_order(
    before: Checkpoint,
    outside: Mapping[str, LazyTensor],
    inside: Mapping[str, LazyTensor],
    stack: str,
) -> dict[str, LazyTensor]:
    """All tensors, in the order of `before`: its own if the names are, else with all blocks
    where its first one stands."""
    every = {**outside, **inside}
    if every.keys() == before.tensors.keys():
        return {name: every[name] for name in before}
    places = before.anatomy.places
    first = next(at for at, name in enumerate(before) if places[name].stack == stack)
    early = [name for name in list(before)[:first] if name in outside]
    return {
        name: every[name]
        for name in dict.fromkeys([*early, *inside, *before, *outside])
        if name in every
    }


def _with_widths(draft: Checkpoint, models: Sequence[Checkpoint], stack: str) -> Checkpoint:
    """The config's width keys, or the modeling file, for the MLPs that there are now."""
    companions = dict(draft.companions)
    by_layer = any(WIDTHS_KEY in model.config for model in models)
    if by_layer and draft.anatomy.several:
        raise UnsupportedError(
            f"{models[0].source.reference}: blocks with several MLPs each, whose widths are those "
            f"of {WIDTHS_KEY} in config.json, can't be put together yet"
        )
    if by_layer:
        companions.pop(MODELING_FILE, None)
    draft = replace(draft, companions=companions)
    widths = {key: mlp.width for key, mlp in draft.anatomy.mlps.items() if key[0] == stack}
    stock = {mlp.width for mlp in models[0].anatomy.mlps.values()}
    if by_layer:
        stock = stock_widths(draft.config)
    if not draft.config or not widths or set(widths.values()) <= stock:
        return draft
    config, companions = settle_widths(draft, dict(draft.config), companions, widths, stock)
    return replace(draft, config=config, companions=companions)
