"""A part of a recipe as a model of pydantic's, and its mistakes in our words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from surgery.merging.parameters import unknown
from surgery.recipe.document import Steps
from surgery.recipe.graph import Problems
from surgery.recipe.schema import Blocks
from surgery.recipe.settings import shortened

KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
"""What pydantic wanted, by the type of its error."""


def parsed(kind: type[Any], given: Any, at: Steps, problems: Problems) -> Any:
    """`given` as a model of pydantic's, or None with its mistakes noted."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        by_place: dict[Steps, list[Any]] = {}
        for found in error.errors():
            by_place.setdefault(_place(given, found["loc"]), []).append(found)
        for place, several in by_place.items():
            # given a table where there is a choice, what is wrong in the table is enough
            inside = any(other[: len(place)] == place != other for other in by_place)
            for text in _said(kind, place, several, types=not inside):
                problems.add((*at, *place), text)
        return None


def _place(given: Any, loc: Sequence[str | int]) -> Steps:
    """Where in `given` a mistake is. pydantic adds the names of types that it tried."""
    place: Steps = ()
    for step in loc:
        inside = dict(enumerate(given)) if isinstance(given, list) else given
        if isinstance(inside, Mapping) and step in inside:
            given, place = inside[step], (*place, step)
    return place


def _said(kind: type[Any], place: Steps, several: Sequence[Any], *, types: bool) -> list[str]:
    """The mistakes that pydantic found in one place, in our words."""
    wanted: dict[str, None] = {}
    texts = []
    for found in several:
        last = str(found["loc"][-1]) if found["loc"] else ""
        if found["type"] == "extra_forbidden":
            fields = (Blocks if place[0] == "blocks" else kind).model_fields
            texts.append(unknown("key", last, list(fields)))
        elif found["type"] == "missing":
            texts.append(f"{last} is missing")
        elif found["type"] == "too_short":
            texts.append("this is a list of one or more")
        elif found["type"] in KINDS:
            wanted[KINDS[found["type"]]] = None
        elif found["type"] == "literal_error":
            wanted[found["ctx"]["expected"]] = None
        else:
            texts.append(found["msg"].removeprefix("Value error, "))
    if wanted and types and not texts:
        texts.append(f"{shortened(several[0]['input'])} isn't {' or '.join(wanted)}")
    return texts
