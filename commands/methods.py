"""`surgery methods`: the ways to merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import AsJson
from .output import console, print_json

if TYPE_CHECKING:
    from surgery.merging.methods import Method
    from surgery.merging.parameters import Parameter


def methods(json: AsJson = False) -> None:
    """The ways to merge: what each is good for, its parameters, and the paper."""
    from rich.padding import Padding
    from rich.text import Text

    from surgery.merging.methods import METHODS

    if json:
        print_json([_as_json(method) for method in METHODS.values()])
        return
    out = console()
    for method in METHODS.values():
        paper = f", arXiv {method.paper}" if method.paper else ""
        out.print(Text(method.name, style="bold"), f"({_takes(method)}{paper})")
        out.print(Padding(method.summary, (0, 0, 0, 4), expand=False))
        if method.parameters:
            shown = ", ".join(_shown(parameter) for parameter in method.parameters)
            out.print(Padding(shown, (0, 0, 0, 4), expand=False))
    out.print(
        "A parameter without a default has to be given. `surgery methods --json` says what each "
        "means, its range, and whether it can differ from model to model."
    )


def _takes(method: Method) -> str:
    """How many models, and whether a base."""
    least, most = method.models
    count = f"{least} model{'s' if least > 1 else ''}" + ("" if least == most else " or more")
    return {"needed": "a base and ", "optional": "a base if you like, and ", "none": ""}[
        method.base
    ] + count


def _shown(parameter: Parameter) -> str:
    value = parameter.default
    if value is None:
        return parameter.name
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}"
    return f"{parameter.name}={shown}"


def _as_json(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "base": method.base,
        "models": {"least": method.models[0], "most": method.models[1]},
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.kind.__name__,
                "default": parameter.default,
                "range": parameter.range or None,
                "per_model": parameter.per_model,
                "doc": parameter.doc,
            }
            for parameter in method.parameters
        ],
    }
