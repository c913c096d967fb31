"""The plan of an output: every shard with its header, every tensor with its offset, and what
it will take. Made from shapes and dtypes alone; no tensor byte is read."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import Weights
from surgery.errors import ArgumentError
from surgery.header import LENGTH_BYTES
from surgery.tensor import FileSpan, LazyTensor

MAX_SHARD_BYTES = 5_000_000_000
ALIGNMENT = 8
"""Tensor data starts at a multiple of this, so that a mapped file can be used as it is."""


FILE_BLOCK = 4096
"""Bytes of a block of a file system, which is the least that two files can share."""
SHARED_BYTES = 1 << 20
"""Bytes of a tensor that is worth sharing. Smaller ones don't decide where a shard's data starts,
so that what steps of a chain leave to be shared, tensors of whole blocks, all start alike."""


@dataclass(frozen=True)
class Shard:
    """A file to write: `head` is its first bytes, `offsets` where in the file tensors start."""

    name: str
    head: bytes
    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Plan:
    """What will be written, and how much of it has to be computed.

    A tensor is *untouched* if it is what it was, *copied* if it is made of rows that lie in
    files, and *computed* otherwise.
    """

    weights: Weights
    shards: tuple[Shard, ...]
    computed: tuple[str, ...]
    copied: tuple[str, ...]
    untouched: tuple[str, ...]

    @property
    def needs_torch(self) -> bool:
        """Whether something has to be computed by it."""
        return any(self.weights[name].needs_torch for name in self.computed)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def companion_bytes(self) -> int:
        """Bytes of the files that travel along."""
        companions = self.weights.companions.values()
        return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in companions)

    @property
    def bytes_needed(self) -> int:
        """Bytes of disk that the output takes, the small files that are made included."""
        return self.weight_bytes + self.companion_bytes + (1 << 20)

    @property
    def index(self) -> bytes | None:
        """The index of the shards, or None for one file."""
        if len(self.shards) == 1:
            return None
        where = {name: shard.name for shard in self.shards for name in shard.offsets}
        index = {
            "metadata": {"total_size": self.weights.nbytes},
            "weight_map": dict(sorted(where.items())),
        }
        return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def plan(weights: Weights, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Plan:
    """Lay out all shards. Tensors keep their order; a shard is full before the next begins.

    Raises ArgumentError if a shard could hold nothing.
    """
    if max_shard_bytes < 1:
        raise ArgumentError(f"max_shard_bytes is {max_shard_bytes}, and has to be at least 1")
    groups: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        nbytes = tensor.nbytes
        full = weights.sharded and size + nbytes > max_shard_bytes
        if groups[-1] and full:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += nbytes
    single = len(groups) == 1
    shards = tuple(
        _shard(
            f"{weights.stem}.safetensors"
            if single
            else f"{weights.stem}-{number:05d}-of-{len(groups):05d}.safetensors",
            group,
        )
        for number, group in enumerate(groups, 1)
    )
    untouched = tuple(name for name, tensor in weights.items() if isinstance(tensor.leaf, FileSpan))
    known = set(untouched)
    copied = tuple(
        name
        for name, tensor in weights.items()
        if name not in known and tensor.file_spans() is not None
    )
    known.update(copied)
    computed = tuple(name for name in weights if name not in known)
    return Plan(weights, shards, computed, copied, untouched)


def _shard(name: str, tensors: Mapping[str, LazyTensor]) -> Shard:
    """Wider types come first, so that every tensor is aligned to its own type."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.bits)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    end = 0
    for tensor_name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        starts[tensor_name] = start
        table[tensor_name] = {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * _padding(len(text), [(starts[name], tensor) for name, tensor in ordered])
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    offsets = {tensor_name: len(head) + start for tensor_name, start in starts.items()}
    return Shard(name, head, offsets, len(head) + end)


def _padding(length: int, tensors: Iterable[tuple[int, LazyTensor]]) -> int:
    """Spaces after a header of `length` bytes, so that as many bytes as possible lie in their
    page of the output where they lie in a page of the input: a file system that shares blocks
    between files needs that."""
    begin = LENGTH_BYTES + length
    votes: Counter[int] = Counter()
    for start, tensor in tensors:
        nbytes = tensor.nbytes
        if nbytes < SHARED_BYTES:
            continue
        span = next(tensor.file_spans() or iter(()), None)
        if span is not None and (span.offset - start) % ALIGNMENT == 0:
            votes[(span.offset - start - begin) % FILE_BLOCK] += nbytes
    if not votes:
        return -begin % ALIGNMENT
    return min(votes, key=lambda spaces: (-votes[spaces], spaces))


def free_bytes(target: Path) -> int:
    """Bytes free where `target` will be."""
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
