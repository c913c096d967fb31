"""One output written in parts by many processes: the same bytes as of one, or a refusal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import files_in, save_raw
from processes import RUN, started, surgery

from surgery import (
    ArgumentError,
    Checkpoint,
    LazyTensor,
    OutputError,
    Part,
    UnsupportedError,
    lines,
    open_checkpoint,
    plan,
    write,
    write_part,
)
from surgery.writing.journal import read_journals
from surgery.writing.locks import locked
from surgery.writing.parts import parse_part, part_of_stage

Raw = Callable[..., Path]
SHARD = 4000


def stage_of(target: Path) -> Path:
    return target.parent / f".{target.name}.staging"


@pytest.fixture
def edited(make_model: Raw) -> Checkpoint:
    base, tuned = make_model("llama", "base"), make_model("llama", "tuned", seed=1)
    return lines(open_checkpoint(base), open_checkpoint(tuned), alpha=0.3)


def part(edited: Checkpoint, target: Path, text: str, **how: Any) -> Any:
    return write_part(edited, target, parse_part(text), max_shard_bytes=SHARD, **how)


def finished(edited: Checkpoint, target: Path, **how: Any) -> Any:
    return write(edited, target, max_shard_bytes=SHARD, complete=True, **how)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_parts_are_the_whole(edited: Checkpoint, tmp_path: Path, count: int) -> None:
    """In any order; some parts have no shard. Tallies come from all of them."""
    whole = write(edited, tmp_path / "whole", max_shard_bytes=SHARD)
    names = [shard.name for shard in whole.plan.shards]
    for number in reversed(range(1, count + 1)):
        one = part(edited, tmp_path / "out", f"{number}/{count}")
        assert [*one.shards] == names[number - 1 :: count]
        assert not (tmp_path / "out").exists()
    written = finished(edited, tmp_path / "out")
    assert sorted(written.kept) == names
    assert written.tallies == whole.tallies
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")
    assert not stage_of(tmp_path / "out").exists()


def test_an_output_of_one_shard_in_parts(edited: Checkpoint, tmp_path: Path) -> None:
    write(edited, tmp_path / "whole")
    for text in ("2/2", "1/2"):
        write_part(edited, tmp_path / "out", parse_part(text))
    write(edited, tmp_path / "out", complete=True)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_whole_run_takes_over_from_parts(edited: Checkpoint, tmp_path: Path) -> None:
    write(edited, tmp_path / "whole", max_shard_bytes=SHARD)
    one = part(edited, tmp_path / "out", "2/3")
    written = write(edited, tmp_path / "out", max_shard_bytes=SHARD)
    assert sorted(written.kept) == sorted(one.shards)
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_part_that_is_missing(edited: Checkpoint, tmp_path: Path) -> None:
    count = len(plan(edited, max_shard_bytes=SHARD).shards)
    with pytest.raises(OutputError, match="isn't known what"):
        finished(edited, tmp_path / "out")
    for text in ("1/4", "3/4"):
        part(edited, tmp_path / "out", text)
    before = files_in(stage_of(tmp_path / "out"))
    with pytest.raises(OutputError) as caught:
        finished(edited, tmp_path / "out")
    left = len(range(1, count, 4)) + len(range(3, count, 4))
    assert str(caught.value) == (
        f"{left} of {count} shards of {tmp_path / 'out'} aren't finished: run --shards 2/4, "
        f"--shards 4/4 again"
    )
    assert files_in(stage_of(tmp_path / "out")) == before


def test_a_part_of_another_plan(edited: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    part(edited, target, "1/2")
    before = files_in(stage_of(target))
    other = lines(*(open_checkpoint(tmp_path / name) for name in ("base", "tuned")), alpha=0.4)
    with pytest.raises(
        OutputError, match=r"part 2/2 is of another .*: lines: alpha was 0.3 and is 0.4"
    ):
        part(other, target, "2/2")
    with pytest.raises(OutputError, match=r"holds parts of another output: lines: alpha was 0.3"):
        finished(other, target)
    with pytest.raises(OutputError, match="the shards are others"):
        write_part(edited, target, Part(2, 2), max_shard_bytes=SHARD * 2)
    after = files_in(stage_of(target))
    assert {name: after[name] for name in before} == before
    part(edited, target, "2/2")
    finished(edited, target)


def test_parts_of_another_number(edited: Checkpoint, tmp_path: Path) -> None:
    part(edited, tmp_path / "out", "1/2")
    with pytest.raises(OutputError, match=r"is being written in 2 parts, and this is part 2/3"):
        part(edited, tmp_path / "out", "2/3")
    part(edited, tmp_path / "out", "2/2")  # the one that was refused hasn't spoilt it
    finished(edited, tmp_path / "out")


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_no_part(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_part(text)


def test_parts_need_kernels_with_names(edited: Checkpoint, tmp_path: Path) -> None:
    from dataclasses import replace

    name, tensor = next(iter(edited.items()))
    made = LazyTensor(tensor.shape, tensor.dtype, inputs=tensor.inputs[:1], kernel=lambda x: x)
    with pytest.raises(UnsupportedError, match="can't be written in parts: a tensor is computed"):
        part(replace(edited, tensors={**edited, name: made}), tmp_path / "out", "1/2")


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_shard_that_was_damaged(edited: Checkpoint, tmp_path: Path, how: str) -> None:
    target = tmp_path / "out"
    for text in ("1/2", "2/2"):
        part(edited, target, text)
    path = stage_of(target) / "files" / plan(edited, max_shard_bytes=SHARD).shards[1].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if how == "gone":
        path.unlink()
    with pytest.raises(OutputError) as caught:
        finished(edited, target)
    assert str(caught.value) == f"{path.name} isn't what was written any more: run its part again"
    said: list[str] = []
    part(edited, target, "2/2", tell=said.append)
    assert said[0] == f"{path.name} isn't what was written any more, and is written again"
    finished(edited, target)
    write(edited, tmp_path / "whole", max_shard_bytes=SHARD)
    assert files_in(target) == files_in(tmp_path / "whole")


HOLD = """
import sys
from pathlib import Path
from surgery.writing.parts import parse_part, part_of_stage
with part_of_stage(Path(sys.argv[1]), parse_part(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_part_has_its_own_lock(edited: Checkpoint, tmp_path: Path) -> None:
    """Real processes: another part may be written meanwhile, this one and the whole may not."""
    target = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target), "1/2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another process is writing part 1/2 of"):
            part(edited, target, "1/2")
        part(edited, target, "2/2")
        for complete in (False, True):
            with pytest.raises(OutputError, match="another run is writing"):
                write(edited, target, max_shard_bytes=SHARD, complete=complete)
        other.kill()
    part(edited, target, "1/2")
    with locked(target), pytest.raises(OutputError, match="another run is writing"):  # noqa: SIM117
        with part_of_stage(target, Part(1, 2)):
            pass
    finished(edited, target)


