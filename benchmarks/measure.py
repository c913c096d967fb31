"""How the benchmarks measure: time, CPU, private memory, and the floor.

    from measure import Case, compare, machine, table

The **floor** of a command is the time of the input and output that no program can avoid: reading
every input file once (`cat INPUTS | cat > /dev/null`) and writing a directory of the output's
size once (`cp -r`). Commands and floors alternate, so that a busy machine slows both.

**Private memory** is memory that no file stands behind and no other process shares (RssAnon of
the process and its children, sampled every 10 ms): pages of the file cache come and go with the
memory that is free, and private memory is what a program needs.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Run:
    """One run of a command: seconds by the clock, seconds of CPU, peak of private bytes."""

    wall: float
    cpu: float
    private: int


@dataclass
class Case:
    """A command to measure. `output` is removed after each run; `inputs` are read by the floor,
    which is left out when there are none, and reads alone when there is no output."""

    name: str
    command: Sequence[str]
    inputs: Sequence[Path] = ()
    output: Path | None = None
    runs: list[Run] = field(default_factory=list)
    floors: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of reading and of writing."""

    @property
    def wall(self) -> float:
        return median(run.wall for run in self.runs)

    @property
    def floor(self) -> float | None:
        return median(map(sum, self.floors)) if self.floors else None

    def as_json(self) -> dict[str, object]:
        """Every figure, as plain data."""
        return {
            "name": self.name,
            "command": list(self.command),
            "wall": [run.wall for run in self.runs],
            "cpu": [run.cpu for run in self.runs],
            "private": [run.private for run in self.runs],
            "floor_read": [read for read, _ in self.floors],
            "floor_write": [write for _, write in self.floors],
        }


def compare(cases: Iterable[Case], repeat: int, *, warm_up: bool = True) -> None:
    """Run each case `repeat` times, each time followed by its floor, after a warm-up that also
    gives the floor a directory of the output's size to copy (a case without inputs has no floor,
    and may go without the warm-up). One case after the other, so that
    the file cache has to hold what one case needs and no more. Each row of the table is told on
    stderr when it is known."""
    for case in cases:
        _remove(case.output)
        if warm_up:
            run(case.command)
        model = None
        if case.inputs and case.output is not None:
            model = _aside(case.output)
        for _ in range(repeat):
            _remove(case.output)
            warm(case.inputs)
            case.runs.append(run(case.command))
            _remove(case.output)
            if case.inputs:
                case.floors.append(floor(case.inputs, model))
        if model is not None:
            shutil.rmtree(model)
        print(table([case]).splitlines()[-1], shlex.join(case.command), file=sys.stderr, flush=True)


def warm(folders: Iterable[Path]) -> None:
    """Bring the files of these directories into the file cache."""
    for file in files_of(folders):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 20):
                pass


def files_of(folders: Iterable[Path]) -> list[Path]:
    """The files of these directories, in order."""
    return [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end, on a disk that has nothing left to write."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=None if environment is None else {**os.environ, **environment},
    )
    sampler = _Sampler(process.pid)
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    sampler.done.set()
    sampler.join()
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{errors.decode()}")
    return Run(wall, usage.ru_utime + usage.ru_stime, sampler.peak)


def floor(inputs: Sequence[Path], model: Path | None) -> tuple[float, float]:
    """Seconds to read the input directories once, and to write a copy of `model`."""
    warm(inputs)
    files = shlex.join(map(str, files_of(inputs)))
    reading = run(["sh", "-c", f"cat {files} | cat > /dev/null"])
    if model is None:
        return reading.wall, 0.0
    copy = model.with_name(model.name + ".copy")
    _remove(copy)
    warm([model])
    writing = run(["cp", "-r", str(model), str(copy)])
    _remove(copy)
    return reading.wall, writing.wall


def private_bytes(pid: int) -> int:
    """Private memory of a process and its children now; 0 for one that has ended."""
    total = 0
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    total = int(line.split()[1]) * 1024
                    break
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as children:
                total += sum(private_bytes(int(child)) for child in children.read().split())
    except OSError:  # it has just ended
        pass
    return total


def machine(folder: Path) -> str:
    """The CPU, cores, kernel and the file system of `folder`, in a line."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    shown = ["df", "--output=fstype", str(folder)]
    kind = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.split()[-1]
    return (
        f"{cpu}, {cores} cores, {memory:.0f} GiB of memory, Linux {platform.release()}, "
        f"{kind}, Python {platform.python_version()}"
    )


def table(cases: Iterable[Case]) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| | wall | range | floor (read + write) | x floor | CPU | private memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases:
        walls = [run.wall for run in case.runs]
        floor_cell = ratio = ""
        if case.floor is not None:
            read = median(read for read, _ in case.floors)
            write = median(write for _, write in case.floors)
            floor_cell = f"{case.floor:.2f} s ({read:.2f} + {write:.2f})"
            ratio = f"{case.wall / case.floor:.2f}"
        lines.append(
            f"| `{case.name}` | {case.wall:.2f} s | {min(walls):.2f} to {max(walls):.2f} | "
            f"{floor_cell} | {ratio} | {median(run.cpu for run in case.runs):.2f} s | "
            f"{median(run.private for run in case.runs) / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


class _Sampler(threading.Thread):
    """The peak of a process's private memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            self.peak = max(self.peak, private_bytes(self.pid))
            self.done.wait(SAMPLE_SECONDS)


def _aside(output: Path) -> Path:
    model = output.with_name(output.name + ".model")
    _remove(model)
    return output.rename(model)


def _remove(path: Path | None) -> None:
    if path is not None and path.exists():
        shutil.rmtree(path)
