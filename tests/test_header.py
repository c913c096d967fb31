"""Headers: what is damaged is refused with all that is wrong, what is sound is read as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conftest import TORCH_DTYPES, bytes_of, entry, safetensors_bytes, tensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.dtypes import DTYPES
from surgery.errors import FormatError, InputError, NotFoundError
from surgery.header import parse_header, read_header

W = entry("F32", [2], 0, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def problems(path: Path, content: bytes) -> tuple[str, ...]:
    """What is wrong with a file of these bytes, without the path that each problem begins with."""
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    return tuple(problem[len(str(path)) :] for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"", "0 bytes and asks for a header of 0"),
        (b"\x01\x02", "2 bytes and asks for a header of 513"),
        (bytes(8), "8 bytes and asks for a header of 0"),
        (bytes(100), "100 bytes and asks for a header of 0"),
        (safetensors_bytes({"w": W})[:20], "20 bytes and asks for a header of 61"),
        (
            safetensors_bytes({}, length=1 << 40),
            "10 bytes and asks for a header of 1,099,511,627,776",
        ),
        (safetensors_bytes({}, length=3), "10 bytes and asks for a header of 3"),
        (b"\xff" * 16, "16 bytes and asks for a header of 18,446,744,073,709,551,615"),
    ],
)
def test_not_the_format(path: Path, content: bytes, asked: str) -> None:
    said = " isn't a safetensors file, or it was cut short: it has "
    assert problems(path, content) == (said + asked,)


def test_a_huge_header_is_not_read(path: Path) -> None:
    """The reference reader's limit is 100 MB; the file is sparse, so that only a read costs."""
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"asks for a header of 100,000,001$"):
        read_header(path)


def test_no_file(path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path}: no such file"


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_header(tmp_path)
    assert str(caught.value) == f"{tmp_path} can't be read: Is a directory"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"not JSON", ": the header isn't JSON: Expecting value"),
        (b'{"w": ', ": the header isn't JSON: Expecting value"),
        (b'\xef\xbb\xbf{"w": 1}', ": the header isn't JSON: "),
        (b'{"\xff": 1}', ": the header isn't JSON: 'utf-8' codec can't decode"),
        (b"[" * 200_000, ": the header isn't JSON: maximum recursion depth"),
        (b'{"a":' * 200_000, ": the header isn't JSON: maximum recursion depth"),
        (b'{"w": ' + b"9" * 5000 + b"}", ": the header isn't JSON: Exceeds the limit"),
        (b"[1, 2]", ": the header isn't a table"),
        (b"null", ": the header isn't a table"),
        (b"7", ": the header isn't a table"),
    ],
)
def test_not_a_table(path: Path, raw: bytes, said: str) -> None:
    (problem,) = problems(path, safetensors_bytes(raw))
    assert problem.startswith(said)


def test_names_given_twice(path: Path) -> None:
    """Python's JSON takes the last, other readers the first: the same file, two models."""
    one = json.dumps(W).encode()
    raw = b'{"w":' + one + b',"v":' + one + b',"w":' + one + b',"v":' + one + b"}"
    assert problems(path, safetensors_bytes(raw, bytes(8))) == (": the header names v, w twice",)
    raw = b'{"w":' + one + b',"v:v":' + one + b',"w":' + one + b"}"
    assert problems(path, safetensors_bytes(raw, bytes(8))) == (": the header names w twice",)
    raw = b'{"__metadata__":{"a":"1","a":"2"},"w":' + one + b"}"
    assert problems(path, safetensors_bytes(raw, bytes(8))) == (": the header names a twice",)
    raw = b'{"w":1,"w":' + one + b"}"
    assert problems(path, safetensors_bytes(raw, bytes(8))) == (": the header names w twice",)
    raw = b'{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'
    assert problems(path, safetensors_bytes(raw, bytes(8))) == (": the header names dtype twice",)


def test_a_name_with_a_colon(path: Path) -> None:
    raw = json.dumps({"a:b": W, "__metadata__": {"format": "pt: 1"}}).encode()
    path.write_bytes(safetensors_bytes(raw, bytes(8)))
    assert list(read_header(path).entries) == ["a:b"]


