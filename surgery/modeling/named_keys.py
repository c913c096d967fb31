"""Which keys of a config set the widths of MLPs, where transformers doesn't know the model type and
only names can tell: an `intermediate_size`, `ffn_dim` or `moe_intermediate_size` that holds one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.anatomy import MLP
from surgery.errors import UnsupportedError
from surgery.growth import Growth
from surgery.modeling.width_keys import Path, leaves, sounds_like_a_width


def named_keys(
    config: Mapping[str, Any], every: Iterable[MLP], growths: Iterable[Growth]
) -> dict[Path, int]:
    """The keys to set, with the new widths; none where no key holds a width.

    Every key that sounds like a width and holds one of an MLP follows it. A width that is so many
    times another (shared experts side by side) follows with that one. Raises UnsupportedError
    where a key could belong to MLPs that don't grow alike, or a grown width is in no key.
    """
    after: dict[int, set[int]] = defaultdict(set)
    grown = {(growth.mlp.stack, growth.mlp.block, growth.mlp.kind): growth for growth in growths}
    for mlp in every:
        growth = grown.get((mlp.stack, mlp.block, mlp.kind))
        after[mlp.width].add(mlp.width if growth is None else growth.width)
    held = {
        path: value
        for path, value in leaves(config)
        if type(value) is int and value in after and sounds_like_a_width(path)
    }
    made = {path: min(after[value]) for path, value in held.items() if after[value] != {value}}
    if not made:
        return {}
    unknown = f"transformers doesn't know the model type {config.get('model_type')!r}"
    problems = [
        f"{'.'.join(path)} is {held[path]:,} and MLPs of that width would get "
        f"{' and '.join(f'{new:,}' for new in sorted(after[held[path]]))}; {unknown}, so that "
        f"nothing tells whose it is: grow all of them alike"
        for path in made
        if len(after[held[path]]) > 1
    ]
    problems += [
        f"no key of config.json that sounds like a width holds {old:,}, which is to "
        + (f"become {new:,}" if new != old else "stay, and may follow the key of another")
        + f"; {unknown}, so that nothing tells how its width is set: grow all MLPs by the same "
        f"factor, or those alone whose width is in a key"
        for old, news in sorted(after.items())
        for new in sorted(news)
        if old not in held.values() and _followed(old, held, made) - {old} != {new} - {old}
    ]
    UnsupportedError.raise_if(problems)
    return made


def _followed(width: int, held: Mapping[Path, int], made: Mapping[Path, int]) -> set[int]:
    """What a width would become that is so many times that of a key."""
    return {
        width // value * made.get(path, value) for path, value in held.items() if width % value == 0
    }
