"""Parameters in mergekit's configurations: at four levels, as numbers, gradients or conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.merging.methods import METHODS, Method
from surgery.merging.parameters import unknown, value_problem
from surgery.recipe.document import Steps
from surgery.recipe.graph import Problems
from surgery.recipe.settings import (
    Constant,
    Gradient,
    Layered,
    Rule,
    Rules,
    Setting,
    is_number,
    numbers_in,
    shortened,
)

IRRELEVANT = ("int8_mask", "eps")
"""Parameters that save mergekit memory, or keep it from dividing by zero."""
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    name: {"density": 1.0}
    for name, m in METHODS.items()
    if "density" in [p.name for p in m.parameters]
}
"""Defaults that differ from ours."""
REQUIRED: Mapping[str, tuple[str, ...]] = {"slerp": ("t",), "nearswap": ("t",)}
"""Parameters without a default there, by the method. `weight` has one here: docs/mergekit.md."""
ONLY = {
    "filter_wise": (False, "model_stock is per tensor here"),
    "nuslerp_flatten": (True, "nuslerp is per tensor here"),
    "nuslerp_row_wise": (False, "nuslerp is per tensor here"),
    "embed_slerp": (False, "embeddings are merged by the method itself here"),
}
"""Parameters of which one value alone is supported, and why."""
PARAMETERS = sorted({p.name for method in METHODS.values() for p in method.parameters})


@dataclass(frozen=True)
class Source:
    """A model in a merge, with its blocks if it is part of a slice."""

    model: str
    at: Steps
    parameters: Any
    blocks: tuple[int, int] | None = None


Slice = tuple[list[Source], dict[str, Setting]]
"""The sources of a run of blocks (or of whole models), and parameters for it alone."""


def parameters_in(
    given: Any, at: Steps, method: Method, problems: Problems, notes: dict[str, None]
) -> dict[str, Setting]:
    """The parameters in a `parameters:` table that this method has."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        problems.add(at, "this is a table of parameters")
        return {}
    own = {parameter.name: parameter for parameter in method.parameters}
    found = {}
    for key, value in given.items():
        if key in IRRELEVANT:
            continue
        if key in ONLY:
            wanted, why = ONLY[key]
            if value is not wanted:
                problems.add((*at, key), f"{key}: {value!r} isn't supported: {why}")
        elif key in own:
            try:
                found[key] = _setting(value)
            except ValueError as error:
                problems.add((*at, key), str(error))
                continue
            for number in numbers_in(found[key]):
                if (problem := value_problem(own[key], number)) is not None:
                    problems.add((*at, key), problem)
            if _never_reached(value):
                where = problems.document.problem((*at, key), "")
                notes[f"{where}conditions after the one without a filter are never reached"] = None
        elif key in PARAMETERS:
            notes[f"{method.name} has no parameter {key}, and leaves it out as mergekit does"] = (
                None
            )
        else:
            problems.add((*at, key), unknown(f"parameter of {method.name}", key, own))
    return found


def merged_settings(
    method: Method,
    slices: Sequence[tuple[Sequence[Source], Mapping[str, Setting]]],
    models: Sequence[Sequence[Source]],
    everywhere: Mapping[str, Setting],
) -> dict[str, Setting | tuple[Setting | None, ...]]:
    """The parameters by mergekit's precedence: of a source, of its slice, of the whole."""
    settings: dict[str, Setting | tuple[Setting | None, ...]] = {}
    for parameter in method.parameters:
        name = parameter.name
        default = DEFAULTS.get(method.name, {}).get(name)
        general = [everywhere[name]] if name in everywhere else []
        general += [] if default is None else [Constant(default)]
        by_model = []
        for column in models:
            spans = {
                number: tuple(
                    given[name]
                    for given in (source.parameters, own)
                    if name in given and (parameter.per_model or len(models) == 1 or given is own)
                )
                for number, (source, (_, own)) in enumerate(zip(column, slices, strict=True))
            }
            by_model.append(_layered(general, spans))
        if parameter.per_model and any(one is not None for one in by_model):
            settings[name] = tuple(by_model)
        elif not parameter.per_model and by_model[0] is not None:
            settings[name] = by_model[0]
    return settings


def _layered(
    general: Sequence[Setting], spans: Mapping[int, tuple[Setting, ...]]
) -> Setting | None:
    if not any(spans.values()):
        return (
            None
            if not general
            else general[0]
            if len(general) == 1
            else Layered(tuple(general), {})
        )
    return Layered(tuple(general), spans)


def _setting(value: Any) -> Setting:
    """A number, a gradient, or conditions by what a name contains."""
    if isinstance(value, bool) or is_number(value):
        return Constant(value)
    if isinstance(value, Mapping):
        return Rules((_condition(value),))
    if isinstance(value, list) and value:
        if all(isinstance(item, Mapping) for item in value):
            return Rules(tuple(_condition(item) for item in value))
        if all(map(is_number, value)):
            return Gradient(tuple(map(float, value)))
    raise ValueError(
        f"{shortened(value)} is neither a finite number, nor a list of them, nor conditions"
    )


def _never_reached(value: Any) -> bool:
    """Whether conditions follow one that holds for every tensor."""
    conditions = value if isinstance(value, list) else []
    return any(
        isinstance(item, Mapping) and item.get("filter") in (None, "*") for item in conditions[:-1]
    )


def _condition(given: Mapping[str, Any]) -> Rule:
    for key in given:
        if key not in ("filter", "value"):
            raise ValueError(unknown("key", key, ["filter", "value"]))
    if "value" not in given:
        raise ValueError("a condition has a value")
    if isinstance(given["value"], Mapping) or _has_tables(given["value"]):
        raise ValueError("the value of a condition is a number, or a list of them")
    wanted = given.get("filter")
    return Rule(_setting(given["value"]), contains=None if wanted in (None, "*") else str(wanted))


def _has_tables(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
