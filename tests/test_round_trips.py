"""Round trips: any checkpoint that the format allows, opened, left as it is or passed through
every way a tensor can travel, written and opened again, has the same bytes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conftest import files_in, safetensors_bytes, write_index
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery import Checkpoint, LazyTensor, check, lines, open_checkpoint, write
from surgery.dtypes import DTYPES
from surgery.header import read_header
from surgery.pages import PAGE
from surgery.tensor import gather


@dataclass(frozen=True)
class Made:
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)


NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", ".", "..", "a/b", "../../x", "weight\n", "\\", '"', "\0", "\u202eabc"]),
    st.sampled_from(["\u00e9", "e\u0301"]),  # one letter to the eye, two names
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=4), st.just(200)),
).filter(lambda name: name != "__metadata__")


@st.composite
def made_tensors(draw: st.DrawFn) -> Made:
    """Any type that the format knows; scalars, empty tensors, rows longer than a page."""
    dtype = draw(st.sampled_from([*DTYPES.values()]))
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 5), max_size=4).map(tuple),
            st.tuples(st.integers(1, 3), st.integers(PAGE - 1, PAGE + 8)),
        )
    )
    if prod(shape) * dtype.bits % 8:
        shape = (*shape, 4)  # to whole bytes: the format has no others
    size = prod(shape) * dtype.bits // 8
    seed = draw(st.one_of(st.none(), st.integers(0, 99)))
    data = bytes(size) if seed is None else random.Random(seed).randbytes(size)
    if dtype.name == "BOOL":
        data = bytes(byte & 1 for byte in data)
    return Made(dtype.name, shape, data)


CHECKPOINTS = st.dictionaries(NAMES, made_tensors(), min_size=1, max_size=8)


def laid_out(folder: Path, tensors: dict[str, Made], shards: int, seed: int) -> Path:
    """The tensors in so many files, at random: in any order in the header, behind any padding."""
    folder.mkdir()
    chance = random.Random(seed)
    count = min(shards, len(tensors))
    names = list(tensors)
    chance.shuffle(names)
    groups = [names[at::count] for at in range(count)]
    where = {}
    for number, group in enumerate(groups, 1):
        file = (
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        table: dict[str, Any] = {}
        data = b""
        for name in group:
            one = tensors[name]
            offsets = [len(data), len(data) + len(one.data)]
            table[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": offsets}
            data += one.data
            where[name] = file
        items = [*table.items(), ("__metadata__", {"who": "me"})]
        chance.shuffle(items)
        text = json.dumps(dict(items), ensure_ascii=chance.random() < 0.5).encode()
        (folder / file).write_bytes(safetensors_bytes(text + b" " * chance.randrange(99), data))
    if count > 1:
        write_index(folder, where)
    return folder


def as_they_lie(folder: Path) -> dict[str, Made]:
    """The tensors of a directory, read with nothing of ours but the header."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        for name, one in read_header(path).entries.items():
            found[name] = Made(one.dtype.name, one.shape, raw[one.start : one.stop])
    return found


def as_safetensors_reads(folder: Path) -> dict[str, Made]:
    """The same by the reference implementation."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, one in safetensors.deserialize(path.read_bytes()):
            found[name] = Made(one["dtype"], tuple(one["shape"]), bytes(one["data"]))
    return found


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def computed(tensor: LazyTensor) -> LazyTensor:
    """Through a kernel that does nothing, where torch has the type."""
    if tensor.dtype.torch_name is None:
        return tensor
    return LazyTensor(tensor.shape, tensor.dtype, inputs=(tensor,), kernel=_same)


def gathered(tensor: LazyTensor) -> LazyTensor:
    """Put together of its rows, in two runs."""
    if tensor.width * tensor.dtype.bits % 8 or not tensor.rows:
        return tensor
    half = tensor.rows // 2
    return gather((tensor,), ((0, 0, half), (0, half, tensor.rows)), tensor.shape)


ROUTES = {
    "untouched": lambda tensor: tensor,
    "computed": computed,
    "gathered": gathered,
    "both": lambda tensor: gathered(computed(tensor)),
}


@pytest.mark.parametrize("route", [*ROUTES])
@given(
    made=CHECKPOINTS,
    shards=st.integers(1, 4),
    seed=st.integers(0, 999),
    max_shard_bytes=st.integers(1, 30_000),
    threads=st.integers(1, 3),
)
def test_what_was_opened_is_written(
    tmp_path_factory: Any,
    route: str,
    made: dict[str, Made],
    shards: int,
    seed: int,
    max_shard_bytes: int,
    threads: int,
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    given_folder = laid_out(folder / "given", made, shards, seed)
    opened = open_checkpoint(given_folder)
    passed = replace(opened, tensors={name: ROUTES[route](t) for name, t in opened.items()})
    how: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "threads": threads}
    write(passed, folder / "one", checksums=True, **how)
    assert as_they_lie(folder / "one") == made
    assert as_safetensors_reads(folder / "one") == made
    again: Checkpoint = open_checkpoint(folder / "one")
    assert {name: (t.dtype.name, t.shape) for name, t in again.items()} == {
        name: (one.dtype, one.shape) for name, one in made.items()
    }
    write(again, folder / "two", checksums=True, **how)
    kept = ("README.md", "README.input.md", "SHA256SUMS")
    first, second = (
        {name: data for name, data in files_in(folder / place).items() if name not in kept}
        for place in ("one", "two")
    )
    assert first == second
    found = {problem.kind for problem in check(folder / "two").problems}
    assert found <= {"not-finite", "never-written"}  # what was given: no digest differs


@settings(max_examples=15)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 1500),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
    seed=st.integers(0, 99),
)
def test_an_update_of_nothing_changes_nothing(
    tmp_path_factory: Any, rows: int, width: int, dtype: str, seed: int
) -> None:
    """theta + lambda (theta - theta) is theta, to the bit, in every type of floats."""
    kind = DTYPES[dtype].torch
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(kind)
    data = values.view(torch.uint8).numpy().tobytes()
    folder = tmp_path_factory.mktemp("nothing")
    made = {
        "layers.0.w": Made(dtype, (rows, width), data),
        "layers.1.w": Made(dtype, (rows, width), data),
    }
    made |= {f"{name}.b": one for name, one in made.items()}
    made |= {f"{name}.c": one for name, one in made.items() if name.endswith("w")}
    laid_out(folder / "given", made, 2, seed)
    (folder / "given" / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    opened = open_checkpoint(folder / "given")
    write(lines(opened, opened, alpha=0.3), folder / "out")
    assert as_they_lie(folder / "out") == made
