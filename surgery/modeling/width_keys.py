"""Which keys of a config set the widths of MLPs: found by building the stock model without memory
with a key changed, and comparing the shapes of all its tensors.

A name tells little: a width can be half of its key's value, a multiple of the hidden size or of
another key, a list with an entry for every layer, and a key can set the widths of experts, shared
experts and plain layers together, or those of several stacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from surgery.anatomy.infer import HIDDEN_KEYS
from surgery.errors import UnsupportedError
from surgery.modeling.layers import completed, stored_shapes
from surgery.modeling.stock import known

Shapes = Mapping[str, tuple[int, ...]]
Path = tuple[str, ...]
"""A key, and the keys that it is nested under."""

_BLOCK = re.compile(r".*?\.\d+\.")
MOST_TIMES = 64
"""A key whose value goes more often into a width isn't tried."""


class NotComparableError(UnsupportedError):
    """The files aren't what the stock class would write, so that its shapes say nothing."""


@dataclass
class Found:
    """Values that make the stock model's tensors the wanted ones, and what other keys that were
    tried would have changed besides. `shared` are tensors of those that may widen along, which a
    key widens with the wanted ones."""

    values: dict[Path, Any] = field(default_factory=dict)
    harmful: dict[Path, str] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()


def find_width_keys(
    config: Mapping[str, Any],
    have: Shapes,
    wanted: Shapes,
    widths: Iterable[tuple[int, int]],
    along: Shapes | None = None,
    within: tuple[str, ...] = (),
) -> Found:
    """The keys to set so that the tensors `wanted`, and no others, get those shapes; no values
    if there are none. `have` are the shapes in the files, `widths` are the (old, new) widths;
    tensors of `along` may get those other shapes with them, and are `shared` if they have to.
    Where `within` is given, tensors whose names don't begin so don't matter. Tensors that the
    files lack, since they are tied to others, may do what they like.

    Raises NotComparableError where the stock model of `config` hasn't got those tensors.
    """
    now = _shapes(config) if known(config) else None
    prefixes = find_prefixes(now, have, wanted) if now is not None else None
    if now is None or prefixes is None:
        raise NotComparableError(
            "the model that transformers makes of this config doesn't have the tensors of these "
            "MLPs in these shapes, so the keys that set their widths can't be told"
        )
    names = {
        name: own
        for name, shape in have.items()
        if name.startswith(prefixes[1]) and now.get(own := as_stored(name, prefixes)) == shape
    }
    target = {names[name]: shape for name, shape in wanted.items() if name in names}
    beside = {names[name]: shape for name, shape in (along or {}).items() if name in names}
    lacking = now.keys() - set(names.values())
    inside = tuple(as_stored(name, prefixes) for name in within) or ("",)
    now = _inside(now, inside)
    found, idle, shared = Found(), {}, set[str]()
    covered: dict[str, tuple[int, ...]] = {}
    for path, value in _candidates(config, sorted(set(widths))):
        if covered == target:
            break
        if path in found.values:
            continue
        changed = _changes(now, lacking, config, {path: value}, inside)
        wrong = {name: shape for name, shape in changed.items() if target.get(name) != shape}
        if wrong:
            if len(wrong) < len(changed):
                found.harmful.setdefault(path, min(wrong))
                if wrong.items() <= beside.items():
                    shared |= wrong.keys()
        elif changed.keys() - covered.keys():
            found.values[path] = value
            covered |= changed
        elif not changed and sounds_like_a_width(path):
            idle[path] = value  # it may do nothing, or nothing alone
    if covered != target and idle:
        found.values |= idle
    if not found.values or _changes(now, lacking, config, found.values, inside) != target:
        found.values = {}
        found.shared = frozenset(name for name in along or {} if names.get(name) in shared)
    return found


def with_values(config: Mapping[str, Any], values: Mapping[Path, Any]) -> dict[str, Any]:
    """The config with these values."""
    made = dict(config)
    for path, value in values.items():
        inner = made
        for key in path[:-1]:
            inner[key] = dict(inner.get(key) or {})
            inner = inner[key]
        inner[path[-1]] = value
    return made


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The tensors of the stock model; None if it can't be built, as with values that its classes
    refuse."""
    return _shapes_of(json.dumps(config))


@lru_cache(maxsize=64)
def _shapes_of(config: str) -> dict[str, tuple[int, ...]] | None:
    try:
        return stored_shapes(json.loads(config))
    except UnsupportedError:
        return None


def _changes(
    now: Shapes,
    lacking: Collection[str],
    config: Mapping[str, Any],
    values: Mapping[Path, Any],
    inside: tuple[str, ...],
) -> dict[str, tuple[int, ...]]:
    """The tensors that change shape with these values, without those that are `lacking` in the
    files: none where that can't be built."""
    made = _shapes(with_values(config, values))
    if made is None:
        return {}
    made = _inside(made, inside)
    changed = {name: shape for name, shape in made.items() if now.get(name) != shape}
    changed |= {name: () for name in now if name not in made}
    return {name: shape for name, shape in changed.items() if name not in lacking}


