"""Opening: what belongs to a checkpoint, what travels with it, and what isn't taken for one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INDEX, bytes_of, entry, safetensors_bytes, save_raw, shared, write_index

from surgery import (
    Checkpoint,
    FormatError,
    InputError,
    NotFoundError,
    SurgeryError,
    open_checkpoint,
)

A = torch.arange(6.0).reshape(2, 3)
B = torch.arange(4, dtype=torch.bfloat16)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Raw = Callable[..., Path]


@pytest.fixture
def two(raw_checkpoint: Raw) -> Path:
    """Two shards, `a` in the first and `b` in the second, with their index."""
    return raw_checkpoint({"a": A}, {"b": B}, config={"model_type": "made_up"})


def problems(folder: Path, kind: type[SurgeryError] = FormatError) -> tuple[str, ...]:
    with pytest.raises(SurgeryError) as caught:
        open_checkpoint(folder)
    assert type(caught.value) is kind
    return caught.value.problems


def whole(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: bytes_of(tensor.whole()) for name, tensor in checkpoint.items()}


# --- the weight files -----------------------------------------------------------------------


def test_shards(two: Path) -> None:
    checkpoint = open_checkpoint(two)
    assert whole(checkpoint) == {"a": bytes_of(A), "b": bytes_of(B)}
    assert {n: (t.shape, str(t.dtype)) for n, t in checkpoint.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((4,), "BF16"),
    }
    assert (checkpoint.numel, checkpoint.nbytes, len(checkpoint)) == (10, 32, 2)
    assert checkpoint.source.files == {
        name: (two / name).stat().st_size for name in (FIRST, SECOND)
    }
    assert (checkpoint.notes, checkpoint.left_behind, checkpoint.history) == ((), (), ())
    assert checkpoint.companions == {}


def test_one_file_as_a_model(raw_checkpoint: Raw) -> None:
    """Nothing else in its folder is looked at: not even a config that can't be read."""
    folder = raw_checkpoint({"a": A}, files={"config.json": "{", "tokenizer.json": "{}"})
    (folder / "other.safetensors").write_bytes(b"no")
    checkpoint = open_checkpoint(folder / "model.safetensors")
    assert whole(checkpoint) == {"a": bytes_of(A)}
    assert (checkpoint.config, checkpoint.companions) == ({}, {})
    assert [*checkpoint.source.files] == ["model.safetensors"]


def test_transformers_shards(make_model: Raw) -> None:
    folder = make_model("llama", max_shard_size="8KB", tie_word_embeddings=False)
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.source.files) > 1
    assert [*checkpoint.source.files] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert checkpoint.notes == ()
    assert checkpoint["lm_head.weight"].shape == (64, 16)
    assert [*checkpoint.companions] == ["generation_config.json"]


def test_a_shared_model_is_sound() -> None:
    checkpoint = open_checkpoint(shared("models", "stories260K"))
    assert checkpoint.notes == ()
    assert checkpoint["model.layers.0.mlp.down_proj.weight"].shape == (64, 172)


def test_the_index_names_what_no_header_has(two: Path) -> None:
    write_index(two, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert problems(two) == (
        f"{two}: the index has c in {SECOND}, and the headers have it in no file",
    )


def test_a_header_has_what_the_index_does_not_name(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A, "c": A}, {"b": B})
    write_index(folder, {"a": FIRST, "b": SECOND})
    assert problems(folder) == (
        f"{folder}: the index has c in no file, and the headers have it in {FIRST}",
    )


def test_shards_that_were_swapped(two: Path) -> None:
    (two / FIRST).rename(two / "x")
    (two / SECOND).rename(two / FIRST)
    (two / "x").rename(two / SECOND)
    assert problems(two) == (
        f"{two}: the index has a in {FIRST}, and the headers have it in {SECOND}",
        f"{two}: the index has b in {SECOND}, and the headers have it in {FIRST}",
    )


def test_a_name_in_two_shards(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A, "b": A}, {"b": B})
    assert problems(folder) == (f"{folder}: b is in both {FIRST} and {SECOND}",)


def test_a_missing_shard_and_a_damaged_one(two: Path) -> None:
    (two / FIRST).unlink()
    size = (two / SECOND).stat().st_size
    os.truncate(two / SECOND, size - 1)
    assert problems(two) == (
        f"{two / FIRST}: the index names this shard, and it isn't there; fetch it",
        (
            f"{two / SECOND} has {size - 1:,} bytes and its header describes {size:,}: the file was "
            f"cut short; fetch it again"
        ),
    )


def test_shards_without_an_index(two: Path) -> None:
    (two / INDEX).unlink()
    assert whole(open_checkpoint(two)) == {"a": bytes_of(A), "b": bytes_of(B)}


