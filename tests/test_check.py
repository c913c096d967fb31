"""`check`: every kind of damage is found and named, and sound models are called sound."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    TORCH_DTYPES,
    files_in,
    safetensors_bytes,
    save_raw,
    shapes,
    shared,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from surgery.commands.main import app
from typer.testing import CliRunner

from surgery import FormatError, NotFoundError, check, lines, merge, open_checkpoint, write
from surgery.integrity.check import Report
from surgery.integrity.digests import read_sums, sums_bytes
from surgery.pages import PAGE, zero_pages

Raw = Callable[..., Path]
SINGLE = "model.safetensors"


def random_model(seed: int = 0, rows: int = 150) -> dict[str, torch.Tensor]:
    """Rows of 700 and 900 elements: no page's edge is a row's."""
    made = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(rows, 700, generator=made),
        "second.weight": torch.randn(rows, 900, generator=made).bfloat16(),
        "norm.weight": torch.randn(700, generator=made),
    }


def overwritten(path: Path, start: int, stop: int) -> None:
    """Zeros where bytes were."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(stop - start))


def punched(path: Path, start: int, stop: int) -> None:
    """A hole where bytes were, as the file system has it; skips where it has none."""
    command = ["fallocate", "--punch-hole", "--offset", str(start), "--length", str(stop - start)]
    if subprocess.run([*command, str(path)], capture_output=True, check=False).returncode:
        pytest.skip("this file system punches no holes")


def kinds(report: Report) -> list[str]:
    return [problem.kind for problem in report.problems]


def texts(report: Report) -> str:
    return "\n".join(problem.text for problem in report.problems)


# --- sound models ---------------------------------------------------------------------------


def test_a_sound_model_is_sound(raw_checkpoint: Raw) -> None:
    report = check(raw_checkpoint(random_model()))
    assert report.sound
    assert (report.problems, report.warnings, report.notes) == ((), (), ())
    assert report.tensors == 3
    assert report.compared == ()
    report.require()


@pytest.mark.parametrize("name", ["stories260K", "ft-shakespeare", "ft-french"])
def test_real_models_are_sound(name: str) -> None:
    report = check(shared("models", name))
    assert (report.problems, report.warnings) == ((), ())


def zeros_of_a_model() -> dict[str, torch.Tensor]:
    """Every way in which models hold zeros of their own."""
    at = torch.randn
    return {
        "bias": torch.zeros(5000),
        "identity.o_proj": torch.zeros(300, 700),
        "embedding": torch.cat([at(100, 1100), torch.zeros(50, 1100)]),
        "rows_between": torch.cat([at(10, 1100), torch.zeros(7, 1100), at(10, 1100)]),
        "padded_down": torch.cat([at(64, 2048), torch.zeros(64, 4096)], 1),
        "padded_front": torch.cat([torch.zeros(64, 4096), at(64, 2048)], 1),
        "block_diagonal": torch.block_diag(at(32, 3000), at(32, 3000), at(32, 3000)),
        "causal_mask": torch.ones(9000, 9000, dtype=torch.bool).tril(),
        "filters": torch.cat([at(8, 600, 3, 3), torch.zeros(4, 600, 3, 3)]),
        "channels": torch.cat([at(8, 600, 3, 3), torch.zeros(8, 600, 3, 3)], 1),
        "pruned": torch.where(torch.rand(500, 700) < 0.9, 0.0, at(500, 700)),
        "experts": torch.cat([at(2, 40, 700), torch.zeros(1, 40, 700)]),
    }


