"""Reading a recipe from YAML: what is wrong with it is reported at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from surgery.errors import RecipeError
from surgery.merging.methods import METHODS
from surgery.merging.parameters import unknown
from surgery.recipe.document import Document, Steps, parse_value, read_documents
from surgery.recipe.graph import Problems, ordered
from surgery.recipe.schema import OPERATIONS, MergeArguments, Recipe, Requirement, Step
from surgery.recipe.settings import Setting, parse_setting

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")
TOP = ("inputs", "steps", "output", "require", "description")


def load_recipe(path: str | Path, *, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, or a configuration of mergekit's, from a YAML file.

    `changes` are written "inputs.base=./other": a value that takes the place of the one there.
    Raises RecipeError with all that is wrong, each with its line.
    """
    documents = read_documents(path)
    if not documents:
        raise RecipeError(f"{path} is empty")
    for change in changes:
        documents[-1] = _changed(documents[-1], change)
    if any(isinstance(d.data, Mapping) and "merge_method" in d.data for d in documents):
        from surgery.recipe.mergekit import translate

        return translate(documents)
    if len(documents) > 1:
        raise RecipeError(
            f"{path} holds {len(documents)} documents, and a recipe is one: its steps can refer "
            f"to each other"
        )
    return _recipe(documents[0])


def _changed(document: Document, change: str) -> Document:
    keys, found, text = change.partition("=")
    if not found:
        raise RecipeError(f"--set {change}: give it as NAME=VALUE, such as inputs.base=./model")
    data = _with(document.data, keys.split("."), parse_value(text), change)
    return Document(document.path, data, document.lines)


def _with(data: Any, keys: list[str], value: Any, change: str) -> Any:
    """`data` with `value` at `keys`. Inside the recipe every name but the last has to be there."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(data, list) and re.fullmatch(r"\d+", key) and int(key) < len(data):
        at = int(key)
        return [*data[:at], _with(data[at], rest, value, change), *data[at + 1 :]]
    if not isinstance(data, Mapping) or (rest and key not in data):
        near = unknown("key", key, list(data) if isinstance(data, Mapping) else [])
        raise RecipeError(f"--set {change}: {near}")
    return {**data, key: _with(data.get(key), rest, value, change)}


def _recipe(document: Document) -> Recipe:
    problems = Problems(document)
    data = document.data
    if not isinstance(data, Mapping):
        raise RecipeError(document.problem((), "a recipe is a table with inputs and steps"))
    for key in data:
        if key not in TOP:
            problems.add((key,), unknown("key", key, TOP))
    inputs = _inputs(data.get("inputs", {}), problems)
    steps = _steps(data.get("steps"), problems)
    for name in inputs.keys() & {step.name for step in steps}:
        problems.add(("steps", name), f"{name} is an input already")
    requirements = _requirements(data.get("require", []), problems)
    in_order = ordered(steps, inputs, problems)
    output = data.get("output", steps[-1].name if steps else "")
    if not isinstance(output, str) or output not in {step.name for step in steps}:
        problems.add(
            ("output",),
            unknown("step", str(output), [step.name for step in steps]) if steps else "no step",
        )
    known = [*inputs, *(step.name for step in steps)]
    for requirement, at in requirements:
        for name in requirement.pair:
            if name not in known:
                problems.add(at, unknown("input or step", name, known))
    RecipeError.raise_if(problems)
    return Recipe(inputs, tuple(in_order), output, tuple(requirements), document)


def _inputs(given: Any, problems: Problems) -> dict[str, str]:
    if not isinstance(given, Mapping):
        problems.add(("inputs",), "this is a table of names and the models that they stand for")
        return {}
    for name, reference in given.items():
        if not NAME.fullmatch(name):
            problems.add(("inputs", name), f"{name!r} is no name: use letters, digits, _ and -")
        if not isinstance(reference, str):
            problems.add(
                ("inputs", name), f"{reference!r} is no directory, file or Hub id: write it as text"
            )
    return {name: reference for name, reference in given.items() if isinstance(reference, str)}


def _steps(given: Any, problems: Problems) -> list[Step]:
    if not isinstance(given, Mapping) or not given:
        problems.add(("steps",), "a recipe has at least one step: name: {merge: {...}}")
        return []
    steps = (_step(name, body, problems) for name, body in given.items())
    return [step for step in steps if step is not None]


def _step(name: str, body: Any, problems: Problems) -> Step | None:
    at: Steps = ("steps", name)
    if not NAME.fullmatch(name):
        problems.add(at, f"{name!r} is no name: use letters, digits, _ and -")
    operations = [key for key in body if key in OPERATIONS] if isinstance(body, Mapping) else []
    others = [key for key in body if key not in OPERATIONS] if isinstance(body, Mapping) else []
    for key in others:
        if key != "write":
            problems.add((*at, key), unknown("operation", key, [*OPERATIONS, "write"]))
    if len(operations) != 1:
        if not others or len(operations) > 1:
            problems.add(at, f"a step has one of {', '.join(OPERATIONS)}, and what that takes")
        return None
    operation = operations[0]
    at_arguments = (*at, operation)
    arguments = _parsed(OPERATIONS[operation], body[operation], at_arguments, problems)
    write = body.get("write")
    if write is not None and not isinstance(write, str):
        problems.add((*at, "write"), f"{write!r} is no directory")
        write = None
    if arguments is None:
        return None
    settings = {}
    if isinstance(arguments, MergeArguments):
        settings = _settings(arguments, at_arguments, problems)
    return Step(name, operation, arguments, at_arguments, write, settings)


def _parsed(kind: type[Any], given: Any, at: Steps, problems: Problems) -> Any:
    """`given` as a model of pydantic's, or None with its mistakes noted."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        for found in error.errors():
            # a choice of types adds the name of the type that was tried to the place
            place = (*at, *found["loc"])
            while len(place) > len(at) and place not in problems.document.lines:
                place = place[:-1]
            last = str(found["loc"][-1]) if found["loc"] else ""
            if found["type"] == "extra_forbidden":
                text = unknown("key", last, list(kind.model_fields))
            elif found["type"] == "missing":
                text = f"{last} is missing"
            else:
                text = found["msg"].removeprefix("Value error, ")
                if place == at and last and last in kind.model_fields:
                    text = f"{last}: {text}"
            if (problem := problems.document.problem(place, text)) not in problems:
                problems.append(problem)
        return None


