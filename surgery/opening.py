"""Opening a checkpoint from its headers, its index and `config.json`, checked against each other;
no byte of a tensor is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.anatomy import Corrections
from surgery.anatomy.stored import KEY, from_data
from surgery.checkpoint import CHECKSUMS, CONFIG, RECORD, SIGNATURE, Checkpoint
from surgery.errors import FormatError, InputError, NotFoundError
from surgery.files import InputFile
from surgery.header import Header, parse_header, read_header
from surgery.hub import Source, resolve
from surgery.system import reading
from surgery.tensor import FileSpan, LazyTensor
from surgery.untrusted import brief, parse_table, read_small

INDEX_SUFFIX = ".safetensors.index.json"
TASK_VECTOR = "task_vector.json"
"""What marks a directory as a task vector."""
OTHER_WEIGHTS = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
    ".mlmodel",
    ".ot",
    ".pkl",
    ".pickle",
    ".distcp",
]
OTHER_FOLDERS = re.compile(r"onnx|openvino|coreml|original|global_step\d*|__pycache__")
"""Folders of other formats and of trainers: what is in them belongs to the weights as they were."""
OF_THESE_BYTES = (CONFIG, RECORD, CHECKSUMS, SIGNATURE)
"""Files that are made anew, or not at all: what they say is true of the files as they were."""
MOST_SHARDS = 10_000
"""A name that claims more is no count to trust."""
MOST_TENSORS = 350_000
"""More than the largest mixtures have (some 210,000), and few enough to hold in a gigabyte."""
MOST_COMPANIONS = 100_000
DEEPEST_FOLDER = 50
LONGEST_FILE_NAME = 255


def open_checkpoint(reference: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open a directory, a `.safetensors` file or a Hub id `org/name[@revision]`.

    With `headers_only` nothing but headers and small files is fetched from the Hub, and reading
    a tensor fails. Raises NotFoundError, or FormatError with everything that is wrong.
    """
    with reading(reference):
        return _open(reference, headers_only)


def _open(reference: str | Path, headers_only: bool) -> Checkpoint:
    source = resolve(reference, headers_only=headers_only)
    if source.path.is_file():
        headers = {source.path.name: read_header(source.path)}
        sizes = {source.path.name: source.path.stat().st_size}
        folder = source.path.parent
        beside = [f"{source.reference}: {CONFIG} beside it isn't read: give {folder} to have it"]
        return Checkpoint(
            tensors=_tensors(headers, folder),
            config={},
            source=replace(source, files=sizes),
            notes=tuple(beside if (folder / CONFIG).is_file() else ()),
        )
    files, index, notes = _weight_files(source)
    tensors, source, more = _open_files(source, files, index)
    companions, left_behind = _companions(source, files)
    corrections, told = _corrections(source)
    return Checkpoint(
        tensors=tensors,
        config=read_json(source.path / CONFIG, missing={}),
        source=source,
        companions=companions,
        notes=(*notes, *more, *told),
        left_behind=tuple(left_behind),
        corrections=corrections,
    )


def _corrections(source: Source) -> tuple[Corrections, list[str]]:
    """What a user said of the anatomy before an earlier edit, from the record, and a note."""
    path = source.path / RECORD
    try:
        record = read_json(path, missing={})
    except InputError:
        return Corrections(), []  # it isn't ours
    if KEY not in record:
        return Corrections(), []
    try:
        found = from_data(record[KEY])
    except (ValueError, TypeError) as error:
        return Corrections(), [
            f"{path}: what it says of the anatomy can't be meant, and isn't taken: {error}"
        ]
    return found, [f"{source.reference}: its anatomy is corrected as {RECORD} beside it says"]


def open_tensors(source: Source, stem: str) -> tuple[dict[str, LazyTensor], Source]:
    """The tensors in `stem`.safetensors of a directory, or in its shards, and the source with
    the files that they lie in."""
    index = source.path / f"{stem}{INDEX_SUFFIX}"
    if not index.exists():
        tensors, source, _ = _open_files(source, [f"{stem}.safetensors"], None)
        return tensors, source
    named = read_json(index)
    tensors, source, _ = _open_files(source, _files_of_index(named, index), named)
    return tensors, source


def _open_files(
    source: Source, files: list[str], index: Mapping[str, Any] | None
) -> tuple[dict[str, LazyTensor], Source, list[str]]:
    """Tensors, the source with the sizes of its files, and notes."""
    headers, sizes = _headers(source, files)
    source = replace(source, files=sizes)
    notes = _cross_check(source, headers, index)
    return _tensors(headers, source.path), source, notes


