"""Make every call of the system fail, one after another, and look at what the run says and leaves.

    python -m tests.reliability.faults [--every 1] [--commands lines,grow]

A library that is loaded before the C library (faults.c) makes the n-th call of one kind, on a
path under the output's folder or the inputs', fail with an error of the system; n goes from 1
until a run ends without meeting it. Also: calls that do less than they were asked for, everything
failing from one call on (a lost mount), and a kill at each call.

A run that failed has to say so in one message that names a file, without a traceback, with the
exit code of the side that failed (3 an input, 5 the output); to leave the final name and the
inputs as they were; and the next run has to end well with the bytes of an undisturbed one.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .forker import Ended, Forker
from .scene import (
    STAGE,
    TRACEBACK,
    Files,
    Scene,
    again,
    files_in,
    found_at,
    fresh,
    make_scene,
    unchanged,
)

SOURCE = Path(__file__).with_name("faults.c")
SHORT, KILL, NOTHING = -1, -2, -3
"""What faults.c does in the place of failing: less than asked, SIGKILL, nothing but say "done"."""

E = errno
WRITING: dict[str, tuple[int, ...]] = {
    "create": (E.ENOSPC, E.EACCES, E.EROFS, E.EIO, E.EDQUOT, E.EMFILE),
    "mkdir": (E.EACCES, E.EROFS, E.ENOSPC, E.EDQUOT),
    "write": (E.ENOSPC, E.EIO, E.EDQUOT),
    "pwrite": (E.ENOSPC, E.EIO, E.EDQUOT, E.ESTALE),
    "ftruncate": (E.ENOSPC, E.EFBIG, E.EIO),
    "copy_file_range": (E.ENOSPC, E.EIO, E.EDQUOT, E.EXDEV),
    "open": (E.EACCES, E.EIO, E.ESTALE, E.EMFILE),
    "read": (E.EIO, E.ESTALE),
    "pread": (E.EIO, E.ESTALE),
    "fsync": (E.EIO, E.ENOSPC, E.EDQUOT),
    "flock": (E.ENOLCK, E.EIO),
    "rename": (E.EACCES, E.EROFS, E.EIO, E.ENOSPC),
    "unlink": (E.EIO, E.EACCES, E.EROFS),
    "rmdir": (E.EIO, E.EACCES),
    "close": (E.EIO, E.ENOSPC, E.EDQUOT),
    "stat": (E.EIO, E.EACCES, E.ESTALE),
    "fstat": (E.EIO, E.ESTALE),
    "opendir": (E.EACCES, E.EIO, E.ESTALE),
}
READING: dict[str, tuple[int, ...]] = {
    "open": (E.EACCES, E.EIO, E.ESTALE, E.EMFILE, E.ENOENT),
    "read": (E.EIO, E.ESTALE),
    "pread": (E.EIO, E.ESTALE),
    "copy_from": (E.EIO, E.ESTALE, E.EXDEV, E.ENOSYS),
    "stat": (E.EIO, E.EACCES, E.ESTALE, E.ENOENT),
    "fstat": (E.EIO, E.ESTALE),
    "opendir": (E.EACCES, E.EIO, E.ESTALE),
}
HARMLESS = {
    "write": SHORT,
    "pwrite": SHORT,
    "pread": SHORT,
    "read": SHORT,
    "copy_file_range": SHORT,
}
DATA = ("pwrite", "write", "pread", "fsync", "create")
"""Calls whose failure has to name the file itself, if it is one that gets a final name."""
INTERRUPTED = ("create", "open", "write", "pwrite", "read", "pread", "fsync", "ftruncate")
"""Calls that a signal may break off, with EINTR: they are made again."""


@dataclass(frozen=True)
class Fault:
    """What fails, where ("out" or "inputs"), how, and whether it does so ever after."""

    command: str
    where: str
    call: str
    error: int
    number: int
    ever: bool = False
    overwrite: bool = False

    def __str__(self) -> str:
        how = {SHORT: "short", KILL: "SIGKILL"}.get(self.error) or errno.errorcode[self.error]
        more = (" and ever after" if self.ever else "") + (", overwriting" * self.overwrite)
        return f"{self.command}: {self.call} {self.number} in {self.where}: {how}{more}"


@dataclass(frozen=True)
class Met:
    """What became of a run that met a fault: the path that it was met at, and what was wrong."""

    fault: Fault
    at: str
    code: int
    state: str
    said: str
    wrong: str | None


def compiled(folder: Path) -> Path | None:
    """The library, or None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "faults.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"], check=True)
    return made


