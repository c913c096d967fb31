"""`surgery demo`: the whole story in a minute, on weights that come with the package."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson
from .output import console, note, print_json, table
from .proof import print_verification

if TYPE_CHECKING:
    from surgery.demo.story import Losses, Story


def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write the models. [default: a new folder]"),
    ] = None,
    json: AsJson = False,
) -> None:
    """See it work: a small model, its fine-tune that forgot, LiNeS, and growth.

    The models are real and tiny (a byte-level Llama trained on prose that Python carries, then on
    Python's own source code); every number is computed now.
    """
    from surgery.demo.story import tell

    target = out or Path(tempfile.mkdtemp(prefix="surgery-demo-"))
    story = tell(target, note)
    if json:
        print_json(_as_json(story))
    else:
        _print(story)


def _as_json(story: Story) -> dict[str, Any]:
    return {
        "losses": {name: asdict(losses) for name, losses in _rows(story)},
        "alpha": story.alpha,
        "recovered": story.recovered,
        "uniform_at_same_code_loss": {"scale": story.like, **asdict(story.uniform)},
        "lines_curve": {str(k): asdict(v) for k, v in story.lines_curve.items()},
        "uniform_curve": {str(k): asdict(v) for k, v in story.uniform_curve.items()},
        "verification": story.verification.as_json(),
        "folders": {name: str(folder) for name, folder in story.folders.items()},
    }


def _rows(story: Story) -> list[tuple[str, Losses]]:
    return [
        ("base", story.base),
        ("fine-tuned on code", story.tuned),
        (f"LiNeS, alpha {story.alpha}", story.edited),
        ("base, grown to twice the width", story.grown),
    ]


def _print(story: Story) -> None:
    out = console()
    rows = table("model", "prose", "code", "", left=("model", ""))
    remarks = (
        "knows prose",
        f"learnt code, and forgot {story.tuned.prose - story.base.prose:.3f} of prose",
        f"remembers {story.recovered:.0%} of that",
        "the same function: nothing changed",
    )
    for (name, losses), remark in zip(_rows(story), remarks, strict=True):
        rows.add_row(name, f"{losses.prose:.4f}", f"{losses.code:.4f}", remark)
    out.print("\nLoss on text that no model has seen, nats per byte:")
    out.print(rows)
    better = story.uniform.prose - story.edited.prose
    out.print(
        f"Scaling the whole update by {story.like:.3f} leaves the same code loss "
        f"({story.uniform.code:.4f}) and a prose loss of {story.uniform.prose:.4f}: LiNeS is "
        f"{abs(better):.4f} {'better' if better > 0 else 'worse'} here."
    )
    curves = table("scale", "uniform: prose", "code", "LiNeS: prose", "code")
    for scale, losses in story.uniform_curve.items():
        lines = story.lines_curve[scale]
        curves.add_row(
            f"{scale:.1f}",
            f"{losses.prose:.4f}",
            f"{losses.code:.4f}",
            f"{lines.prose:.4f}",
            f"{lines.code:.4f}",
        )
    out.print("\nBoth curves (the scale of the whole update, and LiNeS's alpha):")
    out.print(curves)
    out.print("The grown model against its base, before it was written:")
    print_verification(story.verification)
    for name, folder in story.folders.items():
        out.print(f"{name:<11} {folder}", soft_wrap=True)
