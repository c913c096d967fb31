"""Reading a recipe from YAML: what is wrong with it is reported at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.errors import ArgumentError, RecipeError
from surgery.merging.methods import METHODS
from surgery.merging.parameters import unknown
from surgery.recipe.anatomy import KEYS
from surgery.recipe.document import Document, Steps, parse_value, read_documents
from surgery.recipe.graph import Problems, ordered
from surgery.recipe.parsing import parsed
from surgery.recipe.schema import OPERATIONS, MergeArguments, Recipe, Requirement, Step
from surgery.recipe.settings import Rules, Setting, parse_setting

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")
Settings = dict[str, Setting | tuple[Setting | None, ...]]
TOP = ("inputs", "anatomy", "steps", "output", "require", "description")


def load_recipe(
    path: str | Path, *, changes: Sequence[str] = (), anatomy: str | Path | None = None
) -> Recipe:
    """Read a recipe, or a configuration of mergekit's, from a YAML file.

    `changes` are written "inputs.base=./other": a value that takes the place of the one there.
    `anatomy` is a file with corrections of what is recognised in every input, in the place of
    those that the recipe has.
    Raises RecipeError with all that is wrong, each with its line.
    """
    recipe = _load(path, changes)
    if anatomy is None:
        return recipe
    return replace(recipe, anatomy=dict.fromkeys(recipe.inputs, str(anatomy)))


def _load(path: str | Path, changes: Sequence[str]) -> Recipe:
    documents = read_documents(path)
    if not documents:
        raise RecipeError(f"{path} is empty")
    added: dict[str, str] = {}
    for change in changes:
        before = documents[-1]
        documents[-1] = _changed(before, change)
        added |= _added_input(before, change)
    if any(isinstance(d.data, Mapping) and _is_mergekits(d.data) for d in documents):
        from surgery.recipe.mergekit import translate

        return translate(documents)
    if len(documents) > 1:
        raise RecipeError(
            f"{path} holds {len(documents)} documents, and a recipe is one: its steps can refer "
            f"to each other"
        )
    _check_added(documents[0].data, added)
    return _recipe(documents[0])


def _is_mergekits(data: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of mergekit's, be it with a mistake in it."""
    theirs = {
        "merge_method", "models", "slices", "base_model", "experts", "gate_mode", "genome",
    }  # fmt: skip
    return "steps" not in data and not theirs.isdisjoint(data)


def _changed(document: Document, change: str) -> Document:
    keys, found, text = change.partition("=")
    if not found:
        raise ArgumentError(f"--set {change}: give it as NAME=VALUE, such as inputs.base=./model")
    data = _with(document.data, keys.split("."), parse_value(text), change)
    return Document(document.path, data, document.lines)


def _added_input(document: Document, change: str) -> dict[str, str]:
    """The input that a change adds to those that the recipe has, and the change."""
    keys = change.partition("=")[0].split(".")
    if not isinstance(document.data, Mapping) or keys[0] != "inputs" or len(keys) != 2:
        return {}
    return {} if keys[1] in _names(document.data.get("inputs")) else {keys[1]: change}


def _check_added(data: Any, added: Mapping[str, str]) -> None:
    """Raise RecipeError for added inputs that nothing refers to: their names are mistyped, and
    the recipe would go on with its own."""
    used = {name for _, name in _references(data)} if added else set()
    known = [name for name in _names(data.get("inputs")) if name not in added] if added else []
    RecipeError.raise_if(
        f"--set {change}: {unknown('input', name, known)}"
        for name, change in added.items()
        if name not in used
    )