@pytest.mark.parametrize("shift", [0, 8, 64, 1000, 2048, 4088])
def test_zeros_that_a_model_holds_are_notes(shift: int, tmp_path: Path) -> None:
    folder = save_raw(tmp_path / "zeros", zeros_of_a_model())
    whole = (folder / SINGLE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length], whole[8 + length :]
    (folder / SINGLE).write_bytes(safetensors_bytes(text + b" " * shift, data))
    report = check(folder)
    assert (report.problems, report.warnings) == ((), ())
    told = {note.kind: set(note.details["tensors"]) for note in report.notes}
    assert told["zero-tensors"] == {"bias", "identity.o_proj"}
    assert told["zero-rows"] >= {"embedding", "rows_between", "padded_down", "experts"}
    for tensor in open_checkpoint(folder).values():
        tensor.read()  # nor does an operation refuse them


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_zeros_left_out_by_a_sparse_copy_are_zeros(kind: torch.dtype, tmp_path: Path) -> None:
    made = {
        name: t if t.dtype == torch.bool else t.to(kind) for name, t in zeros_of_a_model().items()
    }
    folder = save_raw(tmp_path / "zeros", made)
    sparse = folder / "sparse"
    subprocess.run(["cp", "--sparse=always", str(folder / SINGLE), str(sparse)], check=True)
    sparse.replace(folder / SINGLE)
    report = check(folder)
    assert (report.problems, report.warnings) == ((), ())
    open_checkpoint(folder)


# --- what isn't a number --------------------------------------------------------------------


def test_nan_and_infinity_are_counted_and_placed(raw_checkpoint: Raw) -> None:
    model = random_model()
    model["first.weight"][3, 5] = float("nan")
    model["first.weight"][3, 9:12] = float("-inf")
    model["second.weight"][149, 899] = float("inf")
    report = check(raw_checkpoint(model))
    assert kinds(report) == ["not-finite", "not-finite"]
    found = {problem.tensor: problem.details for problem in report.problems}
    assert found["first.weight"] == {"nan": 1, "infinite": 3, "values": 105_000, "first": [3, 5]}
    assert found["second.weight"]["first"] == [149, 899]
    assert (
        "first.weight (F32 [150, 700]) holds 1 NaN and 3 infinite of 105,000 values, the first at "
        "[3, 5]: the file is damaged, or training diverged" in texts(report)
    )
    with pytest.raises(FormatError) as caught:
        report.require()
    assert len(caught.value.problems) == 2


@given(
    kind=st.sampled_from([k for k, t in TORCH_DTYPES.items() if t.is_floating_point or k == "C64"]),
    shape=shapes(max_side=4),
    seed=st.integers(0, 999),
)
def test_the_counts_are_those_of_torch(
    tmp_path_factory: Any, kind: str, shape: tuple[int, ...], seed: int
) -> None:
    dtype, count = TORCH_DTYPES[kind], torch.Size(shape).numel()
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count * size,), generator=torch.Generator().manual_seed(seed))
    raw = torch.where(torch.rand(raw.shape) < 0.3, 255, raw).to(torch.uint8)
    raw = torch.where(torch.rand(raw.shape) < 0.1, 0x80, raw).to(torch.uint8)
    values = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    report = check(save_raw(tmp_path_factory.mktemp("numbers") / "m", {"t": values}))
    wide = values if dtype.is_complex else values.double()
    nan, infinite = wide.isnan(), wide.isinf() & ~wide.isnan()
    if not (nan | infinite).any():
        assert report.sound
        return
    [problem] = report.problems
    assert problem.details["nan"] == int(nan.sum())
    assert problem.details["infinite"] == int(infinite.sum())
    assert problem.details["first"] == (nan | infinite).nonzero()[0].tolist()


def test_integers_are_no_floats(raw_checkpoint: Raw) -> None:
    ones = torch.full((64, 64), -1, dtype=torch.int32)  # the bits of a NaN
    assert check(raw_checkpoint({"qweight": ones, "ids": ones.to(torch.int64)})).sound


def test_a_mask_of_infinities_is_a_note(raw_checkpoint: Raw) -> None:
    mask = torch.full((8,), float("-inf"))
    report = check(raw_checkpoint({"h.0.attn.masked_bias": mask, **random_model()}))
    assert report.sound
    assert [note.kind for note in report.notes] == ["not-finite"]


# --- pages that were never written ----------------------------------------------------------


@pytest.mark.parametrize("damage", [overwritten, punched])
@pytest.mark.parametrize(("first", "pages"), [(10, 1), (10, 30), (30, 600)])
def test_pages_that_were_never_written(
    raw_checkpoint: Raw, damage: Callable[..., None], first: int, pages: int
) -> None:
    folder = raw_checkpoint(random_model(rows=1500))
    start, stop = first * PAGE, (first + pages) * PAGE
    damage(folder / SINGLE, start, stop)
    report = check(folder)
    assert kinds(report) == ["never-written"]
    [problem] = report.problems
    assert (problem.details["start"], problem.details["stop"]) == (start, stop)
    assert problem.details["hole"] == (damage is punched)
    assert f"{folder / SINGLE}: bytes {start:,} to {stop:,} are" in problem.text
    assert "never written" in problem.text


