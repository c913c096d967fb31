"""Corrections of an anatomy as plain data, for the record beside a checkpoint: what a user said of a
model holds for what was made of it.

What lies in a checkpoint may be anybody's, so it is taken apart here with nothing believed; what
doesn't fit the tensors does nothing, as with any corrections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.anatomy.corrections import Corrections, MLPCorrection
from surgery.anatomy.places import Role

KEY = "anatomy"
"""Where it is in the record."""
MOST = 20_000
"""Entries of a list; what a user writes has a few."""
LONGEST = 500
"""Characters of a name."""


def as_data(corrections: Corrections) -> dict[str, Any]:
    """Plain data that `from_data` reads."""
    return {
        "stacks": list(corrections.stacks),
        "roles": [[pattern, role.value] for pattern, role in corrections.roles],
        "mlps": [
            {
                "stack": mlp.stack,
                "ups": list(mlp.ups),
                "down": mlp.down,
                "parts": mlp.parts,
                "in_out": mlp.in_out,
                "interleaved": mlp.interleaved,
                "blocks": None if mlp.blocks is None else sorted(mlp.blocks),
                **({"followers": _followers(mlp)} if mlp.followers else {}),
            }
            for mlp in corrections.mlps
        ],
    }


def _followers(mlp: MLPCorrection) -> list[list[Any]]:
    return [[name, even] for name, even in mlp.followers]


def from_data(data: Any) -> Corrections:
    """The corrections. Raises ValueError for anything that `as_data` doesn't make."""
    table = _table(data, {"stacks", "roles", "mlps"})
    roles = [_list(entry) for entry in _list(table["roles"])]
    if any(len(entry) != 2 for entry in roles):
        raise ValueError("a role has a name and what it is")
    return Corrections(
        tuple(map(_name, _list(table["stacks"]))),
        tuple((_name(pattern), Role(role)) for pattern, role in roles),
        tuple(map(_mlp, _list(table["mlps"]))),
    )


def _mlp(data: Any) -> MLPCorrection:
    keys = {"stack", "ups", "down", "parts", "in_out", "interleaved", "blocks", "followers"}
    if isinstance(data, Mapping):  # where there are none it isn't written
        data = {"followers": [], **data}
    entry = _table(data, keys)
    ups, blocks = tuple(map(_name, _list(entry["ups"]))), entry["blocks"]
    parts, in_out = entry["parts"], entry["in_out"]
    if type(parts) is not int or (len(ups), parts) not in ((1, 1), (1, 2), (2, 1)):
        raise ValueError("an MLP has one or two ups, or both in one matrix")
    if type(in_out) is not bool or type(entry["interleaved"]) is not bool:
        raise ValueError("in_out and interleaved are true or false")
    if entry["interleaved"] and parts != 2:
        raise ValueError("only gate and up in one matrix are interleaved")
    if blocks is not None and any(type(block) is not int or block < 0 for block in _list(blocks)):
        raise ValueError("blocks are numbers from 0")
    return MLPCorrection(
        _name(entry["stack"]),
        ups,
        _name(entry["down"]),
        parts,
        in_out,
        None if blocks is None else frozenset(blocks),
        entry["interleaved"],
        tuple(map(_follower, _list(entry["followers"]))),
    )


def _follower(data: Any) -> tuple[str, bool]:
    entry = _list(data)
    if len(entry) != 2 or type(entry[1]) is not bool:
        raise ValueError("a follower has a name, and whether its neurons are copied evenly")
    return _name(entry[0]), entry[1]


def _table(data: Any, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or set(data) != keys:
        raise ValueError(f"a table with {', '.join(sorted(keys))} is wanted")
    return data


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list) or len(data) > MOST:
        raise ValueError("a list is wanted, and not one that long")
    return data


def _name(data: Any) -> str:
    if not isinstance(data, str) or len(data) > LONGEST:
        raise ValueError("a name is wanted")
    return data
