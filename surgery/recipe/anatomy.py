"""Corrections of an anatomy as a YAML file: read, checked against the checkpoint, and written.

stacks: {model.layers: 4}
roles: {"*.router.*": router, lm_head.weight: head}
mlps:
  - {stack: model.layers, blocks: "0-3", ups: [ffn.a.weight], down: ffn.b.weight, parts: 2}
  - {stack: tower, ups: [a.weight], down: b.weight, followers: {c.weight: each, n.weight: all}}

Followers are tensors that go by neuron too: `each` acts on a neuron by itself, as a depthwise
convolution does; `all` looks at all of them, as a norm does.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from surgery.anatomy import MLP, Anatomy, Corrections, MLPCorrection, Role
from surgery.anatomy.corrections import block_of
from surgery.checkpoint import RECORD, Checkpoint
from surgery.errors import ArgumentError, RecipeError
from surgery.merging.parameters import unknown
from surgery.operations.layers import parse_layers
from surgery.recipe.document import Document, Steps, read_documents
from surgery.recipe.graph import Problems
from surgery.recipe.parsing import parsed

KEYS = ("stacks", "roles", "mlps")
STORED_NOTE = f"{RECORD} beside it says"
"""How the note of corrections that lie in the record ends: those that are given replace them."""
ROLES = {role.value: role for role in Role}


class _MLP(BaseModel):
    """One entry of `mlps`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stack: str
    blocks: str | int = "all"
    ups: list[str] = Field(min_length=1, max_length=2)
    down: str
    parts: Literal[1, 2] = 1
    in_out: bool = False
    interleaved: bool = False
    followers: dict[str, Literal["each", "all"]] = Field(default_factory=dict)


def correct_anatomy(checkpoint: Checkpoint, path: str | Path) -> Checkpoint:
    """The checkpoint with the corrections in a YAML file over what is inferred of it.

    Raises NotFoundError, or RecipeError with everything that can't be meant, each with its line:
    keys and roles that there aren't, names that the checkpoint hasn't got, shapes that contradict.
    """
    documents = read_documents(path)
    if len(documents) != 1 or not isinstance(documents[0].data, Mapping):
        raise RecipeError(f"{path} isn't one YAML table with {', '.join(KEYS)}")
    return correct(checkpoint, Given(documents[0], (), documents[0].data))


@dataclass(frozen=True)
class Given:
    """Corrections as they are written: the table `data`, at `at` in `document`."""

    document: Document
    at: Steps
    data: Mapping[str, Any]


def correct(checkpoint: Checkpoint, given: Given) -> Checkpoint:
    """The same with a part of a document."""
    problems = Problems(given.document)
    for key in given.data:
        if key not in KEYS:
            problems.add((*given.at, key), unknown("key", key, KEYS))
    stacks = _stacks(given, checkpoint, problems)
    roles = _roles(given, checkpoint, problems)
    mlps = _mlps(given, checkpoint, stacks, problems)
    RecipeError.raise_if(problems)
    note = f"{checkpoint.source.reference}: its anatomy was corrected by {given.document.path}"
    return replace(
        checkpoint,
        corrections=Corrections(tuple(stacks), roles, mlps),
        notes=(*(n for n in checkpoint.notes if not n.endswith(STORED_NOTE)), note),
    )


def anatomy_yaml(anatomy: Anatomy, leave_out: Container[str] = ()) -> str:
    """The anatomy in the form that `correct_anatomy` reads, without the tensors `leave_out`."""
    import yaml

    places = {name: place for name, place in anatomy.places.items() if name not in leave_out}
    anatomy = replace(anatomy, places=places)

    table: dict[str, Any] = {
        "stacks": dict(anatomy.stacks),
        "roles": _role_patterns(anatomy),
        "mlps": [entry for alike in _alike(anatomy) for entry in alike],
    }
    text: str = yaml.safe_dump(table, sort_keys=False, width=100, allow_unicode=True)
    return text


def _table(given: Given, key: str, problems: Problems) -> dict[str, Any]:
    found = given.data.get(key, {})
    if isinstance(found, Mapping):
        return dict(found)
    problems.add((*given.at, key), "this is a table")
    return {}


def _stacks(given: Given, checkpoint: Checkpoint, problems: Problems) -> dict[str, int]:
    """The stacks that are given, and how many blocks they have."""
    stacks = {}
    for stack, depth in _table(given, "stacks", problems).items():
        at: Steps = (*given.at, "stacks", stack)
        if type(depth) is not int or depth < 1:
            problems.add(at, f"{depth!r} is no number of blocks")
            continue
        numbers = {spot[0] for name in checkpoint if (spot := block_of(name, stack))}
        if numbers != set(range(depth)):
            there = ", ".join(map(str, sorted(numbers)[:8])) or "none"
            more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
            problems.add(at, f"{depth} blocks are 0 to {depth - 1}, and there are {there}{more}")
            continue
        stacks[stack] = depth
    return stacks


