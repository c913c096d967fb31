"""What the short versions of the harnesses share: the models, and the process that forks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .faults import compiled
from .forker import Forker
from .scene import Scene, make_scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Four output shards, three input shards: enough for every kind of call."""
    return make_scene(tmp_path_factory.mktemp("scene"), shard="500KB", input_shard=700_000)


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    """A process that forks runs, and makes calls of the system fail that it is armed for."""
    if sys.platform != "linux":
        pytest.skip("signals, /proc and LD_PRELOAD as on Linux")
    folder = tmp_path_factory.mktemp("forker")
    with Forker(folder / "logs", preload=compiled(folder)) as made:
        yield made


@pytest.fixture(scope="session")
def breaks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail; skips where it can't be compiled."""
    library = compiled(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip("no C compiler named cc here")
    return library
