"""The writer: shards are laid out first, then every tensor is filled in at its own offset, by
several threads, while bytes that nobody touched are copied from file to file by the system."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import RECORD, Checkpoint, Weights
from surgery.errors import OutputError
from surgery.hub import Source
from surgery.integrity.seal import input_digests, seal
from surgery.opening import INDEX_SUFFIX, open_checkpoint, open_tensors
from surgery.parallel import Progress, default_threads, run_all
from surgery.system import naming
from surgery.tensor import FileSpan, LazyTensor, input_files
from surgery.writing.card import model_card
from surgery.writing.failures import told
from surgery.writing.journal import Finished, Journal
from surgery.writing.locks import staging_folder
from surgery.writing.parts import Part, join, part_of_stage
from surgery.writing.plan import MAX_SHARD_BYTES, Plan, Shard, free_bytes, plan
from surgery.writing.record import make_record, record_bytes
from surgery.writing.resume import begin
from surgery.writing.shards import Finisher, OpenShard
from surgery.writing.staging import Stage, check_target, publish, staged_bytes, staging

BLOCK_ELEMENTS = 1 << 19
"""Elements computed at a time: 2 MB in float32. Fewer, and threads wait for each other's turn in
the interpreter; more, and what one operation leaves isn't in a cache any more for the next."""
COPY_BYTES = 1 << 20
"""Bytes of a companion that are copied at a time."""
BARE_MEMORY, WITH_TORCH = 60_000_000, 250_000_000
"""Bytes that a Python process takes before it does anything, and one with torch in it."""
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
    kept: tuple[str, ...] = ()
    """The shards that an earlier run had finished."""


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
    resume: bool = True,
    complete: bool = False,
    tell: Callable[[str], object] | None = None,
    checksums: bool = False,
    sign_key: str | Path | None = None,
) -> Written:
    """Write `weights` (a checkpoint, a task vector) to the directory `target`, completely or not
    at all.

    A run that is stopped leaves the shards that it has finished beside the target. With `resume`
    the next one that is to write the same keeps them, after their bytes are checked; `tell` is
    called with a line on what is kept, or why nothing is. With `complete` every shard has to be
    there, as `write_part` leaves it, and what is left to do is done.

    `check` is called with the staged checkpoint, opened anew, before it gets its final name; an
    exception that it raises leaves nothing behind. `verification`, `recipe` and `command`, plain
    data, go into the record. With `checksums` the record has the SHA-256 of every input file, and
    `SHA256SUMS` that of every file written; with `sign_key`, the file of a private key, `model.sig`
    is a signature of all of them. Raises OutputError if the target is in the way, or the disk is
    full.
    """
    target = Path(target).absolute()
    prepare(weights, target, overwrite=overwrite)
    layout = plan(weights, max_shard_bytes=max_shard_bytes)
    check_space(layout, target)
    folder, inputs = staging_folder(target), weights.paths
    with (
        told(folder, inputs),
        staging(target, overwrite=overwrite, tell=tell) as stage,
        told(folder, inputs, lambda: stage.what_is_kept),
    ):
        kept = begin(
            stage,
            layout,
            resume=resume,
            complete=complete,
            threads=threads,
            progress=progress,
            tell=tell,
        )
        # one shard is finished when all is, and nothing could be gone on from
        journal = Journal(stage.folder) if stage.known and len(layout.shards) > 1 else None
        again = checksums or sign_key is not None or check is not None  # reads what was written
        tallies = _fill(layout, stage, layout.shards, kept, journal, threads, progress, again)
        digests = input_digests(weights, threads, progress) if checksums else {}
        record = make_record(layout, tallies, verification, command, recipe, digests)
        _write_small_files(layout, stage.files, record)
        try:
            _check_staged(layout, stage.files)
            if check is not None:
                check(open_checkpoint(stage.files))
            seal(stage.files, checksums=checksums, key=sign_key, threads=threads, progress=progress)
        except Exception:
            stage.discard()
            raise
        _check_unchanged(weights)
        publish(stage, overwrite=overwrite)
    return Written(target, layout, record, tallies, tuple(kept))


