"""What can be merged: the arguments of a merge, and the checkpoints, checked before any byte of a
tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Literal

from surgery.checkpoint import Checkpoint
from surgery.errors import ArgumentError, MismatchError, UnsupportedError
from surgery.merging.methods import Method, joint_problems
from surgery.merging.parameters import resolve
from surgery.operations.pairs import check_pair, check_unquantized

Lines = Literal["auto"] | tuple[float, float] | None
MATCH_ROWS = (
    "pass tokenizer='base', 'union' or a model (--tokenizer base|union|MODEL) to have rows "
    "matched by token"
)


def check_arguments(
    method: Method,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    given: Mapping[str, Any],
    lines: Lines,
) -> dict[str, Any]:
    """The parameters. Raises ArgumentError with everything that can't be meant."""
    least, most = method.models
    count = len(models)
    problems = []
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        beside = " beside the base" if base is not None and method.base != "none" else ""
        plural = "" if wanted == "1" else "s"
        problems.append(f"{method.name} merges {wanted} model{plural}{beside}, and got {count}")
    if method.base == "needed" and base is None:
        problems.append(f"{method.name} needs the base that the models were fine-tuned from")
    if lines is not None and base is None:
        problems.append("lines scales the update from a base, and there is none: give the base")
    values, found = resolve(method.parameters, given, count)
    problems += found + joint_problems(method, values, count)
    problems += _lines_problems(lines, given)
    ArgumentError.raise_if(problems)
    return values


def _lines_problems(lines: Any, given: Mapping[str, Any]) -> list[str]:
    if lines is None or lines == "auto":
        return []
    if not (isinstance(lines, tuple) and len(lines) == 2):
        return [f"lines is {lines!r}, and has to be 'auto' or alpha and beta"]
    problems = [
        f"{name} of lines is {value!r}, and has to be a finite number"
        for name, value in zip(("alpha", "beta"), lines, strict=True)
        if not isinstance(value, (int, float)) or not isfinite(value)
    ]
    if "lambda" in given:
        problems.append("beta of lines takes the place of lambda: give one of the two")
    return problems


def check_together(models: Sequence[Checkpoint], base: Checkpoint | None) -> None:
    """Raise UnsupportedError for packed weights, MismatchError unless all are of one shape."""
    roles = {f"model {at}": model for at, model in enumerate(models, 1)}
    check_unquantized(**({} if base is None else {"base": base}), **roles)
    first, others = (models[0], models[1:]) if base is None else (base, models)
    problems: dict[str, None] = {}
    for other in others:
        try:
            check_pair(first, other, vocabularies=MATCH_ROWS)
        except MismatchError as error:
            problems |= dict.fromkeys(error.problems)
    MismatchError.raise_if(problems)
    if not first:
        raise UnsupportedError(f"{first.source.reference} holds no tensors to merge")
