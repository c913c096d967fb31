"""The MLPs of an anatomy as entries of `mlps` that read back as they are: one entry for all blocks
that have the same, and for all experts of a block that differ in their number."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from surgery.anatomy import MLP, Anatomy, Projection
from surgery.anatomy.matrices import module_of
from surgery.anatomy.said import MLPCorrection, bias_names, numbers

NUMBER = re.compile(r"(?<![^._])[0-9]+(?=[._])")
"""A number in the path of a module."""


def mlp_entries(anatomy: Anatomy) -> Iterator[dict[str, Any]]:
    """An entry for each of the forms that the MLPs of a stack have."""
    inside: dict[tuple[str, int], set[str]] = defaultdict(set)
    for place in anatomy.places.values():
        if place.stack is not None and place.block is not None:
            inside[place.stack, place.block].add(place.inner)
    for stack, depth in anatomy.stacks.items():
        forms: dict[MLPCorrection, list[int]] = defaultdict(list)
        for block in range(depth):
            mlps = (*anatomy.in_block(stack, block), *anatomy.experts.get((stack, block), ()))
            for form in _of_block(mlps, anatomy, inside[stack, block]):
                forms[form].append(block)
        for form, blocks in forms.items():
            yield _entry(form, "all" if len(blocks) == depth else ",".join(map(str, blocks)))


def _entry(said: MLPCorrection, blocks: str) -> dict[str, Any]:
    """The entry that says it; what goes without saying is left out."""
    followers = {name: "all" if even else "each" for name, even in said.followers}
    more = {
        "interleaved": said.interleaved,
        "followers": followers,
        "biases": dict(said.biases),
        "experts": said.experts,
        "idle": said.idle,
        "sparse": said.sparse,
    }
    return {
        "stack": said.stack,
        "blocks": blocks,
        **({} if said.kind == "dense" else {"kind": said.kind}),
        "ups": list(said.ups),
        "down": said.down,
        "parts": said.parts,
        "in_out": said.in_out,
        **{key: value for key, value in more.items() if value},
    }


def _of_block(mlps: Sequence[MLP], anatomy: Anatomy, inside: set[str]) -> list[MLPCorrection]:
    """What says the MLPs of a block."""
    alike: dict[MLPCorrection, list[MLP]] = defaultdict(list)
    for mlp in mlps:
        alike[_starred(_form(mlp, anatomy))].append(mlp)
    found: list[MLPCorrection] = []
    for form, members in alike.items():
        together = _together(form, members, anatomy, inside)
        found += [_form(mlp, anatomy) for mlp in members] if together is None else [together]
    return found


def _together(
    form: MLPCorrection, members: Sequence[MLP], anatomy: Anatomy, inside: set[str]
) -> MLPCorrection | None:
    """What says several that differ in a number, and how many of the numbers are idle; None if it
    would say more than that."""
    idle = {anatomy.places[up.weight].inner for mlp in members for up in mlp.idle}
    if "*" not in form.down or (len(members) == 1 and not idle):
        return None
    used = set(numbers(form.down, inside))
    said = [(name, set(numbers(name, inside)) - used) for name in form.ups]
    without = said[0][1]
    named = {name.replace("*", number) for name, without in said for number in without}
    if len(used) != len(members) or named != idle or any(other != without for _, other in said):
        return None
    return replace(form, idle=len(without))


def _starred(form: MLPCorrection) -> MLPCorrection:
    """The same with a * for the last number in the path of its module, if there is one."""
    names = [*form.ups, form.down, *(name for name, _ in form.followers)]
    names += [bias for _, bias in form.biases]
    module = module_of("", names)
    if not (found := list(NUMBER.finditer(module))):
        return form
    start, stop = found[-1].span()

    def star(name: str) -> str:
        return f"{name[:start]}*{name[stop:]}"

    return replace(
        form,
        ups=tuple(map(star, form.ups)),
        down=star(form.down),
        followers=tuple((star(name), even) for name, even in form.followers),
        biases=tuple((star(weight), star(bias)) for weight, bias in form.biases),
    )


def _form(mlp: MLP, anatomy: Anatomy) -> MLPCorrection:
    """What says one MLP, of all blocks and without what is idle."""
    up = mlp.ups[0]
    below = up.experts if up.flat else None
    projections = (*mlp.ups, mlp.down)

    def inner(name: str) -> str:
        return anatomy.places[name].inner

    return MLPCorrection(
        mlp.stack,
        tuple(inner(each.weight) for each in mlp.ups),
        inner(mlp.down.weight),
        up.parts,
        mlp.down.in_out and not up.flat,
        None,
        up.interleaved,
        tuple(
            (inner(follower.name), follower.even)
            for follower in mlp.followers
            if follower.parts == 1  # an adapter's matrix is found by the projection that it adds to
        ),
        mlp.kind,
        tuple(
            (inner(each.weight), inner(each.bias))
            for each in projections
            if each.bias is not None and _usual_bias(each, anatomy) != each.bias
        ),
        below,
        0,
        mlp.sparse,
    )


def _usual_bias(projection: Projection, anatomy: Anatomy) -> str | None:
    """The bias that a correction takes for that of a weight if none is given."""
    names = bias_names(projection.weight, stacked=projection.experts is not None)
    return next((name for name in names if name in anatomy.places), None)
