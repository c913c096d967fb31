"""The demo's two kinds of text, both of which every full CPython carries: prose and code.

"prose" is the language reference as ``help()`` shows it (``pydoc_data.topics``); "code" is the
source of the standard library's top-level modules. Whether a topic or a module is held out is
decided by a hash of its name alone, so the same names are held out under every Python version,
whatever else came or went: text the shipped weights were trained on is not what they are judged
on. Needs the standard library only.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("prose", "code")


class TextMissing(RuntimeError):
    """This Python was installed without the files that the demo reads."""


def is_held_out(name: str) -> bool:
    """Whether a topic (``"lambda"``) or module file (``"csv.py"``) is never trained on."""
    return hashlib.sha256(name.encode()).digest()[0] % 8 == 0


def training(domain: str) -> bytes:
    """The text of `domain` to train on: no held-out topic or module, no held-out paragraph."""
    return _code(held_out=False) if _checked(domain) == "code" else _prose(held_out=False)


def held_out(domain: str) -> bytes:
    """The text of `domain` to judge a model on."""
    return _code(held_out=True) if _checked(domain) == "code" else _prose(held_out=True)


def windows(data: bytes, size: int, most: int | None = None) -> list[bytes]:
    """Pieces of exactly `size` bytes without overlap; with `most`, that many, evenly spread."""
    starts = range(0, len(data) - size + 1, size)
    if most is not None and len(starts) > most:
        starts_kept = [starts[i * len(starts) // most] for i in range(most)]
    else:
        starts_kept = list(starts)
    return [data[start : start + size] for start in starts_kept]


def _checked(domain: str) -> str:
    if domain not in DOMAINS:
        raise ValueError(f"no such text: {domain!r} (there are: {', '.join(DOMAINS)})")
    return domain


def _prose(*, held_out: bool) -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextMissing(
            "this Python has no pydoc_data.topics, whose text the demo uses "
            "(some distributions package it apart, with the documentation or pydoc)"
        ) from error
    # Topics repeat one another ("compound" holds all of "for"), so each paragraph is kept once,
    # and one that any held-out topic has is held out wherever else it stands.
    seen: set[str] = set()
    kept: list[str] = []
    for wanted in (True, False):
        for name in sorted(topics):
            if is_held_out(name) == wanted:
                for paragraph, words in _paragraphs(topics[name]):
                    if words not in seen and wanted == held_out:
                        kept.append(paragraph)
                    seen.add(words)
    return ("\n\n".join(kept) + "\n").encode()


def _paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Each paragraph as it stands, and its words alone (indentation differs between topics)."""
    for paragraph in re.split(r"\n[ \t]*(?:\n[ \t]*)*\n", text.strip("\n")):
        if paragraph.strip():
            yield paragraph.rstrip(), " ".join(paragraph.split())


def _code(*, held_out: bool) -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    kept = []
    for path in sorted(folder.glob("*.py")):
        # Files that a build or a distributor put there are not the standard library's:
        # _sysconfigdata* lists one machine's paths.
        if path.stem not in sys.stdlib_module_names or path.stem.startswith("_sysconfigdata"):
            continue
        if is_held_out(path.name) == held_out:
            kept.append(path.read_bytes().replace(b"\r\n", b"\n"))
    if not kept:
        raise TextMissing(
            f"no standard-library source in {folder}, whose text the demo uses "
            "(this Python was installed without its .py files)"
        )
    return b"\n".join(kept)
