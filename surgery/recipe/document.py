"""YAML as plain data, with the line of everything in it, from a file that nobody trusts.

Only what JSON could say is read: no tag makes an object, an alias can't explode, a key that is
given twice is an error and doesn't replace the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import NotFoundError, RecipeError

MOST_BYTES = 1_000_000
MOST_NODES = 100_000
"""More than any recipe has, and little enough to hold whatever the aliases make of it."""
DEEPEST = 50
TAG = "tag:yaml.org,2002:"
KINDS = ("str", "int", "float", "bool", "null", "timestamp", "merge")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""1e-5 is a number to everybody but YAML 1.1, which wants a dot."""

Steps = tuple[str | int, ...]
"""Keys and positions that lead to a value: ("steps", "merged", "merge", "models", 0)."""


@dataclass(frozen=True)
class Document:
    """One document of a file: its data, and on which line each value begins."""

    path: str
    data: Any
    lines: Mapping[Steps, int] = field(default_factory=dict)

    def where(self, steps: Steps) -> str:
        """File and line of a value, or of the nearest thing around it that is there."""
        while steps and steps not in self.lines:
            steps = steps[:-1]
        return f"{self.path}:{self.lines.get(steps, 1)}"

    def problem(self, steps: Steps, text: str) -> str:
        """A problem with the value at `steps`, with its line and its name."""
        name = ""
        for step in steps:
            name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
        return f"{self.where(steps)}: {name + ': ' if name else ''}{text}"


def read_documents(path: str | Path) -> list[Document]:
    """The YAML documents in a file. Raises NotFoundError, or RecipeError with the line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path} can't be read: {error.strerror}") from error
    if len(raw) > MOST_BYTES:
        raise RecipeError(f"{path} has {len(raw):,} bytes, and no recipe is that long")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} isn't UTF-8 text: {error.reason}") from error
    return parse_documents(text, str(path))


def parse_documents(text: str, path: str) -> list[Document]:
    """The documents in `text`, which `path` stands for in messages. Empty ones are left out."""
    try:
        nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: this isn't YAML: {reason}") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{path}: this can't be read as YAML: {error}") from error
    return [_Reader(path).document(node) for node in nodes if not _empty(node)]


def parse_value(text: str) -> Any:
    """A value as it is written in YAML, for `--set`."""
    found = parse_documents(text, "--set")
    return found[0].data if found else None


def _empty(node: yaml.Node | None) -> bool:
    return node is None or (node.tag.endswith(":null") and not node.value)


class _Reader:
    """Builds the data of one document and notes lines."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes = 0
        self.lines: dict[Steps, int] = {}
        self.problems: list[str] = []
        self.scalars = yaml.SafeLoader("")

    def document(self, node: yaml.Node) -> Document:
        data = self._value(node, ())
        RecipeError.raise_if(self.problems)
        return Document(self.path, data, self.lines)

    def _value(self, node: yaml.Node, steps: Steps, line: int | None = None) -> Any:
        self.nodes += 1
        here = node.start_mark.line + 1
        self.lines[steps] = here if line is None else line
        if self.nodes > MOST_NODES or len(steps) > DEEPEST:
            raise RecipeError(
                f"{self.path}:{here}: this has too many values, or they are nested too deeply, "
                f"to be a recipe"
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, here)
        if isinstance(node, yaml.SequenceNode):
            self._plain(node, "seq", here)
            return [self._value(item, (*steps, at)) for at, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        self._plain(node, "map", here)
        return self._mapping(node, steps)

    def _mapping(self, node: yaml.MappingNode, steps: Steps) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.path}:{line}: a key has to be a word")
                continue
            key = self._scalar(key_node, line)
            if key == "<<":
                self.problems.append(f"{self.path}:{line}: merge keys (<<) aren't supported")
                continue
            name = str(key)
            if name in made:
                self.problems.append(f"{self.path}:{line}: {name} is given a second time")
            made[name] = self._value(value_node, (*steps, name), line)
        return made

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        kind = node.tag.removeprefix(TAG)
        if node.tag == kind or kind not in KINDS:
            self.problems.append(f"{self.path}:{line}: the tag {node.tag} isn't allowed")
            return None
        if kind == "merge":
            return "<<"
        if kind == "str" and node.style is None and EXPONENT.fullmatch(node.value):
            return float(node.value)
        if kind in ("str", "timestamp"):
            return node.value
        try:
            return self.scalars.construct_object(node)
        except (ValueError, yaml.YAMLError):
            self.problems.append(f"{self.path}:{line}: {node.value[:40]!r} is no {kind}")
            return None

    def _plain(self, node: yaml.Node, kind: str, line: int) -> None:
        if node.tag != TAG + kind:
            self.problems.append(f"{self.path}:{line}: the tag {node.tag} isn't allowed")
