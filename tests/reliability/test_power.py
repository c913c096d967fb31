"""What a disk has when the power goes; `python -m tests.reliability.power` cuts it often."""

from __future__ import annotations

from pathlib import Path

import pytest

from .forker import Forker
from .power import PowerCut, can_mount
from .scene import STAGE


@pytest.fixture
def cut(forker: Forker, tmp_path: Path) -> PowerCut:
    if not can_mount():
        pytest.skip("no file system can be made in a file and mounted here")
    return PowerCut(tmp_path, forker, forker)


def test_the_power_goes(cut: PowerCut) -> None:
    found = [*cut.moments("lines", 0.3)]
    assert {state for _, state in found} <= {"absent", "whole"}
    assert found[0] == ("during", "absent")
    assert found[-1] == ("after the end", "whole")


def test_a_disk_that_lies_is_seen(cut: PowerCut, breaks: Path) -> None:
    """Without the syncs the same harness finds half a model: it is the syncs that help."""
    found = [*cut.moments("lines", 0.5, lies=STAGE)]
    assert found[-1][1].startswith("WRONG: half of a model")