def _tensors(headers: Mapping[str, Header], folder: Path) -> dict[str, LazyTensor]:
    tensors = {}
    for file, header in headers.items():
        shard = InputFile(folder / file, header.stamp)
        for name, entry in header.entries.items():
            span = FileSpan(shard, entry.start, entry.stop - entry.start)
            tensors[name] = LazyTensor(entry.shape, entry.dtype, leaf=span)
    return tensors


def _weight_files(source: Source) -> tuple[list[str], Mapping[str, Any] | None, list[str]]:
    """The safetensors files that make up the model, the index if there is one, and notes."""
    folder = source.path
    here = {path.name for path in folder.glob("*.safetensors")} | set(source.remote_headers)
    indices = sorted(path.name for path in folder.glob(f"*{INDEX_SUFFIX}"))
    here.discard("adapter_model.safetensors")
    if (folder / "adapter_config.json").exists() and not here:
        raise FormatError(
            f"{folder} is a LoRA adapter and no model: give the model it belongs to as well, "
            f"written MODEL+{folder}"
        )
    if (folder / TASK_VECTOR).exists():
        raise FormatError(
            f"{folder} is a task vector and no model: `surgery apply BASE {folder}` adds it to one"
        )
    if len(indices) > 1:
        raise FormatError(
            f"{folder} has several indices: {', '.join(indices)}; remove all but the right one"
        )
    single = "model.safetensors"
    if indices and single in here:
        named = read_json(folder / indices[0]).get("weight_map", {})
        if not isinstance(named, dict) or single not in named.values():
            raise FormatError(
                f"{folder} has both {single} and {indices[0]}, and loaders differ in which they "
                f"take: one of them is stale; remove it"
            )
    if indices:
        index = read_json(folder / indices[0])
        files = _files_of_index(index, folder / indices[0])
    elif single in here:
        index, files = None, [single]
    elif here:
        index, files = None, sorted(here)
        _complete(folder, files)
    else:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_WEIGHTS)
        raise FormatError(
            f"{folder} has no safetensors file"
            + (f", only {', '.join(others[:3])}: convert it to safetensors first" if others else "")
        )
    stray = sorted(here - set(files))
    notes = [f"{name} isn't in the index, and is left out" for name in stray if index is not None]
    notes += [f"{name} is left out beside {single}" for name in stray if index is None]
    return files, index, notes


