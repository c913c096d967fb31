"""Anatomy: the places of all tensors and the MLP of every block, put together from one look."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.anatomy.corrections import Corrections, put_plain
from surgery.anatomy.dense import find_dense
from surgery.anatomy.hidden import hidden_sizes
from surgery.anatomy.layout import told_layouts
from surgery.anatomy.letters import place_attention
from surgery.anatomy.mixtures import find_mixtures, not_understood, place_experts, place_routers
from surgery.anatomy.mlp import MLP
from surgery.anatomy.places import Place, Role, find_places
from surgery.anatomy.sparsity import note_sparse_activations
from surgery.tensor import LazyTensor

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "dim", "n_embed", "model_dim")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTH_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim")
WIDTHS_KEY = "mlp_widths"
"""Our own: the width of every layer's MLP, where layers differ (see writing a grown model)."""
WIDTH_KEYS_KEY = "mlp_width_keys"
"""The same by the config's own keys: what they are in each block, by the path of the blocks."""
MODULE_WIDTHS_KEY = "mlp_module_widths"
"""The same by module: the inputs and outputs of each projection."""

NOTHING = Corrections()


@dataclass(frozen=True)
class Anatomy:
    """What the tensors of a checkpoint are.

    `stacks` maps the prefix of each list of blocks to its length L. `mlps` are the plain ones
    that were understood, `several` those of blocks that have more than one, `experts` those of
    mixtures; `no_growth` says, for a (stack, block) whose MLPs can't be grown, why. `beside` are
    other MLPs, outside the blocks or small ones in them, that only widen with those.
    """

    places: Mapping[str, Place]
    stacks: Mapping[str, int]
    mlps: Mapping[tuple[str, int], MLP]
    no_growth: Mapping[tuple[str, int], str]
    embedding: str | None
    head: str | None
    tied: bool
    """Whether the head is the embedding: the config says so, or there is no head of its own."""
    notes: tuple[str, ...]
    experts: Mapping[tuple[str, int], tuple[MLP, ...]] = field(default_factory=dict)
    several: Mapping[tuple[str, int], tuple[MLP, ...]] = field(default_factory=dict)
    beside: tuple[MLP, ...] = ()

    @property
    def every_mlp(self) -> list[MLP]:
        """The plain MLPs and the experts, in the order of the blocks."""
        keys = dict.fromkeys(sorted((*self.mlps, *self.several, *self.experts)))
        plain = {**{key: (mlp,) for key, mlp in self.mlps.items()}, **self.several}
        return [mlp for key in keys for mlp in (*plain.get(key, ()), *self.experts.get(key, ()))]

    @property
    def plain_mlps(self) -> list[MLP]:
        """Those of the blocks that are no experts."""
        return [mlp for key in sorted({*self.mlps, *self.several}) for mlp in self.in_block(*key)]

    @property
    def all_mlps(self) -> list[MLP]:
        """Those, and the ones beside them."""
        return [*self.every_mlp, *self.beside]

    def in_block(self, stack: str, block: int) -> tuple[MLP, ...]:
        """The plain MLPs of a block."""
        key = stack, block
        return self.several.get(key) or ((self.mlps[key],) if key in self.mlps else ())

    @property
    def unrecognised(self) -> list[str]:
        return [name for name, place in self.places.items() if place.role is Role.UNKNOWN]

    def with_owned(self, owner: Mapping[str, str]) -> Anatomy:
        """The same with more tensors, which belong to others (`owner` says to which): they have
        the role of those, and stand in the same block."""
        places = dict(self.places)
        for name, weight in owner.items():
            place = places[weight]
            outer = weight.removesuffix(place.inner)
            places[name] = replace(place, inner=name.removeprefix(outer))
        return replace(self, places=places)