def test_zeros_over_several_tensors_are_one_finding(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint(random_model(rows=1500))
    size = (folder / SINGLE).stat().st_size
    start = 100 * PAGE
    overwritten(folder / SINGLE, start, size)
    [problem] = check(folder).problems
    assert problem.details["start"] == start
    assert problem.details["stop"] >= size - PAGE
    assert len(problem.details["tensors"]) > 1


def test_a_stream_that_stopped_anywhere(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"weight": torch.randn(300, 700)})
    size = (folder / SINGLE).stat().st_size
    overwritten(folder / SINGLE, size - 100_001, size)  # no page's edge: the file's end tells
    assert kinds(check(folder)) == ["never-written"]


def test_zeros_inside_a_row_off_the_pages_are_a_warning(raw_checkpoint: Raw) -> None:
    weight = torch.randn(40, 9000)
    weight[7, 1003:5999] = 0
    report = check(raw_checkpoint({"weight": weight}))
    assert report.sound
    assert [warning.kind for warning in report.warnings] == ["zeros"]


def test_a_file_of_nothing_but_zeros(tmp_path: Path) -> None:
    model = random_model()
    folder = save_raw(tmp_path / "m", model, {"z": torch.zeros(64, 64), "y": torch.zeros(64)})
    [problem] = check(folder).problems
    assert problem.text.startswith(f"{folder / 'model-00002-of-00002.safetensors'} holds nothing")


