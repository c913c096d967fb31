"""What `check` does: the files against their digests, the numbers in them, and what isn't one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from surgery.anatomy import Anatomy, Role
from surgery.checkpoint import CHECKSUMS
from surgery.errors import NotFoundError
from surgery.files import InputFile
from surgery.hub import Source
from surgery.integrity.check import Finding, Opened, Report
from surgery.integrity.digests import files_below, hub_digest, read_sums, sha256_of_all
from surgery.integrity.holes import holes_in, holes_of
from surgery.integrity.scan import Found, scan
from surgery.pages import Zeros, reader
from surgery.parallel import Progress
from surgery.tensor import FileSpan, LazyTensor

NAMED = 5
"""Names that a sentence lists before it counts."""


def examine(
    weights: Opened, sums: str | Path | None, threads: int | None, progress: Progress | None
) -> Report:
    """The report of `check` on a model that was opened."""
    folder = weights.source.path if weights.source.path.is_dir() else weights.source.path.parent
    wanted, compared, findings = _wanted(weights.source, folder, sums)
    files = _by_file(weights.tensors)
    inputs = {file: file.path.relative_to(folder).as_posix() for file in files}
    hashed = frozenset(file for file, name in inputs.items() if name in wanted)
    found, scanned = scan(files, hashed, threads=threads, progress=progress)
    digests = {inputs[file]: digest for file, digest in scanned.items()}
    others = [folder / name for name in wanted if name not in digests and (folder / name).is_file()]
    more = sha256_of_all(others, threads)
    digests |= {path.relative_to(folder).as_posix(): digest for path, digest in more.items()}
    findings.problems += _differing(folder, wanted, digests)
    for file, tensors in files.items():
        _look_at_file(findings, file, tensors, found, weights.anatomy)
    if not findings.problems and not compared:
        findings.warnings += _strangers(weights, inputs)
    findings.notes += _notes(found)
    return Report(
        reference=weights.source.reference,
        folder=folder,
        files=dict(weights.source.files),
        tensors=len(weights.tensors),
        nbytes=sum(tensor.nbytes for tensor in weights.tensors.values()),
        digests=dict(sorted(digests.items())),
        compared=tuple(compared),
        signed=None,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        notes=tuple(findings.notes),
    )


@dataclass
class _Findings:
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


def _by_file(
    tensors: Mapping[str, LazyTensor],
) -> dict[InputFile, list[tuple[str, LazyTensor]]]:
    """The tensors of every file, in the order of their bytes."""
    files: dict[InputFile, list[tuple[int, int, str, LazyTensor]]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        assert isinstance(tensor.leaf, FileSpan)
        place = (tensor.leaf.offset, number, name, tensor)
        files.setdefault(tensor.leaf.file, []).append(place)
    return {
        file: [(name, tensor) for _, _, name, tensor in sorted(places, key=lambda p: p[:2])]
        for file, places in files.items()
    }


def _wanted(
    source: Source, folder: Path, sums: str | Path | None
) -> tuple[dict[str, dict[str, str]], list[str], _Findings]:
    """The digests that files should have, by name and by who says so; and files that are missing
    or extra."""
    wanted: dict[str, dict[str, str]] = {}
    compared = []
    findings = _Findings()
    single = source.path.name if source.path.is_file() else None
    path = folder / CHECKSUMS if sums is None else Path(sums)
    if sums is not None and not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    if path.is_file():
        listed = read_sums(path)
        if single is None or single in listed:
            compared.append(path.name)
            for name, digest in listed.items():
                if single in (None, name):
                    wanted.setdefault(name, {})[path.name] = digest
        if single is None:
            findings.problems += _missing_and_extra(folder, path, listed)
    names = [single] if single is not None else files_below(folder)
    known = {name: hub for name in names if (hub := hub_digest(folder / name))}
    if known:
        compared.append("the Hub")
    for name, digest in known.items():
        wanted.setdefault(name, {})["the Hub"] = digest
    return wanted, compared, findings


def _missing_and_extra(folder: Path, sums: Path, listed: Mapping[str, str]) -> Iterator[Finding]:
    here = files_below(folder)
    for name in listed:
        if not (folder / name).is_file():
            text = f"{folder / name} is missing: {sums.name} has it; fetch it again"
            yield Finding("missing", text, name)
    for name in here:
        if name not in listed and (folder / name).resolve() != sums.resolve():
            text = f"{folder / name} is extra: {sums.name} doesn't have it; remove it, or add its "
            yield Finding("extra", text + f"digest: sha256sum {name} >> {sums.name}", name)


def _differing(
    folder: Path, wanted: Mapping[str, Mapping[str, str]], digests: Mapping[str, str]
) -> Iterator[Finding]:
    for name, found in digests.items():
        for who, wants in wanted[name].items():
            if wants != found:
                text = (
                    f"{folder / name} isn't the file that it was: its SHA-256 is {found[:12]}..., "
                    f"and {who} has {wants[:12]}...; it was changed, damaged, or is another "
                    f"model's: fetch it again"
                )
                details = {"sha256": found, "expected": wants, "says": who}
                yield Finding("differs", text, name, details=details)


def _look_at_file(
    findings: _Findings,
    file: InputFile,
    tensors: list[tuple[str, LazyTensor]],
    found: Mapping[str, Found],
    anatomy: Anatomy,
) -> None:
    for name, tensor in tensors:
        seen = found[name]
        if seen.nan or seen.infinite:
            mask = not seen.nan and anatomy.places[name].role is Role.BUFFER
            place = findings.notes if mask else findings.problems
            place.append(_not_finite(file, name, tensor, seen))
    numbers = [(t, found[n]) for n, t in tensors if t.dtype.kind != "integer" and t.numel]
    if any(len(t.shape) > 1 for t, _ in numbers) and all(seen.zero for _, seen in numbers):
        text = f"{file.path} holds nothing but zeros: it was never written; fetch it again"
        findings.problems.append(Finding("never-written", text, file.path.name))
        return
    for finding, severe in _runs(file, tensors, found):
        (findings.problems if severe else findings.warnings).append(finding)


def _not_finite(file: InputFile, name: str, tensor: LazyTensor, seen: Found) -> Finding:
    assert seen.first is not None
    at = [int(index) for index in numpy.unravel_index(seen.first, tensor.shape)]
    counts = {"NaN": seen.nan, "infinite": seen.infinite}
    said = " and ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    text = (
        f"{file.path}: {name} ({tensor.dtype} {list(tensor.shape)}) holds {said} of "
        f"{tensor.numel:,} values, the first at {at}: the file is damaged, or training diverged"
    )
    details = {"nan": seen.nan, "infinite": seen.infinite, "values": tensor.numel, "first": at}
    return Finding("not-finite", text, file.path.name, name, details)


@dataclass
class _Run:
    start: int
    stop: int
    kinds: set[Zeros]
    tensors: list[str]


def _runs(
    file: InputFile, tensors: list[tuple[str, LazyTensor]], found: Mapping[str, Found]
) -> Iterator[tuple[Finding, bool]]:
    """Zeros that aren't the model's own, and whether that is certain."""
    holes = holes_of(file)
    pieces = []
    for name, tensor in tensors:
        assert isinstance(tensor.leaf, FileSpan)
        pieces += [(*run, name) for run in found[name].runs]
        pieces += [(*run, kind, name) for run, kind in holes_in(tensor, tensor.leaf, holes)]
    for run in _joined(file, sorted(pieces, key=lambda piece: piece[:2])):
        if not run.kinds & {Zeros.FILLED, Zeros.ODD}:
            continue
        hole = any(start < run.stop and run.start < stop for start, stop in holes)
        severe = hole or Zeros.FILLED in run.kinds
        names = _some(list(dict.fromkeys(run.tensors)))
        what = "a hole in the file" if hole else "zeros from or to the middle of a row"
        why = (
            "they were never written, as after a download that stopped or a crash; fetch it again"
            if severe
            else "odd, but not at the edge of a page; compare the file with where it came from"
        )
        text = f"{file.path}: bytes {run.start:,} to {run.stop:,} are {what}, in {names}: {why}"
        details = {"start": run.start, "stop": run.stop, "tensors": run.tensors, "hole": hole}
        kind = "never-written" if severe else "zeros"
        yield Finding(kind, text, file.path.name, details=details), severe


def _joined(file: InputFile, pieces: list[tuple[int, int, Zeros, str]]) -> Iterator[_Run]:
    """Pieces that only zeros lie between, as one: they were looked at part by part, and tensor
    by tensor."""
    read = reader(file)
    run: _Run | None = None
    for start, stop, kind, name in pieces:
        gap = 0 if run is None else start - run.stop
        if run is not None and (gap <= 0 or (gap <= 8192 and not read(run.stop, start).any())):
            run.stop = max(run.stop, stop)
            run.kinds.add(kind)
            if run.tensors[-1] != name:
                run.tensors.append(name)
            continue
        if run is not None:
            yield run
        run = _Run(start, stop, {kind}, [name])
    if run is not None:
        yield run


def _strangers(weights: Opened, inputs: Mapping[InputFile, str]) -> Iterator[Finding]:
    from surgery.integrity.strangers import strange_seams

    for seam in strange_seams(weights.tensors, weights.anatomy):
        first, second = inputs[seam.first], inputs[seam.second]
        text = (
            f"{first} and {second} may be of different models: between {seam.blocks[0]} and "
            f"{seam.blocks[1]} the sizes of the channels have a correlation of {seam.found:.2f}, "
            f"and {seam.usual:.2f} is usual in this model; compare digests with where they "
            f"came from"
        )
        details = {
            "files": [first, second],
            "blocks": list(seam.blocks),
            "correlation": seam.found,
            "usual": seam.usual,
        }
        yield Finding("stranger", text, details=details)


def _notes(found: Mapping[str, Found]) -> Iterator[Finding]:
    zero = [name for name, seen in found.items() if seen.zero and not seen.nan]
    if zero:
        text = f"{_some(zero)}: nothing but zeros"
        yield Finding("zero-tensors", text, details={"tensors": zero})
    rows = [
        name
        for name, seen in found.items()
        if not seen.zero and (seen.columns or any(kind is Zeros.WHOLE for *_, kind in seen.runs))
    ]
    if rows:
        text = f"{_some(rows)}: whole rows or columns of zeros"
        yield Finding("zero-rows", text, details={"tensors": rows})


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
