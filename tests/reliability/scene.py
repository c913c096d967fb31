"""What the harnesses work on: two small real models in many shards, four commands on them, what
each writes when nobody disturbs it, and what a folder holds afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .forker import Ended, Forker

DEMO = Path(__file__).parents[2] / "surgery" / "demo" / "weights"
RECIPE = """\
inputs: {{base: {base}, tuned: {tuned}}}
steps:
  merged:
    merge: {{base: base, models: [tuned], method: ties, density: 0.2, lines: auto}}
  grown:
    grow: {{model: merged, factor: 1.5, layers: 4-7}}
"""
TRACEBACK = "Traceback (most recent call last)"

STAGE = ".out.staging"

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Scene:
    """Inputs and commands, in a folder of their own: nothing of it may ever change.

    `commands` are the arguments of `surgery` by name, all but the output.
    """

    inputs: Path
    commands: Mapping[str, Sequence[str]]
    shard: str

    def argv(self, name: str, *more: str) -> list[str]:
        """`surgery NAME ... -o out`, with the output in many shards."""
        return [*self.commands[name], "--max-shard-size", self.shard, "-o", "out", *more]

    def wanted(self, forker: Forker, name: str, folder: Path, *more: str) -> tuple[Files, Ended]:
        """What the command writes when it is left alone, and how it ended."""
        with fresh(folder) as place:
            if "--overwrite" in more:
                shutil.copytree(self.inputs / "old", place / "out")
            ended = forker.run(self.argv(name, *more), place)
            assert ended.code == 0, ended.said
            return files_in(place / "out"), ended


def make_scene(folder: Path, *, shard: str = "60KB", input_shard: int = 200_000) -> Scene:
    """Base and tuned of the demo, in shards of `input_shard` bytes, and an old model to replace."""
    from surgery import open_checkpoint, write

    inputs = folder / "inputs"
    for name in ("base", "tuned"):
        write(open_checkpoint(DEMO / name), inputs / name, max_shard_bytes=input_shard)
        (inputs / name / "surgery.json").unlink()
    shutil.copytree(inputs / "tuned", inputs / "old")
    (inputs / "old" / "only_in_the_old_one.txt").write_text("old")
    base, tuned = str(inputs / "base"), str(inputs / "tuned")
    (inputs / "recipe.yaml").write_text(RECIPE.format(base=base, tuned=tuned))
    commands = {
        "lines": ["lines", base, tuned, "--alpha", "0.6"],
        "grow": ["grow", base, "--factor", "1.5", "--uniform", "--layers", "4-7", "--no-logits"],
        "merge": ["merge", base, tuned, "--method", "ties"],
        "run": ["run", str(inputs / "recipe.yaml"), "--no-logits"],
    }
    return Scene(inputs, commands, shard)


class fresh:
    """An empty folder, removed afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def unchanged(folder: Path) -> dict[str, Any]:
    """All there is to tell whether somebody touched what is in `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        seen = path.stat()
        what = path.read_bytes() if path.is_file() else sorted(os.listdir(path))
        found[str(path)] = (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_mode, what)
    return found


def found_at(folder: Path, wanted: Files, old: Files | None) -> str:
    """What lies under the final name: "absent", "whole", the "old" one, the old one put "aside";
    else what is wrong."""
    target, aside = folder / "out", folder / ".out.replaced"
    strange = [n for n in os.listdir(folder) if n != "out" and not n.startswith(".out.")]
    if strange:
        return f"WRONG: {', '.join(strange)} beside the target"
    if target.exists():
        files = files_in(target)
        if files == wanted:
            return "whole"
        return "old" if files == old else "WRONG: half of a model under the final name"
    if old is None:
        return "absent"
    return "aside" if files_in(aside) == old else "WRONG: neither the old nor the new model"


def again(
    scene: Scene, forker: Forker, argv: Sequence[str], folder: Path, wanted: Files, state: str
) -> str | None:
    """What is wrong with a second run, after the first left `state`; None if nothing is.

    It has to end well, with the bytes of a run that nobody disturbed, and leave nothing else.
    """
    if state != "whole" or "--overwrite" in argv:
        ended = forker.run(argv, folder)
        aside = folder / ".out.replaced"
        if ended.code == 5 and str(aside) in ended.said and aside.is_dir():
            # the run refuses, and tells the user to move the old model back: do that
            shutil.rmtree(folder / "out", ignore_errors=True)
            aside.rename(folder / "out")
            ended = forker.run(argv, folder)
        if ended.code != 0:
            return f"the second run ended with {ended.code}: {ended.said[-300:]}"
    if files_in(folder / "out") != wanted:
        return "the second run wrote other bytes"
    if os.listdir(folder) != ["out"] and state == "whole" and "--overwrite" not in argv:
        # killed between the rename and the end: another run would refuse, as the target is there
        forker.run(["clean", "out", "--yes"], folder)
    if os.listdir(folder) != ["out"]:
        return f"left behind: {', '.join(sorted(os.listdir(folder)))}"
    return None