@pytest.mark.parametrize("operation", ["lines", "merge"])
def test_operations_refuse_zeros_that_nobody_wrote(
    raw_checkpoint: Raw, tmp_path: Path, operation: str
) -> None:
    base = raw_checkpoint(random_model(0), name="base", config={})
    tuned = raw_checkpoint(random_model(1), name="tuned", config={})
    overwritten(tuned / SINGLE, 8 * PAGE, 16 * PAGE)
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    if operation == "lines":
        edited = lines(first, second, alpha=0.5)
    else:
        edited = merge([second], base=first, method="ties", density=0.5)
    with pytest.raises(FormatError) as caught:
        write(edited, tmp_path / "out")
    assert f"{tuned / SINGLE}: bytes 32,768 to 65,536, in " in str(caught.value)
    assert "surgery check" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_only_copied_is_refused_for_its_hole(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint(random_model())
    punched(folder / SINGLE, 8 * PAGE, 16 * PAGE)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(folder)
    assert "bytes 32,768 to 65,536, in first.weight, are a hole in the file" in str(caught.value)
    assert kinds(check(folder)) == ["never-written"]


def test_zeros_can_be_meant(raw_checkpoint: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw_checkpoint(random_model())
    punched(folder / SINGLE, 8 * PAGE, 16 * PAGE)
    monkeypatch.setenv("SURGERY_ALLOW_ZERO_PAGES", "1")
    for tensor in open_checkpoint(folder).values():
        tensor.read()


@given(
    data=st.lists(st.sampled_from([b"\0" * PAGE, b"\0" * 4095 + b"\1", b"\1" * 100]), max_size=8),
    offset=st.integers(0, 3 * PAGE),
)
def test_zero_pages_are_those_of_a_plain_loop(data: list[bytes], offset: int) -> None:
    import numpy

    raw = b"".join(data)
    expected: list[list[int]] = []
    for page in range(-(-offset // PAGE) * PAGE, offset + len(raw) - PAGE + 1, PAGE):
        if not any(raw[page - offset : page - offset + PAGE]):
            if expected and expected[-1][1] == page:
                expected[-1][1] += PAGE
            else:
                expected.append([page, page + PAGE])
    found = zero_pages(numpy.frombuffer(raw, numpy.uint8), offset)
    assert [list(run) for run in found] == expected


# --- digests --------------------------------------------------------------------------------


def summed(folder: Path, *names: str) -> Path:
    """SHA256SUMS as sha256sum itself writes it."""
    names = names or tuple(sorted(files_in(folder)))
    made = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, check=True)
    (folder / "SHA256SUMS").write_bytes(made.stdout)
    return folder


def test_files_are_compared_with_their_digests(raw_checkpoint: Raw) -> None:
    folder = summed(raw_checkpoint(random_model(), config={"a": 1}, files={"x/y.txt": b"y"}))
    report = check(folder)
    assert report.sound
    assert report.compared == ("SHA256SUMS",)
    assert report.digests == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in files_in(folder).items()
        if name != "SHA256SUMS"
    }


def test_what_differs_is_missing_or_extra_is_named(raw_checkpoint: Raw) -> None:
    folder = summed(raw_checkpoint(random_model(), config={"a": 1}, files={"x/y.txt": b"y"}))
    (folder / "config.json").write_text('{"a": 2}')
    (folder / "x" / "y.txt").unlink()
    (folder / "modeling_extra.py").write_text("boom")
    (folder / ".gitattributes").write_text("the Hub's own")
    with (folder / SINGLE).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x01")
    report = check(folder)
    assert sorted((p.kind, p.file) for p in report.problems) == [
        ("differs", "config.json"),
        ("differs", SINGLE),
        ("extra", "modeling_extra.py"),
        ("missing", "x/y.txt"),
    ]


def test_a_swapped_shard_is_certain_with_digests(tmp_path: Path) -> None:
    parts = [{"a.weight": torch.randn(64, 64)}, {"b.weight": torch.randn(64, 64)}]
    folder = summed(save_raw(tmp_path / "one", *parts))
    other = save_raw(tmp_path / "other", *({n: t + 1e-3 for n, t in p.items()} for p in parts))
    shard = "model-00002-of-00002.safetensors"
    (folder / shard).write_bytes((other / shard).read_bytes())
    [problem] = check(folder).problems
    assert (problem.kind, problem.file) == ("differs", shard)


def test_the_hubs_cache_knows_digests(tmp_path: Path) -> None:
    made = save_raw(tmp_path / "made", random_model(), config={})
    content = (made / SINGLE).read_bytes()
    repo = tmp_path / "models--org--name"
    blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes(content)
    (snapshot / SINGLE).symlink_to(Path("../../blobs", blob.name))
    (snapshot / "config.json").write_text("{}")
    assert check(snapshot).compared == ("the Hub",)
    assert check(snapshot).sound
    blob.write_bytes(content[:-4] + b"\0\0\x80?")
    [problem] = check(snapshot).problems
    assert "the Hub has" in problem.text


@given(st.dictionaries(st.text(min_size=1, max_size=9), st.binary(max_size=9), min_size=1))
def test_digest_files_are_those_of_sha256sum(
    tmp_path_factory: Any, given: dict[str, bytes]
) -> None:
    names = {n: c for n, c in given.items() if "/" not in n and "\0" not in n}
    names = {
        n: c for n, c in names.items() if n not in (".", "..") and n.isprintable() | ("\n" in n)
    }
    names = {n: c for n, c in names.items() if "\r" not in n and not n.startswith("-")}
    names = {n: c for n, c in names.items() if len(n.encode("utf-8", "surrogatepass")) < 200}
    folder = tmp_path_factory.mktemp("sums")
    for name, content in names.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in names.items()}
    sums = folder / "zz SUMS"
    sums.write_bytes(sums_bytes(digests))
    assert read_sums(sums) == digests
    if names:
        run = ["sha256sum", "--strict", "-c", "zz SUMS"]
        subprocess.run(run, cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("line", ["nonsense", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 64}  /x"])
def test_a_digest_file_that_lies_is_refused(raw_checkpoint: Raw, line: str) -> None:
    folder = raw_checkpoint(random_model(), files={"SHA256SUMS": line + "\n"})
    with pytest.raises(FormatError, match="line 1"):
        check(folder)


def test_digests_given_by_name(raw_checkpoint: Raw, tmp_path: Path) -> None:
    folder = raw_checkpoint(random_model())
    sums = tmp_path / "published.txt"
    sums.write_bytes(sums_bytes({SINGLE: "0" * 64}))
    assert kinds(check(folder, sums=sums)) == ["differs"]
    with pytest.raises(NotFoundError):
        check(folder, sums=tmp_path / "absent")


# --- weight files of another model ----------------------------------------------------------


def split(folder: Path, source: Path, at: int, swapped: Mapping[str, torch.Tensor] | None) -> Path:
    """The model `source` as shards of `at` blocks each, the second of them of `swapped`."""
    shards: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(source / SINGLE).items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        shards.setdefault(block // at, {})[name] = tensor
    if swapped is not None:
        shards[1] = {name: swapped[name] for name in shards[1]}
    config = json.loads((source / "config.json").read_text())
    return save_raw(folder, *(shards[number] for number in sorted(shards)), config=config)


def in_another_basis(model: Mapping[str, torch.Tensor], hidden: int) -> dict[str, torch.Tensor]:
    """The same function with its channels in another order, as another training would have it."""
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(3))
    made = {}
    for name, tensor in model.items():
        for axis, size in enumerate(tensor.shape):
            if size == hidden and not (axis == 1 and "o_proj" in name):
                tensor = tensor.index_select(axis, order)
        made[name] = tensor.contiguous()
    return made


DEMO = Path(__file__).parents[1] / "surgery" / "demo" / "weights"


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", ["base", "tuned"])
def test_no_false_alarm_over_shards(tmp_path: Path, name: str, at: int) -> None:
    report = check(split(tmp_path / "m", DEMO / name, at, None))
    assert (report.problems, report.warnings) == ((), ())


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["stories260K", "ft-shakespeare", "ft-french"])
def test_no_false_alarm_over_shards_of_real_models(tmp_path: Path, name: str, at: int) -> None:
    report = check(split(tmp_path / "m", shared("models", name), at, None))
    assert (report.problems, report.warnings) == ((), ())


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_shard_of_another_model_is_a_warning(tmp_path: Path, at: int) -> None:
    other = in_another_basis(load_file(DEMO / "tuned" / SINGLE), 80)
    report = check(split(tmp_path / "m", DEMO / "base", at, other))
    assert report.sound
    assert {warning.kind for warning in report.warnings} == {"stranger"}
    named = {file for warning in report.warnings for file in warning.details["files"]}
    assert any(file.startswith("model-00002-of-") for file in named)


@pytest.mark.parametrize("at", [1, 2])
def test_a_shard_of_another_real_model_is_a_warning(tmp_path: Path, at: int) -> None:
    other = in_another_basis(load_file(shared("models", "ft-french") / SINGLE), 64)
    report = check(split(tmp_path / "m", shared("models", "ft-shakespeare"), at, other))
    assert {warning.kind for warning in report.warnings} == {"stranger"}


# --- the command line -----------------------------------------------------------------------


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, args)])