def test_a_missing_shard_without_an_index(two: Path) -> None:
    (two / INDEX).unlink()
    (two / SECOND).unlink()
    assert problems(two) == (
        f"{two / SECOND}: no such file, and the names of the others say that there is one",
    )


def test_a_name_that_claims_shards_beyond_number(tmp_path: Path) -> None:
    """It isn't answered by a problem for each of the 99,998 others."""
    (tmp_path / "model-00001-of-99999.safetensors").write_bytes(safetensors_bytes({}))
    assert [*open_checkpoint(tmp_path)] == []


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b", "..", ".", "", "x\0", "./a"],
)
def test_an_index_that_leads_elsewhere(two: Path, name: str) -> None:
    write_index(two, {"a": FIRST, "b": name})
    assert problems(two)[0] == (
        f"{two / INDEX}: weight_map names {name!r}, which isn't the plain name of a file beside it"
    )


@pytest.mark.parametrize("name", [None, 3, True])
def test_an_index_whose_values_are_no_names(two: Path, name: Any) -> None:
    write_index(two, {"a": FIRST, "b": name, "c": "../x"})
    named = f"{two / INDEX}: weight_map names "
    said = ", which isn't the plain name of a file beside it"
    assert problems(two) == (f"{named}{name!r}{said}", f"{named}'../x'{said}")


@pytest.mark.parametrize(
    ("name", "said"), [([FIRST], f"[{FIRST!r}]"), ({"file": FIRST}, "a table of 1")]
)
def test_an_index_whose_values_are_tables(two: Path, name: Any, said: str) -> None:
    write_index(two, {"a": FIRST, "b": name})
    (problem,) = problems(two)
    assert problem.startswith(f"{two / INDEX}: weight_map names {said}, which isn't")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", " isn't JSON: Expecting property name"),
        ("[" * 100_000, " isn't JSON: maximum recursion depth"),
        ("[]", " isn't a JSON table"),
        ("{}", " has no weight_map"),
        ('{"weight_map": {}}', " has no weight_map"),
        ('{"weight_map": ["a"]}', " has no weight_map"),
    ],
)
def test_an_index_that_is_none(two: Path, text: str, said: str) -> None:
    (two / INDEX).write_text(text)
    (problem,) = problems(two)
    assert problem.startswith(f"{two / INDEX}{said}")


@pytest.mark.parametrize("metadata", [None, [], {}, {"total_size": "32"}, {"total_size": 32}])
def test_an_index_is_sound_without_a_total(two: Path, metadata: Any) -> None:
    weight_map = {"a": FIRST, "b": SECOND}
    (two / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    assert open_checkpoint(two).notes == ()


def test_a_total_that_is_wrong_is_noted(two: Path) -> None:
    write_index(two, {"a": FIRST, "b": SECOND}, total_size=1234)
    assert open_checkpoint(two).notes == (
        "the index says total_size 1,234, and the tensors have 32",
    )


def test_one_file_beside_an_index(two: Path) -> None:
    """transformers takes the single file, others the index: one of the two models is stale."""
    (two / FIRST).rename(two / "model.safetensors")
    assert problems(two) == (
        (
            f"{two} has both model.safetensors and {INDEX}, and loaders differ in which they take: "
            f"one of them is stale; remove it"
        ),
    )


def test_one_file_that_the_index_names(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A})
    write_index(folder, {"a": "model.safetensors"}, 24)
    assert whole(open_checkpoint(folder)) == {"a": bytes_of(A)}


def test_two_indices(two: Path) -> None:
    (two / "model.fp16.safetensors.index.json").write_text("{}")
    assert problems(two) == (
        (
            f"{two} has several indices: model.fp16.safetensors.index.json, {INDEX}; remove all but "
            f"the right one"
        ),
    )


def test_stray_shards_are_noted(two: Path) -> None:
    (two / "model-00003-of-00003.safetensors").write_bytes(b"of an older save")
    checkpoint = open_checkpoint(two)
    assert checkpoint.notes == (
        "model-00003-of-00003.safetensors isn't in the index, and is left out",
    )
    assert sorted(checkpoint) == ["a", "b"]
    assert checkpoint.left_behind == ("model-00003-of-00003.safetensors",)


def test_a_stray_beside_one_file(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A})
    (folder / "consolidated.safetensors").write_bytes(b"the same in another layout")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.notes == ("consolidated.safetensors is left out beside model.safetensors",)
    assert [*checkpoint] == ["a"]


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes({}))
    said = (
        f"{tmp_path} is a LoRA adapter and no model: give the model it belongs to as well, written"
    )
    assert problems(tmp_path) == (f"{said} MODEL+{tmp_path}",)