def _roles(
    given: Given, checkpoint: Checkpoint, problems: Problems
) -> tuple[tuple[str, Role], ...]:
    roles = []
    for pattern, role in _table(given, "roles", problems).items():
        at: Steps = (*given.at, "roles", pattern)
        if not isinstance(role, str) or role not in ROLES:
            problems.add(at, unknown("role", str(role), list(ROLES)))
            continue
        if pattern not in checkpoint and not any(fnmatchcase(n, pattern) for n in checkpoint):
            problems.add(at, _no_tensor(pattern, checkpoint))
        roles.append((pattern, ROLES[role]))
    return tuple(roles)


def _no_tensor(name: str, checkpoint: Checkpoint) -> str:
    where = checkpoint.source.reference
    if any(mark in name for mark in "*?["):
        return f"no tensor of {where} has a name like that"
    text = unknown("tensor", name, list(checkpoint))
    return text if "did you mean" in text else f"there is no tensor of that name in {where}"


def _mlps(
    given: Given, checkpoint: Checkpoint, named: Mapping[str, int], problems: Problems
) -> tuple[MLPCorrection, ...]:
    entries = given.data.get("mlps", [])
    if not isinstance(entries, list):
        problems.add(
            (*given.at, "mlps"), "this is a list of tables: - {stack: ..., ups: [...], down: ...}"
        )
        return ()
    stacks = {**checkpoint.anatomy.stacks, **named}
    made = []
    for number, item in enumerate(entries):
        at: Steps = (*given.at, "mlps", number)
        entry: _MLP | None = parsed(_MLP, item, at, problems)
        if entry is None:
            continue
        if entry.stack not in stacks:
            problems.add((*at, "stack"), unknown("stack", entry.stack, list(stacks)))
            continue
        try:
            blocks = parse_layers(str(entry.blocks), stacks[entry.stack])
        except ArgumentError as error:
            problems.add((*at, "blocks"), str(error))
            continue
        if len(entry.ups) == 2 and entry.parts == 2:
            problems.add((*at, "parts"), "2 is for gate and up in one matrix, and ups has two")
            continue
        if entry.interleaved and entry.parts != 2:
            problems.add((*at, "interleaved"), "this is for gate and up in one matrix: parts: 2")
            continue
        correction = MLPCorrection(
            entry.stack,
            tuple(entry.ups),
            entry.down,
            entry.parts,
            entry.in_out,
            None if len(blocks) == stacks[entry.stack] else frozenset(blocks),
            entry.interleaved,
            tuple((name, kind == "all") for name, kind in entry.followers.items()),
        )
        for block in blocks:
            for problem in correction.problems(checkpoint, block):
                problems.add(at, problem)
        made.append(correction)
    return tuple(made)


def _role_patterns(anatomy: Anatomy) -> dict[str, str]:
    """The role of every tensor; one line for all blocks where they agree. Longer names come
    first: of several patterns that fit, the first counts."""
    alike: dict[tuple[str, str], dict[str, Role]] = {}
    roles: dict[str, Role] = {}
    for name, place in anatomy.places.items():
        if place.stack is None:
            roles[name] = place.role
        else:
            alike.setdefault((place.stack, place.inner), {})[name] = place.role
    for (stack, inner), found in sorted(alike.items(), key=lambda item: -len(item[0][1])):
        if len(set(found.values())) == 1:
            roles[f"{stack}.*.{inner}" if stack else f"*.{inner}"] = next(iter(found.values()))
        else:
            roles |= found
    return {pattern: role.value for pattern, role in roles.items()}


def _alike(anatomy: Anatomy) -> Iterator[list[dict[str, Any]]]:
    """The MLPs of every stack, one entry for those that have the same form."""
    for stack, depth in anatomy.stacks.items():
        forms: dict[tuple[Any, ...], list[int]] = {}
        for (own, block), mlp in anatomy.mlps.items():
            if own == stack:
                forms.setdefault(_form(mlp, anatomy), []).append(block)
        yield [
            {
                "stack": stack,
                "blocks": "all" if len(blocks) == depth else ",".join(map(str, sorted(blocks))),
                "ups": list(ups),
                "down": down,
                "parts": parts,
                "in_out": in_out,
                **({"interleaved": True} if interleaved else {}),
                **({"followers": dict(followers)} if followers else {}),
            }
            for (ups, down, parts, in_out, interleaved, followers), blocks in forms.items()
        ]


def _form(mlp: MLP, anatomy: Anatomy) -> tuple[Any, ...]:
    places = anatomy.places
    ups = tuple(places[up.weight].inner for up in mlp.ups)
    up = mlp.ups[0]
    followers = tuple(
        (places[follower.name].inner, "all" if follower.even else "each")
        for follower in mlp.followers
        if follower.parts == 1  # an adapter's matrix is found by the projection that it adds to
    )
    return ups, places[mlp.down.weight].inner, up.parts, mlp.down.in_out, up.interleaved, followers
