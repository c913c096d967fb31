"""The writer: shards are laid out first, then every tensor is filled in at its own offset, by
several threads, while bytes that nobody touched are copied from file to file by the system."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from threading import Lock
from typing import Any

from surgery.checkpoint import RECORD, Checkpoint, Weights
from surgery.errors import OutputError
from surgery.files import as_bytes
from surgery.hub import Source
from surgery.opening import INDEX_SUFFIX, open_checkpoint, open_tensors
from surgery.parallel import Progress, default_threads, run_all
from surgery.system import naming
from surgery.tensor import FileSpan, LazyTensor, input_files
from surgery.writing.card import model_card
from surgery.writing.failures import told
from surgery.writing.plan import MAX_SHARD_BYTES, Plan, free_bytes, plan
from surgery.writing.record import make_record, record_bytes
from surgery.writing.staging import check_target, publish, staging, staging_folder

BLOCK_ELEMENTS = 1 << 18
"""Elements computed at a time: 1 MB in float32, which stays in the cache of a core."""
BARE_MEMORY = 250_000_000
"""Bytes that a Python process with torch in it takes before it does anything."""
COPY_BYTES = 1 << 26
"""Bytes copied at a time: enough to keep calls few, little enough to share among threads."""


@dataclass(frozen=True)
class Written:
    """What was written: the plan, the record, and the tallies of tensors that have one, by name
    (see LazyTensor)."""

    target: Path
    plan: Plan
    record: Mapping[str, Any]
    tallies: Mapping[str, float]


def write(
    weights: Weights,
    target: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
    check: Callable[[Checkpoint], object] | None = None,
    verification: Mapping[str, Any] | None = None,
    recipe: Any = None,
    command: str | None = None,
) -> Written:
    """Write `weights` (a checkpoint, a task vector) to the directory `target`, completely or not at all.

    `check` is called with the staged checkpoint, opened anew, before it gets its final name; an
    exception that it raises leaves nothing behind. `verification`, `recipe` and `command`, plain
    data, go into the record. Raises OutputError if the target is in the way, or the disk is full.
    """
    target = Path(target).absolute()
    prepare(weights, target, overwrite=overwrite)
    layout = plan(weights, max_shard_bytes=max_shard_bytes)
    check_space(layout, target)
    stage = staging_folder(target)
    with told(stage, weights.paths), staging(target) as folder, told(stage, weights.paths):
        tallies = _fill(layout, folder, threads, progress)
        record = make_record(layout, tallies, verification, command, recipe)
        _write_small_files(layout, folder, record)
        _check_staged(layout, folder)
        if check is not None:
            check(open_checkpoint(folder))
        for file in input_files(weights.values()):
            file.check_unchanged()
        publish(folder, target, overwrite=overwrite)
    return Written(target, layout, record, tallies)


def prepare(weights: Weights, target: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `target` exists or could harm an input."""
    check_target(target, dict.fromkeys(weights.paths), overwrite=overwrite)


def check_space(layout: Plan, target: Path) -> None:
    """Raise OutputError unless the output fits on the disk."""
    needed, free = layout.bytes_needed, free_bytes(target)
    if needed > free:
        raise OutputError(
            f"{target} needs {needed:,} bytes, and {free:,} are free there: make room, or "
            f"choose another place"
        )


def peak_memory(layout: Plan, threads: int | None = None) -> int:
    """Bytes of memory that writing takes at its peak, about: Python and torch, and what each
    thread holds of a block: its inputs, as many temporaries, and the result."""
    most = 0
    for name in layout.computed:
        tensor = layout.weights[name]
        rows = max(tensor.width, BLOCK_ELEMENTS) if tensor.streams else tensor.numel
        most = max(most, rows * 4 * (2 * len(tensor.inputs) + 1))
    return BARE_MEMORY + (threads or default_threads()) * most


# One thing to do: bytes to copy to an offset, or rows to compute.
_Copy = tuple[int, FileSpan, int]
_Compute = tuple[int, str, LazyTensor, int, int, int]
_Measure = tuple[LazyTensor]


