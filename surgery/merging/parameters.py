"""The parameters of merge methods: what there are, and checking what was given, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any

Value = float | int | bool | tuple[float, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a merge method. `default` None means that it has to be given; a `per_model`
    one is a number for all models, or one for each."""

    name: str
    default: float | int | bool | None
    doc: str
    per_model: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    above_low: bool = False
    """Whether `low` itself is out of range."""

    @property
    def kind(self) -> type:
        return float if self.default is None else type(self.default)

    @property
    def range(self) -> str:
        """The range for people, such as "in (0, 1]"; "" if anything goes."""
        if self.kind is bool or (isfinite(self.low), isfinite(self.high)) == (False, False):
            return ""
        if not isfinite(self.high):
            return f"{'above' if self.above_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"


def resolve(
    parameters: Sequence[Parameter], given: Mapping[str, Any], models: int
) -> tuple[dict[str, Any], list[str]]:
    """A value for every parameter (a tuple where it is per model), and what is wrong with
    `given`."""
    known = {parameter.name: parameter for parameter in parameters}
    problems = [unknown("parameter", name, known) for name in given if name not in known]
    values = {}
    for name, parameter in known.items():
        value = given.get(name, parameter.default)
        if value is None:
            problems.append(f"{name} has to be given: {parameter.doc}")
            continue
        values[name], found = _checked(parameter, value, models)
        problems += found
    return values, problems


def unknown(what: str, name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    """That there is no such thing, and what was probably meant."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    listed = ", ".join(known) or "none"
    hint = f"did you mean {near[0]}?" if near else f"there are {listed}"
    return f"there is no {what} {name!r}: {hint}"


def _checked(parameter: Parameter, value: Any, models: int) -> tuple[Any, list[str]]:
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    problems = []
    if isinstance(value, (list, tuple)):
        if not parameter.per_model:
            problems.append(f"{parameter.name} takes one value for all models, not {len(given)}")
        elif len(given) != models:
            problems.append(
                f"{parameter.name} has {len(given)} values, and there are {models} models: give "
                f"one for each, or one for all"
            )
    if None in given:
        problems.append(f"{parameter.name} has to be given for each model: {parameter.doc}")
    given = [item for item in given if item is not None]
    problems += dict.fromkeys(text for item in given if (text := value_problem(parameter, item)))
    if problems:
        return None, problems
    made = [parameter.kind(item) for item in given]
    if not parameter.per_model:
        return made[0], []
    return tuple(made) if len(made) == models else tuple(made) * models, []


def value_problem(parameter: Parameter, value: Any) -> str | None:
    """What is wrong with one value."""
    name = parameter.name
    if parameter.kind is bool:
        return None if isinstance(value, bool) else f"{name} is {value!r}, not true or false"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        return f"{name} is {value!r}, and has to be a finite number"
    if parameter.kind is int and value != int(value):
        return f"{name} is {value}, and has to be a whole number"
    low = value <= parameter.low if parameter.above_low else value < parameter.low
    if low or value > parameter.high:
        return f"{name} is {value}, and has to be {parameter.range}"
    return None
