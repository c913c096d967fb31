"""Cut the power, and look at what the disk has.

    python -m tests.reliability.power [--every 0.02]

The output is written to a file system in a file (ext4, through the loop device). At moments of
the run it is stopped, and the file is copied: that copy has what has reached the disk, and no
page that the system was still holding back. Mounted anew, with its journal replayed, it is what a
machine would find after a power loss at that moment: the final name has to be absent or complete,
and after a run that ended well it has to be complete.

As a control the same is done with a disk that says that it has synced and hasn't: that has to be
seen, or the harness would see nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .faults import NOTHING, compiled
from .forker import Forker
from .scene import STAGE, Files, files_in, found_at, make_scene

SIZE = 48 << 20
MOUNT = ("mount", "-o", "loop,noauto_da_alloc")


def can_mount() -> bool:
    """Whether a file system can be made in a file and mounted here."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    with tempfile.TemporaryDirectory() as made:
        image, at = Path(made, "image"), Path(made, "at")
        try:
            with mounted(formatted(image), at):
                return True
        except subprocess.CalledProcessError:
            return False


def formatted(image: Path) -> Path:
    """An empty file system in a file."""
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
    return image


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """The file system in `image`, at `at`."""
    at.mkdir(exist_ok=True)
    subprocess.run([*MOUNT, image, at], check=True, capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True, capture_output=True)


def as_on_disk(image: Path, copy: Path) -> Path:
    """A copy of what has reached the disk by now. Nothing may be on its way while it is made:
    it is made until it comes out the same twice."""
    before = b""
    while (now := image.read_bytes()) != before:
        before = now
    copy.write_bytes(now)
    return copy


class PowerCut:
    """Runs on a file system of their own, and what a power loss would leave of them."""

    def __init__(self, folder: Path, forker: Forker, preloaded: Forker | None = None) -> None:
        self.folder, self.forker, self.preloaded = folder, forker, preloaded
        self.scene = make_scene(folder)
        self.old = files_in(self.scene.inputs / "old")

    def moments(
        self, command: str, every: float, *, overwrite: bool = False, lies: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """When the power was cut, and what was found then. `lies` is a path under which nothing
        is really synced."""
        more = ("--overwrite",) if overwrite else ()
        old = self.old if overwrite else None
        wanted, _ = self.scene.wanted(self.forker, command, self.folder / "plain" / "place", *more)
        image = formatted(self.folder / "image")
        with mounted(image, self.folder / "disk") as disk:
            place = disk / "place"
            place.mkdir()
            if overwrite:
                shutil.copytree(self.scene.inputs / "old", place / "out")
            os.sync()
            how = {}
            forker = self.forker
            if lies is not None:
                assert self.preloaded is not None
                forker = self.preloaded
                report = str(self.folder / "fired")
                how["fault"] = ["fsync", str(place / lies), 1, NOTHING, 1, report]
            run = forker.start(self.scene.argv(command, *more), place, **how)
            while not (place / STAGE).exists():
                time.sleep(0.001)
            while _is_alive(run.pid):
                os.kill(run.pid, signal.SIGSTOP)
                yield "during", self.after_a_cut(image, wanted, old)
                os.kill(run.pid, signal.SIGCONT)
                time.sleep(every)
            ended = run.ended()
            assert ended.code == 0, ended.said
            yield "after the end", self.after_a_cut(image, wanted, old)

    def after_a_cut(self, image: Path, wanted: Files, old: Files | None) -> str:
        """What is under the final name if the power goes now."""
        copy = as_on_disk(image, self.folder / "copy")
        with mounted(copy, self.folder / "later") as disk:
            return found_at(disk / "place", wanted, old)


def _is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state not in "ZX"


def main() -> None:
    """The harness."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=float, default=0.02, help="seconds from cut to cut")
    parser.add_argument("--commands", default="lines,grow,merge,run")
    given = parser.parse_args()
    if not can_mount():
        sys.exit("not run: no file system can be mounted here")
    wrong = False
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        folder = Path(made)
        library = compiled(folder)
        with Forker(folder / "logs") as forker, Forker(folder / "more", preload=library) as lying:
            cut = PowerCut(folder, forker, lying)
            print("| command | | cuts | absent | whole | old | aside | wrong | after the end |")
            print("|---|---|---:|---:|---:|---:|---:|---:|---|")
            controls = [(STAGE, "lies about the stage"), ("", "lies about all")]
            for command in given.commands.split(","):
                for overwrite in (False, True):
                    found = list(cut.moments(command, given.every, overwrite=overwrite))
                    wrong |= _row(command, "--overwrite" if overwrite else "", found)
            if library is not None:
                for path, name in controls:
                    found = list(cut.moments("lines", given.every, lies=path))
                    assert not _row("lines", name, found) or found[-1][1] != "whole"
    sys.exit(wrong)


def _row(command: str, how: str, found: list[tuple[str, str]]) -> bool:
    """Print it; returns whether something was wrong."""
    states = Counter("wrong" if state.startswith("WRONG") else state for _, state in found)
    last = found[-1][1]
    columns = " | ".join(str(states[c]) for c in ("absent", "whole", "old", "aside", "wrong"))
    print(f"| {command} | {how} | {len(found)} | {columns} | {last} |", flush=True)
    return states["wrong"] > 0 or last != "whole"


if __name__ == "__main__":
    main()
