"""Named lazy tensors that make a directory, and the one that matters most: Checkpoint, a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from surgery.anatomy import Anatomy, Corrections, infer, settled_config
from surgery.anatomy.infer import MODULE_WIDTHS_KEY, WIDTH_KEYS_KEY, WIDTHS_KEY
from surgery.files import as_bytes
from surgery.hub import Source
from surgery.quantization.fp8 import Layout, find_layout
from surgery.quantization.schemes import Quantization, find_quantization
from surgery.system import naming
from surgery.tensor import LazyTensor

CONFIG = "config.json"
RECORD = "surgery.json"
CARD = "README.md"
CHECKSUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
FINGERPRINT_ELEMENTS = 2048
_ORIGIN = ("_name_or_path", "transformers_version")


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
class Weights(Mapping[str, LazyTensor]):
    """Named lazy tensors that are written as one directory, and the files that go with them.

    `companions` are the other files by their relative path: a path to copy from, or the bytes
    to write. `notes` say what was odd about the files, `left_behind` which files don't travel.
    """

    stem: ClassVar[str]
    """The name of the safetensors files, without numbers and suffix."""
    library: ClassVar[str | None] = None
    """What loads the directory, as the Hub names libraries."""
    sharded: ClassVar[bool] = True
    """Whether what loads it knows several files and their index."""

    tensors: Mapping[str, LazyTensor]
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

    # what Mapping has for these asks for each tensor by its name, and there may be 100,000
    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def items(self) -> ItemsView[str, LazyTensor]:
        return self.tensors.items()

    def values(self) -> ValuesView[LazyTensor]:
        return self.tensors.values()

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where what this is made of lies."""
        return tuple(s.path for edit in self.history for s in edit.inputs.values())

    @property
    def unrecognised(self) -> list[str]:
        """Tensors whose role in the model isn't known."""
        return []

    def own_files(self) -> dict[str, bytes]:
        """Small files that belong to this kind of directory, by name."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint(Weights):
    """A model: its tensors by name, its `config.json`, and the files that travel with it."""

    stem: ClassVar[str] = "model"
    library: ClassVar[str | None] = "transformers"

    config: Mapping[str, Any]
    source: Source
    corrections: Corrections = field(default_factory=Corrections)
    """What a user says of the anatomy, over what is inferred."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.source.path, *super().paths)

    @property
    def unrecognised(self) -> list[str]:
        return self.anatomy.unrecognised

    def own_files(self) -> dict[str, bytes]:
        """`config.json`: its own bytes where nothing changed, else its keys in order; nothing if
        the input had none and none was made."""
        given = self.source.path / CONFIG
        if given.is_file():
            with naming(given):
                raw = given.read_bytes()
            if json.dumps(json.loads(raw)) == json.dumps(self.config):  # 1 isn't true or 1.0
                return {CONFIG: raw}
        elif not self.config:
            return {}
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        return {CONFIG: text.encode("utf-8", "backslashreplace")}  # half a surrogate pair: escaped

    @cached_property
    def fingerprint(self) -> str:
        """What tells these weights from others without reading them all: the SHA-256 of names,
        types, shapes and the first rows of every float tensor (some 4 KB of each)."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            if tensor.dtype.kind == "float":
                rows = min(tensor.rows, -(-FINGERPRINT_ELEMENTS // max(1, tensor.width)))
                digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
                digest.update(as_bytes(tensor.read(0, rows).contiguous()))
        return digest.hexdigest()

    @cached_property
    def anatomy(self) -> Anatomy:
        """What each tensor is, inferred from names, shapes and the config,
        and corrected. The scales of 8-bit floats are what their weights are."""
        if self.scales is None:
            return infer(self.tensors, self.config, self.corrections)
        weight_of = self.scales.weight_of
        weights = {name: tensor for name, tensor in self.items() if name not in weight_of}
        return infer(weights, self.config, self.corrections).with_owned(weight_of)

    @property
    def settled_config(self) -> dict[str, Any]:
        """The config, with what it says of tied heads made to agree with the files."""
        return settled_config(self.config, self.anatomy)

    @property
    def needs_code(self) -> bool:
        """Whether layers differ in width, so that stock classes can't load it: our modeling file
        beside the shards does."""
        return not {WIDTHS_KEY, WIDTH_KEYS_KEY, MODULE_WIDTHS_KEY}.isdisjoint(self.config)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the weights are packed, if they are: arithmetic on them would be nonsense."""
        return find_quantization(self.tensors, self.config)

    @cached_property
    def scales(self) -> Layout | None:
        """Which tensors scale which, where weights are 8-bit floats with scales."""
        found = self.quantization
        return find_layout(self.tensors, self.config) if found and found.scaled else None

    def edited(
        self,
        edit: Edit,
        tensors: Mapping[str, LazyTensor],
        config: Mapping[str, Any] | None = None,
        companions: Mapping[str, Path | bytes] | None = None,
        notes: tuple[str, ...] = (),
        others: Iterable[Weights] = (),
    ) -> Checkpoint:
        """This checkpoint after `edit`, with these tensors in the place of those of that name,
        and, where they are given, another config and other companion files. The edits that
        `others`, the further inputs of `edit`, have behind them are part of its history."""
        made = replace(
            self,
            tensors={**self.tensors, **tensors},
            config=self.config if config is None else config,
            companions=self.companions if companions is None else companions,
            notes=self.notes + notes,
            history=(*joint_history(self, *others), edit),
        )
        if "anatomy" in vars(self):
            share_anatomy(self, made)
        return made


def share_anatomy(known: Checkpoint, other: Checkpoint) -> None:
    """Infer one anatomy for two checkpoints that agree in all that it is made from. Of 100,000
    tensors it takes seconds."""
    if "anatomy" not in vars(other) and _same_headers(known, other):
        vars(other)["anatomy"] = known.anatomy


def _same_headers(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, in their order, types, shapes, configs and corrections are the same."""
    return (
        json.dumps(_described(one.config)) == json.dumps(_described(other.config))
        and one.corrections == other.corrections
        and list(one) == list(other)
        and all(
            a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(one.values(), other.values(), strict=True)
        )
    )


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what says nothing of the tensors: which file it was, who wrote it."""
    return {key: value for key, value in config.items() if key not in _ORIGIN}


def joint_history(*inputs: Weights) -> tuple[Edit, ...]:
    """The edits behind several inputs, each once."""
    return tuple({id(edit): edit for one in inputs for edit in one.history}.values())
