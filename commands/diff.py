"""`surgery diff`: what changed between two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .opening import open_model
from .options import MODEL, AnatomyFile, AsJson, Scope, Threads
from .output import console, groups, print_json, progress, table

if TYPE_CHECKING:
    from surgery.operations.diff import Change, Difference

SHOWN = 20
NAMED = 3
"""Tensors that a note names."""


def diff(
    base: Annotated[str, typer.Argument(help=MODEL)],
    other: Annotated[str, typer.Argument(help="The model to compare with it.")],
    effective_rank: Annotated[
        bool, typer.Option("--effective-rank", help="Also that of every update (takes SVDs).")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a heat-map of the relative updates, as PNG or SVG.")
    ] = None,
    scope: Scope = None,
    anatomy: AnatomyFile = None,
    json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Show which tensors changed and by how much, block by block and module by module."""
    import surgery

    first, second = open_model(base, anatomy), open_model(other, anatomy)
    with progress("comparing", second.nbytes) as advance:
        found = surgery.diff(
            first,
            second,
            effective_rank=effective_rank,
            scope=scope,
            threads=threads,
            progress=advance,
        )
    if plot is not None:
        from .heatmap import draw

        draw(found, plot, f"{first.source.path.name} to {second.source.path.name}")
    if json:
        print_json(_as_json(found))
    else:
        _print(found, base, other)


def _as_json(found: Difference) -> dict[str, Any]:
    return {
        "identical": found.identical,
        "changes": [asdict(change) for change in found.changes],
        "modules": [
            {"stack": stack, "module": module, "block": block, **asdict(change)}
            for (stack, module, block), change in found.modules.items()
        ],
        "added": list(found.added),
        "removed": list(found.removed),
        "reshaped": {name: [list(a), list(b)] for name, (a, b) in found.reshaped.items()},
        "retyped": {name: list(types) for name, types in found.retyped.items()},
        "config": {key: list(values) for key, values in found.config.items()},
        "not_finite": {
            role: [name for name, holds in found.not_finite.items() if holds[at]]
            for at, role in enumerate(("base", "other"))
        },
    }


def _print(found: Difference, base: str, other: str) -> None:
    out = console()
    changed = sum(not change.equal for change in found.changes)
    out.print(f"{changed:,} of {len(found.changes):,} tensors changed")
    for text in _not_finite(found, base, other):
        out.print(f"note      {text}", soft_wrap=True)
    for stack in dict.fromkeys(stack for stack, _, _ in found.modules):
        modules = {(m, b): c for (s, m, b), c in found.modules.items() if s == stack}
        _matrix(f"{stack}: ||tau|| / ||base||", {k: _relative(c) for k, c in modules.items()})
        _matrix(f"{stack}: cosine", {k: _cosine(c) for k, c in modules.items()})
        if any(change.effective_rank is not None for change in modules.values()):
            ranks = {
                k: "" if c.effective_rank is None else f"{c.effective_rank:.1f}"
                for k, c in modules.items()
            }
            _matrix(f"{stack}: effective rank of the update", ranks)
    rows = table("outside the blocks", "||tau|| / ||base||", "cosine", left=("outside the blocks",))
    for change in found.outside:
        rows.add_row(change.name, _relative(change), _cosine(change))
    out.print(rows)
    for title, names in (("added", found.added), ("removed", found.removed)):
        for name in names[:SHOWN]:
            out.print(f"{title}: {name}")
        if len(names) > SHOWN:
            out.print(f"{title}: and {len(names) - SHOWN:,} more")
    for name, (a, b) in found.reshaped.items():
        out.print(f"another shape: {name} was {list(a)} and is {list(b)}")
    for name, (was, now) in found.retyped.items():
        out.print(f"another type: {name} was {was} and is {now}")
    for key, (before, after) in found.config.items():
        out.print(f"config {key}: {before!r} became {after!r}")


def _relative(change: Change) -> str:
    """0 is for no change at all: a small one is told from none."""
    if change.equal:
        return "0"
    text = f"{change.relative:.4f}"
    return text if float(text) else f"{change.relative:.1e}"


def _cosine(change: Change) -> str:
    return "1" if change.equal else f"{change.cosine:.4f}"


def _not_finite(found: Difference, *models: str) -> Iterator[str]:
    """Of each model, the tensors whose figures mean nothing."""
    for at, model in enumerate(models):
        names = [name for name, holds in found.not_finite.items() if holds[at]]
        if names:
            few = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            tensors = "tensor" if len(names) == 1 else "tensors"
            yield f"NaN or infinity in {len(names):,} {tensors} of {model}: {few}"


def _matrix(title: str, cells: dict[tuple[str, int], str]) -> None:
    """One row for each block, one column for each module."""
    out = console()
    modules = list(dict.fromkeys(module for module, _ in cells))
    headings = [module.rpartition(".")[2].replace("_", "_\n") for module in modules]
    texts = {module: heading.split("\n") for module, heading in zip(modules, headings, strict=True)}
    for (module, _), cell in cells.items():
        texts[module].append(cell)
    widths = [max(map(len, texts[module])) for module in modules]
    blocks = sorted({block for _, block in cells})
    numbers = max(len(f"{text}") for text in ("block", *blocks))
    for number, (first, end) in enumerate(groups(numbers, widths, out.width)):
        made = table("block", *headings[first:end], title=None if number else title)
        for block in blocks:
            row = (cells.get((module, block), "") for module in modules[first:end])
            made.add_row(str(block), *row)
        out.print(made)
