"""Conditions of a merge's parameters beside the tensors that there are: some that fit none, and
tensors that none fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from surgery.anatomy import Role
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.recipe.document import Document, Steps
from surgery.recipe.schema import MergeArguments, Step
from surgery.recipe.settings import rules_in, spot_of


def check_every_tensor(step: Step, key: str, made: Mapping[str, object]) -> None:
    """Raise RecipeError if a parameter of a merge has no value for some of its tensors."""
    setting, given = step.settings[key], step.arguments
    assert isinstance(given, MergeArguments)
    first = made[given.names[0] if given.base is None else given.base]
    if isinstance(setting, tuple) or not isinstance(first, Checkpoint):
        return
    places = first.anatomy.places
    missing = [
        name
        for name, tensor in first.items()
        if tensor.dtype.kind == "float" and places[name].role is not Role.BUFFER
        if setting.at(spot_of(name, places[name], first.anatomy, step.spans, step.behind)) is None
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RecipeError(
            f"{key} has no value for {missing[0]}{more}: end its conditions with one that has a "
            f"value and no filter, or give it for all under the file's parameters"
        )


def unused_conditions(step: Step, made: object, document: Document) -> Iterator[str]:
    """That conditions of a merge's parameters fit none of its tensors, each with its line."""
    rules = {
        key: [
            rule
            for setting in (given if isinstance(given, tuple) else (given,))
            if setting is not None
            for rule in rules_in(setting)
        ]
        for key, given in step.settings.items()
    }
    if not isinstance(made, Checkpoint) or not any(rules.values()):
        return
    anatomy = made.anatomy
    spots = [
        spot_of(name, place, anatomy, step.spans, step.behind)
        for name, place in anatomy.places.items()
    ]
    for key, every in rules.items():
        for condition in dict.fromkeys(r.condition for r in every if not any(map(r.fits, spots))):
            where = document.where(_place_of(document, step, key, condition))
            yield f"{where}: {key}: no tensor fits {condition!r}"


def _place_of(document: Document, step: Step, key: str, condition: str | None) -> Steps:
    """Where a condition of a parameter stands, or else the step."""
    for at in document.lines:
        if at[: len(step.at)] == step.at and key in at:
            if at[-1] == condition:
                return at
            if at[-1] == "filter" and condition in _values_at(document.data, step, at):
                return at
    return step.at


def _values_at(data: Any, step: Step, at: Steps) -> list[Any]:
    """What is at a place, in a file of several documents in any of them."""
    if isinstance(data, list):
        return [_value_at(one, at[len(step.at) :]) for one in data]
    return [_value_at(data, at)]


def _value_at(data: Any, at: Steps) -> Any:
    """What is at a place, if it is there: `--set` can have changed what was around it."""
    try:
        for step in at:
            data = data[step]
    except (LookupError, TypeError):
        return None
    return data
