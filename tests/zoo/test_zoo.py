"""Every model type of the installed transformers, against `expected.json` (see report.py).

A sample runs always; all of it with `pytest -m zoo`. A type that is new, that can be built and
couldn't, or whose findings changed, fails: look at what changed, then make the file anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from .kinds import kinds_of, model_types
from .report import EXPECTED, kinds, page, run

WHOLE = json.loads(EXPECTED.read_text())
TYPES: dict[str, dict[str, Any]] = WHOLE["types"]
BUILT = [name for name, entry in TYPES.items() if "not built" not in entry]
SAMPLE = BUILT[:: max(1, len(BUILT) // 30)][:30]
AGAIN = "look at what changed, then run `python -m tests.zoo.report`"

pytestmark = pytest.mark.skipif(
    transformers.__version__ != WHOLE["transformers"],
    reason=f"expected.json is of transformers {WHOLE['transformers']}",
)


def found(name: str, scratch: Path) -> dict[str, Any]:
    """What is there to be compared. The search for a config whose model runs, which takes most of
    the time, is left out where it found none."""
    kind = kinds(name.partition(" (")[0]).get(name)
    search = TYPES[name].get("logits", True)
    return {"not built": "no class"} if kind is None else run(kind, scratch, search=search)


def compare(name: str, scratch: Path) -> None:
    entry, wanted = found(name, scratch), TYPES[name]
    if "not built" in wanted:  # the reason is transformers' own text
        if "not built" not in entry and "requires the" in wanted["not built"]:
            pytest.skip("a library is installed that wasn't")
        assert "not built" in entry, f"{name} can be built now: {AGAIN}"
        return
    if not wanted["logits"]:  # why is the model's own text
        entry.pop("inputs", None)
        wanted = {key: value for key, value in wanted.items() if key != "inputs"}
    assert entry == wanted, AGAIN


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_all_architectures(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in TYPES if name not in SAMPLE])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.zoo
def test_the_list_is_that_of_transformers() -> None:
    assert {name for one in model_types() for name in kinds(one)} == set(TYPES), AGAIN


def test_every_model_type_has_its_entry() -> None:
    assert {name.partition(" (")[0] for name in TYPES} == set(model_types()), AGAIN
    assert [kind.name for kind in kinds_of("bert")] == ["bert (causal)", "bert (masked)"]


def test_nothing_that_was_found_is_an_error() -> None:
    errors = {
        (name, check): said
        for name, entry in TYPES.items()
        for check, said in entry.get("refused", {}).items()
        if said.startswith("ERROR")
    }
    assert errors == {}


def test_the_page_is_that_of_the_run() -> None:
    written = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert written.read_text() == page(WHOLE), AGAIN
