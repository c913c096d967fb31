"""The order of the calls of the system, from a trace: what a power loss leaves depends on it.

    python -m tests.reliability.trace [COMMAND]

A rename may reach the disk before the bytes of the files that it publishes, and an fsync of a
file says nothing of the directory that names it. So: every file is synced after the last call
that changes it, every directory after the last name that is made in it, all of it before the
rename; the folder above after it; what is replaced is removed only then; and nothing is changed
under the final name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .scene import make_scene

TRACED = (
    "openat,open,creat,pwrite64,pwritev,pwritev2,write,writev,ftruncate,fallocate,copy_file_range,"
    "sendfile,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,link,"
    "linkat,symlink,symlinkat"
)
CHANGES = (
    "pwrite64", "pwritev", "pwritev2", "write", "writev", "ftruncate", "fallocate",
    "copy_file_range", "sendfile",
)  # fmt: skip
LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)")
UNFINISHED = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
DESCRIPTOR = re.compile(r"\b\d+<([^>]*)>")
FOLDER = re.compile(r'(?:AT_FDCWD|\d+)<([^>]*)>, "([^"]*)"')
STRING = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Call:
    """A call that succeeded: the paths that it is about, and the lines of the trace in which it
    began and ended. Other threads' calls lie between these."""

    name: str
    paths: tuple[str, ...]
    arguments: str
    began: int
    ended: int

    @property
    def makes_a_name(self) -> bool:
        """Whether a directory is another after it."""
        making = ("mkdir", "rename", "unlink", "rmdir", "link", "symlink", "creat")
        return self.name.startswith(making) or "O_CREAT" in self.arguments

    @property
    def syncs(self) -> bool:
        return self.name in ("fsync", "fdatasync")

    def changed(self) -> str | None:
        """The file whose bytes are changed."""
        if self.name in CHANGES:
            return self.paths[1 if self.name == "copy_file_range" else 0]
        return (
            self.paths[-1] if "O_CREAT" in self.arguments or "O_TRUNC" in self.arguments else None
        )


def calls(trace: str) -> list[Call]:
    """The calls of a trace of `strace -f -y` that succeeded, in the order of their ends."""
    found = []
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        began = number
        if match := UNFINISHED.match(line):
            begun[match[1]] = number, f"{match[1]} {match[2]}({match[3]}"
            continue
        if match := RESUMED.match(line):
            began, text = begun.pop(match[1])
            line = text + match[3]
        if (match := LINE.match(line)) and int(match[4]) >= 0:
            found.append(Call(match[2], _paths(match[2], match[3]), match[3], began, number))
    return found


def _paths(name: str, arguments: str) -> tuple[str, ...]:
    if name.endswith(("at", "at2")) or name == "openat":
        return tuple(
            path if path.startswith("/") else f"{folder}/{path}"
            for folder, path in FOLDER.findall(arguments)
        )
    return tuple(DESCRIPTOR.findall(arguments)) or tuple(STRING.findall(arguments))


def wrong_order(found: Sequence[Call], target: Path) -> list[str]:
    """What a power loss could undo or tear, of a run that wrote `target`."""
    final = str(target)
    published = [
        call for call in found if call.name.startswith("rename") and call.paths[1] == final
    ]
    if not published:
        return [f"nothing was renamed to {target}"]
    rename = published[-1]
    stage = rename.paths[0]
    before = [call for call in found if call.ended < rename.began]
    after = [call for call in found if call.began > rename.ended]
    wrong = []
    for path, changed in _last_changes(before, stage).items():
        if not any(c.syncs and path in c.paths and c.began > changed for c in before):
            wrong.append(f"{path} isn't synced between its last change and the rename")
    parent = str(target.parent)
    if not any(call.syncs and parent in call.paths for call in after):
        wrong.append(f"{parent} isn't synced after the rename")
    for made in (c for c in before if c.name.startswith("mkdir") and _above(c.paths[0], parent)):
        above = str(Path(made.paths[0]).parent)
        if not any(c.syncs and above in c.paths and c.began > made.ended for c in found):
            wrong.append(f"{above} isn't synced after {made.paths[0]} was made in it")
    wrong += [
        f"{path} is changed under its final name"
        for call in after
        if (path := call.changed()) is not None and _inside(path, final, stage)
    ]
    return wrong + _removed_too_early(found, final, parent)


def _last_changes(before: Sequence[Call], stage: str) -> dict[str, int]:
    """When each file that gets a final name, and each directory, was changed for the last time."""
    last: dict[str, int] = {}
    for call in before:
        if (path := call.changed()) is not None and _inside(path, stage):
            last[path] = call.ended
        if call.makes_a_name:
            if call.name.startswith("mkdir") and _inside(call.paths[0], stage):
                last[call.paths[0]] = call.ended
            for path in call.paths:
                folder = str(Path(path).parent)
                if _inside(folder, stage):
                    last[folder] = call.ended
        if call.name.startswith(("unlink", "rmdir")):
            last.pop(call.paths[0], None)
    return last


def _removed_too_early(found: Sequence[Call], final: str, parent: str) -> list[str]:
    """What is replaced goes only when the new one is safe."""
    asides = {c.paths[1] for c in found if c.name.startswith("rename") and c.paths[0] == final}
    published = [c for c in found if c.name.startswith("rename") and c.paths[1] == final]
    safe = [c for c in found if c.syncs and parent in c.paths and c.began > published[-1].ended]
    return [
        f"{path} is removed before the new model is safe"
        for call in found
        if call.name.startswith(("unlink", "rmdir"))
        for path in call.paths
        if _inside(path, *asides) and not (safe and call.began > safe[0].ended)
    ]


def _inside(path: str, *folders: str) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def _above(path: str, parent: str) -> bool:
    return _inside(parent, path)


def traced(argv: Sequence[str], folder: Path) -> str:
    """The trace of `surgery *argv`."""
    report = folder / "trace.txt"
    code = "from surgery.commands.main import run; run()"
    command = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={TRACED}", "-o", str(report)]
    done = subprocess.run(
        [*command, sys.executable, "-c", code, *argv],
        check=False,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    trace = report.read_text(errors="replace")
    report.unlink()
    return trace


def main() -> None:
    """The harness."""
    if shutil.which("strace") is None:
        sys.exit("not run: there is no strace here")
    with tempfile.TemporaryDirectory() as made:
        scene = make_scene(Path(made))
        work = Path(made, "place")
        wrong = []
        for name in sys.argv[1:] or scene.commands:
            for more in ([], ["--overwrite"]):
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                argv = scene.argv(name, *more)
                if more:
                    shutil.copytree(scene.inputs / "old", work / "out")
                found = calls(traced(argv, work))
                here = [call for call in found if any(_inside(p, str(work)) for p in call.paths)]
                bad = wrong_order(here, work / "out")
                syncs = sum(call.syncs for call in here)
                print(f"{name} {' '.join(more)}: {len(here)} calls, {syncs} of them fsync")
                wrong += bad
        print("\n".join(wrong) or "the order holds")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
