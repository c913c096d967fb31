"""The model card, `README.md`: the Hub's metadata, and what was done, for a person to read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from surgery.checkpoint import CARD, Checkpoint, Weights
from surgery.hub import Source
from surgery.system import naming
from surgery.writing.plan import Plan

_UNPRINTABLE = re.compile(r"[^ -~]")
_NOTHING = ("", "~", "null")

_LONGEST_METADATA = 100_000
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(layout: Plan, record: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """`README.md`, and the input's own card if it had one, under another name, by file name."""
    weights = layout.weights
    made: dict[str, Path | bytes] = {}
    given = weights.companions.get(CARD)
    if given is not None:
        made[_free_name(weights.companions)] = given
    metadata = _metadata(weights, given if isinstance(given, Path) else None)
    lines = ["---", *(f"{key}: {_yaml(value)}" for key, value in metadata.items()), "---", ""]
    made[CARD] = "\n".join([*lines, *_body(weights, record), ""]).encode()
    return made


def _free_name(taken: Mapping[str, object]) -> str:
    """A name for the input's card that no other file of it has."""
    names = (f"README.input{number or ''}.md" for number in count())
    return next(name for name in names if name not in taken)


def _metadata(weights: Weights, given: Path | None) -> dict[str, Any]:
    inputs = [
        source
        for edit in weights.history
        for role, source in edit.inputs.items()
        if weights.library != "peft" or role == "base"  # an adapter is of one model
    ]
    names = dict.fromkeys(model_name(source) for source in inputs if not source.step)
    metadata: dict[str, Any] = {
        "base_model": list(names),
        **({} if weights.library is None else {"library_name": weights.library}),
        "tags": ["surgery", *dict.fromkeys(edit.operation for edit in weights.history)],
    }
    return metadata | _kept(given)


def model_name(source: Source) -> str:
    """The Hub's id, or the name of the directory: where it lies on this machine is nobody's."""
    if source.step:
        return source.reference
    return source.repo_id or source.path.resolve().name


def _kept(card: Path | None) -> dict[str, Any]:
    """What the input's card says that is true of the output as well, the licence first of all."""
    if card is None:
        return {}
    import yaml

    with naming(card), card.open("rb") as file:
        first, *lines = file.read(_LONGEST_METADATA).decode("utf-8", "replace").split("\n")
    ends = [at for at, line in enumerate(lines) if line.rstrip() == "---"]
    if first.rstrip() != "---" or not ends:
        return {}
    try:  # as text alone: `no` is a language, and no tag makes anything of a value
        found = yaml.load("\n".join(lines[: ends[0]]), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # a card is prose for people: one that can't be parsed says nothing to us
    if not isinstance(found, dict):
        return {}
    return {key: found[key] for key in _KEPT if key in found and _is_plain(found[key])}


def _is_plain(value: Any) -> bool:
    """A line of text, or a list of such: all that these keys can hold."""
    if isinstance(value, list):
        return all(isinstance(item, str) and _is_plain(item) for item in value)
    return isinstance(value, str) and value.isprintable() and value not in _NOTHING


def _yaml(value: Any) -> str:
    """A value on one line: JSON is YAML, and what it quotes can't break out of its place."""
    return _UNPRINTABLE.sub(_escaped, json.dumps(value, ensure_ascii=False))


def _escaped(found: re.Match[str]) -> str:
    """YAML's escape, which has no halves of pairs as JSON's do."""
    code = ord(found.group())
    if found.group().isprintable():
        return found.group()
    return "\\ufffd" if 0xD800 <= code < 0xE000 else f"\\U{code:08x}"


def _body(weights: Weights, record: Mapping[str, Any]) -> list[str]:
    lines = ["# Edited with Surgery", ""]
    for edit in weights.history:
        given = ", ".join(f"{k} = {_text(v)}" for k, v in edit.parameters.items() if v is not None)
        inputs = ", ".join(f"{role} {_code(model_name(s))}" for role, s in edit.inputs.items())
        lines += [f"- **{edit.operation}** of {inputs}: {given}."]
    if command := record.get("command"):
        lines += ["", "The command:", "", *(f"    {line}" for line in command.splitlines())]
    if isinstance(verification := record.get("verification"), Mapping):
        lines += ["", f"Verified before it was written: {verification['summary']}."]
    if any(edit.operation == "grow" for edit in weights.history):
        lines += [
            "",
            (
                "`surgery.json` lists the new index ranges of every grown tensor. To train only "
                "what is new (G-Freeze), train those rows and columns; for G-Train, train the "
                "tensors of role `up` whole, and freeze all else."
            ),
        ]
    if any(edit.operation == "expand" for edit in weights.history):
        lines += [
            "",
            (
                "`surgery.json` lists the blocks that were added, which return their input as "
                "they are. LLaMA Pro trains those alone, and freezes all else."
            ),
        ]
    if isinstance(weights, Checkpoint) and weights.needs_code:
        lines += ["", "Loading takes `trust_remote_code=True`: layers differ in MLP width."]
    return lines


def _text(value: Any) -> str:
    """A value in the text: as it is where Markdown sees nothing in it."""
    text = str(value)
    return text if re.fullmatch(r"[\w .,:=+@/%-]*", text, re.ASCII) else _code(text)


def _code(text: str) -> str:
    """A name in the text, which has to stay in its line."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return "`" + plain.replace("`", "'") + "`"