def _with(data: Any, keys: list[str], value: Any, change: str) -> Any:
    """`data` with `value` at `keys`. Inside the recipe every name but the last has to be there."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(data, list) and re.fullmatch(r"\d+", key) and int(key) < len(data):
        at = int(key)
        return [*data[:at], _with(data[at], rest, value, change), *data[at + 1 :]]
    if not isinstance(data, Mapping) or (rest and key not in data):
        known = list(map(str, range(len(data)))) if isinstance(data, list) else _names(data)
        raise RecipeError(f"--set {change}: {unknown('key', key, known)}")
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
    anatomy = _anatomy(data, problems)
    steps = _steps(data.get("steps"), problems)
    requirements = _requirements(data.get("require", []), problems)
    _check_names(data, problems)
    in_order = ordered(steps, problems)
    RecipeError.raise_if(problems)
    output = data.get("output", steps[-1].name)
    used = {name for _, name in _references(data)}
    notes = [
        document.problem(("inputs", name), "nothing in the recipe uses this input")
        for name in inputs
        if name not in used
    ]
    notes += [
        document.problem((*step.at, key), "rules after default are never reached: put it last")
        for step in steps
        for key, setting in step.settings.items()
        if any(map(_hides_rules, setting if isinstance(setting, tuple) else (setting,)))
    ]
    return Recipe(
        inputs,
        tuple(in_order),
        output,
        tuple(requirements),
        document,
        tuple(notes),
        anatomy=anatomy,
    )


def _hides_rules(setting: Setting | None) -> bool:
    """Whether it has a rule for all tensors before others."""
    return isinstance(setting, Rules) and any(r.condition is None for r in setting.rules[:-1])


def _check_names(data: Mapping[str, Any], problems: Problems) -> None:
    """That every name stands for one thing, and that what is referred to is there, if it is wrong
    in itself or not."""
    inputs, steps = _names(data.get("inputs")), _names(data.get("steps"))
    known = [*inputs, *steps]
    for name in steps:
        if name in inputs:
            problems.add(("steps", name), f"{name} is an input already")
    if steps and data.get("output", steps[-1]) not in steps:
        problems.add(("output",), unknown("step", str(data["output"]), steps))
    for at, name in _references(data):
        if name not in known:
            problems.add(at, unknown("input or step", name, known))


def _references(data: Mapping[str, Any]) -> Iterator[tuple[Steps, str]]:
    """Every name that steps and requirements refer to, and where."""
    for step, body in _items(data.get("steps")):
        for operation, given in _items(body):
            if operation in OPERATIONS and isinstance(given, Mapping):
                for at, name in OPERATIONS[operation].references_in(given):
                    yield ("steps", step, operation, *at), name
    required = data.get("require")
    for number, item in enumerate(required if isinstance(required, list) else ()):
        for key, names in _items(item):
            if key in ("same", "compare") and isinstance(names, list):
                yield from (
                    (("require", number, key, at), name)
                    for at, name in enumerate(names)
                    if isinstance(name, str)
                )


def _items(given: Any) -> list[tuple[str, Any]]:
    return list(given.items()) if isinstance(given, Mapping) else []


def _names(given: Any) -> list[str]:
    return list(given) if isinstance(given, Mapping) else []


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


def _anatomy(data: Mapping[str, Any], problems: Problems) -> dict[str, str | Steps]:
    """Corrections of what is recognised in the inputs: of all alike, or by the input's name; each
    in a file or here."""
    given, inputs = data.get("anatomy"), _names(data.get("inputs"))
    if given is None:
        return {}
    if isinstance(given, str):
        return dict.fromkeys(inputs, given)
    if not isinstance(given, Mapping):
        problems.add(("anatomy",), "this is a file, or a table: of corrections, or of inputs")
        return {}
    if given.keys() & set(KEYS) and not given.keys() & set(inputs):
        return dict.fromkeys(inputs, ("anatomy",))
    found: dict[str, str | Steps] = {}
    for name, one in given.items():
        at: Steps = ("anatomy", name)
        if name not in inputs:
            problems.add(at, unknown("input", name, inputs))
        elif not isinstance(one, (str, Mapping)):
            problems.add(at, f"this is a file, or a table with {', '.join(KEYS)}")
        else:
            found[name] = one if isinstance(one, str) else at
    return found


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
    operations = [key for key in _names(body) if key in OPERATIONS]
    others = [key for key in _names(body) if key not in (*OPERATIONS, "write")]
    for key in others:
        problems.add((*at, key), unknown("operation", key, [*OPERATIONS, "write"]))
    if len(operations) != 1:
        if not others or len(operations) > 1:
            problems.add(at, f"a step has one of {', '.join(OPERATIONS)}, and what that takes")
        return None
    operation = operations[0]
    at_arguments = (*at, operation)
    arguments = parsed(OPERATIONS[operation], body[operation], at_arguments, problems)
    given = body[operation]
    arguments = parsed(OPERATIONS[operation], given, at_arguments, problems)
    settings: Settings = {}
    if operation == "merge" and isinstance(given, Mapping):
        settings = _settings(given, at_arguments, problems)
    write = body.get("write")
    if write is not None and (not isinstance(write, str) or not write):
        problems.add((*at, "write"), f"{write!r} is no directory")
    if arguments is None:
        return None
    return Step(name, operation, arguments, at_arguments, write, settings)


def _settings(given: Mapping[str, Any], at: Steps, problems: Problems) -> Settings:
    """The parameters of a merge. One that is per model may be given for all models, as a list
    with one for each, or beside each model."""
    method = given.get("method")
    if not isinstance(method, str):
        return {}
    if method not in METHODS:
        problems.add((*at, "method"), unknown("merge method", method, METHODS))
        return {}
    known = {parameter.name: parameter for parameter in METHODS[method].parameters}
    fields = MergeArguments.model_fields
    shared = {name: value for name, value in given.items() if name not in fields}
    models = given["models"] if isinstance(given.get("models"), list) else []
    settings: Settings = {}

    def parse(value: Any, place: Steps) -> Setting | None:
        try:
            return parse_setting(value)
        except ValueError as error:
            problems.add(place, str(error))
            return None

    for name, value in shared.items():
        place = (*at, name)
        if name not in known:
            problems.add(place, unknown(f"parameter of {method}", name, [*known, *fields]))
        elif known[name].per_model and isinstance(value, list):
            if models and len(value) != len(models):
                problems.add(
                    place,
                    f"this has {len(value)} values, and there are {len(models)} models: give one "
                    f"for each, which may be a list over depth: [[0, 1], [1, 0]]",
                )
            settings[name] = tuple(parse(v, (*place, i)) for i, v in enumerate(value))
        elif (one := parse(value, place)) is not None:
            settings[name] = one
    for number, item in enumerate(models):
        for name, value in _items(item):
            place = (*at, "models", number, name)
            if name == "model":
                continue
            if name not in known:
                own = [p.name for p in known.values() if p.per_model]
                problems.add(place, unknown(f"parameter of {method}", name, [*own, "model"]))
            elif not known[name].per_model:
                problems.add(place, f"{name} is one for all models: give it beside them")
            elif name in shared:
                problems.add(place, f"{name} is given for all models as well")
            else:
                before = settings.get(name) or (None,) * len(models)
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
        if (requirement := parsed(Requirement, item, at, problems)) is not None:
            found.append((requirement, at))
    return found