@pytest.mark.parametrize(
    "metadata", [None, [], "pt", {"format": 1}, {"format": None}, {"format": {"a": "b"}}]
)
def test_metadata_that_is_no_table_of_strings(path: Path, metadata: Any) -> None:
    content = safetensors_bytes({"__metadata__": metadata, "w": W}, bytes(8))
    assert problems(path, content) == (": __metadata__ isn't a table of strings",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "w has no dtype, shape and data_offsets"),
        ([], "w has no dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [2]}, "w has no dtype, shape and data_offsets"),
        ({"shape": [2], "data_offsets": [0, 8]}, "w has no dtype, shape and data_offsets"),
        (entry("F33", [2], 0, 8), "w has the type 'F33', which safetensors doesn't know"),
        (entry("f32", [2], 0, 8), "w has the type 'f32', which safetensors doesn't know"),
        ({**W, "dtype": ["F32"]}, "w has the type ['F32'], which safetensors doesn't know"),
        ({**W, "dtype": None}, "w has the type None, which safetensors doesn't know"),
        ({**W, "shape": [-2]}, "w has shape [-2] and data_offsets [0, 8]"),
        # two negative sides have a positive product
        ({**W, "shape": [-1, -2]}, "w has shape [-1, -2] and data_offsets [0, 8]"),
        ({**W, "shape": [True, 2]}, "w has shape [True, 2] and data_offsets [0, 8]"),
        ({**W, "shape": [2.0]}, "w has shape [2.0] and data_offsets [0, 8]"),
        ({**W, "shape": ["2"]}, "w has shape ['2'] and data_offsets [0, 8]"),
        ({**W, "shape": 2}, "w has shape 2 and data_offsets [0, 8]"),
        ({**W, "shape": None}, "w has shape None and data_offsets [0, 8]"),
        ({**W, "shape": [2**63]}, f"w has shape [{2**63}] and data_offsets [0, 8]"),
        # 2^64 elements are 0 in the arithmetic of other languages
        ({**W, "shape": [2**32, 2**32, 0, -1]}, f"w has shape [{2**32}, {2**32}, 0, -1] and"),
        ({**W, "data_offsets": [0]}, "w has shape [2] and data_offsets [0]"),
        ({**W, "data_offsets": [0, 4, 8]}, "w has shape [2] and data_offsets [0, 4, 8]"),
        ({**W, "data_offsets": [-8, 0]}, "w has shape [2] and data_offsets [-8, 0]"),
        ({**W, "data_offsets": [0, True]}, "w has shape [2] and data_offsets [0, True]"),
        ({**W, "data_offsets": "08"}, "w has shape [2] and data_offsets '08'"),
        ({**W, "shape": [3]}, "w is F32 [3], which takes 12 bytes, and has 8"),
        ({**W, "shape": []}, "w is F32 [], which takes 4 bytes, and has 8"),
        ({**W, "shape": [0]}, "w is F32 [0], which takes 0 bytes, and has 8"),
        ({**W, "data_offsets": [8, 0]}, "w is F32 [2], which takes 8 bytes, and has -8"),
        (
            {**W, "shape": [2**32, 2**32]},
            (
                "w is F32 [4294967296, 4294967296], which takes 73,786,976,294,838,206,464 bytes, "
                "and has 8"
            ),
        ),
        (entry("F4", [4], 0, 1), "w is F4 [4], which takes 2 bytes, and has 1"),
    ],
)
def test_an_entry_that_is_wrong(path: Path, value: Any, said: str) -> None:
    (problem,) = problems(path, safetensors_bytes({"w": value}, bytes(8)))
    assert problem.startswith(f": {said}")


def test_bits_that_are_no_whole_bytes(path: Path) -> None:
    content = safetensors_bytes({"w": entry("F6_E2M3", [2], 0, 2)}, bytes(2))
    assert problems(path, content) == (
        ": w is F6_E2M3 [2], which takes 12 bits: no whole number of bytes",
    )


