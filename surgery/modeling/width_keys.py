"""Which keys of a config set the widths of MLPs: found by building the stock model without memory
with a key changed, and comparing the shapes of all its tensors.

A name tells little: a width can be half of its key's value, a multiple of the hidden size or of
another key, and a key can set the widths of experts, shared experts and plain layers together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.anatomy.infer import HIDDEN_KEYS, first, text_config
from surgery.errors import UnsupportedError
from surgery.modeling.layers import derived, known, stored_shapes

Shapes = Mapping[str, tuple[int, ...]]
Path = tuple[str, ...]
"""A key, and the keys that it is nested under, inside the language model's config."""

_BLOCK = re.compile(r".*?\.\d+\.")
MOST_TIMES = 64
"""A key whose value goes more often into a width isn't tried."""


class NotComparableError(UnsupportedError):
    """The files aren't what the stock class would write, so that its shapes say nothing."""


@dataclass
class Found:
    """Values that make the stock model's tensors the wanted ones, and what other keys that were
    tried would have changed besides."""

    values: dict[Path, Any] = field(default_factory=dict)
    harmful: dict[Path, str] = field(default_factory=dict)


def find_width_keys(
    config: Mapping[str, Any],
    have: Shapes,
    wanted: Shapes,
    widths: Iterable[tuple[int, int]],
    within: tuple[str, ...] = (),
) -> Found:
    """The keys to set so that the tensors `wanted`, and no others, get those shapes; no values
    if there are none. `have` are the shapes in the files, `widths` are the (old, new) widths.
    Where `within` is given, tensors whose names don't begin so don't matter.

    Raises NotComparableError where the stock model of `config` hasn't got those tensors.
    """
    now = _shapes(config) if known(config) else None
    prefixes = _prefixes(now, have, wanted) if now is not None else None
    if now is None or prefixes is None:
        raise NotComparableError(
            "the stock model of this config doesn't have these tensors in these shapes"
        )
    stored = {as_stored(name, prefixes): shape for name, shape in wanted.items()}
    target = {name: shape for name, shape in stored.items() if name in now}
    inside = tuple(as_stored(name, prefixes) for name in within) or ("",)
    if within:
        now = {name: shape for name, shape in now.items() if name.startswith(inside)}
    found, idle = Found(), {}
    covered: dict[str, tuple[int, ...]] = {}
    for path, value in _candidates(config, sorted(set(widths))):
        if path in found.values or covered == target:
            continue
        changed = _changes(now, config, {path: value}, inside)
        wrong = [name for name, shape in changed.items() if target.get(name) != shape]
        if wrong:
            if len(wrong) < len(changed):
                found.harmful.setdefault(path, min(wrong))
        elif changed.keys() - covered.keys():
            found.values[path] = value
            covered |= changed
        elif not changed and _named(path):
            idle[path] = value  # it may do nothing, or nothing alone
    if covered != target and idle:
        found.values |= idle
    if not found.values or _changes(now, config, found.values, inside) != target:
        found.values = {}
    return found


def with_values(config: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """The config with these values where the language model is described."""
    part = dict(text_config(config))
    for path, value in values.items():
        inner = part
        for key in path[:-1]:
            inner[key] = dict(inner.get(key) or {})
            inner = inner[key]
        inner[path[-1]] = value
    return {**config, "text_config": part} if text_config(config) is not config else part


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The tensors of the stock model; None if it can't be built, as with values that its classes
    refuse."""
    try:
        return stored_shapes(config)
    except UnsupportedError:
        return None


def _changes(
    now: Shapes, config: Mapping[str, Any], values: Mapping[Path, Any], inside: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """The tensors that change shape with these values: none where that can't be built."""
    made = _shapes(with_values(config, values))
    if made is None:
        return {}
    made = {name: shape for name, shape in made.items() if name.startswith(inside)}
    changed = {name: shape for name, shape in made.items() if now.get(name) != shape}
    return changed | {name: () for name in now if name not in made}


def as_stored(name: str, prefixes: tuple[str, str]) -> str:
    """The stock model's name of a tensor, or of what its name begins with."""
    add, cut = prefixes
    return add + name.removeprefix(cut)


def _prefixes(now: Shapes, have: Shapes, wanted: Shapes) -> tuple[str, str] | None:
    """What to put before a name, and what to take from it, to have the stock model's. Files of a
    base model lack the prefix that a model with a head has, and the other way round. Blocks that
    the stock class ignores (those that predict further tokens) don't count, if they change as the
    others do."""
    prefixes = {""} | {name.split(".", 1)[0] + "." for name in (*now, *have)}
    for add, cut in ((a, c) for a in prefixes for c in prefixes if not (a and c)):
        names = {name: add + name.removeprefix(cut) for name in wanted if name.startswith(cut)}
        kept = {name: stored for name, stored in names.items() if stored in now}
        changes = {(have[name], wanted[name]) for name in kept}
        if (
            len(names) == len(wanted)
            and all(now[stored] == have[name] for name, stored in kept.items())
            and all((have[n], wanted[n]) in changes for n in names.keys() - kept.keys())
            and _blocks(names[n] for n in names.keys() - kept.keys()).isdisjoint(_blocks(now))
        ):
            return add, cut
    return None


def _blocks(names: Iterable[str]) -> set[str]:
    """What comes before the first number of each name, and the number."""
    return {match.group(0) if (match := _BLOCK.match(name)) else name for name in names}


def _candidates(
    config: Mapping[str, Any], widths: list[tuple[int, int]]
) -> Iterator[tuple[Path, Any]]:
    """Keys and what they would have to be, the likeliest first: those that hold an old width,
    then those that a width is so many times of, or the hidden size times a width."""
    part = text_config(config)
    defaults = derived(config)
    values = {**dict(_leaves(defaults)), **dict(_leaves(part))}
    hidden = first(part, HIDDEN_KEYS) or first(defaults, HIDDEN_KEYS)
    later: list[tuple[Path, Any]] = []
    for path, value in values.items():
        for old, new in widths:
            if value == old and type(value) is int:
                yield path, new
            elif value is None and _named(path):
                later.append((path, new))
            elif type(value) is int and value > 1 and value * new % old == 0:
                close = value % old == 0 or (old % value == 0 and old // value <= MOST_TIMES)
                if close or (hidden is not None and value * hidden == old):
                    later.append((path, value * new // old))
            elif type(value) is float and hidden is not None and value * hidden == old:
                later.append((path, new / hidden))
    yield from sorted(later, key=lambda item: not _named(item[0]))


def _named(path: Path) -> bool:
    """Whether a key sounds like an MLP's width: those are tried first."""
    return any(word in path[-1] for word in ("inter", "inner", "ffn", "ff_", "ffw", "mlp"))


def _leaves(config: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        elif value is None or type(value) in (int, float):
            yield (*above, key), value
