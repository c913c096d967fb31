"""Which stacks are meant: the language model, a tower beside it, an encoder, a decoder.

Only the names of stacks tell, for a checkpoint need not have a config; a part without a word of
its own is a language model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from surgery.anatomy.infer import Anatomy
from surgery.errors import ArgumentError

SCOPES = ("all", "language", "vision", "audio", "connector", "encoder", "decoder")
"""What can be said besides the name of a stack or of a module that holds stacks."""

_PARTS = (
    ("vision", re.compile(r"vision|visual|image|img|vi[td]\w*|vqmodel|pixel|patch|sam|siglip")),
    ("audio", re.compile(r"audio|speech|acoustic|sound|wav\w*|voice|codec|asr")),
    (
        "connector",
        re.compile(r"connector|projector|mergers?|resampler|perceiver|qformer|adapters?|aligner"),
    ),
)
_WORDS = re.compile(r"[._\d]+")


def part_of(stack: str) -> str:
    """ "vision", "audio", "connector" or "language", by the words of a stack's name."""
    words = _WORDS.split(stack.lower())
    for part, pattern in _PARTS:
        if any(pattern.fullmatch(word) for word in words):
            return part
    return "language"


def side_of(stack: str) -> str | None:
    """ "encoder" or "decoder", by the outermost of these words in a stack's name."""
    found = re.search(r"encoder|decoder", stack.lower())
    return found.group() if found else None


def usual(stacks: Sequence[str], *, speaks: bool) -> list[str]:
    """What is meant where nothing is said: the language model of a model that has other parts
    beside it and a head that `speaks`, else all stacks."""
    language = [stack for stack in stacks if part_of(stack) == "language"]
    return language if speaks and language else list(stacks)


def in_scope(stacks: Collection[str], scope: str) -> list[str]:
    """The stacks that `scope` means: one of SCOPES, or the name of a stack or of a module around
    stacks. Raises ArgumentError where there is none."""
    chosen = [stack for stack in stacks if _meant(stack, scope)]
    if not chosen:
        known = ", ".join(f"{stack or '(top)'} ({part_of(stack)})" for stack in stacks)
        raise ArgumentError(
            f"scope is {scope!r}, and no stack is of that: there are {known or 'none'}; give "
            f"{', '.join(SCOPES)} or the name of a stack"
        )
    return chosen


def names_in_scope(anatomy: Anatomy, scope: str | None) -> set[str]:
    """The tensors that `scope` means: those of its stacks, and those outside the stacks whose own
    names say so. All of them where there is no scope. Raises as `in_scope` does."""
    if scope is None:
        return set(anatomy.places)
    stacks = in_scope(anatomy.stacks, scope)
    return {
        name
        for name, place in anatomy.places.items()
        if (_meant(name, scope) if place.stack is None else place.stack in stacks)
    }


def _meant(name: str, scope: str) -> bool:
    return scope in ("all", part_of(name), side_of(name), name) or name.startswith(f"{scope}.")