def test_a_shape_beyond_all_floats(path: Path) -> None:
    shape = [2**62] * 20
    (problem,) = problems(path, safetensors_bytes({"w": {**W, "shape": shape}}, bytes(8)))
    assert problem.startswith(": w is F32 [4611686018427387904, ")


def test_a_name_that_is_no_text(path: Path) -> None:
    """Half a surrogate pair: JSON's escapes can spell it, and no encoding can write it."""
    raw = b'{"w\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    assert problems(path, safetensors_bytes(raw, bytes(8))) == (
        ": 'w\\ud800' is a name that no encoding can write",
    )


SIZED = safetensors_bytes({"v": entry("U8", [3], 0, 3), "w": entry("U8", [2], 3, 5)})


@pytest.mark.parametrize(
    ("data", "said"), [(4, "cut short"), (0, "cut short"), (6, "added to"), (4096, "added to")]
)
def test_a_file_of_the_wrong_size(path: Path, data: int, said: str) -> None:
    (problem,) = problems(path, SIZED + bytes(data))
    size = len(SIZED)
    assert problem == (
        f" has {size + data:,} bytes and its header describes {size + 5:,}: the file was {said}; "
        f"fetch it again"
    )


def test_gap_and_overlap(path: Path) -> None:
    table = {
        "late": entry("U8", [2], 9, 11),
        "first": entry("U8", [4], 0, 4),
        "second": entry("U8", [4], 2, 6),
    }
    assert problems(path, safetensors_bytes(table, bytes(11))) == (
        ": second starts at byte 2 and overlaps the tensor before it, which ends at 4",
        ": late starts at byte 9 and leaves a gap after the tensor before it, which ends at 6",
    )


def test_a_gap_at_the_start(path: Path) -> None:
    table = {"w": entry("U8", [2], 1, 3)}
    (problem,) = problems(path, safetensors_bytes(table, bytes(3)))
    assert problem == (
        ": w starts at byte 1 and leaves a gap after the tensor before it, which ends at 0"
    )


def test_two_tensors_in_one_place(path: Path) -> None:
    table = {"v": entry("U8", [4], 0, 4), "w": entry("U8", [4], 0, 4)}
    (problem,) = problems(path, safetensors_bytes(table, bytes(4)))
    assert problem == ": w starts at byte 0 and overlaps the tensor before it, which ends at 4"


def test_an_empty_tensor_inside_another(path: Path) -> None:
    table = {"v": entry("U8", [4], 0, 4), "w": entry("U8", [0], 2, 2)}
    (problem,) = problems(path, safetensors_bytes(table, bytes(4)))
    assert problem == ": w starts at byte 2 and overlaps the tensor before it, which ends at 4"


def test_offsets_beyond_the_file(path: Path) -> None:
    table = {"v": entry("U8", [4], 0, 4), "w": entry("U8", [2**62], 4, 4 + 2**62)}
    (problem,) = problems(path, safetensors_bytes(table, bytes(4)))
    assert problem.endswith(": the file was cut short; fetch it again")
    assert f"describes {4 + 2**62 + len(safetensors_bytes(table)):,}" in problem


def test_all_that_is_wrong_at_once(path: Path) -> None:
    table = {
        "__metadata__": 1,
        "a": entry("F33", [2], 0, 8),
        "b": entry("F32", [-2], 8, 16),
        "c": W,
        "d": entry("F32", [2], 16, 17),
    }
    assert problems(path, safetensors_bytes(table, bytes(8))) == (
        ": __metadata__ isn't a table of strings",
        ": a has the type 'F33', which safetensors doesn't know",
        ": b has shape [-2] and data_offsets [8, 16]",
        ": d is F32 [2], which takes 8 bytes, and has 1",
    )
    table = {"a": entry("U8", [2], 1, 3), "b": entry("U8", [2], 2, 4)}
    found = problems(path, safetensors_bytes(table, bytes(9)))
    assert ["gap" in p or "overlaps" in p or "added to" in p for p in found] == [True] * 3


