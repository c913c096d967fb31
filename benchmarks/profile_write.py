"""Where the time of writing an edit goes: to find what to change, not to publish.

    python benchmarks/profile_write.py {lines,grow} [--parameters 1.1B] [--threads N] [--work DIR]

runs the edit in this process and prints seconds and GB/s of each part of the writer, summed over
its threads (parts hold each other: `_compute` has reading, arithmetic and writing in it); then
every kind of work alone, on one thread: ways to copy, reading, writing, syncing, and the
arithmetic without any file, at several block sizes. GB/s are of bytes moved: read plus computed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from checkpoints import SHAPES, make_pair
from measure import files_of, warm

from surgery import Checkpoint, LazyTensor, grow, lines, open_checkpoint, plan
from surgery.files import InputFile

writer = import_module("surgery.writing.write")  # `surgery.writing` has a function of that name

Report = dict[str, list[float]]
"""By part: calls, seconds, bytes."""


def whole_run(checkpoint: Checkpoint, target: Path, threads: int | None) -> None:
    """Print what one run of the writer spends where."""
    report: Report = defaultdict(lambda: [0, 0.0, 0])
    sizes: dict[str, Callable[..., int]] = {
        "_copy": lambda fd, span, offset: span.length,
        "_compute": lambda fd, tensor, start, stop, offset: (
            (stop - start) * tensor.width * tensor.dtype.bits // 8
        ),
        "_write_at": lambda fd, data, offset: len(data),
    }
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    with (
        _timed(writer, "_copy", report, sizes["_copy"]),
        _timed(writer, "_compute", report, sizes["_compute"]),
        _timed(writer, "_write_at", report, sizes["_write_at"]),
        _timed(writer, "_fill", report),
        _timed(writer, "publish", report),
        _timed(InputFile, "read_into", report, lambda _, data, offset: len(data)),
    ):
        writer.write(checkpoint, target, threads=threads)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"whole: {wall:.2f} s, user {after.ru_utime - before.ru_utime:.2f} s, system "
        f"{after.ru_stime - before.ru_stime:.2f} s, {after.ru_minflt - before.ru_minflt:,} minor "
        f"page faults"
    )
    for name, (calls, seconds, size) in report.items():
        _print(f"  {name} ({calls:,.0f} calls)", seconds, size)
    shutil.rmtree(target)


def ways_to_copy(source: Path, folder: Path) -> None:
    """Print the speed of each way of getting a file's bytes into a new file, and of syncing."""
    size = source.stat().st_size
    target = folder / "copy"

    def in_kernel(read: int, write: int) -> None:
        done = 0
        while done < size:
            done += os.copy_file_range(read, write, min(writer.COPY_BYTES, size - done))

    def through(read: int, write: int, *, length: int) -> None:
        buffer = memoryview(bytearray(length))
        for offset in range(0, size, length):
            got = os.preadv(read, [buffer], offset)
            os.pwrite(write, buffer[:got], offset)

    def reading(read: int, write: int) -> None:
        buffer = memoryview(bytearray(1 << 20))
        for offset in range(0, size, len(buffer)):
            os.preadv(read, [buffer], offset)

    def writing(read: int, write: int) -> None:
        buffer = memoryview(bytes(1 << 20))
        for offset in range(0, size, len(buffer)):
            os.pwrite(write, buffer[: size - offset], offset)

    ways: dict[str, Callable[[int, int], None]] = {
        "copy_file_range": in_kernel,
        "pread and pwrite, 256 KB": partial(through, length=1 << 18),
        "pread and pwrite, 1 MB": partial(through, length=1 << 20),
        "pread alone, 1 MB": reading,
        "pwrite alone, 1 MB": writing,
    }
    print(f"alone, {size / 1e9:.2f} GB:")
    for name, way in ways.items():
        warm([source.parent])
        with open(source, "rb") as read, open(target, "w+b") as write:
            os.ftruncate(write.fileno(), size)
            seconds = _seconds(partial(way, read.fileno(), write.fileno()))
            _print(f"  {name}", seconds, size)
            if target.stat().st_blocks:
                _print("    fsync after it", _seconds(partial(os.fsync, write.fileno())), size)
        target.unlink()


def arithmetic(tensor: LazyTensor) -> None:
    """Print the speed of a computed tensor's kernel and tally on rows that are in memory."""
    assert tensor.kernel is not None
    torch.set_num_threads(1)
    print(f"arithmetic alone, {getattr(tensor.kernel, 'func', tensor.kernel).__name__}:")
    for elements in (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20):
        start, stop = next(tensor.blocks(elements))
        inputs = tensor.read_inputs(start, stop)
        moved = sum(part.nbytes for part in inputs) + tensor.kernel(*inputs).nbytes
        repeat = max(1, (1 << 26) // elements)
        for name, part in (("kernel", tensor.kernel), ("tally", tensor.tally)):
            if part is not None:
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                seconds = _seconds(partial(_repeat, partial(part, *inputs), repeat))
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
                label = f"  {name}, {elements >> 10}K elements, {faults / repeat:.0f} faults each"
                _print(label, seconds, moved * repeat)


@contextmanager
def _timed(
    owner: Any, name: str, report: Report, size: Callable[..., int] = lambda *_: 0
) -> Iterator[None]:
    function = getattr(owner, name)

    @wraps(function)
    def wrapper(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            entry = report[name]
            entry[0] += 1
            entry[1] += time.perf_counter() - start
            entry[2] += size(*given)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, function)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _print(name: str, seconds: float, size: float) -> None:
    speed = f"{size / 1e9 / seconds:8.2f} GB/s" if size else ""
    print(f"{name:<50} {seconds:8.2f} s {speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("verb", choices=("lines", "grow"))
    parser.add_argument("--parameters", choices=SHAPES, default="1.1B")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, help="keep the checkpoints here")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-profile-"))
    try:
        paths = make_pair(work, given.parameters)
        base, tuned = map(open_checkpoint, paths)
        edit = lines(base, tuned, alpha=0.4) if given.verb == "lines" else grow(base, factor=2)
        warm(paths)
        whole_run(edit, work / "profiled", given.threads)
        ways_to_copy(max(files_of(paths), key=lambda file: file.stat().st_size), work)
        arithmetic(max((edit[n] for n in plan(edit).computed), key=lambda t: t.numel))
    finally:
        if given.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