class Breaker:
    """Runs with faults, in a folder of its own."""

    def __init__(self, scene: Scene, forker: Forker, folder: Path) -> None:
        self.scene, self.forker, self.folder = scene, forker, folder
        self.inputs = unchanged(scene.inputs)
        self.old = files_in(scene.inputs / "old")
        self.right: dict[tuple[str, bool], Files] = {}

    def wanted(self, fault: Fault, argv_more: Sequence[str]) -> Files:
        """What the command writes when nothing fails."""
        key = (fault.command, fault.overwrite)
        if key not in self.right:
            made = self.scene.wanted(self.forker, fault.command, self.folder, *argv_more)
            self.right[key] = made[0]
        return self.right[key]

    def met(self, fault: Fault) -> Met | None:
        """The run, or None if it ended without meeting the fault."""
        more = ("--overwrite",) if fault.overwrite else ()
        wanted = self.wanted(fault, more)
        argv = self.scene.argv(fault.command, *more)
        report = self.folder.with_name("fired")
        report.unlink(missing_ok=True)
        under = self.folder if fault.where == "out" else self.scene.inputs
        arm = [fault.call, str(under), fault.number, fault.error, int(fault.ever), str(report)]
        with fresh(self.folder) as place:
            if fault.overwrite:
                shutil.copytree(self.scene.inputs / "old", place / "out")
            ended = self.forker.run(argv, place, fault=arm)
            if not report.exists():
                assert ended.code == 0, ended.said
                return None
            at = report.read_text().split(" ", 1)[1].strip()
            state = found_at(place, wanted, self.old if fault.overwrite else None)
            wrong = state if state.startswith("WRONG") else self.wrong_end(fault, ended, state, at)
            wrong = wrong or again(self.scene, self.forker, argv, place, wanted, state)
        if unchanged(self.scene.inputs) != self.inputs:
            wrong = "an input was touched"
        return Met(fault, at, ended.code, state, ended.said, wrong)

    def wrong_end(self, fault: Fault, ended: Ended, state: str, at: str) -> str | None:
        """What is wrong with the way in which a run ended that met a fault."""
        if fault.error == KILL:
            return None if ended.code == -9 else f"it ended with {ended.code}"
        if TRACEBACK in ended.said:
            return f"a traceback: {ended.said[-1200:]}"
        if ended.code == 0:
            if state != "whole":
                return f"it ended with 0, and the final name is {state}"
            swallowed = fault.call == "fsync" and fault.error != errno.EINTR
            return "an fsync failed, and nobody was told" if swallowed else None
        if fault.error in (SHORT, errno.EINTR):
            return f"this is no failure, and it ended with {ended.code}: {ended.said}"
        if ended.code != (5 if fault.where == "out" else 3):
            return f"it ended with {ended.code}: {ended.said}"
        errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        if len(errors) != 1:
            return f"{len(errors)} messages: {ended.said}"
        told = [at]
        if fault.call not in DATA or (fault.where == "out" and "/files/" not in at):
            told += [str(self.folder / "out"), str(self.folder / STAGE), str(Path(at).parent)]
            told += [f"{self.folder} "]
        if not any(path in errors[0] for path in told):
            return f"{at} isn't named: {errors[0]}"
        return None

    def every(self, fault: Fault, step: int = 1, most: int = 10_000) -> Iterator[Met]:
        """The fault at call 1, 1 + step, ... as long as runs meet it."""
        for number in range(fault.number, most, step):
            met = self.met(Fault(**{**vars(fault), "number": number}))
            if met is None:
                return
            yield met


def faults(command: str, *, overwrite: bool = False) -> Iterator[Fault]:
    """The first of each kind."""
    for where, calls in (("out", WRITING), ("inputs", READING)):
        for call, errors in calls.items():
            for number, error in enumerate(errors, 1):
                yield Fault(command, where, call, error, number, overwrite=overwrite)
        for error in (errno.ESTALE, errno.EIO):
            yield Fault(command, where, "any", error, 1, ever=True, overwrite=overwrite)
    yield Fault(command, "out", "any", KILL, 1, overwrite=overwrite)
    for call, error in HARMLESS.items():
        yield Fault(command, "out", call, error, 1, overwrite=overwrite)
    for call in ("pread", "read"):
        yield Fault(command, "inputs", call, SHORT, 1, overwrite=overwrite)
    for call in INTERRUPTED:
        yield Fault(command, "out", call, errno.EINTR, 1, overwrite=overwrite)


def steps_of(fault: Fault, every: int) -> int:
    """The errors of one kind of call take turns, so that each call meets one of them."""
    kinds = (WRITING if fault.where == "out" else READING).get(fault.call, (0,))
    return every * (len(kinds) if fault.error in kinds else 1)


def table(found: Iterable[Met]) -> str:
    """Rows by place and call."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for one in found:
        kind = {SHORT: " (short)", KILL: " (killed)", errno.EINTR: " (EINTR)"}
        call = one.fault.call + kind.get(one.fault.error, "") + " on" * one.fault.ever
        row = rows.setdefault((one.fault.where, call), Counter())
        row["faults"] += 1
        row[f"exit {one.code}"] += 1
        row["wrong"] += one.wrong is not None
    columns = ("faults", "exit 0", "exit 3", "exit 5", "wrong")
    lines = [f"| in | call | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    total: Counter[str] = Counter()
    for (where, call), row in rows.items():
        lines.append(f"| {where} | {call} | {' | '.join(str(row[c]) for c in columns)} |")
        total += row
    lines.append(f"| both | all | {' | '.join(str(total[c]) for c in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """The harness."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every n-th call of a kind")
    parser.add_argument("--commands", default="lines,grow,merge,run")
    parser.add_argument("--calls", help="only these")
    parser.add_argument("--overwrite", action="store_true", help="onto a model that is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        library = compiled(Path(made))
        if library is None:
            sys.exit("not run: this needs Linux and a C compiler named cc")
        scene = make_scene(Path(made), shard="500KB", input_shard=700_000)
        found = []
        with Forker(Path(made, "logs"), preload=library) as forker:
            breaker = Breaker(scene, forker, Path(made, "place"))
            for command in given.commands.split(","):
                for fault in faults(command, overwrite=given.overwrite):
                    if given.calls and fault.call not in given.calls.split(","):
                        continue
                    for one in breaker.every(fault, steps_of(fault, given.every)):
                        found.append(one)
                        if one.wrong is not None:
                            print(f"{one.fault}, at {one.at}: {one.wrong}\n", flush=True)
        print(table(found))
    sys.exit(any(one.wrong for one in found))


if __name__ == "__main__":
    main()