def test_the_order_is_that_of_the_bytes(path: Path) -> None:
    """And an empty tensor may share its place with the one that begins there."""
    table = {
        "__metadata__": {"format": "pt", "x": "y"},
        "b": entry("U8", [2], 4, 6),
        "empty": entry("F32", [0, 7], 4, 4),
        "a": entry("F32", [], 0, 4),
    }
    content = safetensors_bytes(table, bytes(6))
    path.write_bytes(content)
    header = read_header(path)
    data = len(content) - 6
    assert [*header.entries] == ["a", "empty", "b"]
    assert header.metadata == {"format": "pt", "x": "y"}
    assert [(e.start - data, e.stop - data) for e in header.entries.values()] == [
        (0, 4),
        (4, 4),
        (4, 6),
    ]
    assert header.entries["empty"].shape == (0, 7)
    assert header.entries["a"].dtype is DTYPES["F32"]


def test_no_tensors(path: Path) -> None:
    path.write_bytes(safetensors_bytes({}))
    assert read_header(path).entries == {}
    assert read_header(path).metadata == {}


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_types_are_torchs(name: str) -> None:
    dtype = DTYPES[name]
    assert dtype.torch is TORCH_DTYPES[name]
    assert dtype.bits == 8 * torch.empty(0, dtype=TORCH_DTYPES[name]).element_size()


@given(given_tensors=tensors())
def test_what_safetensors_wrote_is_read(tmp_path_factory: Any, given_tensors: Any) -> None:
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    save_file(given_tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.entries.keys() == given_tensors.keys()
    assert header.metadata == {"format": "pt"}
    for name, tensor in given_tensors.items():
        found = header.entries[name]
        assert found.dtype.torch is tensor.dtype
        assert found.shape == tuple(tensor.shape)
        assert content[found.start : found.stop] == bytes_of(tensor)


_OFFSET = st.integers(-1, 9)
_ENTRY = st.builds(
    entry,
    st.sampled_from(["U8", "F16", "F32", "F4", "F6_E2M3", "BOOL", "F8_E4M3", "X"]),
    st.lists(st.integers(0, 4), max_size=2),
    _OFFSET,
    _OFFSET,
)


@st.composite
def _nearly_sound(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Tensors one after the other, with at most one thing out of place."""
    table: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        dtype, bits = draw(st.sampled_from([("U8", 8), ("F32", 32), ("F4", 4), ("F6_E3M2", 6)]))
        shape = draw(st.lists(st.integers(0, 4), max_size=2))
        size = bits
        for side in shape:
            size *= side
        table[name] = entry(dtype, shape, end, end + size // 8)
        end += size // 8
    if table and draw(st.booleans()):
        moved = table[draw(st.sampled_from(sorted(table)))]["data_offsets"]
        moved[draw(st.integers(0, 1))] += draw(st.integers(-2, 2))
    return table, max(0, end + draw(st.sampled_from([0, 0, 0, 1, -1])))


@given(case=st.one_of(_nearly_sound(), st.tuples(st.dictionaries(st.just("w"), _ENTRY), _OFFSET)))
@example(case=({}, 0))
def test_the_same_files_are_sound_as_for_safetensors(case: tuple[dict[str, Any], int]) -> None:
    table, size = case
    content = safetensors_bytes(table, bytes(range(max(0, size))))
    raw = json.dumps(table).encode()
    try:
        theirs = {name: dict(value) for name, value in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        with pytest.raises(FormatError):
            parse_header(raw, len(content), "it")
        return
    ours = parse_header(raw, len(content), "it").entries
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        assert found.dtype.name == theirs[name]["dtype"]
        assert [*found.shape] == theirs[name]["shape"]
        assert content[found.start : found.stop] == bytes(theirs[name]["data"])


@given(at=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 200))
def test_damage_of_any_kind_is_an_error_of_ours_or_none(
    tmp_path_factory: Any, at: int, byte: int, cut: int
) -> None:
    table = {"__metadata__": {"format": "pt"}, "w": W, "v": entry("I64", [1, 2], 8, 24)}
    content = bytearray(safetensors_bytes(table, bytes(24)))
    content[at % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content[: len(content) - (cut if cut < len(content) else 0)])
    try:
        entries = read_header(path).entries.values()
    except FormatError:
        return
    assert cut == 0 or cut >= len(content)
    assert sum(found.stop - found.start for found in entries) == 24