# --- the command line -----------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that takes a while, in shards of 4 MB."""
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        made = {f"t{i}": torch.randn(256, 4096) for i in range(24)}
        save_raw(tmp_path / name, made, config={"model_type": "made_up"})
    path = tmp_path / "recipe.yaml"
    inputs = {name: str(tmp_path / name) for name in ("base", "tuned")}
    steps = {"out": {"lines": {"base": "base", "tuned": "tuned", "alpha": 0.3}}}
    path.write_text(yaml.safe_dump({"inputs": inputs, "steps": steps}))
    return path


def test_machines_write_at_once(recipe: Path, tmp_path: Path) -> None:
    """Four processes at the same time, one of which is killed and run again: the output is, byte
    for byte, that of one, the record and its command as well."""
    given = ("run", recipe, "-o", tmp_path / "out", "--max-shard-size", "5MB")
    single = ("run", recipe, "-o", tmp_path / "single", "--max-shard-size", "5MB")
    assert surgery(*single).returncode == 0
    running = [
        started(*given, "--shards", f"{number}/4", stderr=subprocess.PIPE) for number in range(1, 5)
    ]
    journal = stage_of(tmp_path / "out") / "journal-2-of-4.jsonl"
    while not journal.exists() and running[1].poll() is None:
        time.sleep(0.001)
    running[1].kill()
    codes = [one.wait() for one in running]
    assert codes == [0, -signal.SIGKILL, 0, 0], [one.communicate() for one in running]
    assert len(read_journals(stage_of(tmp_path / "out"))) < 24
    early = surgery(*given, "--finish")
    assert early.returncode == 5
    assert "aren't finished: run --shards 2/4 again" in early.stderr
    again = surgery(*given, "--shards=2/4", "--json")
    assert again.returncode == 0, again.stderr
    assert "part 2/4, going on: " in again.stderr
    told = json.loads(again.stdout)
    assert (told["part"], len(told["shards"])) == ("2/4", 6)
    assert 1 <= len(told["kept"]) < 6
    last = surgery(*given, "--finish")
    assert last.returncode == 0, last.stderr
    assert same_but_for_the_name(tmp_path)


