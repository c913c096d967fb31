"""YAML as plain data, with the line of everything in it, from a file that nobody trusts.

Only what JSON could say is read: no tag makes an object, an alias can't explode, a key that is
given twice is an error and doesn't replace the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from surgery.errors import NotFoundError, RecipeError

MOST_BYTES = 1_000_000
MOST_NODES = 20_000
"""More than any recipe has, and little enough to hold whatever the aliases make of it."""
DEEPEST = 50
LONGEST_NUMBER = 200
"""Characters, hexadecimal ones too: what is shorter fits into a float64."""
TAG = "tag:yaml.org,2002:"
NUMBERS = ("int", "float")
KINDS = ("str", *NUMBERS, "bool", "null", "timestamp", "merge")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""1e-5 is a number to everybody but YAML 1.1, which wants a dot."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
"""Escapes in quoted text can make these, which no name and no path can hold."""

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
        with Path(path).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise NotFoundError(f"{path} can't be read: {error.strerror}") from error
    if len(raw) > MOST_BYTES:
        raise RecipeError(f"{path} has more than {MOST_BYTES:,} bytes: no recipe is that long")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} isn't UTF-8 text: {error.reason}") from error
    return parse_documents(text, str(path))


def parse_documents(text: str, path: str) -> list[Document]:
    """The documents in `text`, which `path` stands for in messages. Empty ones are left out."""
    try:
        nodes = list(_Composer(text, path).nodes())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{path}:{line}: this isn't YAML: the character {chr(error.character)!r} isn't allowed"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}" if mark is not None else ""
        reason = error.problem or error.context
        raise RecipeError(f"{path}{at}: this isn't YAML: {reason}") from error
    except ValueError as error:  # "\U00110000", a character that there isn't
        raise RecipeError(f"{path}: this can't be read as YAML: {error}") from error
    return [_Reader(path).document(node) for node in nodes if node is not None and not _empty(node)]


def parse_value(text: str) -> Any:
    """A value as it is written in YAML, for `--set`."""
    found = parse_documents(text, "--set")
    return found[0].data if found else None


def _empty(node: yaml.Node) -> bool:
    return node.tag == TAG + "null" and not node.value


class _Composer(yaml.SafeLoader):
    """Composes nodes, and stops where there are too many or they lie too deep."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self.path = path
        self.count = 0
        self.depth = 0

    def nodes(self) -> Iterator[yaml.Node | None]:
        while self.check_node():
            yield self.get_node()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.count += 1
        self.depth += 1
        if self.count > MOST_NODES or self.depth > DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            _too_much(self.path, mark.line + 1)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _too_much(path: str, line: int) -> NoReturn:
    raise RecipeError(
        f"{path}:{line}: this has too many values, or they are nested too deeply, to be a recipe"
    )


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
            _too_much(self.path, here)
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
            if key_node.tag == TAG + "merge":
                self.problems.append(f"{self.path}:{line}: merge keys (<<) aren't supported")
                continue
            self._scalar(key_node, line)
            name = key_node.value  # as it is written: a step may be called `on` or `1`
            if name in made:
                self.problems.append(f"{self.path}:{line}: {name} is given a second time")
            made[name] = self._value(value_node, (*steps, name), line)
        return made

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        kind = node.tag.removeprefix(TAG)
        if node.tag == kind or kind not in KINDS:
            self.problems.append(f"{self.path}:{line}: the tag {node.tag} isn't allowed")
            return None
        if bad := UNPRINTABLE.search(node.value):
            self.problems.append(
                f"{self.path}:{line}: the character {bad.group()!r} isn't allowed in text"
            )
            return None
        if kind == "str" and node.style is None and EXPONENT.fullmatch(node.value):
            return float(node.value)
        # 1:30 is ninety to YAML 1.1 alone
        if kind in ("str", "timestamp", "merge") or (kind in NUMBERS and ":" in node.value):
            return node.value
        if kind == "null":
            return None
        try:
            if kind in NUMBERS and len(node.value) > LONGEST_NUMBER:
                raise ValueError
            return self.scalars.construct_object(node)
        except (ValueError, LookupError):  # LookupError: !!int "", !!bool maybe
            self.problems.append(f"{self.path}:{line}: {node.value[:40]!r} is no {kind}")
            return None

    def _plain(self, node: yaml.Node, kind: str, line: int) -> None:
        if node.tag != TAG + kind:
            self.problems.append(f"{self.path}:{line}: the tag {node.tag} isn't allowed")