def test_an_adapter_beside_one_file(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A}, files={"adapter_config.json": "{}"})
    assert [*open_checkpoint(folder)] == ["a"]


def test_an_adapter_beside_shards(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A}, {"b": B}, files={"adapter_config.json": "{}"})
    assert [*open_checkpoint(folder)] == ["a", "b"]


def test_another_format(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "config.json", "tf_model.h5"):
        (tmp_path / name).write_bytes(b"{}")
    assert problems(tmp_path) == (
        (
            f"{tmp_path} has no safetensors file, only pytorch_model.bin, tf_model.h5: convert it to "
            f"safetensors first"
        ),
    )


def test_nothing_there(tmp_path: Path) -> None:
    assert problems(tmp_path) == (f"{tmp_path} has no safetensors file",)
    (problem,) = problems(tmp_path / "gone", NotFoundError)
    assert problem.startswith(f"'{tmp_path / 'gone'}': there is no such directory")
    (problem,) = problems(tmp_path / "gone.safetensors", NotFoundError)
    assert problem.startswith(f"'{tmp_path / 'gone.safetensors'}': there is no such file")
    (tmp_path / "model.bin").write_bytes(b"")
    (problem,) = problems(tmp_path / "model.bin")
    assert problem == (
        f"{tmp_path / 'model.bin'} is a file, and not a *.safetensors one: give the checkpoint's "
        f"directory"
    )


# --- links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json"])
def test_a_link_out_of_the_checkpoint(raw_checkpoint: Raw, tmp_path: Path, what: str) -> None:
    files = {"tokenizer.json": "{}", "1_Pooling/config.json": "{}"}
    folder = raw_checkpoint({"a": A}, files=files)
    (folder / what).rename(tmp_path / "secret")
    (folder / what).symlink_to(os.path.relpath(tmp_path / "secret", (folder / what).parent))
    assert problems(folder) == (
        (
            f"{folder / what} is a link to {tmp_path / 'secret'}, outside the checkpoint: put the "
            f"file there"
        ),
    )


@pytest.mark.parametrize("what", ["config.json", INDEX])
def test_a_link_out_of_the_checkpoint_for_what_is_read(
    two: Path, tmp_path: Path, what: str
) -> None:
    (two / what).rename(tmp_path / "secret")
    (two / what).symlink_to(tmp_path / "secret")
    (problem,) = problems(two)
    assert problem.startswith(f"{two / what} is a link to {tmp_path / 'secret'}, outside")


def test_a_link_within_the_checkpoint(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A}, files={"tokenizer.json": "{}"})
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert whole(open_checkpoint(folder)) == {"a": bytes_of(A)}


def test_a_link_to_the_checkpoint(two: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(two, target_is_directory=True)
    assert sorted(open_checkpoint(tmp_path / "link")) == ["a", "b"]
    (tmp_path / "one.safetensors").symlink_to(two / FIRST)
    assert [*open_checkpoint(tmp_path / "one.safetensors")] == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_to_itself(raw_checkpoint: Raw, name: str) -> None:
    folder = raw_checkpoint({"a": A})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{folder / name} is a link ")


def snapshot(root: Path) -> Path:
    """What huggingface_hub makes: a snapshot whose files are links to blobs beside it."""
    folder = save_raw(root / "models--o--n" / "snapshots" / "c0ffee", {"a": A}, config={"k": 1})
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    blobs = root / "models--o--n" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    return folder


def test_the_layout_of_the_hub_cache(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(snapshot(tmp_path))
    assert whole(checkpoint) == {"a": bytes_of(A)}
    assert checkpoint.config == {"k": 1}
    assert [*checkpoint.companions] == ["1_Pooling/config.json"]


def test_a_link_to_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    """`ln -s ~/.cache/huggingface/hub/models--o--n/snapshots/c0ffee model`"""
    (tmp_path / "model").symlink_to(snapshot(tmp_path), target_is_directory=True)
    assert whole(open_checkpoint(tmp_path / "model")) == {"a": bytes_of(A)}


@pytest.mark.parametrize("where", ["secret", "models--o--n/snapshots/secret"])
def test_a_snapshot_that_leads_elsewhere(tmp_path: Path, where: str) -> None:
    folder = snapshot(tmp_path)
    (tmp_path / where).write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / where)
    (problem,) = problems(folder)
    assert problem.startswith(f"{folder / 'tokenizer.json'} is a link to {tmp_path / where}, outs")


# --- what travels ---------------------------------------------------------------------------

TRAVELS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_made_up.py",
    "1_Pooling/config.json",
    "LICENSE",
    "README.md",
    "tekken.model.v3",
)
STAYS = (
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "model.onnx_data",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/params.json",
    "__pycache__/modeling_made_up.cpython-311.pyc",
    "checkpoint-5/model.safetensors",
    "checkpoint-5/optimizer.pt",
    "x.fp16.safetensors",
)
NOBODYS = (".gitattributes", ".cache/huggingface/x.json", "surgery.json", f"sub/{INDEX}")