def _complete(folder: Path, files: list[str]) -> None:
    """Without an index, the shards' own names say how many there are."""
    numbered = [re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", name) for name in files]
    sets = {(match.group(1), int(match.group(3))) for match in numbered if match}
    FormatError.raise_if(
        f"{folder / name}: no such file, and the names of the others say that there is one"
        for prefix, count in sorted(sets)
        for name in (f"{prefix}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))
        if count <= MOST_SHARDS and name not in files
    )


def _files_of_index(index: Mapping[str, Any], path: Path) -> list[str]:
    """The files that the index names. Refuses a name that isn't that of a file beside it."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map")
    named = {value for value in weight_map.values() if isinstance(value, str)}
    strange = [brief(value) for value in weight_map.values() if not isinstance(value, str)]
    strange += [brief(name) for name in sorted(named) if not _is_plain_name(name)]
    FormatError.raise_if(
        f"{path}: weight_map names {name}, which isn't the plain name of a file beside it"
        for name in dict.fromkeys(strange)
    )
    return sorted(named)


def _is_plain_name(name: str) -> bool:
    """Whether it is the name of a file in the same folder, on any system."""
    long = len(name.encode("utf-8", "surrogatepass")) > LONGEST_FILE_NAME
    plain = name == PurePosixPath(name).name and "\\" not in name and name not in ("", "..")
    return plain and name.isprintable() and not long


def _headers(source: Source, files: list[str]) -> tuple[dict[str, Header], dict[str, int]]:
    problems: list[str] = []
    headers: dict[str, Header] = {}
    sizes: dict[str, int] = {}
    for name in files:
        path = source.path / name
        try:
            if remote := source.remote_headers.get(name):
                where = f"{source.reference}: {name}"
                headers[name] = parse_header(remote.header, remote.size, where)
                sizes[name] = remote.size
            else:
                _stays_inside(path, source.path)
                headers[name] = read_header(path)
                sizes[name] = path.stat().st_size
        except NotFoundError:
            problems.append(f"{path}: the index names this shard, and it isn't there; fetch it")
        except InputError as error:
            problems.extend(error.problems)
        if (count := sum(len(header.entries) for header in headers.values())) > MOST_TENSORS:
            raise FormatError(f"{source.path} has more than {count:,} tensors: no model has")
    FormatError.raise_if(problems)
    return headers, sizes


def _stays_inside(path: Path, folder: Path) -> None:
    """Refuse a link out of the checkpoint. The Hub's cache links a snapshot's files to blobs
    beside the snapshots; where those lead is the cache's business."""
    if not path.is_symlink():
        return
    root = folder.resolve()
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # the latter up to Python 3.12, for a loop
        raise FormatError(f"{path} is a link that leads nowhere: {error}") from error
    if inside:
        return
    first_hop = Path(os.path.normpath(path.parent.resolve() / path.readlink()))
    if root.parent.name != "snapshots" or first_hop.parent != root.parent.parent / "blobs":
        raise FormatError(
            f"{path} is a link to {path.resolve()}, outside the checkpoint: put the file there"
        )


def _cross_check(
    source: Source, headers: Mapping[str, Header], index: Mapping[str, Any] | None
) -> list[str]:
    """Each name in exactly one file, and where the index says. Returns notes."""
    where: dict[str, str] = {}
    problems = []
    for file, header in headers.items():
        for name in header.entries:
            if name in where:
                problems.append(f"{source.path}: {name} is in both {where[name]} and {file}")
            where[name] = file
    notes: list[str] = []
    if index is not None:
        named = index["weight_map"]
        for name in () if named == where else {**named, **where}:
            says, lies = named.get(name), where.get(name)
            if says != lies:
                problems.append(
                    f"{source.path}: the index has {name} in {says or 'no file'}, and the "
                    f"headers have it in {lies or 'no file'}"
                )
        total = sum(e.stop - e.start for h in headers.values() for e in h.entries.values())
        metadata = index.get("metadata")
        says = metadata.get("total_size") if isinstance(metadata, dict) else None
        if isinstance(says, int) and says != total:
            notes.append(f"the index says total_size {says:,}, and the tensors have {total:,}")
    FormatError.raise_if(problems)
    return notes


def _companions(source: Source, files: list[str]) -> tuple[dict[str, Path | bytes], list[str]]:
    """The other files that travel, by relative path, and those that don't."""
    companions: dict[str, Path | bytes] = {}
    left_behind: list[str] = []
    for relative, entry in _walk(source.path):
        path, name, key = Path(entry.path), entry.name, str(relative / entry.name)
        if (not relative.parts and name in files) or key in OF_THESE_BYTES:
            continue
        if name.endswith(INDEX_SUFFIX):
            continue
        other_format = path.suffix in OTHER_WEIGHTS or ".bin.index.json" in name
        if other_format or any(map(OTHER_FOLDERS.fullmatch, relative.parts)):
            left_behind.append(key)
            continue
        if len(companions) == MOST_COMPANIONS:
            raise FormatError(
                f"{source.path} has more than {MOST_COMPANIONS:,} files: no model has"
            )
        _stays_inside(path, source.path)
        if path.is_file():
            companions[key] = path
        elif path.is_symlink() and not path.is_dir():
            raise NotFoundError(f"{path} is a link to {path.readlink()}, which isn't there")
        else:  # a pipe, a socket, a device, a link to a folder
            left_behind.append(key)
    return companions, left_behind


def _walk(root: Path) -> Iterator[tuple[PurePosixPath, os.DirEntry[str]]]:
    """Everything below `root` that is no folder and not hidden, with the folder it is in, level by
    level. Links aren't followed."""
    level = [PurePosixPath()]
    for _ in range(DEEPEST_FOLDER):
        below = []
        for relative in level:
            with reading(root / relative), os.scandir(root / relative) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            for entry in listed:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    below.append(relative / entry.name)
                else:
                    yield relative, entry
        if not below:
            return
        level = below
    raise FormatError(f"{root} has folders that are nested more than {DEEPEST_FOLDER} deep")


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON table in a file; `missing`, if given, where there is no file."""
    _stays_inside(path, path.parent)
    try:
        return parse_table(read_small(path), str(path))
    except NotFoundError:
        if missing is not None:
            return missing
        raise