def test_the_command_says_sound(raw_checkpoint: Raw) -> None:
    result = run(raw_checkpoint(random_model()))
    assert result.exit_code == 0
    assert "result    sound" in result.stdout


def test_the_command_says_all_that_is_wrong_and_exits_with_3(raw_checkpoint: Raw) -> None:
    model = random_model()
    model["norm.weight"][7] = float("nan")
    folder = raw_checkpoint(model)
    overwritten(folder / SINGLE, 8 * PAGE, 16 * PAGE)
    result = run(folder, "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    found = [problem["kind"] for problem in told["problems"]]
    assert sorted(found) == ["never-written", "not-finite"]
    assert "norm.weight" in result.stderr
    assert "never written" in result.stderr


def test_other_directories_of_weights(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from surgery import task_vector

    base, tuned = make_model(name="base"), make_model(name="tuned", seed=1)
    update = task_vector(open_checkpoint(base), open_checkpoint(tuned))
    write(update, tmp_path / "update")
    assert check(tmp_path / "update").sound
    assert check(base / SINGLE).sound


def test_threads_change_nothing(raw_checkpoint: Raw) -> None:
    model = {f"t{i}": torch.randn(400, 701) for i in range(12)}
    model["t3"][200, 7] = float("nan")
    folder = summed(raw_checkpoint(model))
    assert check(folder, threads=1) == check(folder, threads=5)
    assert (
        check(folder).digests[SINGLE] == hashlib.sha256((folder / SINGLE).read_bytes()).hexdigest()
    )
