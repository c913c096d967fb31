"""What strangers' files say, made safe for a terminal: names and values are text, never commands
to it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f"  # escape sequences begin here; a tab moves the cursor
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # other lines, and text that runs backwards
    "\ud800-\udfff]"  # halves of pairs, which no encoding can write
)


def plain(text: str) -> str:
    """The text with every character that a terminal would obey written as its escape: \\x1b."""
    return _OBEYED.sub(lambda found: repr(found.group())[1:-1], text)


def one_line(text: str) -> str:
    """The same of a name in a list, which stays in its line."""
    return plain(text).replace("\n", "\\n")


def one_problem(text: str) -> str:
    """The same of a message: if it has several lines, none can pass for a message of its own."""
    return plain(text).replace("\n", "\n  ")


def plain_console(**options: Any) -> Console:
    """A console of rich's that shows no text as anything but text."""
    from rich.console import Console
    from rich.segment import Segment

    class Plain(Console):
        def render(self, *args: Any, **how: Any) -> Any:
            for segment in super().render(*args, **how):
                if segment.control or not _OBEYED.search(segment.text):
                    yield segment
                else:
                    yield Segment(plain(segment.text), segment.style)

    return Plain(highlight=False, markup=False, **options)
