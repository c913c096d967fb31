"""What a run is about to write, as plain data by which a later run tells whether it writes the
same: what every tensor is computed from and how, the input files, the layout, the versions.

A lazy tensor is data, so this is read off it, down to the arguments of its kernels; the recipe
that made it is kept only so that a difference can be named.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from surgery.errors import FormatError
from surgery.files import InputFile, as_bytes
from surgery.header import LENGTH_BYTES, LONGEST
from surgery.integrity.digests import hub_digest
from surgery.system import reading
from surgery.tensor import FileSpan, LazyTensor
from surgery.writing.plan import Plan
from surgery.writing.record import version

FORMAT = 1
SHOWN = 6
"""Differences that are named; two recipes can differ in everything."""

Identity = dict[str, Any]


class _Nameless(Exception):
    """Something in a kernel that can't be told from another, as a lambda can't."""


def identify(layout: Plan) -> Identity | None:
    """What will be written, or None if a kernel isn't a named function of plain values."""
    names = _Names()
    try:
        shards = {
            shard.name: {
                "size": shard.size,
                "head": _sha256(shard.head),
                "tensors": _sha256(
                    "\n".join(f"{n!r}:{names.tensor(layout.weights[n])}" for n in shard.offsets)
                ),
            }
            for shard in layout.shards
        }
    except (_Nameless, RecursionError):
        return None
    edits = [
        {
            "operation": edit.operation,
            "parameters": dict(edit.parameters),
            "inputs": {role: source.reference for role, source in edit.inputs.items()},
        }
        for edit in layout.weights.history
    ]
    made = {
        "format": FORMAT,
        "versions": {"Surgery": version("model-surgery"), "torch": version("torch")},
        "edits": edits,
        "files": {path: _file(file) for path, file in sorted(names.files.items())},
        "shards": shards,
    }
    found: Identity = json.loads(json.dumps(made, default=str))
    return found


def differences(before: Identity, now: Identity) -> list[str]:
    """In what two runs differ, the most telling first; empty if they write the same."""
    if before == now:
        return []
    if before.get("format") != now["format"]:
        return ["what was kept is of another version of Surgery"]
    found = [
        f"{name} was {was} and is {now['versions'][name]}"
        for name, was in before["versions"].items()
        if was != now["versions"].get(name)
    ]
    found += _edits(before["edits"], now["edits"])
    found += _files(before["files"], now["files"])
    if not found:
        heads = [
            {name: (one["size"], one["head"]) for name, one in side["shards"].items()}
            for side in (before, now)
        ]
        if heads[0] != heads[1]:
            found.append(f"the shards are others: {len(heads[0])} before, {len(heads[1])} now")
        else:
            found.append("tensors are computed in another way")
    more = len(found) - SHOWN
    return found if more <= 0 else [*found[:SHOWN], f"and {more} more differences"]


def _edits(before: list[Any], now: list[Any]) -> list[str]:
    steps = [[edit["operation"] for edit in side] for side in (before, now)]
    if steps[0] != steps[1]:
        were, are = (", ".join(side) or "none" for side in steps)
        return [f"the operations were {were} and are {are}"]
    found = []
    for one, other in zip(before, now, strict=True):
        for kind in ("parameters", "inputs"):
            for key in dict.fromkeys([*one[kind], *other[kind]]):
                was, is_ = one[kind].get(key), other[kind].get(key)
                if was != is_:
                    found.append(f"{one['operation']}: {key} was {was} and is {is_}")
    return found


def _files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for path in dict.fromkeys([*before, *now]):
        was, is_ = before.get(path), now.get(path)
        if was is None or is_ is None:
            found.append(f"{path} is {'read now' if was is None else 'no longer read'}")
        elif was != is_:
            what = [name for name in was if was[name] != is_.get(name)]
            found.append(f"{path} has changed: its {' and '.join(what)}")
    return found


def _file(file: InputFile) -> dict[str, Any]:
    """What tells a file from another without reading it all; taken from the file that is open."""
    with reading(file.path):
        stat = os.fstat(file.descriptor.fd)
    start = bytearray(LENGTH_BYTES)
    file.read_into(memoryview(start), 0)
    length = int.from_bytes(start, "little")
    if length > min(LONGEST, stat.st_size):
        raise FormatError(f"{file.path} is no safetensors file any more: it was when it was opened")
    head = bytearray(length)
    file.read_into(memoryview(head), LENGTH_BYTES)
    return {
        "size": stat.st_size,
        "time": stat.st_mtime_ns,
        "header": _sha256(start + head),
        "digest": hub_digest(file.path),
    }


