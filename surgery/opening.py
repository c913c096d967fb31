"""Opening a checkpoint from its headers, its index and `config.json`, checked against each other; no
byte of a tensor is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.checkpoint import CONFIG, RECORD, Checkpoint
from surgery.errors import FormatError, InputError, NotFoundError
from surgery.files import InputFile
from surgery.header import Header, parse_header, read_header
from surgery.hub import Source, resolve
from surgery.system import reading
from surgery.tensor import FileSpan, LazyTensor

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
MOST_SHARDS = 10_000
"""A name that claims more is no count to trust."""


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
        return Checkpoint(
            tensors=_tensors(headers, source.path.parent),
            config={},
            source=replace(source, files=sizes),
        )
    files, index, notes = _weight_files(source)
    tensors, source, more = _open_files(source, files, index)
    companions, left_behind = _companions(source, files)
    return Checkpoint(
        tensors=tensors,
        config=read_json(source.path / CONFIG, missing={}),
        source=source,
        companions=companions,
        notes=(*notes, *more),
        left_behind=tuple(left_behind),
    )


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
    strange = [value for value in weight_map.values() if not isinstance(value, str)]
    named = {value for value in weight_map.values() if isinstance(value, str)}
    strange += [n for n in sorted(named) if n != PurePosixPath(n).name or "\\" in n or "\0" in n]
    strange += [n for n in sorted(named) if n in ("", "..")]
    FormatError.raise_if(
        f"{path}: weight_map names {name!r}, which isn't the plain name of a file beside it"
        for name in dict.fromkeys(map(str, strange))
    )
    return sorted(named)


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
        for name in [*named, *(name for name in where if name not in named)]:
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
    for folder, folders, names in os.walk(source.path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(source.path)
        for name in sorted(names):
            path = Path(folder) / name
            key = (relative / name).as_posix()
            if name.startswith(".") or (folder == str(source.path) and name in files):
                continue
            if key in (CONFIG, RECORD) or name.endswith(INDEX_SUFFIX):
                continue
            other_format = path.suffix in OTHER_WEIGHTS or ".bin.index.json" in name
            if other_format or any(map(OTHER_FOLDERS.fullmatch, relative.parts)):
                left_behind.append(key)
                continue
            _stays_inside(path, source.path)
            if path.is_file():
                companions[key] = path
            elif path.is_symlink():
                raise NotFoundError(f"{path} is a link to {path.readlink()}, which isn't there")
    return companions, left_behind


def _raise(error: OSError) -> None:
    """What can't be listed isn't passed over: its files would be lost."""
    raise error


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON table in a file; `missing`, if given, where there is no file."""
    _stays_inside(path, path.parent)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise NotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} isn't a JSON table")
    return value
