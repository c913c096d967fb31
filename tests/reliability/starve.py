"""Real shortages and real losses: a full disk, a place that may not be written to, too little
memory, inputs that are cut short, changed or lost while they are read, two runs at once.

    python -m tests.reliability.starve

Each is what an ordinary Linux machine does, without anything in between; what can't be had here
(no right to mount, no cgroup) is named as not run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .forker import Ended, Forker
from .power import can_mount, formatted, mounted
from .scene import STAGE, TRACEBACK, Files, again, files_in, found_at, fresh, make_scene

NOBODY = 65534
CGROUPS = Path("/sys/fs/cgroup/memory")

Outcome = tuple[str, str | None]
"""What happened, in a word or two, and what was wrong with it."""


class Starver:
    """Runs with too little of something, in a folder of their own."""

    def __init__(self, folder: Path, forker: Forker) -> None:
        self.folder, self.forker = folder, forker
        self.place = folder / "place"
        self.scene = make_scene(folder)
        self.wanted, self.ended = self.scene.wanted(forker, "lines", self.place)
        self.argv = self.scene.argv("lines")

    def full_disks(self, count: int, seed: int = 0) -> Iterator[Outcome]:
        """A tmpfs that is filled while the run is writing, to a random place."""
        rng = random.Random(seed)
        size = sum(map(len, self.wanted.values()))
        for _ in range(count):
            with fresh(self.place) as place, tmpfs(place, 4 * size):
                run = self.forker.start(self.argv, place)
                wait_for(lambda: (place / STAGE).exists(), run.pid)
                free = os.statvfs(place)
                left = rng.randrange(size)
                with (place / "others").open("wb") as other:  # as another process does
                    os.posix_fallocate(
                        other.fileno(), 0, max(4096, free.f_bavail * free.f_frsize - left)
                    )
                ended = run.ended()
                (place / "others").unlink()
                yield self.judged(ended, place, 5, ("the disk is full", "bytes, and"))

    def not_allowed(self) -> Iterator[Outcome]:
        """Root may do all: as nobody, in a folder of root's, and on a file system without leave
        to write; and inputs that nobody may read."""
        self.folder.chmod(0o755)
        with fresh(self.place) as place:
            ended = self.forker.run(self.argv, place, user=NOBODY)
            yield self.judged(ended, place, 5, ("Permission denied",))
        shard = next((self.scene.inputs / "tuned").glob("*-00002-*"))
        with fresh(self.place) as place:
            place.chmod(0o777)
            shard.chmod(0o600)
            try:
                ended = self.forker.run(self.argv, place, user=NOBODY)
            finally:
                shard.chmod(0o644)
            yield self.judged(ended, place, 3, (str(shard), "Permission denied"))
        with fresh(self.place) as place, tmpfs(place, 1 << 26):
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
            ended = self.forker.run(self.argv, place)
            subprocess.run(["mount", "-o", "remount,rw", place], check=True)
            yield self.judged(ended, place, 5, ("read-only", "Read-only"))

    def changed_inputs(self, how: str, count: int, seed: int = 0) -> Iterator[Outcome]:
        """An input that somebody writes to at a random moment of the run: "cut" to half,
        "rewritten" in place with other bytes, "replaced" by another file, "removed"."""
        rng = random.Random(seed)
        shards = sorted((self.scene.inputs / "tuned").glob("*.safetensors"))
        for _ in range(count):
            copy = self.folder / "copied"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.scene.inputs / "tuned", copy)
            victim = copy / rng.choice(shards).name
            argv = [str(copy) if part.endswith("/tuned") else part for part in self.argv]
            with fresh(self.place) as place:
                right, _ = self.right_bytes(argv)
                run = self.forker.start(argv, place)
                time.sleep(rng.uniform(0, self.ended.seconds))
                tamper(victim, how)
                ended = run.ended()
                state = found_at(place, right, None)
                if state.startswith("WRONG") and how in ("rewritten", "replaced"):
                    # changed before it was opened: the output has to be that of the changed one
                    state = found_at(place, self.right_bytes(argv)[0], None)
                yield self.word(ended, state), self.wrong_change(ended, state, victim, how)

    def right_bytes(self, argv: list[str]) -> tuple[Files, Ended]:
        """What the run writes if nobody touches its inputs."""
        with fresh(self.folder / "right") as place:
            ended = self.forker.run(argv, place)
            assert ended.code == 0, ended.said
            return files_in(place / "out"), ended

    def wrong_change(self, ended: Ended, state: str, victim: Path, how: str) -> str | None:
        if state.startswith("WRONG"):
            return f"{how}, ended with {ended.code}: {state}"
        if TRACEBACK in ended.said or ended.code not in (0, 3):
            return f"{how}, ended with {ended.code}: {ended.said[-600:]}"
        if (
            ended.code == 3
            and str(victim) not in ended.said
            and str(victim.parent) not in ended.said
        ):
            return f"{how}: {victim} isn't named: {ended.said}"
        return None

    def lost_disk(self, count: int, seed: int = 0) -> Iterator[Outcome]:
        """Inputs on a file system whose disk goes away: reads give an error of the device."""
        rng = random.Random(seed)
        for _ in range(count):
            image = formatted(self.folder / "image")
            with mounted(image, self.folder / "disk") as disk:
                shutil.copytree(self.scene.inputs / "tuned", disk / "tuned")
            argv = [
                str(self.folder / "disk" / "tuned") if part.endswith("/tuned") else part
                for part in self.argv
            ]
            with mounted(image, self.folder / "disk"), fresh(self.place) as place:
                run = self.forker.start(argv, place)
                time.sleep(rng.uniform(0, self.ended.seconds * 0.8))
                os.truncate(image, 4096)
                ended = run.ended()
                state = found_at(place, self.expected_for(argv), None)
                wrong = None
                if TRACEBACK in ended.said or ended.code not in (0, 3):
                    wrong = f"ended with {ended.code}: {ended.said[-600:]}"
                yield self.word(ended, state), state if state.startswith("WRONG") else wrong

    def expected_for(self, argv: list[str]) -> Files:
        """As `wanted`, with the inputs under other paths: what differs is the record's."""
        path = next(part for part in argv if part.endswith("/tuned") and "/disk/" in part)
        ours = str(self.scene.inputs / "tuned").encode()
        return {name: data.replace(ours, path.encode()) for name, data in self.wanted.items()}

    def out_of_memory(self, count: int, seed: int = 0) -> Iterator[Outcome]:
        """A cgroup that allows less than the run needs: the kernel kills it, wherever it is."""
        rng = random.Random(seed)
        with cgroup(1 << 40) as group:
            with fresh(self.place) as place:
                self.forker.run(self.argv, place, cgroup=str(group))
            most = int((group / "memory.max_usage_in_bytes").read_text())
        for _ in range(count):
            with cgroup(int(rng.uniform(0.1, 1.0) * most)) as group, fresh(self.place) as place:
                ended = self.forker.run(self.argv, place, cgroup=str(group))
                yield self.judged(ended, place, -9, ())

    def little_address_space(self, count: int, seed: int = 0) -> Iterator[Outcome]:
        """`ulimit -v`: memory is refused, and the run has to say so."""
        rng = random.Random(seed)
        status = Path(f"/proc/{self.forker.process.pid}/status").read_text()
        base = int(status.split("VmSize:")[1].split()[0]) * 1024
        for _ in range(count):
            with fresh(self.place) as place:
                limit = base + rng.randrange(200 << 20)
                ended = self.forker.run(self.argv, place, address_space=limit)
                # the C library ends the process where it can't do without (-6)
                yield self.judged(ended, place, -6 if ended.code == -6 else 1, ("memory",))

    def together(self, count: int) -> Outcome:
        """So many runs at once, on one target."""
        with fresh(self.place) as place:
            runs = [self.forker.start(self.argv, place) for _ in range(count)]
            ended = [run.ended() for run in runs]
            codes = Counter(one.code for one in ended)
            said = ("another run is writing", "exists already", "was made by somebody else")
            wrong = None
            if codes[0] != 1 or codes[5] != count - 1:
                wrong = f"ended with {dict(codes)}: {[one.said[-200:] for one in ended]}"
            for one in ended:
                if one.code and not any(text in one.said for text in said):
                    wrong = f"refused without the reason: {one.said}"
            if files_in(place / "out") != self.wanted or os.listdir(place) != ["out"]:
                wrong = f"left: {os.listdir(place)}"
            first = sum("another run is writing" in one.said for one in ended)
            return f"one wins, {first} of {count - 1} refused by the lock", wrong

    def judged(self, ended: Ended, place: Path, code: int, texts: tuple[str, ...]) -> Outcome:
        """A run that failed with `code`, said one of `texts` and left no damage, or ended well."""
        state = found_at(place, self.wanted, None)
        wrong = state if state.startswith("WRONG") else None
        if TRACEBACK in ended.said:
            wrong = f"a traceback: {ended.said[-900:]}"
        elif ended.code not in (0, code):
            wrong = f"ended with {ended.code}: {ended.said[-600:]}"
        elif ended.code and texts and not any(text in ended.said for text in texts):
            wrong = f"said otherwise: {ended.said}"
        wrong = wrong or again(self.scene, self.forker, self.argv, place, self.wanted, state)
        return self.word(ended, state), wrong

    def word(self, ended: Ended, state: str) -> str:
        return f"exit {ended.code}, {state}"