class _Names:
    """Texts that are the same for the same values in another process: no address, no order of
    a set. What is used many times is worked out once."""

    def __init__(self) -> None:
        self.files: dict[str, InputFile] = {}
        self._paths: dict[Path, str] = {}
        self._seen: dict[int, tuple[object, str]] = {}  # the object too, or its id may come again

    def tensor(self, tensor: LazyTensor) -> str:
        """A digest of what the tensor is and how its rows are made."""
        if (seen := self._seen.get(id(tensor))) is not None:
            return seen[1]
        parts = (
            f"{tensor.shape}{tensor.dtype.name}{tensor.rowwise}{tensor.runs}",
            *(self.value(v) for v in (tensor.leaf, tensor.kernel, tensor.measure, tensor.tally)),
            *(self.tensor(one) for one in tensor.inputs),
        )
        return self._remember(tensor, _sha256("|".join(parts)))

    def value(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, float, str, bytes, complex):
            return repr(value)
        if type(value) is FileSpan:
            return f"{self._file(value.file)}[{value.offset}:{value.length}]"
        if (seen := self._seen.get(id(value))) is not None:
            return seen[1]
        return self._remember(value, self._described(value))

    def _described(self, value: Any) -> str:
        if isinstance(value, LazyTensor):
            return self.tensor(value)
        if isinstance(value, partial):
            given = [self.value(v) for v in (value.func, value.args, value.keywords)]
            return f"partial({', '.join(given)})"
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)) or hasattr(
            value, "__objclass__"  # a method of torch.Tensor's, say
        ):  # fmt: skip
            return _function(value)
        if isinstance(value, InputFile):
            return self._file(value)
        if isinstance(value, enum.Enum):
            return f"{_function(type(value))}.{value.name}"
        if is_dataclass(value):
            inside = (f"{f.name}={self.value(getattr(value, f.name))}" for f in fields(value))
            return f"{_function(type(value))}({', '.join(inside)})"
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({', '.join(map(self.value, value))})"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{self.value(k)}: {self.value(v)}' for k, v in value.items())}}}"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self.value, value)))}}}"
        return _array(value)

    def _file(self, file: InputFile) -> str:
        if (path := self._paths.get(file.path)) is None:
            path = self._paths[file.path] = os.path.realpath(file.path)
            self.files.setdefault(path, file)
        return repr(path)

    def _remember(self, value: object, text: str) -> str:
        self._seen[id(value)] = value, text
        return text


def _array(value: Any) -> str:
    """Values in memory, by their bytes; Raises _Nameless for what isn't an array either."""
    import numpy
    import torch

    if isinstance(value, torch.dtype):
        return repr(value)
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        digest = _sha256(numpy.ascontiguousarray(value).tobytes())
        return f"array({value.dtype}, {value.shape}, {digest})"
    if isinstance(value, numpy.generic):
        return f"{value.dtype}({value!r})"
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        digest = _sha256(as_bytes(value.detach().contiguous()))
        return f"tensor({value.dtype}, {tuple(value.shape)}, {digest})"
    raise _Nameless(type(value).__qualname__)


def _function(value: Any) -> str:
    """A function or a class by its name, and the code of a function: a name may stay when what
    it does is changed. What a closure holds can't be named."""
    name: str = value.__qualname__
    owner = getattr(value, "__self__", None)
    bound = owner is not None and not isinstance(owner, (type, types.ModuleType))
    if "<" in name or bound or getattr(value, "__closure__", None):
        raise _Nameless(name)
    code = getattr(value, "__code__", None)
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" + ("" if code is None else f"#{_code(code)}")


@lru_cache(4096)
def _code(code: types.CodeType) -> str:
    return _sha256(f"{code.co_code.hex()}{code.co_names}{[*map(_constant, code.co_consts)]}")


def _constant(value: object) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def _sha256(data: str | bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data.encode("utf-8", "backslashreplace") if isinstance(data, str)
                          else data).hexdigest()  # fmt: skip
