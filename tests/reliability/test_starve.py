"""Real shortages, once each; `python -m tests.reliability.starve` has more of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .forker import Forker
from .starve import Starver, cases


@pytest.fixture(scope="module")
def starver(forker: Forker) -> Iterator[Starver]:
    with tempfile.TemporaryDirectory() as made:  # pytest's own can't be entered by others
        yield Starver(Path(made), forker)


def test_real_shortages(starver: Starver) -> None:
    ran = 0
    for name, outcomes in cases(starver, 1):
        for word, wrong in outcomes or ():
            assert wrong is None, f"{name}: {word}: {wrong}"
            ran += 1
    assert ran >= 6


@pytest.mark.parametrize("how", ["cut", "rewritten"])
def test_an_input_that_is_changed_in_the_middle(starver: Starver, how: str) -> None:
    for word, wrong in starver.changed_inputs(how, 2, seed=3):
        assert wrong is None, word
