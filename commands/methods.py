"""`surgery methods`: the ways to merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import AsJson
from .output import console, print_json, table

if TYPE_CHECKING:
    from surgery.merging.methods import Method
    from surgery.merging.parameters import Parameter


def methods(json: AsJson = False) -> None:
    """The ways to merge: what each is good for, its parameters, and the paper."""
    from surgery.merging.methods import METHODS

    if json:
        print_json([_as_json(method) for method in METHODS.values()])
        return
    rows = table("method", "good for", "base", "models", "parameters", "paper",
                 left=("method", "good for", "base", "models", "parameters", "paper"))  # fmt: skip
    for at in (1, 4):
        rows.columns[at].no_wrap = False
    for method in METHODS.values():
        rows.add_row(
            method.name,
            method.summary,
            {"needed": "yes", "optional": "may", "none": "no"}[method.base],
            _count(method),
            ", ".join(_shown(p) for p in method.parameters),
            f"arXiv {method.paper}" if method.paper else "",
        )
    out = console()
    out.print(rows)
    out.print("A parameter without a default has to be given. `surgery methods --json` says what")
    out.print("each means, its range, and whether it can differ from model to model.")


def _count(method: Method) -> str:
    least, most = method.models
    return f"{least}" if least == most else f"{least} or more"


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
