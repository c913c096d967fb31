"""Attention that is told by nothing but letters: matrices of a block that are called alike but for
q, k and v."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from surgery.anatomy.places import Place, Role

_LETTER = re.compile(
    r"(?P<before>(?:.*[._])?)(?P<word>q|k|v|o|query|key|value|out|output)"
    r"(_proj|_lin|_linear)?(\.weight|\.bias)?"
)
_TRIPLES = ({"q", "k", "v"}, {"query", "key", "value"})
_OUTPUTS = ("o", "out", "output")


def place_attention(places: dict[str, Place]) -> None:
    """Give the role to what has none: to the three, and to the matrix that follows them. A key and
    a value alone are none (RWKV's channel mix has those)."""
    named: dict[tuple[str | None, int | None, str], dict[str, list[str]]] = defaultdict(dict)
    for name, place in places.items():
        if place.block is None or place.role is not Role.UNKNOWN:
            continue
        if (match := _LETTER.fullmatch(place.inner)) is not None:
            key = place.stack, place.block, match["before"]
            named[key].setdefault(match["word"], []).append(name)
    for found in named.values():
        if not any(triple <= found.keys() for triple in _TRIPLES):
            continue
        for word in (*set().union(*_TRIPLES), *_OUTPUTS):
            for name in found.get(word, ()):
                places[name] = replace(places[name], role=Role.ATTENTION)