def infer(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    corrections: Corrections = NOTHING,
) -> Anatomy:
    """The anatomy of a checkpoint, from headers and config alone, where `corrections` don't say."""
    part = text_config(config)
    places, stacks = find_places(tensors, first(part, DEPTH_KEYS))
    place_attention(places)
    corrections.place(tensors, places, stacks)
    embedding = _embedding(tensors, places, first(part, ("vocab_size",)))
    if embedding is not None and places[embedding].role is Role.UNKNOWN:
        places[embedding] = replace(places[embedding], role=Role.EMBEDDING)
    hidden = first(part, HIDDEN_KEYS)
    if hidden is None and embedding is not None:
        hidden = tensors[embedding].shape[-1]
    in_blocks = _in_blocks(tensors, places)
    sizes = hidden_sizes(tensors, places, hidden)
    layouts = told_layouts(tensors, places, sizes)
    said = corrections.said(in_blocks)
    experts = find_mixtures(in_blocks, places, sizes, config, part, layouts, said)
    found = find_dense(tensors, places, sizes, _all_widths(config), experts, layouts, config)
    mlps, no_growth = found.mlps, found.no_growth
    put_plain(said, in_blocks, places, sizes, mlps, found.several, no_growth)
    no_growth |= not_understood(experts)
    note_sparse_activations(mlps, stacks, part)
    several = {key: these for key, these in found.several.items() if key not in mlps}
    place_experts(places, experts, said, corrections)
    place_routers(tensors, places, in_blocks, experts)
    in_blocks_too = [mlp for these in several.values() for mlp in these]
    for mlp in (*mlps.values(), *in_blocks_too):
        norms = {f.name for f in mlp.followers if places[f.name].role is Role.NORM}
        for name in (*mlp.tensors, mlp.down.bias):
            if name is not None and name not in norms:
                places[name] = replace(places[name], role=Role.MLP)
    head = _head(tensors, places, embedding)
    tied, notes = _tying(config, embedding, head)
    mixtures = {
        key: tuple(found.mlps)
        for key, found in experts.items()
        if found.mlps and key not in no_growth
    }
    return Anatomy(
        places, stacks, mlps, no_growth, embedding, head, tied, notes, mixtures, several,
        tuple(found.beside),
    )  # fmt: skip


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the language model, where it is nested."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def architecture(config: Mapping[str, Any]) -> str | None:
    """The first of the classes that the config names."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that holds a whole number."""
    for key in keys:
        if type(value := config.get(key)) is int:
            return value
    return None


def _widths(config: Mapping[str, Any]) -> set[int]:
    keys = (*WIDTH_KEYS, WIDTHS_KEY)
    given = [value for key, value in config.items() if key.rpartition(".")[2] in keys]
    values = [v for value in given for v in (value if isinstance(value, list) else [value])]
    return {value for value in values if type(value) is int}


def _all_widths(config: Mapping[str, Any]) -> set[int]:
    """The widths that a config gives, those of its parts included."""
    widths = _widths(config)
    for part in config.values():
        for inner in part if isinstance(part, list) else (part,):
            if isinstance(inner, Mapping):
                widths |= _all_widths(inner)
    return widths


def _in_blocks(
    tensors: Mapping[str, LazyTensor], places: Mapping[str, Place]
) -> dict[tuple[str, int], dict[str, LazyTensor]]:
    blocks: dict[tuple[str, int], dict[str, LazyTensor]] = defaultdict(dict)
    for name, place in places.items():
        if place.stack is not None and place.block is not None:
            blocks[place.stack, place.block][name] = tensors[name]
    return blocks


def _embedding(
    tensors: Mapping[str, LazyTensor], places: Mapping[str, Place], vocabulary: int | None
) -> str | None:
    """The matrix of token embeddings: of those that aren't positions or types, the largest. Where
    no name tells, the one matrix outside the blocks that has a row for every token."""
    found = [
        name
        for name, place in places.items()
        if place.role is Role.EMBEDDING
        and len(tensors[name].shape) == 2
        and not re.search(r"pos|wpe|type", name)
    ]
    if not found:
        found = [
            name
            for name, place in places.items()
            if place.role is Role.UNKNOWN
            and place.stack is None
            and len(tensors[name].shape) == 2
            and tensors[name].shape[0] == vocabulary
        ]
        return found[0] if len(found) == 1 else None
    return max(found, key=lambda name: tensors[name].shape[0])


def _head(
    tensors: Mapping[str, LazyTensor], places: Mapping[str, Place], embedding: str | None
) -> str | None:
    """The matrix that leads from hidden states to tokens: a head of the embedding's shape."""
    for name, place in places.items():
        if (
            place.role is Role.HEAD
            and embedding
            and tensors[name].shape == tensors[embedding].shape
        ):
            return name
    return None


def _tying(
    config: Mapping[str, Any], embedding: str | None, head: str | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether head and embedding are one, and what is odd about what config and files say."""
    key = "tie_word_embeddings"
    says = config.get(key, text_config(config).get(key))
    name = architecture(config) or ""
    with_head = any(word in name for word in ("ForCausalLM", "LMHead", "MaskedLM"))
    if says is False and head is None and with_head and embedding is not None:
        note = "tie_word_embeddings is false, and no head is stored: it is taken to be tied to"
        return True, (f"{note} {embedding}",)
    if says is True and head is not None:
        return True, (f"tie_word_embeddings is true, and {head} is stored all the same",)
    return bool(says) or (head is None and with_head), ()
