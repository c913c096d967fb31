"""The config of a grown model: the width keys follow, layer by layer where layers differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from surgery.anatomy.infer import (
    HIDDEN_KEYS,
    MODULE_WIDTHS_KEY,
    WIDTH_KEYS,
    WIDTH_KEYS_KEY,
    WIDTHS_KEY,
    first,
    text_config,
)
from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.growth import Growth
from surgery.modeling.block_keys import gives, grown_shapes, keys_by_block
from surgery.modeling.module_widths import widths_by_module
from surgery.modeling.named_keys import named_keys
from surgery.modeling.stock import known
from surgery.modeling.width_keys import (
    Found,
    NotComparableError,
    find_width_keys,
    with_values,
)
from surgery.modeling.widths import MODELING_FILE, modeling_file, without_auto_map
from surgery.operations.at_once import grown_at_once


def widened_config(
    base: Checkpoint, growths: Sequence[Growth], *, stock: bool = False
) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """The config after `growths`, and the companion files: with a modeling file if layers differ
    or no key can say their width, without it if they don't any more. With `stock` the result has
    to load without one.

    Raises UnsupportedError where the config has no key that sets the width, or where layers that
    differ can't be loaded.
    """
    companions = {k: v for k, v in base.companions.items() if k != MODELING_FILE}
    config = without_auto_map(base.settled_config)
    if not config:
        return config, companions  # tensors alone: there is no loader to tell
    if not config.keys().isdisjoint((WIDTH_KEYS_KEY, MODULE_WIDTHS_KEY)):
        return widened_config(*grown_at_once(base, growths), stock=stock)
    try:
        return _by_its_own_keys(base, config, companions, growths)
    except UnsupportedError:
        if len({growth.mlp.stack for growth in growths}) > 1 and WIDTHS_KEY not in config:
            with suppress(UnsupportedError):  # keys may set the widths of several stacks
                return _with_keys(base, config, growths), companions
        if stock:
            raise
        made = None
        if known(config):
            with suppress(UnsupportedError):  # what was refused first says more
                made = _by_modeling_file(base, config, growths)
        if made is None:
            raise
        return made[0], {**companions, MODELING_FILE: made[1]}


def _by_modeling_file(
    base: Checkpoint, config: dict[str, Any], growths: Sequence[Growth]
) -> tuple[dict[str, Any], bytes] | None:
    """The config and the modeling file for widths that a key sets elsewhere too, or that no key
    sets: 4 x hidden in the code."""
    with suppress(UnsupportedError):  # blocks that aren't part of the base model
        if made := keys_by_block(base, config, growths):
            return made
    if base.anatomy.experts or WIDTHS_KEY in config:
        return None
    widths = _block_widths(base, growths)
    stacks = {stack for stack, _ in widths}
    if len(stacks) == 1 and len(widths) == base.anatomy.stacks[stacks.pop()]:
        with suppress(UnsupportedError):
            resized, companions = _resized(base, config, {}, widths)
            source = companions[MODELING_FILE]
            assert isinstance(source, bytes)
            if gives(base, config, resized, source, growths):
                return resized, source
    return widths_by_module(base, config, growths)


def _by_its_own_keys(
    base: Checkpoint,
    config: dict[str, Any],
    companions: dict[str, Path | bytes],
    growths: Sequence[Growth],
) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """The config whose keys hold for all layers, or the width of each in `mlp_widths`."""
    config = dict(config)
    if base.anatomy.experts:
        return _with_keys(base, config, growths), companions
    if base.anatomy.several and config.pop(WIDTHS_KEY, None):
        if widths := _block_widths(base, growths):
            return _resized(base, config, companions, widths)
        raise UnsupportedError(
            f"{base.source.reference} has several MLPs in a block, and they wouldn't be as wide as "
            f"each other: grow all of them alike"
        )
    widths = {key: mlp.width for key, mlp in base.anatomy.mlps.items()}
    before = stock_widths(config) if config.pop(WIDTHS_KEY, None) else set(widths.values())
    after = {(growth.mlp.stack, growth.mlp.block): growth.width for growth in growths}
    widths |= {key: after[key] for key in widths if key in after}
    if WIDTHS_KEY not in base.config and not _layers_differ(base, widths):
        try:
            return _with_keys(base, config, growths), companions
        except NotComparableError:  # what transformers doesn't know is told by its names
            if len({growth.mlp.stack for growth in growths}) > 1 or base.anatomy.several:
                raise
    made, companions = settle_widths(base, config, companions, widths, before)
    source = companions.get(MODELING_FILE)
    fresh = WIDTHS_KEY not in base.config and known(config)
    if isinstance(source, bytes) and fresh and not gives(base, config, made, source, growths):
        raise UnsupportedError(
            f"{base.source.reference}: the MLPs of {config.get('model_type')} can't be resized in "
            f"place, so layers of different widths can't be loaded: pass --uniform"
        )
    return made, companions


def _block_widths(base: Checkpoint, growths: Sequence[Growth]) -> dict[tuple[str, int], int]:
    """The new width of every block that has plain MLPs; nothing if those of a block differ."""
    after = {growth.mlp: growth.width for growth in growths}
    widths: dict[tuple[str, int], int] = {}
    for mlp in base.anatomy.plain_mlps:
        assert mlp.block is not None
        width = after.get(mlp, mlp.width)
        if widths.setdefault((mlp.stack, mlp.block), width) != width:
            return {}
    return widths


def _layers_differ(base: Checkpoint, widths: Mapping[tuple[str, int], int]) -> bool:
    """Whether layers of a stack that were as wide as each other are so no more."""
    made: dict[tuple[str, int], set[int]] = defaultdict(set)
    for (stack, block), width in widths.items():
        made[stack, base.anatomy.mlps[stack, block].width].add(width)
    return any(len(several) > 1 for several in made.values())


def widened_along(
    base: Checkpoint, growths: Sequence[Growth], others: Sequence[Growth]
) -> list[Growth]:
    """Those of `others` whose MLPs share a key of the config with `growths`: they widen together
    or not at all. None where other keys will do."""
    config = without_auto_map(base.settled_config)
    joined: list[Growth] = []
    left = list(others)
    while (
        config
        and left
        and config.keys().isdisjoint((WIDTHS_KEY, WIDTH_KEYS_KEY, MODULE_WIDTHS_KEY))
    ):
        try:
            found = _find_keys(base, config, [*growths, *joined], left)
        except NotComparableError:
            break
        more = [growth for growth in left if found.shared & set(growth.mlp.tensors)]
        if not more:
            break
        joined += more
        left = [growth for growth in left if growth not in more]
    return joined


def _with_keys(
    base: Checkpoint, config: dict[str, Any], growths: Sequence[Growth]
) -> dict[str, Any]:
    """The config with the keys that give the grown tensors their shapes, and no others."""
    if not known(config) and (named := named_keys(config, base.anatomy.every_mlp, growths)):
        return with_values(config, named)
    found = _find_keys(base, config, growths, ())
    if found.values:
        return with_values(config, found.values)
    kinds = {mlp.kind for mlp in base.anatomy.every_mlp}
    advice = "grow all layers alike, or pass --uniform"
    if len(kinds) > 1:
        advice += "; --experts all grows every kind"
    grown = {growth.mlp.stack for growth in growths}
    places = (base.anatomy.places.get(name) for name in found.harmful.values())
    if any(place is not None and place.stack not in (None, *grown) for place in places):
        advice += "; --scope all grows stacks that share a key together"
    harm = "".join(
        f"; {'.'.join(key)} would change {name} too" for key, name in found.harmful.items()
    )
    widths = sorted({(growth.mlp.width, growth.width) for growth in growths})
    said = ", ".join(f"{old:,} -> {new:,}" for old, new in widths)
    raise UnsupportedError(
        f"{base.source.reference}: no keys of config.json give these MLPs their new widths "
        f"({said}) and leave the others{harm}: {advice}"
    )


def _find_keys(
    base: Checkpoint, config: dict[str, Any], growths: Sequence[Growth], others: Sequence[Growth]
) -> Found:
    have = {name: tensor.shape for name, tensor in base.items()}
    wanted, along = grown_shapes(base, growths)[1], grown_shapes(base, others)[1]
    widths = {(growth.mlp.width, growth.width) for growth in (*growths, *others)}
    return find_width_keys(config, have, wanted, widths, along)


def settle_widths(
    model: Checkpoint,
    config: dict[str, Any],
    companions: dict[str, Path | bytes],
    widths: Mapping[tuple[str, int], int],
    before: set[int],
) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """`config` and `companions` (without what layers that differ need) for MLPs of `widths`,
    where the config's own keys give one of `before`. `model` names the tensors of the MLPs."""
    stacks = {stack for stack, _ in widths}
    if len(stacks) != 1:
        raise UnsupportedError(
            f"{model.source.reference} has MLPs in several stacks ({', '.join(sorted(stacks))}), "
            f"and growing those isn't there yet"
        )
    after = sorted(set(widths.values()))
    if len(after) == 1:
        try:
            return _with_width(model, config, before, after[0]), companions
        except UnsupportedError:
            if WIDTHS_KEY not in model.config:
                raise
    if len(widths) != model.anatomy.stacks[stacks.pop()]:
        raise UnsupportedError(
            f"{model.source.reference} has layers without an MLP of this kind, and MLPs of "
            f"different widths beside them can't be loaded: grow all alike, or pass --uniform"
        )
    return _resized(model, config, companions, widths)


