"""Checkpoint and TaskVector: named lazy tensors, and opening a checkpoint from its headers.

Opening reads headers, the index and `config.json`, and checks them against each other; no byte
of a tensor is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.anatomy import Anatomy, infer, settled_config
from surgery.errors import FormatError, InputError, NotFoundError
from surgery.files import InputFile
from surgery.header import Header, parse_header, read_header
from surgery.hub import Source, resolve
from surgery.tensor import FileSpan, LazyTensor

INDEX_SUFFIX = ".safetensors.index.json"
RECORD = "surgery.json"
CARD = "README.md"
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


@dataclass(frozen=True)
class Edit:
    """One operation as it was run: what it was told, what it was given, what it did.

    `parameters` and `details` are plain data, as they go into the record (`surgery.json`).
    """

    operation: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Source]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, LazyTensor]):
    """A model's tensors by name, its `config.json`, and the files that travel with it.

    `companions` are the other files by their relative path: a path to copy from, or the bytes
    to write. `notes` say what was odd about the files, `left_behind` which files don't travel.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    source: Source
    companions: Mapping[str, Path | bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    history: tuple[Edit, ...] = ()

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def anatomy(self) -> Anatomy:
        """What each tensor is, inferred from names, shapes and the config."""
        return infer(self.tensors, self.config)

    @property
    def settled_config(self) -> dict[str, Any]:
        """The config, with what it says of tied heads made to agree with the files."""
        return settled_config(self.config, self.anatomy)

    @property
    def quantization(self) -> str | None:
        """How the weights are packed, if they are: arithmetic on them would be nonsense."""
        given = self.config.get("quantization_config")
        if isinstance(given, Mapping):
            return str(given.get("quant_method") or given.get("quant_algo") or "unknown")
        for name, tensor in self.tensors.items():
            if tensor.dtype.kind == "packed":
                return f"{tensor.dtype} ({name})"
            if name.endswith((".qweight", ".weight_packed", ".weight_scale_inv", ".absmax")):
                return f"packed weights ({name})"
        return None

    def edited(
        self,
        edit: Edit,
        tensors: Mapping[str, LazyTensor],
        config: Mapping[str, Any] | None = None,
        companions: Mapping[str, Path | bytes] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Checkpoint:
        """This checkpoint after `edit`, with these tensors in the place of those of that name,
        and, where they are given, another config and other companion files."""
        return replace(
            self,
            tensors={**self.tensors, **tensors},
            config=self.config if config is None else config,
            companions=self.companions if companions is None else companions,
            notes=self.notes + notes,
            history=(*self.history, edit),
        )


@dataclass(frozen=True, eq=False)
class TaskVector(Mapping[str, LazyTensor]):
    """tau = tuned - base, tensor by tensor: a mapping and no model."""

    tensors: Mapping[str, LazyTensor]

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def open_checkpoint(reference: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open a directory, a `.safetensors` file or a Hub id `org/name[@revision]`.

    With `headers_only` nothing but headers and small files is fetched from the Hub, and reading
    a tensor fails. Raises NotFoundError, or FormatError with everything that is wrong.
    """
    source = resolve(reference, headers_only=headers_only)
    if source.path.is_file():
        headers = {source.path.name: read_header(source.path)}
        sizes = {source.path.name: source.path.stat().st_size}
        return Checkpoint(_tensors(headers, source.path.parent), {}, replace(source, files=sizes))
    files, index, notes = _weight_files(source)
    headers, sizes = _headers(source, files)
    source = replace(source, files=sizes)
    notes += _cross_check(source, headers, index)
    companions, left_behind = _companions(source, files)
    return Checkpoint(
        tensors=_tensors(headers, source.path),
        config=_read_json(source.path / "config.json", missing={}),
        source=source,
        companions=companions,
        notes=tuple(notes),
        left_behind=tuple(left_behind),
    )


def _tensors(headers: Mapping[str, Header], folder: Path) -> dict[str, LazyTensor]:
    tensors = {}
    for file, header in headers.items():
        shard = InputFile(folder / file)
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
        raise FormatError(f"{folder} is a LoRA adapter and no model: give the model it belongs to")
    if len(indices) > 1:
        raise FormatError(
            f"{folder} has several indices: {', '.join(indices)}; remove all but the right one"
        )
    single = "model.safetensors"
    if indices and single in here:
        named = _read_json(folder / indices[0]).get("weight_map", {})
        if not isinstance(named, dict) or single not in named.values():
            raise FormatError(
                f"{folder} has both {single} and {indices[0]}, and loaders differ in which they "
                f"take: one of them is stale; remove it"
            )
    if indices:
        index = _read_json(folder / indices[0])
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
    for folder, folders, names in os.walk(source.path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(source.path)
        for name in sorted(names):
            path = Path(folder) / name
            key = (relative / name).as_posix()
            if name.startswith(".") or (folder == str(source.path) and name in files):
                continue
            if key in ("config.json", RECORD) or name.endswith(INDEX_SUFFIX):
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


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
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
