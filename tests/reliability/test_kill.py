"""A few kills; `python -m tests.reliability.kill` makes hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from .forker import Ended, Forker
from .kill import Killer, Kind, kinds, table
from .scene import Scene, found_at


@pytest.fixture
def killer(scene: Scene, forker: Forker, tmp_path: Path) -> Killer:
    return Killer(scene, forker, tmp_path / "place", seed=7, measured=1)


def test_kills_at_random_moments(killer: Killer) -> None:
    some = [kind for kind in kinds(["lines"]) if kind.overwrite or kind.signal == "SIGKILL"]
    found = [killer.kill(kind) for kind in some]
    assert [one.wrong for one in found] == [None] * 4, table(found)


def test_what_is_wrong_is_seen(killer: Killer, tmp_path: Path) -> None:
    """A harness that calls nothing wrong would prove nothing."""
    kind = Kind("lines", "SIGKILL", overwrite=False)
    wanted = {"config.json": b"{}", "model.safetensors": b"all of it"}
    place = tmp_path / "a"
    (place / "out").mkdir(parents=True)
    (place / "out" / "config.json").write_bytes(b"{}")
    assert found_at(place, wanted, None).startswith("WRONG: half of a model")
    assert killer.judge(kind, Ended(-9, "", 1.0), place, wanted).wrong is not None
    (place / "out" / "config.json").unlink()
    (place / "out").rmdir()
    assert found_at(place, wanted, None) == "absent"
    assert found_at(place, wanted, killer.old).startswith("WRONG: neither")
    (place / "stray").write_text("")
    assert found_at(place, wanted, None).startswith("WRONG: stray")
    silent = Ended(0, "Written to out", 1.0)
    (place / "stray").unlink()
    assert "ended with 0" in str(killer.judge(kind, silent, place, wanted).wrong)