def _settings(
    arguments: MergeArguments, at: Steps, problems: Problems
) -> dict[str, Setting | tuple[Setting | None, ...]]:
    """The parameters of a merge. One that is per model may be given for all models, as a list
    with one for each, or beside each model."""
    if arguments.method not in METHODS:
        problems.add((*at, "method"), unknown("merge method", arguments.method, METHODS))
        return {}
    known = {parameter.name: parameter for parameter in METHODS[arguments.method].parameters}
    keys = [*known, *MergeArguments.model_fields]
    count = len(arguments.models)
    settings: dict[str, Setting | tuple[Setting | None, ...]] = {}

    def parse(value: Any, place: Steps) -> Setting | None:
        try:
            return parse_setting(value)
        except ValueError as error:
            problems.add(place, str(error))
            return None

    for name, value in (arguments.__pydantic_extra__ or {}).items():
        place = (*at, name)
        if name not in known:
            problems.add(place, unknown(f"parameter of {arguments.method}", name, keys))
        elif known[name].per_model and isinstance(value, list):
            if len(value) != count:
                problems.add(
                    place,
                    f"this has {len(value)} values, and there are {count} models: give one for "
                    f"each, which may be a list over depth: [[0, 1], [1, 0]]",
                )
            settings[name] = tuple(parse(v, (*place, i)) for i, v in enumerate(value))
        elif (one := parse(value, place)) is not None:
            settings[name] = one
    for number, item in enumerate(arguments.models):
        own = {} if isinstance(item, str) else item.parameters
        for name, value in own.items():
            place = (*at, "models", number, name)
            if name not in known:
                problems.add(place, unknown(f"parameter of {arguments.method}", name, known))
            elif not known[name].per_model:
                problems.add(place, f"{name} is one for all models: give it beside them")
            elif name in (arguments.__pydantic_extra__ or {}):
                problems.add(place, f"{name} is given for all models as well")
            else:
                before = settings.get(name) or (None,) * count
                assert isinstance(before, tuple)
                one = parse(value, place)
                settings[name] = (*before[:number], one, *before[number + 1 :])
    return settings


def _requirements(given: Any, problems: Problems) -> list[tuple[Requirement, Steps]]:
    if not isinstance(given, list):
        problems.add(("require",), "this is a list of what has to hold: - same: [base, grown]")
        return []
    found = []
    for number, item in enumerate(given):
        at: Steps = ("require", number)
        if (requirement := _parsed(Requirement, item, at, problems)) is not None:
            found.append((requirement, at))
    return found
