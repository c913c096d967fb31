"""LoRA adapters baked into their base, or taken as task vectors of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery.anatomy import untied_config
from surgery.anatomy.infer import text_config
from surgery.checkpoint import Checkpoint, Edit
from surgery.errors import ArgumentError, UnsupportedError
from surgery.lora.adapter import Adapter
from surgery.lora.edits import Edited, collect
from surgery.lora.product import wide
from surgery.merging.finite import finite, unchecked
from surgery.operations.dequantize import computable
from surgery.tensor import LazyTensor
from surgery.vectors import TaskVector, combined


def apply_adapter(base: Checkpoint, *adapters: Adapter) -> Checkpoint:
    """The base with the adapters in its weights: W + the sum of scale * B A, computed in float32
    (float64 for float64 inputs) and rounded once, to the types of the base.

    What an adapter holds whole (modules_to_save, biases) takes the place of the base's. Where the
    base ties head and embedding and only one of them was trained, the result has both. Raises
    MismatchError if an adapter belongs to another base, or UnsupportedError; no tensor is read.
    """
    if not adapters:
        raise ArgumentError("there is no adapter to apply")
    (base,) = computable(base=base)
    edits = collect(base, adapters)
    tensors = {name: _baked(base, name, edited) for name, edited in edits.tensors.items()}
    config = base.settled_config
    if edits.unties:
        config = untied_config(config)
    companions, notes = dict(base.companions), list(edits.notes)
    if edits.vocabulary is not None:
        config = _with_vocabulary(config, edits.vocabulary)
        companions |= {n: p for a in adapters for n, p in a.tokenizer_files.items()}
    else:
        notes += _tokenizers_left(base, adapters)
    notes += _other_bases(base, adapters)
    *earlier, last = (_edit(base, adapter) for adapter in adapters)
    before = replace(base, history=(*base.history, *earlier))
    edited = before.edited(last, tensors, config, companions, tuple(notes))
    reference = "+".join([base.source.reference, *(a.source.reference for a in adapters)])
    return replace(edited, source=replace(base.source, reference=reference))


def adapter_task_vector(base: Checkpoint, adapter: Adapter) -> TaskVector:
    """What the adapter does to `base`, as a task vector in float32 (float64 for float64 inputs).

    Raises MismatchError if it belongs to another base, or UnsupportedError if it gives the model
    a vocabulary or a head that the base hasn't got.
    """
    (base,) = computable(base=base)
    edits = collect(base, [adapter])
    UnsupportedError.raise_if(
        f"{adapter.source.reference} gives {name} the shape {list(edited.start.shape)}, and "
        + (f"{list(base[name].shape)} is that of the base" if name in base else "the base has none")
        + f": no task vector can; bake it, as {base.source.reference}+{adapter.source.reference}"
        for name, edited in edits.tensors.items()
        if name not in base or edited.start.shape != base[name].shape
    )
    tensors = {name: _update(base, name, edited) for name, edited in edits.tensors.items()}
    return TaskVector(
        tensors=tensors, base=base, source=adapter.source, notes=edits.notes, history=base.history
    )


def _baked(base: Checkpoint, name: str, edited: Edited) -> LazyTensor:
    """The tensor after its edits, in the type that the base has it in."""
    from surgery.kernels.rounding import rounded
    from surgery.kernels.updates import apply_updates

    embedding = base.anatomy.embedding or ""
    dtype = base[name if name in base else embedding].dtype
    start, updates = edited.start, edited.updates
    if not updates:
        if start.dtype == dtype:
            return unchecked(start)
        kernel = partial(rounded, dtype=dtype)
        return LazyTensor(start.shape, dtype, inputs=(start,), kernel=kernel)
    kernel = partial(
        apply_updates,
        scales=(1.0,) * len(updates),
        compute=wide(start, *updates),
        dtype=dtype,
    )
    return LazyTensor(start.shape, dtype, inputs=(start, *updates), kernel=kernel)


def _update(base: Checkpoint, name: str, edited: Edited) -> LazyTensor:
    from surgery.kernels.merging import difference

    if not edited.replaced:
        return combined(edited.updates, (1.0,) * len(edited.updates))
    before = finite(base, name)
    kind = wide(before, edited.start, *edited.updates)
    after = edited.start
    if edited.updates:
        after = combined((edited.start, *edited.updates), (1.0,) * (1 + len(edited.updates)))
    kernel = partial(difference, compute=kind, dtype=kind)
    return LazyTensor(after.shape, kind, inputs=(before, after), kernel=kernel)


def _with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config with `vocab_size`, where it says one."""
    changed = dict(config)
    part = text_config(config)
    if part is not config and "vocab_size" in part:
        changed["text_config"] = {**part, "vocab_size": size}
    if "vocab_size" in config or (part is config and config):
        changed["vocab_size"] = size
    return changed


def _tokenizers_left(base: Checkpoint, adapters: tuple[Adapter, ...]) -> list[str]:
    """A note for every adapter with another tokenizer: the model's own is kept."""
    return [
        f"{adapter.source.reference} brings a tokenizer of its own, and the model's is kept: the "
        f"vocabulary is the same"
        for adapter in adapters
        if any(
            not isinstance(mine := base.companions.get(name), Path)
            or mine.read_bytes() != path.read_bytes()
            for name, path in adapter.tokenizer_files.items()
        )
    ]


def _other_bases(base: Checkpoint, adapters: tuple[Adapter, ...]) -> list[str]:
    names = (base.source.reference, base.source.repo_id, str(base.source.path))
    return [
        f"{a.source.reference} was trained on {a.config.base}, and is applied to "
        f"{base.source.reference}"
        for a in adapters
        if a.config.base is not None and a.config.base not in names
    ]


def _edit(base: Checkpoint, adapter: Adapter) -> Edit:
    config = adapter.config
    parameters = {
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "dora": config.dora,
    }
    details = {
        "modules": {module: update.a.shape[0] for module, update in adapter.updates.items()},
        "saved": sorted((*adapter.saved, *adapter.tokens)),
    }
    return Edit("adapter", parameters, {"base": base.source, "adapter": adapter.source}, details)