def tamper(path: Path, how: str) -> None:
    """Do to a file what nobody should."""
    size = path.stat().st_size
    if how == "cut":
        os.truncate(path, size // 2)
    elif how == "removed":
        path.unlink()
    elif how == "replaced":
        other = path.with_suffix(".new")
        content = bytearray(path.read_bytes())
        content[-4096:] = b"\x01" * 4096
        other.write_bytes(content)
        other.rename(path)
    else:
        with path.open("r+b") as file:
            file.seek(size - 4096)
            file.write(b"\x01" * 4096)


def wait_for(seen: Callable[[], bool], pid: int) -> None:
    """Until it is seen, or the process has ended."""
    while not seen() and Path(f"/proc/{pid}").exists():
        time.sleep(0.0005)


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes at `folder`."""
    options = f"size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup (v1) of so many bytes."""
    group = CGROUPS / f"surgery-{os.getpid()}"
    group.mkdir()
    try:
        if limit < 1 << 40:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def has_cgroups() -> bool:
    """Whether memory can be limited here."""
    try:
        with cgroup(1 << 30) as group:
            return (group / "memory.limit_in_bytes").exists()
    except OSError:
        return False


def cases(starver: Starver, count: int) -> Iterator[tuple[str, Iterator[Outcome] | None]]:
    """Every harness by its name; None for what can't be had here."""
    mount, groups = can_mount(), has_cgroups()
    root = os.geteuid() == 0
    yield "a full disk (tmpfs)", starver.full_disks(count) if mount else None
    yield "no permission, a read-only disk", starver.not_allowed() if mount and root else None
    yield "out of memory (cgroup)", starver.out_of_memory(count) if groups else None
    yield "little address space (ulimit -v)", starver.little_address_space(count)
    for how in ("cut", "rewritten", "replaced", "removed"):
        yield f"an input {how} meanwhile", starver.changed_inputs(how, count)
    yield "the inputs' disk lost (EIO)", starver.lost_disk(count) if mount else None
    yield "8 runs at once", (starver.together(8) for _ in range(count))


def main() -> None:
    """The harness."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--only", default="", help="only those whose name has this in it")
    given = parser.parse_args()
    bad = False
    with tempfile.TemporaryDirectory() as made, Forker(Path(made, "logs")) as forker:
        starver = Starver(Path(made), forker)
        print("| what | runs | wrong | how they ended |")
        print("|---|---:|---:|---|")
        for name, outcomes in cases(starver, given.count):
            if given.only not in name:
                continue
            if outcomes is None:
                print(f"| {name} | not run here | | |")
                continue
            found = list(outcomes)
            for wrong in dict.fromkeys(wrong for _, wrong in found if wrong):
                print(f"{name}: {wrong}", file=sys.stderr)
            ends = Counter(word for word, _ in found).most_common()
            count = sum(wrong is not None for _, wrong in found)
            words = "; ".join(f"{number} x {word}" for word, number in ends)
            print(f"| {name} | {len(found)} | {count} | {words} |", flush=True)
            bad |= count > 0
    sys.exit(bad)


if __name__ == "__main__":
    main()
