"""A parameter that may differ from tensor to tensor: a number, a gradient over depth, or rules.

0.5                                             everywhere
[0, 0.5, 1]                                     interpolated over the depth of a stack
{attention: 0.3, "*.mlp.*": [0, 1], default: 0.5}   by role or name; the first that fits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from surgery.anatomy import Anatomy, Place, Role
from surgery.merging.parameters import unknown

Number = float | int | bool
ROLES = tuple(role.value for role in Role if role is not Role.UNKNOWN)
DEFAULT = "default"


@dataclass(frozen=True)
class Spot:
    """Where a value is wanted: a tensor, its role, how deep it stands (0 to 1), and in which of
    the spans of blocks that make up the stack."""

    name: str
    role: Role
    depth: float
    span: int = 0


@dataclass(frozen=True)
class Constant:
    """The same everywhere."""

    value: Number

    def at(self, spot: Spot) -> Number | None:
        return self.value


@dataclass(frozen=True)
class Gradient:
    """Straight lines between values that are evenly spread over the depth."""

    values: tuple[float, ...]

    def at(self, spot: Spot) -> Number | None:
        scaled = spot.depth * (len(self.values) - 1)
        at = min(int(scaled), len(self.values) - 1)
        after = min(at + 1, len(self.values) - 1)
        part = scaled - at
        return (1 - part) * self.values[at] + part * self.values[after]


@dataclass(frozen=True)
class Rule:
    """A setting for tensors of a `role`, or whose name fits a `pattern` or `contains` a text;
    with none of the three, for all."""

    setting: Setting
    role: str | None = None
    pattern: str | None = None
    contains: str | None = None

    @property
    def condition(self) -> str | None:
        """What it asks of a tensor, for messages; None if it fits every one."""
        return self.role or self.pattern or self.contains

    def fits(self, spot: Spot) -> bool:
        return (
            (self.role is None or spot.role.value == self.role)
            and (self.pattern is None or fnmatchcase(spot.name, self.pattern))
            and (self.contains is None or self.contains in spot.name)
        )


@dataclass(frozen=True)
class Rules:
    """The setting of the first rule that fits; nothing if none does."""

    rules: tuple[Rule, ...]

    def at(self, spot: Spot) -> Number | None:
        return next((rule.setting.at(spot) for rule in self.rules if rule.fits(spot)), None)


@dataclass(frozen=True)
class Layered:
    """Settings by precedence: the first that says something. Those of `spans` come before the
    others, and hold in their span of blocks alone."""

    settings: tuple[Setting, ...]
    spans: Mapping[int, tuple[Setting, ...]]

    def at(self, spot: Spot) -> Number | None:
        found = (s.at(spot) for s in (*self.spans.get(spot.span, ()), *self.settings))
        return next((value for value in found if value is not None), None)


Setting = Constant | Gradient | Rules | Layered


def numbers_in(setting: Setting) -> Iterator[Number]:
    """Every number that a setting is made of."""
    if isinstance(setting, Constant):
        yield setting.value
    elif isinstance(setting, Gradient):
        yield from setting.values
    else:
        for inner in _inside(setting):
            yield from numbers_in(inner)


def rules_in(setting: Setting) -> Iterator[Rule]:
    """Every rule in a setting."""
    if isinstance(setting, Rules):
        yield from setting.rules
    elif isinstance(setting, Layered):
        for inner in _inside(setting):
            yield from rules_in(inner)


def _inside(setting: Rules | Layered) -> list[Setting]:
    if isinstance(setting, Rules):
        return [rule.setting for rule in setting.rules]
    return [*(s for several in setting.spans.values() for s in several), *setting.settings]


def number_of(setting: Setting) -> Number | None:
    """The number that it is for every tensor, if it is one."""
    if isinstance(setting, Layered) and len(setting.spans) < 2:
        inside = _inside(setting)
        return number_of(inside[0]) if inside else None
    return setting.value if isinstance(setting, Constant) else None


def says_all(setting: Setting) -> bool:
    """Whether it has a value for every tensor, whatever it is called."""
    if isinstance(setting, Rules):
        return any(rule.condition is None for rule in setting.rules)
    return not isinstance(setting, Layered) or any(map(says_all, setting.settings))


def parse_setting(value: Any) -> Setting:
    """The setting that a recipe gives. Raises ValueError with what is wrong."""
    if isinstance(value, bool) or is_number(value):
        return Constant(value)
    if isinstance(value, list):
        if not value or not all(is_number(item) for item in value):
            raise ValueError(
                f"{shortened(value)} isn't a list of finite numbers, from the first block to the "
                f"last"
            )
        return Gradient(tuple(map(float, value)))
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("there is no rule")
        return Rules(tuple(_rule(str(key), item) for key, item in value.items()))
    raise ValueError(
        f"{shortened(value)} is neither a finite number, nor a list of them over depth, nor rules "
        f"by role or name"
    )


def shortened(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rule(key: str, value: Any) -> Rule:
    if isinstance(value, Mapping):
        raise ValueError(f"the rule for {key} has rules in it")  # noqa: TRY004
    setting = parse_setting(value)
    if key == DEFAULT:
        return Rule(setting)
    if key in ROLES:
        return Rule(setting, role=key)
    if any(mark in key for mark in "*?["):
        return Rule(setting, pattern=key)
    raise ValueError(unknown("role", key, [*ROLES, DEFAULT]) + "; a pattern of names has a * in it")


def is_number(value: object) -> bool:
    """Whether it is a number that can be computed with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def spot_of(
    name: str,
    place: Place | None,
    anatomy: Anatomy,
    spans: Sequence[int] | None = None,
    behind: float = 1.0,
) -> Spot:
    """Where a tensor stands. Without blocks around it, what comes after them (the final norm, the
    head) is as deep as the last, or as `behind` says, and all else as the first.

    `spans` are lengths of runs of blocks; depth then counts inside each.
    """
    last = len(spans) - 1 if spans else 0
    if place is None:  # a head that the first model ties to its embedding
        return Spot(name, Role.HEAD, behind, last)
    if place.stack is None or place.block is None:
        late = place.role in (Role.NORM, Role.HEAD)
        return Spot(name, place.role, behind if late else 0.0, last if late else 0)
    start, at = 0, 0
    length = anatomy.stacks[place.stack]
    if spans is not None:
        while place.block >= start + spans[at]:
            start, at = start + spans[at], at + 1
        length = spans[at]
    return Spot(name, place.role, (place.block - start) / (length - 1) if length > 1 else 1.0, at)