def _fill(
    layout: Plan, folder: Path, threads: int | None, progress: Progress | None
) -> dict[str, float]:
    """Write all shards; returns the tallies."""
    sums: dict[str, list[float]] = defaultdict(list)
    lock = Lock()
    names: dict[int, Path] = {}

    def work(job: _Copy | _Compute | _Measure) -> None:
        if len(job) == 1:
            _ = job[0].measured
            return
        if len(job) == 3:
            fd, span, offset = job
            with naming(names[fd]):
                _copy(fd, span, offset)
            done = span.length
        else:
            fd, name, tensor, start, stop, offset = job
            with naming(names[fd]):
                done, tally = _compute(fd, tensor, start, stop, offset)
            if tally is not None:
                with lock:
                    sums[name].append(tally)
        if progress is not None:
            progress(done)

    with ExitStack() as files:
        fds: dict[str, int] = {}
        for shard in layout.shards:
            fd = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            files.callback(os.close, fd)
            names[fd] = folder / shard.name
            with naming(names[fd]):
                os.ftruncate(fd, shard.size)
                _write_at(fd, memoryview(shard.head), 0)
            fds[shard.name] = fd
        run_all(_jobs(layout, fds), work, threads)
    return {name: fsum(sums[name]) for name in layout.weights if name in sums}


def _jobs(layout: Plan, fds: Mapping[str, int]) -> Iterator[_Copy | _Compute | _Measure]:
    """All jobs, tensor by tensor. A tensor that has to be measured is so while the one before
    it is computed: else all threads but one would wait for the measure."""
    tensors = [
        (fds[shard.name], name, offset)
        for shard in layout.shards
        for name, offset in shard.offsets.items()
    ]
    weights = layout.weights
    for number, (fd, name, offset) in enumerate(tensors):
        for _, ahead, _ in tensors[number + 1 : number + 2] if number else tensors[:2]:
            if weights[ahead].measure is not None:
                yield (weights[ahead],)
        yield from _tensor_jobs(weights[name], name, fd, offset)


def _tensor_jobs(tensor: LazyTensor, name: str, fd: int, offset: int) -> Iterator[_Copy | _Compute]:
    if (spans := tensor.file_spans()) is not None:
        for span in spans:
            for start in range(0, span.length, COPY_BYTES):
                part = span.part(start, min(start + COPY_BYTES, span.length))
                yield fd, part, offset + start
            offset += span.length
    else:
        row = tensor.width * tensor.dtype.bits // 8
        for start, stop in tensor.blocks(BLOCK_ELEMENTS):
            yield fd, name, tensor, start, stop, offset + start * row


def _compute(
    fd: int, tensor: LazyTensor, start: int, stop: int, offset: int
) -> tuple[int, float | None]:
    """Write rows at `offset` of the file. Returns the bytes written, and the rows' tally."""
    tally = None
    if tensor.tally is not None:
        rows, tally = tensor.tally(*tensor.read_inputs(start, stop))
    else:
        rows = tensor.read(start, stop)
    assert rows.dtype == tensor.dtype.torch
    assert rows.numel() == (stop - start) * tensor.width
    data = as_bytes(rows.contiguous())
    _write_at(fd, data, offset)
    return len(data), tally


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _copy(fd: int, span: FileSpan, offset: int) -> None:
    """Copy a span into a file at `offset`, inside the system where it can."""
    done = 0
    source = span.file.descriptor
    while done < span.length and hasattr(os, "copy_file_range"):
        try:
            got = os.copy_file_range(
                source.fd, fd, span.length - done, span.offset + done, offset + done
            )
        except OSError:  # not between these two files, or one of them fails: which of the two is
            break  # told by reading and writing
        if got == 0:
            break  # the file has ended, which read_into reports, or can't be copied from
        done += got
    buffer = bytearray(min(1 << 20, span.length - done))
    while done < span.length:
        part = memoryview(buffer)[: span.length - done]
        span.file.read_into(part, span.offset + done)
        _write_at(fd, part, offset + done)
        done += len(part)


def _write_small_files(layout: Plan, folder: Path, record: Mapping[str, Any]) -> None:
    weights = layout.weights
    made: dict[str, Path | bytes] = dict(weights.companions)
    made |= model_card(layout, record)
    made |= weights.own_files()
    if layout.index is not None:
        made[weights.stem + INDEX_SUFFIX] = layout.index
    made[RECORD] = record_bytes(record)
    for name, content in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            with naming(content):
                content = content.read_bytes()
        with naming(path):
            path.write_bytes(content)


def _check_staged(layout: Plan, folder: Path) -> None:
    """What was written, read back from the files, is what was planned."""
    wanted = {name: (t.shape, t.dtype) for name, t in layout.weights.items()}
    staged, _ = open_tensors(Source(str(folder), folder), layout.weights.stem)
    found = {name: (t.shape, t.dtype) for name, t in staged.items()}
    if wanted != found:
        names = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise OutputError(f"what was written isn't what was planned: {', '.join(names[:5])}")
