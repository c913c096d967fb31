"""The heat-map of `surgery diff`: block by module, the relative norm of the update."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import ArgumentError, OutputError

if TYPE_CHECKING:
    from surgery.operations.diff import Difference


def draw(found: Difference, path: Path, title: str) -> None:
    """Write the picture; its format follows the name, which has to end in .png, .svg or .pdf."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ArgumentError(f"--plot {path}: the name has to end in .png, .svg or .pdf")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ArgumentError("--plot needs matplotlib: pip install 'model-surgery[plot]'") from error
    mpl.use("agg")
    import matplotlib.pyplot as plt

    stacks = list(dict.fromkeys(stack for stack, _, _ in found.modules))
    figure, axes = plt.subplots(
        1, max(1, len(stacks)), squeeze=False, layout="constrained", figsize=_size(found, stacks)
    )
    for axis, stack in zip(axes[0], stacks, strict=False):
        cells = {(m, b): c.relative for (s, m, b), c in found.modules.items() if s == stack}
        modules = list(dict.fromkeys(module for module, _ in cells))
        blocks = sorted({block for _, block in cells})
        grid = [
            [cells.get((module, block), float("nan")) for module in modules] for block in blocks
        ]
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
        axis.set_xticks(range(len(modules)), modules, rotation=45, ha="right", fontsize=8)
        step = max(1, len(blocks) // 24)
        axis.set_yticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]], fontsize=8)
        axis.set_ylabel("block")
        axis.set_title(stack or "blocks", fontsize=9)
        figure.colorbar(image, ax=axis, label="||tau|| / ||base||")
    figure.suptitle(title, fontsize=10)
    try:
        plt.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error
    finally:
        plt.close(figure)


def _size(found: Difference, stacks: list[str]) -> tuple[float, float]:
    """Inches: room for every block and module, within reason."""
    blocks = max((block for _, _, block in found.modules), default=0) + 1
    modules = len({module for _, module, _ in found.modules})
    width = max(5.0, 0.5 * modules + 2.5) * max(1, len(stacks))
    return min(width, 24.0), min(max(4.0, 0.28 * blocks + 2.5), 20.0)
