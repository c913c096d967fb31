"""Kill `surgery` at random moments, and look at what is left.

    python -m tests.reliability.kill --kills 500 --seed 0

Every kill: the final name is absent or complete, byte for byte what a run writes that nobody
disturbs (with --overwrite: the old model or the new one, or the old one put aside); the inputs
are as they were; and a second run ends well, with the same bytes, leaving nothing else behind.
Half of the moments are drawn from the whole life of the run, half from the time in which its
staging directory is there.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .forker import Ended, Forker, Run
from .scene import TRACEBACK, Files, Scene, again, files_in, found_at, fresh, make_scene, unchanged

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
COMMANDS = ("lines", "grow", "merge", "run")


@dataclass(frozen=True)
class Kind:
    """What is run, what it is killed with, and whether there is a model to replace."""

    command: str
    signal: str
    overwrite: bool

    @property
    def more(self) -> tuple[str, ...]:
        return ("--overwrite",) if self.overwrite else ()


@dataclass(frozen=True)
class Normal:
    """A run that nobody disturbs: what it writes, how long it takes, how long its staging
    directory is there."""

    wanted: Files
    seconds: float
    staged: float


@dataclass(frozen=True)
class Killed:
    """What a kill left: how the run ended, what lay under the final name, whether a staging
    directory was left, and what was wrong, if anything was."""

    kind: Kind
    code: int
    state: str
    staged: bool
    wrong: str | None


class Killer:
    """Runs and kills, in a folder of its own."""

    def __init__(
        self, scene: Scene, forker: Forker, folder: Path, seed: int, *, measured: int = 3
    ) -> None:
        self.scene, self.forker, self.folder = scene, forker, folder
        self.measured = measured
        self.random = random.Random(seed)
        self.normal: dict[tuple[str, bool], Normal] = {}
        self.inputs = unchanged(scene.inputs)
        self.old = files_in(scene.inputs / "old")

    def measure(self, kind: Kind) -> Normal:
        """The command, undisturbed, some times."""
        key = (kind.command, kind.overwrite)
        if key not in self.normal:
            found = [
                self.scene.wanted(self.forker, kind.command, self.folder, *kind.more)
                for _ in range(self.measured)
            ]
            wanted = found[0][0]
            assert all(files == wanted for files, _ in found), "the same run, and other bytes"
            staged = median(self._staged_for(kind) for _ in range(self.measured))
            self.normal[key] = Normal(wanted, median(e.seconds for _, e in found), staged)
        return self.normal[key]

    def _staged_for(self, kind: Kind) -> float:
        with fresh(self.folder) as place:
            run = self._start(kind, place)
            _wait_for_stage(place, run)
            since = time.monotonic()
            while (place / ".out.staging").exists():
                time.sleep(0.001)
            took = time.monotonic() - since
            run.ended()
            return took

    def _start(self, kind: Kind, place: Path) -> Run:
        if kind.overwrite:
            for name, content in self.old.items():
                path = place / "out" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return self.forker.start(self.scene.argv(kind.command, *kind.more), place)

    def kill(self, kind: Kind) -> Killed:
        """One run, killed."""
        normal = self.measure(kind)
        with fresh(self.folder) as place:
            run = self._start(kind, place)
            if self.random.random() < 0.5:
                delay = self.random.uniform(0, 1.02 * normal.seconds)
            else:
                _wait_for_stage(place, run)
                delay = self.random.uniform(0, 1.1 * normal.staged)
            time.sleep(delay)
            os.kill(run.pid, getattr(signal, kind.signal))
            return self.judge(kind, run.ended(), place, normal.wanted)

    def judge(self, kind: Kind, ended: Ended, place: Path, wanted: Files) -> Killed:
        """What the run left, and whether a second one ends well."""
        old = self.old if kind.overwrite else None
        state = found_at(place, wanted, old)
        staged = (place / ".out.staging").exists()
        argv = self.scene.argv(kind.command, *kind.more)
        wrong = state if state.startswith("WRONG") else _wrong_end(kind, ended, state)
        wrong = wrong or again(self.scene, self.forker, argv, place, wanted, state)
        if unchanged(self.scene.inputs) != self.inputs:
            wrong = "an input was touched"
        return Killed(kind, ended.code, state, staged, wrong)


def _wait_for_stage(place: Path, run: Run) -> None:
    """Until the staging directory is there, or can't come any more."""
    for _ in range(20_000):
        if (place / ".out.staging").exists():
            return
        time.sleep(0.0005)
    raise AssertionError(f"no staging directory appeared: {run.ended().said}")


def _wrong_end(kind: Kind, ended: Ended, state: str) -> str | None:
    """What is wrong with the way in which a run ended that was sent a signal."""
    killed = -getattr(signal, kind.signal, signal.SIGKILL)
    allowed = {0, killed} if kind.signal in ("SIGKILL", "memory") else {0, 130, 143, killed}
    if ended.code not in allowed:
        return f"it ended with {ended.code}: {ended.said[-300:]}"
    if TRACEBACK in ended.said:
        return f"a traceback: {ended.said[-600:]}"
    if ended.code == 0 and state != "whole":
        return f"it ended with 0, and the final name is {state}"
    if state == "whole" and "nothing was written" in ended.said:
        return f"it was written, and the run says: {ended.said[-300:]}"
    return None


def kinds(commands: Iterable[str] = COMMANDS) -> Iterator[Kind]:
    """Every command with every signal, with and without a model to replace."""
    for command in commands:
        for name in SIGNALS:
            for overwrite in (False, True):
                yield Kind(command, name, overwrite)


def table(killed: Iterable[Killed]) -> str:
    """Rows by command and signal."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for one in killed:
        row = rows.setdefault((one.kind.command, one.kind.signal), Counter())
        row["kills"] += 1
        row["in time"] += one.code != 0
        row[one.state] += 1
        row["stage left"] += one.staged
        row["wrong"] += one.wrong is not None
    columns = ("kills", "in time", "absent", "whole", "old", "aside", "stage left", "wrong")
    lines = [f"| command | by | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    total: Counter[str] = Counter()
    for (command, name), row in rows.items():
        lines.append(f"| {command} | {name} | {' | '.join(str(row[c]) for c in columns)} |")
        total += row
    lines.append(f"| all | | {' | '.join(str(total[c]) for c in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """The harness."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made, Forker(Path(made, "logs")) as fork:
        killer = Killer(make_scene(Path(made)), fork, Path(made, "place"), given.seed)
        all_kinds = list(kinds())
        found = []
        for number in range(given.kills):
            one = killer.kill(all_kinds[number % len(all_kinds)])
            found.append(one)
            if one.wrong is not None:
                print(f"kill {number}, {one.kind}, ended {one.code}: {one.wrong}", flush=True)
            if sys.stderr.isatty() or number % 50 == 49:
                print(f"{number + 1} of {given.kills}", file=sys.stderr, flush=True)
        print(table(found))
    sys.exit(any(one.wrong for one in found))


if __name__ == "__main__":
    main()
