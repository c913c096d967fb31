"""The order of system calls, from a trace; and that another order would be seen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .scene import Scene
from .trace import calls, traced, wrong_order

TRACE = """\
1 mkdir("/d/.out.staging", 0777) = 0
1 mkdir("/d/.out.staging/files", 0777) = 0
1 openat(AT_FDCWD</d>, "/d/.out.staging/files/a", O_RDWR|O_CREAT|O_EXCL, 0666) = 3</d/.out.staging/files/a>
2 pwrite64(3</d/.out.staging/files/a>, "x", 1, 0 <unfinished ...>
1 fsync(4</d/.out.staging/files>) = 0
2 <... pwrite64 resumed>) = 1
1 fsync(3</d/.out.staging/files/a>) = 0
1 rename("/d/.out.staging/files", "/d/out") = 0
1 fsync(5</d>) = 0
1 rmdir("/d/.out.staging") = 0
"""


@pytest.fixture
def trace(scene: Scene, tmp_path: Path) -> str:
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    if subprocess.run(["strace", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    shutil.copytree(scene.inputs / "old", tmp_path / "out")
    return traced(scene.argv("lines", "--overwrite"), tmp_path)


def test_all_is_synced_in_order(trace: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    found = calls(trace)
    assert wrong_order(found, target) == []
    synced = [call for call in found if call.syncs and "model-" in call.paths[0]]
    assert len(synced) >= 4, "the trace has no fsync of a shard: it proves nothing"
    aside = tmp_path / ".out.replaced"
    removed = [call for call in found if any(path.startswith(str(aside)) for path in call.paths)]
    assert removed, "the trace doesn't show what became of the model that was replaced"


def test_a_trace_that_is_in_order() -> None:
    assert wrong_order(calls(TRACE), Path("/d/out")) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 fsync(3</d/.out.staging/files/a>) = 0\n", "/d/.out.staging/files/a isn't synced"),
        ("1 fsync(4</d/.out.staging/files>) = 0\n", "/d/.out.staging/files isn't synced"),
        ("1 fsync(5</d>) = 0\n", "/d isn't synced after the rename"),
        ('1 rename("/d/.out.staging/files", "/d/out") = 0\n', "nothing was renamed"),
    ],
)
def test_a_call_that_is_missing_is_seen(line: str, said: str) -> None:
    assert line in TRACE
    [wrong] = wrong_order(calls(TRACE.replace(line, "")), Path("/d/out"))
    assert wrong.startswith(said)


def test_calls_that_come_too_early_or_late_are_seen() -> None:
    sync, resumed = "1 fsync(3</d/.out.staging/files/a>) = 0\n", "2 <... pwrite64 resumed>) = 1\n"
    early = TRACE.replace(resumed + sync, sync + resumed)
    assert wrong_order(calls(early), Path("/d/out")) == [
        "/d/.out.staging/files/a isn't synced between its last change and the rename"
    ]
    late = TRACE + '1 pwrite64(3</d/out/a>, "y", 1, 0) = 1\n'
    assert wrong_order(calls(late), Path("/d/out")) == ["/d/out/a is changed under its final name"]
    replaced = TRACE.replace(
        '1 rename("/d/.out.staging/files"',
        '1 rename("/d/out", "/d/.out.replaced") = 0\n1 rename("/d/.out.staging/files"',
    )
    assert wrong_order(calls(replaced), Path("/d/out")) == []
    gone = '1 unlink("/d/.out.replaced/a") = 0\n'
    assert wrong_order(calls(replaced + gone), Path("/d/out")) == []
    early = replaced.replace("1 fsync(5</d>)", gone + "1 fsync(5</d>)")
    assert wrong_order(calls(early), Path("/d/out")) == [
        "/d/.out.replaced/a is removed before the new model is safe"
    ]
