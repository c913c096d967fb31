"""What the fuzzers found, read again: each was a crash, a hang or an escape sequence once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from .fuzz.readers import READERS, outcome

CORPUS = Path(__file__).parent / "corpus"
FOUND = sorted(path.name for path in CORPUS.iterdir() if not path.name.startswith("."))
SECONDS = 10.0


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    """By the name of the reader, a dash, and anything."""
    began = time.process_time()
    outcome(name.rpartition("-")[0], (CORPUS / name).read_bytes())
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("name", READERS)
def test_sound_inputs_are_read(name: str) -> None:
    """The seeds get past the checks, or a fuzzer that starts from them sees nothing."""
    assert "read" in [outcome(name, seed) for seed in READERS[name].seeds]