def test_what_travels_and_what_stays(raw_checkpoint: Raw) -> None:
    files = {name: f"the bytes of {name}" for name in (*TRAVELS, *STAYS, *NOBODYS)}
    checkpoint = open_checkpoint(raw_checkpoint({"a": A}, config={}, files=files))
    assert sorted(checkpoint.companions) == sorted(TRAVELS)
    for name, path in checkpoint.companions.items():
        assert isinstance(path, Path)
        assert path.read_text() == files[name]
    assert sorted(checkpoint.left_behind) == sorted(STAYS)


def test_the_state_of_a_trainer_stays(raw_checkpoint: Raw) -> None:
    folder = raw_checkpoint({"a": A}, files={"global_step500/zero_state.json": "{}"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.companions == {}
    assert checkpoint.left_behind == ("global_step500/zero_state.json",)


def test_a_companion_whose_blob_is_gone(raw_checkpoint: Raw) -> None:
    """Half a cache: the edited model would come without its tokenizer, and nobody told."""
    folder = raw_checkpoint({"a": A})
    (folder / "tokenizer.json").symlink_to("gone")
    assert problems(folder, NotFoundError) == (
        f"{folder / 'tokenizer.json'} is a link to gone, which isn't there",
    )


# --- the config -----------------------------------------------------------------------------


def test_the_config_is_kept_key_for_key(raw_checkpoint: Raw) -> None:
    text = """{"z": 1, "torch_dtype": "bfloat16", "dtype": null, "a": [1, 2.0, true],
        "max": {"__float__": "Infinity"}, "rope_theta": 1e4, "nested": {"y": 0, "x": "\\u00e9"}}"""
    config = open_checkpoint(raw_checkpoint({"a": A}, files={"config.json": text})).config
    assert json.dumps(config) == json.dumps(json.loads(text))
    assert [*config] == ["z", "torch_dtype", "dtype", "a", "max", "rope_theta", "nested"]


def test_no_config(raw_checkpoint: Raw) -> None:
    assert open_checkpoint(raw_checkpoint({"a": A})).config == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", " isn't JSON: Expecting"),
        (b"[]", " isn't a JSON table"),
        (b'{"\xff": 1}', " isn't JSON: 'utf-8' codec"),
    ],
)
def test_a_config_that_is_none(raw_checkpoint: Raw, text: bytes, said: str) -> None:
    folder = raw_checkpoint({"a": A}, files={"config.json": text})
    (problem,) = problems(folder)
    assert problem.startswith(f"{folder / 'config.json'}{said}")


@pytest.mark.parametrize(
    ("config", "dtype", "name", "said"),
    [
        ({}, "F32", "a.weight", None),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "F32",
            "a",
            "fp8 (8-bit floats with scales; its quantization_config says so)",
        ),
        (
            {"quantization_config": {"quant_algo": "NVFP4"}},
            "F32",
            "a",
            (
                "NVFP4 (4-bit floats, two to a byte, with a scale for each 16; its quantization_config "
                "says so)"
            ),
        ),
        (
            {"quantization_config": {}},
            "F32",
            "a",
            "unknown (a scheme that isn't known here; its quantization_config says so)",
        ),
        ({"quantization_config": None}, "F32", "a", None),
        (
            {},
            "F8_E4M3",
            "a",
            "fp8 (8-bit floats, and nothing says by what they are scaled; a is F8_E4M3)",
        ),
        (
            {},
            "F32",
            "a.weight_scale_inv",
            "fp8 (8-bit floats with scales; a.weight_scale_inv is F32)",
        ),
        (
            {},
            "I32",
            "a.qweight",
            "gptq (GPTQ, integers of 2 to 8 bits packed in int32 by groups; a.qweight is I32)",
        ),
        ({}, "I32", "a.position_ids", None),
    ],
)
def test_packed_weights_are_seen(
    tmp_path: Path, config: Any, dtype: str, name: str, said: str | None
) -> None:
    size = 1 if dtype.startswith("F8") else 4
    content = safetensors_bytes({name: entry(dtype, [2], 0, 2 * size)}, bytes(2 * size))
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(tmp_path).quantization
    assert (None if found is None else str(found)) == said


def test_opening_reads_no_tensor(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.preadv", None)
    assert open_checkpoint(two).nbytes == 32
