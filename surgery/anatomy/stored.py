"""Corrections of an anatomy as plain data, for the record beside a checkpoint: what a user said of
a model holds for what was made of it.

What lies in a checkpoint may be anybody's, so it is taken apart here with nothing believed; what
doesn't fit the tensors does nothing, as with any corrections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.anatomy.corrections import Corrections
from surgery.anatomy.places import Role
from surgery.anatomy.said import KINDS, MLPCorrection

KEY = "anatomy"
"""Where it is in the record."""
MOST = 20_000
"""Entries of a list; what a user writes has a few."""
LONGEST = 500
"""Characters of a name."""
NOT_WRITTEN: dict[str, Any] = {
    "followers": [],
    "kind": "dense",
    "biases": [],
    "experts": None,
    "idle": 0,
    "sparse": None,
}
"""What is meant by a key of an MLP that isn't there."""


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
                **{key: value for key, value in _more(mlp).items() if value != NOT_WRITTEN[key]},
            }
            for mlp in corrections.mlps
        ],
    }


def _more(mlp: MLPCorrection) -> dict[str, Any]:
    """What most have nothing of."""
    return {
        "followers": [[name, even] for name, even in mlp.followers],
        "kind": mlp.kind,
        "biases": [list(pair) for pair in mlp.biases],
        "experts": mlp.experts,
        "idle": mlp.idle,
        "sparse": mlp.sparse,
    }


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
    keys = {"stack", "ups", "down", "parts", "in_out", "interleaved", "blocks", *NOT_WRITTEN}
    if isinstance(data, Mapping):
        data = {**NOT_WRITTEN, **data}
    entry = _table(data, keys)
    ups, blocks, sparse = tuple(map(_name, _list(entry["ups"]))), entry["blocks"], entry["sparse"]
    parts, in_out = entry["parts"], entry["in_out"]
    if type(parts) is not int or (len(ups), parts) not in ((1, 1), (1, 2), (2, 1)):
        raise ValueError("an MLP has one or two ups, or both in one matrix")
    if type(in_out) is not bool or type(entry["interleaved"]) is not bool:
        raise ValueError("in_out and interleaved are true or false")
    if blocks is not None and any(type(block) is not int or block < 0 for block in _list(blocks)):
        raise ValueError("blocks are numbers from 0")
    if entry["kind"] not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}")
    if type(entry["idle"]) is not int or type(entry["experts"]) not in (int, type(None)):
        raise ValueError("experts and idle are numbers")
    made = MLPCorrection(
        _name(entry["stack"]),
        ups,
        _name(entry["down"]),
        parts,
        in_out,
        None if blocks is None else frozenset(blocks),
        entry["interleaved"],
        tuple(map(_follower, _list(entry["followers"]))),
        entry["kind"],
        tuple(map(_bias, _list(entry["biases"]))),
        entry["experts"],
        entry["idle"],
        None if sparse is None else _name(sparse),
    )
    for key, mistake in made.mistakes():
        raise ValueError(f"{key}: {mistake}")
    return made


def _follower(data: Any) -> tuple[str, bool]:
    entry = _list(data)
    if len(entry) != 2 or type(entry[1]) is not bool:
        raise ValueError("a follower has a name, and whether its neurons are copied evenly")
    return _name(entry[0]), entry[1]


def _bias(data: Any) -> tuple[str, str]:
    entry = _list(data)
    if len(entry) != 2:
        raise ValueError("a bias has the name of its weight and its own")
    return _name(entry[0]), _name(entry[1])


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