@dataclass(frozen=True)
class PartWritten:
    """What a part has written, and which of its shards were finished before."""

    target: Path
    plan: Plan
    part: Part
    shards: tuple[str, ...]
    kept: tuple[str, ...]


def write_part(
    weights: Weights,
    target: str | Path,
    part: Part,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
) -> PartWritten:
    """Write the shards of one `part` into the stage of `target`, which many processes share, on
    many machines if the file system is theirs too; `write` with `complete` then makes it whole.

    A part that is written again keeps what it had finished. Raises OutputError if the other parts
    are of another plan, or another process writes this one.
    """
    target = Path(target).absolute()
    prepare(weights, target, overwrite=overwrite)
    layout = plan(weights, max_shard_bytes=max_shard_bytes)
    check_space(layout, target)
    folder, inputs = staging_folder(target), weights.paths
    with (
        told(folder, inputs),
        part_of_stage(target, part) as stage,
        told(folder, inputs, lambda: stage.what_is_kept),
    ):
        kept = join(stage, layout, part, threads=threads, progress=progress, tell=tell)
        shards = part.shards(layout)
        journal = Journal(stage.folder, f"-{part.name}")
        # what finishes the whole reads every part
        _fill(layout, stage, shards, kept, journal, threads, progress, True)
        _check_unchanged(weights)
    return PartWritten(target, layout, part, tuple(s.name for s in shards), tuple(kept))


def _check_unchanged(weights: Weights) -> None:
    """Raise FormatError if a file that was read is no longer what it was."""
    for file in input_files(weights.values()):
        file.check_unchanged()