def _resized(
    model: Checkpoint,
    config: dict[str, Any],
    companions: dict[str, Path | bytes],
    widths: Mapping[tuple[str, int], int],
) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """With the modeling file that gives every block a width of its own."""
    made = {**config, WIDTHS_KEY: [width for _, width in sorted(widths.items())]}
    made["auto_map"], source = modeling_file(model, model.anatomy.plain_mlps)
    return made, {**companions, MODELING_FILE: source}


def stock_widths(config: Mapping[str, Any]) -> set[int]:
    """What the config's own keys say, where `mlp_widths` overrides them."""
    part = text_config(config)
    width = first(part, WIDTH_KEYS)
    hidden = first(part, HIDDEN_KEYS)
    return {width} if width is not None else {4 * hidden} if hidden is not None else set()


def _with_width(
    base: Checkpoint, config: dict[str, Any], before: set[int], width: int
) -> dict[str, Any]:
    """Set the keys that hold the old width, where the language model is described."""
    nested = text_config(config)
    part = dict(nested)
    keys = [key for key in WIDTH_KEYS if type(part.get(key)) is int and part[key] in before]
    if not keys and "n_inner" in part and part["n_inner"] is None:
        keys = ["n_inner"] if stock_widths(config) == before else []
    if not keys:
        raise UnsupportedError(
            f"{base.source.reference}: no key of config.json holds the MLP's width "
            f"{', '.join(map(str, sorted(before)))}, so none can be told the new one; looked at "
            f"{', '.join(WIDTH_KEYS)}"
        )
    part |= dict.fromkeys(keys, width)
    return {**config, "text_config": part} if nested is not config else part
