"""`surgery clean`: what runs that were stopped have left, shown and removed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson
from .output import console, print_json, size, table

if TYPE_CHECKING:
    from surgery.writing.leftovers import Leftover


def clean(
    place: Annotated[
        Path, typer.Argument(help="A directory to look below, or what was to be written.")
    ] = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove them without asking.")] = False,
    json: AsJson = False,
) -> None:
    """Show what runs that were stopped have left, and remove it.

    Finished shards are kept beside the target (.NAME.staging), so that the same command goes on
    from them. A model that was to be replaced (.NAME.replaced) gets its name back if nothing has
    that name. What a run is using is left alone.
    """
    from surgery.writing.leftovers import clear, find_leftovers

    found = find_leftovers(place)
    if found and not json:
        _print(found)
    cleared = []
    for leftover in found:
        if not leftover.in_use and (yes or _agreed(leftover, json)):
            clear(leftover)
            cleared.append(leftover)
    if json:
        print_json({"leftovers": [_as_json(one, one in cleared) for one in found]})
    elif not found:
        console().print(f"Nothing was left below {place.absolute()}")
    elif cleared:
        console().print(f"{len(cleared)} of {len(found)} cleared")
    else:
        console().print("Nothing was removed: --yes removes what isn't in use")


def _agreed(leftover: Leftover, json: bool) -> bool:
    """Ask, where somebody can answer."""
    if json or not sys.stdin.isatty():
        return False
    to = f" to {leftover.target}" if leftover.remedy == "put back" else ""
    return typer.confirm(f"{leftover.remedy} {leftover.path}{to}?")


def _print(found: list[Leftover]) -> None:
    rows = table("left", "size", "last change", "shards", "", left=("left", ""))
    rows.columns[0].no_wrap = False
    for one in found:
        shards = f"{one.finished} finished" if one.finished else ""
        what = "in use" if one.in_use else f"to {one.remedy}"
        rows.add_row(str(one.path), size(one.nbytes), _age(one.age), shards, what)
    console().print(rows)


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _as_json(one: Leftover, cleared: bool) -> dict[str, Any]:
    return {
        "path": str(one.path),
        "target": str(one.target),
        "remedy": one.remedy,
        "bytes": one.nbytes,
        "age_seconds": round(one.age),
        "finished_shards": one.finished,
        "in_use": one.in_use,
        "cleared": cleared,
    }