def _inside(
    shapes: dict[str, tuple[int, ...]], inside: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Those whose names begin so."""
    if "" in inside:
        return shapes
    return {name: shape for name, shape in shapes.items() if name.startswith(inside)}


def as_stored(name: str, prefixes: tuple[str, str]) -> str:
    """The stock model's name of a tensor, or of what its name begins with."""
    add, cut = prefixes
    return add + name.removeprefix(cut)


def find_prefixes(now: Shapes, have: Shapes, wanted: Shapes) -> tuple[str, str] | None:
    """What to put before a name, and what to take from it, to have the stock model's. Files of a
    base model lack the prefix that a model with a head has, and the other way round. Blocks that
    the stock class ignores (those that predict further tokens) don't count, if they change as the
    others do."""
    prefixes = sorted({""} | {name.split(".", 1)[0] + "." for name in (*now, *have)})
    for add, cut in ((a, c) for a in prefixes for c in prefixes if not (a and c)):
        names = {name: add + name.removeprefix(cut) for name in wanted if name.startswith(cut)}
        kept = {name: stored for name, stored in names.items() if stored in now}
        ignored = names.keys() - kept.keys()
        changes = {(have[name], wanted[name]) for name in kept}
        if (
            len(names) == len(wanted)
            and all(now[stored] == have[name] for name, stored in kept.items())
            and all((have[name], wanted[name]) in changes for name in ignored)
            and (not ignored or _blocks(names[n] for n in ignored).isdisjoint(_blocks(now)))
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
    then those that a width is so many times of, or a hidden size times a width."""
    values = {**dict(leaves(completed(config))), **dict(leaves(config))}
    hidden = {
        value for path, value in values.items() if path[-1] in HIDDEN_KEYS and type(value) is int
    }
    exact: list[tuple[Path, Any]] = []
    later: list[tuple[Path, Any]] = []
    for path, value in values.items():
        if isinstance(value, list):
            exact += [
                (path, made) for made in _lists(value, dict(widths)) if sounds_like_a_width(path)
            ]
            continue
        for old, new in widths:
            if value == old and type(value) is int:
                exact.append((path, new))
            elif value is None and sounds_like_a_width(path):
                later.append((path, new))
            elif (
                type(value) is int
                and value > int(not sounds_like_a_width(path))
                and value * new % old == 0
            ):
                close = value % old == 0 or (old % value == 0 and old // value <= MOST_TIMES)
                if close or any(value * size == old for size in hidden):
                    later.append((path, value * new // old))
            elif type(value) is float and any(value * size == old for size in hidden):
                later += [(path, new / size) for size in hidden if value * size == old]
            elif type(value) in (int, float) and value and "ratio" in path[-1]:
                later.append((path, value * new / old))
    for several in (exact, later):
        for named in (True, False):
            yield from _each_once(item for item in several if sounds_like_a_width(item[0]) == named)


def _lists(values: list[Any], widths: Mapping[int, int]) -> Iterator[list[Any]]:
    """A list with an entry for every layer: those that are an old width become the new one; or
    else, as multiples of the hidden size, all grow by what the widths do."""
    if not all(type(value) in (int, float) for value in values):
        return
    if any(value in widths for value in values):
        yield [widths.get(value, value) for value in values]
    elif values:
        for old, new in widths.items():
            scaled = [value * new / old for value in values]
            yield [
                int(v) if v.is_integer() and type(w) is int else v
                for v, w in zip(scaled, values, strict=True)
            ]


def _each_once(items: Iterable[tuple[Path, Any]]) -> Iterator[tuple[Path, Any]]:
    seen: list[tuple[Path, Any]] = []
    for item in items:
        if item not in seen:
            seen.append(item)
            yield item


def sounds_like_a_width(path: Path) -> bool:
    """Whether a key sounds like an MLP's width: those are tried first."""
    words = ("inter", "inner", "ffn", "ff_", "ffw", "mlp", "_ff", "feed", "widen", "expan")
    return any(word in path[-1] for word in words)


def leaves(config: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every number, list and null of a config, with its path."""
    for key, value in config.items():
        if not isinstance(key, str):
            continue  # the numbers of labels
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, key))
        elif isinstance(value, (list, tuple)):
            yield (*above, key), list(value)
        elif value is None or type(value) in (int, float):
            yield (*above, key), value
