"""What an output gets so that others can tell whether it is what was written: the digests of its
inputs for the record, those of its own files beside them, and a signature."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgery.checkpoint import CHECKSUMS, SIGNATURE, Weights
from surgery.hub import Source
from surgery.integrity.digests import files_below, hub_digest, sha256_of_all, sums_bytes
from surgery.opening import OTHER_FOLDERS, OTHER_WEIGHTS
from surgery.parallel import Progress


def input_digests(
    weights: Weights, threads: int | None = None, progress: Progress | None = None
) -> dict[Path, str]:
    """The SHA-256 of every file that `weights` were made of, by path. What the Hub's cache knows
    isn't computed anew: `surgery check` of the input does that."""
    known: dict[Path, str] = {}
    unknown = []
    for path in _input_files(weights):
        if digest := hub_digest(path):
            known[path] = digest
        else:
            unknown.append(path)
    return known | sha256_of_all(unknown, threads, progress)


def bytes_to_hash(weights: Weights) -> int:
    """How many bytes the digests take to read, about."""
    inputs = (path.stat().st_size for path in _input_files(weights) if not hub_digest(path))
    return sum(inputs) + weights.nbytes


def seal(
    folder: Path,
    *,
    checksums: bool,
    key: str | Path | None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Put what is asked for beside the files in `folder`, which is complete: `SHA256SUMS`, and
    the signature, which is of that file too."""
    if checksums:
        found = sha256_of_all((folder / name for name in files_below(folder)), threads, progress)
        digests = {path.relative_to(folder).as_posix(): found[path] for path in found}
        (folder / CHECKSUMS).write_bytes(sums_bytes(digests))
    if key is not None:
        from surgery.integrity.signing import sign

        sign(folder, folder / SIGNATURE, Path(key))


def _input_files(weights: Weights) -> Iterator[Path]:
    """Weight files, configs and what travels along; no weights of other formats."""
    sources = {
        source.path: source
        for edit in weights.history
        for source in edit.inputs.values()
        if not source.step
    }
    for source in sources.values():
        yield from _files_of(source)


def _files_of(source: Source) -> Iterator[Path]:
    if source.path.is_file():
        yield source.path
        return
    for name in files_below(source.path):
        path = Path(name)
        other = path.suffix in OTHER_WEIGHTS or any(map(OTHER_FOLDERS.fullmatch, path.parts[:-1]))
        if name in source.files or not other:
            yield source.path / name