def prepare(weights: Weights, target: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `target` exists or could harm an input."""
    with told(staging_folder(target), weights.paths):
        check_target(target, dict.fromkeys(weights.paths), overwrite=overwrite)


def check_space(layout: Plan, target: Path) -> None:
    """Raise OutputError unless the output fits on the disk."""
    with told(staging_folder(target), layout.weights.paths):
        needed, free = layout.bytes_needed, free_bytes(target) + staged_bytes(target)
    if needed > free:
        raise OutputError(
            f"{target} needs {needed:,} bytes, and {free:,} are free there: make room, or "
            f"choose another place"
        )


def peak_memory(layout: Plan, threads: int | None = None) -> int:
    """Bytes of memory that writing takes at its peak, about: Python, with torch where that is
    needed, and what each thread holds of a block: its inputs, as many temporaries, and the
    result."""
    most = 0
    for name in layout.computed:
        tensor = layout.weights[name]
        rows = max(tensor.width, BLOCK_ELEMENTS) if tensor.streams else tensor.numel
        most = max(most, rows * 4 * (2 * len(tensor.inputs) + 1))
    bare = WITH_TORCH if layout.needs_torch else BARE_MEMORY
    return bare + (threads or default_threads()) * most


# One thing to do: bytes to copy to an offset, or rows to compute, in a shard; or a measure.
_Copy = tuple[OpenShard, FileSpan, int]
_Compute = tuple[OpenShard, str, LazyTensor, int, int, int]
_Measure = tuple[LazyTensor]


def _fill(
    layout: Plan,
    stage: Stage,
    shards: Sequence[Shard],
    kept: Mapping[str, Finished],
    journal: Journal | None,
    threads: int | None,
    progress: Progress | None,
    cached: bool,
) -> dict[str, float]:
    """Write those of `shards` that aren't `kept`, sync and note each while the next is computed;
    returns the tallies of all. What is written stays in the page cache if `cached`."""

    def work(job: _Copy | _Compute | _Measure) -> None:
        if len(job) == 1:
            _ = job[0].measured
            return
        if len(job) == 3:
            shard, span, offset = job
            with naming(shard.path):
                shard.copy(span, offset)
            done = span.length
            shard.done(done)
        else:
            shard, name, tensor, start, stop, offset = job
            with naming(shard.path):
                done, tally = _compute(shard, tensor, start, stop, offset)
            shard.done(done, name, tally)
        if progress is not None:
            progress(done)

    def open_shard(shard: Shard) -> OpenShard:
        digested = journal is not None
        made = OpenShard(stage.files, shard, finisher.put, digested=digested, cached=cached)
        opened.append(made)
        return made

    finisher = Finisher(journal, stage.count_one)
    opened: list[OpenShard] = []
    left = [shard for shard in shards if shard.name not in kept]
    try:
        jobs = _jobs(layout, left, open_shard, finisher)
        run_all(jobs, work, threads, with_torch=layout.needs_torch)
    finally:
        finisher.join()
        for shard in opened:  # those that aren't finished, as something has failed
            with suppress(OSError):
                shard.close()
    if finisher.failure is not None:
        raise finisher.failure
    sums: dict[str, float] = {}
    for finished in [*kept.values(), *finisher.finished]:
        sums.update(finished.tallies)
    return {name: sums[name] for name in layout.weights if name in sums}


def _jobs(
    layout: Plan,
    shards: Sequence[Shard],
    open_shard: Callable[[Shard], OpenShard],
    finisher: Finisher,
) -> Iterator[_Copy | _Compute | _Measure]:
    """All jobs, shard by shard and tensor by tensor. A tensor that has to be measured is so
    while the one before it is computed: else all threads but one would wait for the measure."""
    weights = layout.weights
    ahead = [weights[name] for shard in shards for name in shard.offsets]
    at = 0
    for shard in shards:
        file = open_shard(shard)
        for name, offset in shard.offsets.items():
            for tensor in ahead[at + 1 : at + 2] if at else ahead[:2]:
                if tensor.measure is not None:
                    yield (tensor,)
            at += 1
            for job in _tensor_jobs(weights[name], name, file, offset):
                if finisher.failure is not None:
                    raise finisher.failure
                file.hand_out()
                yield job
        file.close_jobs()


def _tensor_jobs(
    tensor: LazyTensor, name: str, shard: OpenShard, offset: int
) -> Iterator[_Copy | _Compute]:
    if (spans := tensor.file_spans()) is not None:
        for span in spans:
            for start in range(0, span.length, COPY_BYTES):
                part = span.part(start, min(start + COPY_BYTES, span.length))
                yield shard, part, offset + start
            offset += span.length
    else:
        row = tensor.width * tensor.dtype.bits // 8
        for start, stop in tensor.blocks(BLOCK_ELEMENTS):
            yield shard, name, tensor, start, stop, offset + start * row


def _compute(
    shard: OpenShard, tensor: LazyTensor, start: int, stop: int, offset: int
) -> tuple[int, float | None]:
    """Write rows at `offset` of the shard. Returns the bytes written, and the rows' tally."""
    made, tally = tensor.read_tallied(start, stop)
    assert made.nbytes == (stop - start) * tensor.width * tensor.dtype.bits // 8
    shard.write(made.data, offset)
    return made.nbytes, tally


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
        with naming(path):
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                _copy(content, path)


def _copy(source: Path, target: Path) -> None:
    """Copy in pieces: a companion may be of any size. An error names the file that it is of, which
    says whose fault it is; `shutil.copyfile` leaves out the one that can't be read."""
    with open(source, "rb", buffering=0) as given, open(target, "wb") as made:
        while True:
            with naming(source):
                block = given.read(COPY_BYTES)
            if not block:
                return
            made.write(block)


def _check_staged(layout: Plan, folder: Path) -> None:
    """What was written, read back from the files, is what was planned."""
    wanted = {name: (t.shape, t.dtype) for name, t in layout.weights.items()}
    staged, _ = open_tensors(Source(str(folder), folder), layout.weights.stem)
    found = {name: (t.shape, t.dtype) for name, t in staged.items()}
    if wanted != found:
        names = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise OutputError(f"what was written isn't what was planned: {', '.join(names[:5])}")