def same_but_for_the_name(tmp_path: Path, option: str = "") -> bool:
    """Whether `out` and `single` are the same, but for their names in the command and this
    option of the one."""
    found = files_in(tmp_path / "out"), files_in(tmp_path / "single")
    for files in found:
        for name in ("surgery.json", "README.md"):
            text = files[name].decode()
            text = text.replace(str(tmp_path / "single"), str(tmp_path / "out"))
            files[name] = text.replace(option, "").encode()
    return found[0] == found[1]


def test_a_growth_is_proved_when_it_is_finished(make_model: Raw, tmp_path: Path) -> None:
    base = make_model("llama", "base")
    path = tmp_path / "grow.yaml"
    steps = {"grown": {"grow": {"model": "base", "factor": 2}}}
    path.write_text(yaml.safe_dump({"inputs": {"base": str(base)}, "steps": steps}))
    given = ("run", path, "-o", tmp_path / "out", "--no-logits", "--max-shard-size", "4000")
    for number in (1, 2):
        one = surgery(*given, "--shards", f"{number}/2")
        assert one.returncode == 0, one.stderr
        assert "holds" not in one.stdout
        assert f"part {number}/2" in one.stdout
    last = surgery(*given, "--finish")
    assert last.returncode == 0, last.stderr
    assert "holds" in last.stdout
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["verification"]["passed"]


@pytest.mark.parametrize(
    "options",
    [("--shards", "1/2", "--finish"), ("--shards", "1/2", "--fresh"), ("--shards", "3/2"),
     ("--finish", "--ray", "local"), ("--finish", "--fresh")],
)  # fmt: skip
def test_options_that_go_not_together(recipe: Path, tmp_path: Path, options: Any) -> None:
    found = surgery("run", recipe, "-o", tmp_path / "out", *options)
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("error: ")
    assert not stage_of(tmp_path / "out").exists()


# --- Ray ------------------------------------------------------------------------------------


def test_ray_is_asked_for_by_name(recipe: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['ray'] = None\n{RUN}"
    found = surgery("run", recipe, "-o", tmp_path / "out", "--ray", "local", code=code)
    assert found.returncode == 2
    assert found.stderr == "error: --ray needs Ray: pip install 'model-surgery[ray]'\n"


def test_a_cluster_that_loses_a_worker(recipe: Path, tmp_path: Path) -> None:
    """A local Ray with two workers, one of which is killed in the middle of its part."""
    pytest.importorskip("ray")
    single = ("run", recipe, "-o", tmp_path / "single", "--max-shard-size", "5MB", "--threads", "1")
    assert surgery(*single).returncode == 0
    given = ("run", recipe, "-o", tmp_path / "out", "--max-shard-size", "5MB", "--threads", "1")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    running = started(
        *given,
        *("--ray", "local", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    killed = False
    while running.poll() is None and not killed:
        for journal in stage_of(tmp_path / "out").glob("journal-*.jsonl"):
            lock = journal.with_name(f"part{journal.stem.removeprefix('journal')}.lock")
            killed = killed or kill_holder(lock, running.pid)
        time.sleep(0.002)
    told, said = running.communicate()
    assert killed, said
    assert running.returncode == 0, said
    assert json.loads(told)["out"] == str(tmp_path / "out")
    assert "as tasks of Ray" in said
    assert re.search(r"^part ./. is written, going on from [1-6] shards; ", said, re.MULTILINE)
    assert same_but_for_the_name(tmp_path, " --json")
    assert not stage_of(tmp_path / "out").exists()


def kill_holder(lock: Path, driver: int) -> bool:
    """Kill the worker of this driver that has this file open, if one has."""
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(file.path == str(lock) for file in child.open_files()):
                child.kill()
                return True
    return False
