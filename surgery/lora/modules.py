"""Which tensors of a model an adapter can change, and how PEFT calls the modules they are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from surgery.anatomy import Role
from surgery.anatomy.matrices import stores_in_out
from surgery.checkpoint import Checkpoint
from surgery.errors import ArgumentError, UnsupportedError
from surgery.lora.matching import Names
from surgery.modeling.modules import Layer, layers


@dataclass(frozen=True)
class Matrix:
    """A weight to take apart: the tensor on disk and the module that PEFT finds it in."""

    name: str
    module: str
    in_out: bool


@dataclass(frozen=True)
class Modules:
    """The modules of a model: those to take apart, and the rest by what they hold on disk."""

    matrices: tuple[Matrix, ...]
    owners: dict[str, tuple[str, str]]
    """The module and the parameter in it, for every tensor on disk that is one."""
    layers: dict[str, Layer]


def find_modules(base: Checkpoint, patterns: Sequence[str] | None) -> Modules:
    """Every linear layer inside the blocks, or those that `patterns` match: whole names or their
    ends, with * and ? as in file names. Raises ArgumentError for a pattern that matches none."""
    if isinstance(patterns, str):  # a sequence of letters, to Python
        raise ArgumentError(f"modules is {patterns!r}, and has to be a list of names")
    known = layers(base.config) if base.config else _as_stored(base)
    names = Names(base)
    owners: dict[str, tuple[str, str]] = {}
    matrices = []
    for module, layer in known.items():
        for parameter in layer.parameters:
            if found := names.find(f"{module}.{parameter}"):
                owners.setdefault(found, (module, parameter))
        name = names.find(f"{module}.weight") if layer.linear else None
        if name is None or owners[name] != (module, "weight") or len(base[name].shape) != 2:
            continue
        if base[name].dtype.kind == "float" and _chosen(base, name, module, patterns):
            matrices.append(Matrix(name, module, layer.in_out))
    ArgumentError.raise_if(
        f"no linear layer is called {pattern!r}: give its name or the end of it, such as q_proj"
        for pattern in patterns or ()
        if not any(_matches(matrix.module, pattern) for matrix in matrices)
    )
    if not matrices:
        raise UnsupportedError(
            f"{base.source.reference} has no linear layers in blocks: `surgery inspect` shows what "
            f"was recognised, and patterns can name other layers"
        )
    return Modules(tuple(matrices), owners, known)


def short_names(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """The ends of the names, where they name nothing else; else the names themselves."""
    ends = sorted({module.rpartition(".")[2] for module in chosen})
    reached = {module for module in every if module.rpartition(".")[2] in ends}
    return ends if reached == set(chosen) else sorted(chosen)


def is_head(module: str) -> bool:
    """Whether that is what transformers calls the head of a causal model."""
    return module.rpartition(".")[2] in ("lm_head", "embed_out")


def _chosen(base: Checkpoint, name: str, module: str, patterns: Sequence[str] | None) -> bool:
    if patterns is None:
        return base.anatomy.places[name].block is not None
    return any(_matches(module, pattern) for pattern in patterns)


def _matches(module: str, pattern: str) -> bool:
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def _as_stored(base: Checkpoint) -> dict[str, Layer]:
    """Without a config the names on disk are all there is, and shapes tell what is linear."""
    places = base.anatomy.places
    in_out = stores_in_out({name: base[name] for name in base if places[name].block is not None})
    found: dict[str, list[str]] = {}
    for name in base:
        module, _, parameter = name.rpartition(".")
        found.setdefault(module, []).append(parameter)
    others = (Role.NORM, Role.EMBEDDING, Role.BUFFER)
    return {
        module: Layer(
            tuple(parameters),
            linear=(weight := f"{module}.weight") in base
            and len(base[weight].shape) == 2
            and places[weight].role not in others,
            in_out=in_out,
        )
        for module, parameters in found.items()
        if module
    }
