"""The readers on documents that hypothesis makes: of nothing, and of sound ones by mutation.

HYPOTHESIS_PROFILE=deep makes 1,000 of each. `fuzz/run.py` does the same guided by coverage.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .fuzz.mutate import NASTY, WORDS, mutated
from .fuzz.readers import READERS, outcome

KEYS = ("tensors", "config", "edits", "weight_map", "metadata", "base", "text_config", "details")
SCALARS = st.one_of(
    st.sampled_from([value for value in NASTY if not isinstance(value, (list, dict))]),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
)
DOCUMENTS: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=9)), inner, max_size=5),
    ),
    max_leaves=20,
)
LINES = st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join), max_size=9)
BYTES = st.one_of(st.binary(max_size=200), LINES.map("\n".join).map(str.encode))


@pytest.mark.parametrize("name", READERS)
@given(number=st.integers(0, 9), seed=st.integers(0, 2**64))
def test_what_was_sound(name: str, number: int, seed: int) -> None:
    reader = READERS[name]
    sound = reader.seeds[number % len(reader.seeds)]
    outcome(name, mutated(sound, reader.kind, random.Random(seed)))


@pytest.mark.parametrize("name", READERS)
@given(document=DOCUMENTS)
def test_any_document(name: str, document: Any) -> None:
    outcome(name, json.dumps(document).encode())


@pytest.mark.parametrize("name", READERS)
@given(data=BYTES)
def test_any_bytes(name: str, data: bytes) -> None:
    outcome(name, data)
