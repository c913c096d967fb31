"""What is wrong with a configuration of mergekit's as a whole, beside what each key says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.merging.methods import Method, joint_problems
from surgery.recipe.document import Document, Steps
from surgery.recipe.graph import Problems
from surgery.recipe.mergekit_parameters import REQUIRED, Source
from surgery.recipe.settings import Constant, Setting, number_of, says_all


def check_no_base(problems: Problems, method: Method) -> None:
    """A problem if a method needs the base that isn't there."""
    if method.needs_base:
        which = "one of the two models" if method.models == (1, 1) else "it"
        problems.add(
            ("merge_method",),
            f"{method.name} needs the base that the models were fine-tuned from: add base_model: "
            f"with {which}",
        )


def check_added_base(
    base: str,
    method: Method,
    count: int,
    parameters: Mapping[str, Setting],
    problems: Problems,
    notes: dict[str, None],
) -> None:
    """What there is to say of a base that isn't among the `count` models, and is merged as they
    are because the method treats all alike."""
    weights = [p for p in method.parameters if p.name == "weight" and method.name == "linear"]
    if method.models[1] == count:
        problems.add(
            ("base_model",), f"{method.name} has no base, and would take {base} too: leave it out"
        )
    elif any(p.name not in parameters or not says_all(parameters[p.name]) for p in weights):
        problems.add(
            ("base_model",),
            f"{method.name} merges {base} too, and it has no weight: give it one under models, or "
            f"leave base_model out",
        )
    else:
        notes[
            problems.document.problem(
                ("base_model",), f"{method.name} merges {base} too, as mergekit does"
            )
        ] = None


def check_together(
    document: Document,
    problems: Problems,
    method: Method,
    models: Sequence[Sequence[Source]],
    settings: Mapping[str, Setting | tuple[Setting | None, ...]],
) -> None:
    """Problems with the number of models, and with parameters that are numbers."""
    at: Steps = ("models",) if "models" in document.data else ("slices",)
    least, most = method.models
    count = len(models)
    if count < least or (most is not None and count > most):
        wanted = f"{'' if least == most else 'at least '}{least} model{'' if least == 1 else 's'}"
        beside = ""
        if method.base != "none" and document.data.get("base_model"):
            beside = f" beside the base {document.data['base_model']}"
        named = ", ".join(column[0].model for column in models)
        advice = ""
        if method.name == "passthrough":
            advice = ": blocks of several are put one after another by slices of one source each"
        problems.add(
            at,
            f"{method.name} takes {wanted}{beside}, and there {'is' if count == 1 else 'are'} "
            f"{count} ({named}){advice}",
        )
        return
    constants: dict[str, Any] = {}
    for parameter in method.parameters:
        setting = settings.get(parameter.name, Constant(parameter.default or 0))
        several = setting if isinstance(setting, tuple) else (setting,)
        numbers = [parameter.default if item is None else number_of(item) for item in several]
        if None in numbers:  # it differs by tensor, and is looked at where they are known
            return
        if not parameter.per_model:
            constants[parameter.name] = numbers[0]
        else:
            constants[parameter.name] = tuple(numbers if len(numbers) > 1 else numbers * count)
    for problem in joint_problems(method, constants, count):
        problems.add(at, problem)


def required_parameters(
    document: Document,
    problems: Problems,
    method: Method,
    settings: Mapping[str, Setting | tuple[Setting | None, ...]],
) -> dict[str, Steps]:
    """Parameters that mergekit has no default for, and where they stand: a tensor that none of
    their conditions fits is a mistake."""
    found: dict[str, Steps] = {}
    for parameter in method.parameters:
        if parameter.name not in REQUIRED.get(method.name, ()):
            continue
        if parameter.name not in settings:
            problems.add(
                ("merge_method",),
                f"{method.name} has no {parameter.name}: give it under parameters; {parameter.doc}",
            )
            continue
        places = [at for at in document.lines if at[-2:] == ("parameters", parameter.name)]
        found[parameter.name] = min(places, key=len, default=("parameters", parameter.name))
    return found
