"""FP8 with scales: every value against a loop over blocks in float64; what computes with such a
model rounds once; transformers loads what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bytes_of, save_raw
from families import loaded
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgery import (
    ArgumentError,
    Checkpoint,
    UnsupportedError,
    apply,
    dequantize,
    diff,
    expand,
    extract_lora,
    grow,
    lines,
    merge,
    open_checkpoint,
    plan,
    task_vector,
    verify,
    write,
)
from surgery.files import InputFile

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
BLOCK = 128
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WIDE = {"hidden_size": 192, "intermediate_size": 320, "num_key_value_heads": 2}
"""Neither is a multiple of 128."""


def quantized(
    weight: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK), dtype: Any = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as 8-bit floats, and the scale of every block."""
    down, across = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    scales = torch.empty(down, across)
    values = torch.empty(weight.shape, dtype=dtype)
    for i in range(down):
        for j in range(across):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[place].abs().max() / 400 * 1.0371
            values[place] = (weight[place] / scales[i, j]).to(dtype)
    return values, scales


def by_formula(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """Value times the scale of its block: exact in float64, and then the nearest float32."""
    out = values.double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            out[place] *= scales[i, j].double()
    return out.float()


def as_fp8(source: Path, target: Path, config: Mapping[str, Any] | None = None) -> Path:
    """A copy of a model with the matrices of its blocks in FP8, as DeepSeek-V3 stores them."""
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensor.float())
        else:
            tensors[name] = tensor
    table = json.loads((source / "config.json").read_text())
    table["quantization_config"] = {**FP8, **(config or {})}
    return save_raw(target, tensors, config=table, files={"tokenizer_config.json": "{}"})


def values_of(folder: Path) -> Tensors:
    """What every tensor of such a model stands for, in float32 where it is FP8."""
    stored = load_file(folder / "model.safetensors")
    return {
        name: by_formula(tensor, stored[f"{name}_scale_inv"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def written(checkpoint: Checkpoint, target: Path, **how: Any) -> Tensors:
    write(checkpoint, target, **how)
    return load_file(target / "model.safetensors")


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and bytes_of(found) == bytes_of(wanted)


@pytest.fixture
def pair(make_model: Make, tmp_path: Path) -> tuple[Path, Path]:
    """Two models in FP8 that differ."""
    made = []
    for seed, name in enumerate(("base", "tuned")):
        path = make_model(name=f"{name}-bf16", dtype=torch.bfloat16, seed=seed, **WIDE)
        made.append(as_fp8(path, tmp_path / name))
    return made[0], made[1]


def test_every_value_is_its_block_s_scale_times_what_is_stored(pair: tuple[Path, Path], tmp_path):
    base, _ = pair
    stored, wanted = load_file(base / "model.safetensors"), values_of(base)
    assert stored["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (3, 2)
    found = written(dequantize(open_checkpoint(base)), tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same(found[name], value.bfloat16()), name
        if stored[name].dtype != torch.float8_e4m3fn:
            assert same(found[name], stored[name])
    full = written(dequantize(open_checkpoint(base), dtype="float32"), tmp_path / "full")
    assert all(same(full[name], value) for name, value in wanted.items())


def test_what_was_not_quantized_is_copied_from_file_to_file(pair: tuple[Path, Path]):
    base, _ = pair
    layout = plan(dequantize(open_checkpoint(base)))
    stored = load_file(base / "model.safetensors")
    assert set(layout.computed) == {n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert not layout.copied


def test_config_and_notes_say_what_was_done(pair: tuple[Path, Path], tmp_path: Path):
    base, _ = pair
    made = dequantize(open_checkpoint(base))
    write(made, tmp_path / "out")
    given = json.loads((base / "config.json").read_text())
    del given["quantization_config"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == given | {"dtype": "bfloat16"}
    assert (tmp_path / "out/tokenizer_config.json").exists()
    assert made.notes == (
        (
            f"{base} holds 8-bit floats: 14 tensors were multiplied by their scales in float32, and "
            f"became bfloat16"
        ),
    )
    record = json.loads((tmp_path / "out/surgery.json").read_text())
    assert [edit["operation"] for edit in record["edits"]] == ["dequantize"]
    assert record["edits"][0]["details"] == {"tensors": 14, "activation_scales": []}
    assert made.quantization is None


def test_a_config_without_a_type_gets_one(tmp_path: Path):
    values, scales = quantized(torch.randn(8, 8))
    tensors = {"a.weight": values, "a.weight_scale_inv": scales}
    config = {"model_type": "llama", "quantization_config": FP8}
    model = open_checkpoint(save_raw(tmp_path / "m", tensors, config=config))
    assert dequantize(model).config == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_threads_and_blocks_change_nothing(pair: tuple[Path, Path], monkeypatch, tmp_path: Path):
    base, tuned = (open_checkpoint(path) for path in pair)
    edited = lines(base, tuned, alpha=0.3)
    for name, wanted in written(edited, tmp_path / "one", threads=1).items():
        tensor = edited[name]
        for size in (1, 37, 129):
            parts = [
                tensor.read(at, min(at + size, tensor.rows)) for at in range(0, tensor.rows, size)
            ]
            assert same(torch.cat(parts).reshape(tensor.shape), wanted), (name, size)
    monkeypatch.setattr(sys.modules["surgery.writing.write"], "BLOCK_ELEMENTS", 1000)
    shards = written(edited, tmp_path / "two", threads=4)
    assert all(
        same(value, shards[name])
        for name, value in load_file(tmp_path / "one/model.safetensors").items()
    )


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    block=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    kind=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
)
def test_any_rows_of_any_blocks(tmp_path_factory: Any, shape: Any, block: Any, cut: Any, kind: Any):
    values, scales = quantized(torch.randn(shape), block, kind)
    folder = save_raw(
        tmp_path_factory.mktemp("fp8") / "model",
        {"a.weight": values, "a.weight_scale_inv": scales},
        config={"quantization_config": FP8 | {"weight_block_size": list(block)}},
    )
    tensor = dequantize(open_checkpoint(folder), dtype="float32")["a.weight"]
    start, stop = sorted(int(part * shape[0]) for part in cut)
    assert same(tensor.read(start, stop), by_formula(values, scales, block)[start:stop])


@pytest.mark.parametrize("way", ["stacked", "exponents", "bytes", "no config", "bfloat16 scales"])
def test_other_ways_to_store_blocks(way: str, tmp_path: Path):
    config: dict[str, Any] = {"quantization_config": dict(FP8)}
    values, scales = quantized(torch.randn(200, 150))
    name, scale_name = "a.weight", "a.weight_scale_inv"
    wanted = by_formula(values, scales)
    if way == "stacked":  # experts, one matrix after another: blocks don't run over their border
        halves = [quantized(torch.randn(200, 150) * (n + 1)) for n in range(3)]
        values, scales = (torch.stack(parts) for parts in zip(*halves, strict=True))
        name, scale_name = "experts.gate_up_proj", "experts.gate_up_proj_scale_inv"
        wanted = torch.stack([by_formula(*half) for half in halves])
    elif way in ("exponents", "bytes"):
        raw = torch.tensor([[120, 121], [127, 129]], dtype=torch.uint8)
        wanted = by_formula(values, torch.tensor([[2.0**-7, 2.0**-6], [1.0, 4.0]]))
        scales = raw if way == "bytes" else raw.view(torch.float8_e8m0fnu)
        config["quantization_config"]["scale_fmt"] = "ue8m0"
    elif way == "no config":
        config = {}
    else:
        scales = scales.bfloat16()
        wanted = by_formula(values, scales)
    folder = save_raw(tmp_path / "m", {name: values, scale_name: scales}, config=config)
    made = dequantize(open_checkpoint(folder), dtype="float32")
    assert list(made) == [name]
    assert same(made[name].whole(), wanted)
    assert same(made[name].read(199, 200), wanted.reshape(-1, 150)[199:200])


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        }
    },
}


@pytest.mark.parametrize("config", [COMPRESSED, {"quant_method": "fbgemm_fp8"}, FP8])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (40,), (40, 1)])
def test_a_scale_for_each_row_or_for_the_matrix(config: Any, shape: Any, tmp_path: Path):
    values = torch.randn(40, 24).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.01
    tensors = {
        "a.weight": values,
        "a.weight_scale": scales,
        "a.input_scale": torch.ones(1),
        "a.bias": torch.randn(40),
    }
    folder = save_raw(tmp_path / "m", tensors, config={"quantization_config": config})
    made = dequantize(open_checkpoint(folder))
    product = values.double() * (
        scales.double() if scales.numel() == 1 else scales.double().reshape(40, 1)
    )
    assert same(made["a.weight"].whole(), product.float().bfloat16())
    assert set(made) == {"a.bias", "a.weight"}
    assert "scales of activations (a.input_scale, ...) were left out" in made.notes[1]


def test_blocks_of_compressed_tensors(tmp_path: Path):
    values, scales = quantized(torch.randn(40, 24), (16, 16))
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}
    config = {**COMPRESSED, "config_groups": {"group_0": {"weights": weights}}}
    tensors = {"a.weight": values, "a.weight_scale": scales}
    folder = save_raw(tmp_path / "m", tensors, config={"quantization_config": config})
    made = dequantize(open_checkpoint(folder), dtype="float32")
    assert same(made["a.weight"].whole(), by_formula(values, scales, (16, 16)))


@pytest.mark.parametrize("way", ["transformers", "modelopt", "modelopt, nested"])
def test_a_scale_for_each_32(way: str, tmp_path: Path):
    """MXFP8: a byte e stands for 2 ** (e - 127)."""
    values = torch.randn(40, 96).to(torch.float8_e4m3fn)
    scales = torch.randint(110, 130, (40, 3), dtype=torch.uint8)
    config: dict[str, Any] = {
        "transformers": {"quant_method": "mxfp8"},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        "modelopt, nested": {"quant_method": "modelopt", "quantization": {"quant_algo": "mxfp8"}},
    }[way]
    scale = "a.weight_scale_inv" if way == "transformers" else "a.weight_scale"
    folder = save_raw(
        tmp_path / "m", {"a.weight": values, scale: scales}, config={"quantization_config": config}
    )
    made = dequantize(open_checkpoint(folder), dtype="float32")
    wanted = by_formula(values, 2.0 ** (scales.double() - 127), (1, 32))
    assert same(made["a.weight"].whole(), wanted)
    assert list(made) == ["a.weight"]


@pytest.mark.parametrize("told", ["in the config", "beside the shards"])
def test_modelopt_has_a_scale_for_each_matrix(told: str, tmp_path: Path):
    values, scale = torch.randn(40, 24).to(torch.float8_e4m3fn), torch.tensor(0.0371)
    tensors = {"a.weight": values, "a.weight_scale": scale, "a.input_scale": torch.tensor(0.5)}
    table = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}}
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    folder = save_raw(
        tmp_path / "m",
        tensors,
        config={"quantization_config": table} if told == "in the config" else {},
        files={} if told == "in the config" else {"hf_quant_config.json": json.dumps(own)},
    )
    made = dequantize(open_checkpoint(folder))
    product = (values.double() * scale.double()).float().bfloat16()
    assert same(made["a.weight"].whole(), product)
    assert list(made) == ["a.weight"]
    assert "hf_quant_config.json" not in made.companions
    packed = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    other = save_raw(tmp_path / "o", tensors, config={"quantization_config": packed})
    assert "packed by NVIDIA's ModelOpt" in refused(dequantize, open_checkpoint(other))


# One rounding


def nearest(exact: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether `found` is `exact` (float64) in bfloat16, up to the rounding of float32 before."""
    allowed = exact.abs() * (2**-8 + 2**-20) + 2**-22
    return found.dtype == torch.bfloat16 and bool(((found.double() - exact).abs() <= allowed).all())


def test_lines_rounds_once(pair: tuple[Path, Path], tmp_path: Path):
    base, tuned = (values_of(path) for path in pair)
    found = written(lines(*map(open_checkpoint, pair), alpha=0.3), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = base[name], tuned[name]
    assert same(found[name], ((second - first) * 0.3 + first).bfloat16())
    assert nearest(first.double() + 0.3 * (second.double() - first.double()), found[name])
    twice = (second.bfloat16().float() - first.bfloat16().float()) * 0.3 + first.bfloat16().float()
    assert not torch.equal(found[name], twice.bfloat16())
    # after a step of its own, too
    chained = lines(*(dequantize(open_checkpoint(path)) for path in pair), alpha=0.3)
    assert all(same(chained[n].whole(), value) for n, value in found.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert "quantization_config" not in chained.config


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "passthrough", "tsv_m", "slerp"])
def test_merge_rounds_once(method: str, pair: tuple[Path, Path], make_model: Make, tmp_path: Path):
    """Merging FP8 models is merging what they stand for, in float32, with one rounding."""
    full = []
    for at, path in enumerate(pair):
        write(dequantize(open_checkpoint(path), dtype="float32"), tmp_path / f"full-{at}")
        full.append(tmp_path / f"full-{at}")
    takes = {"passthrough": 1}.get(method, 2)
    with_base = method in ("task_arithmetic", "tsv_m")
    options: dict[str, Any] = {"t": 0.25} if method == "slerp" else {}

    def merged(paths: list[Path], **more: Any) -> Checkpoint:
        models = [open_checkpoint(path) for path in paths]
        if method == "slerp":
            return merge(models[1:], base=models[0], method=method, **options, **more)
        if with_base:
            return merge(models[1:] * 2, base=models[0], method=method, **more)
        return merge(models[:takes], method=method, **more)

    found, wanted = merged(list(pair)), merged(full, dtype="bfloat16")
    quantized_names = [n for n in wanted if ".layers." in n and wanted[n].shape[1:]]
    for name in quantized_names:
        assert same(found[name].whole(), wanted[name].whole()), name
    assert len(quantized_names) == 14
    exact = merged(list(pair), dtype="float32")
    assert all(same(exact[n].whole(), merged(full)[n].whole()) for n in quantized_names)


def test_task_vectors_and_what_they_are_applied_to(pair: tuple[Path, Path], tmp_path: Path):
    base, tuned = map(open_checkpoint, pair)
    first, second = map(values_of, pair)
    vector = task_vector(base, tuned)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert same(vector[name].whole(), second[name] - first[name])
    stored = task_vector(base, tuned, dtype="tuned")
    assert same(stored[name].whole(), (second[name] - first[name]).bfloat16())
    back = apply(open_checkpoint(pair[0]), vector, scale=0.5)
    wanted = (first[name] + (second[name] - first[name]) * 0.5).bfloat16()
    assert same(back[name].whole(), wanted)
    write(vector, tmp_path / "vector")


def test_diff_compares_what_they_stand_for(pair: tuple[Path, Path], make_model: Make, tmp_path):
    write(dequantize(open_checkpoint(pair[0]), dtype="float32"), tmp_path / "full")
    full = open_checkpoint(tmp_path / "full")
    found = diff(open_checkpoint(pair[0]), full)
    assert all(change.equal for change in found.changes)
    assert not found.added
    assert not found.removed
    assert found.retyped["model.layers.0.mlp.up_proj.weight"] == ("F8_E4M3", "F32")
    assert "quantization_config" in found.config
    assert not any(
        c.equal for c in diff(*map(open_checkpoint, pair)).changes if ".layers." in c.name
    )


def test_every_fp8_input_has_a_note(pair: tuple[Path, Path], tmp_path: Path):
    base, tuned = map(open_checkpoint, pair)
    plain = tmp_path / "plain"
    write(dequantize(tuned), plain)
    for made in (
        lines(base, open_checkpoint(plain), alpha=0.5),
        merge([open_checkpoint(plain), base], method="linear"),
        merge([open_checkpoint(plain)] * 2, base=base, method="ties", density=0.5),
    ):
        assert [note.split(" holds ")[0] for note in made.notes] == [str(pair[0])]
    both = merge([tuned, tuned], base=base, method="ties", density=0.5)
    assert [note.split(" holds ")[0] for note in both.notes] == [str(path) for path in pair]


def test_verification_runs_what_they_stand_for(pair: tuple[Path, Path], tmp_path: Path):
    write(dequantize(open_checkpoint(pair[0])), tmp_path / "plain")
    found = verify(open_checkpoint(pair[0]), open_checkpoint(tmp_path / "plain"))
    assert found.logits is not None
    assert found.logits.max_difference == 0
    assert verify(*map(open_checkpoint, pair)).logits.max_difference > 0  # type: ignore[union-attr]


def test_lora_on_an_fp8_base(pair: tuple[Path, Path], tmp_path: Path):
    """An adapter of the whole difference, and the base with it: what the tuned model stands for."""
    base, tuned = pair
    write(extract_lora(open_checkpoint(base), open_checkpoint(tuned), rank=192), tmp_path / "lora")
    baked = open_checkpoint(f"{base}+{tmp_path / 'lora'}")
    name = "model.layers.0.self_attn.o_proj.weight"
    apart = baked[name].whole().float() - values_of(tuned)[name]
    assert float(apart.abs().max()) < 0.01


def test_headers_are_enough_to_plan(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor's bytes were read")

    monkeypatch.setattr(InputFile, "read_into", refuse)
    base, tuned = map(open_checkpoint, pair)
    plan(dequantize(base))
    plan(lines(base, tuned, alpha=0.5))
    plan(merge([tuned, tuned], base=base, method="ties", density=0.5))


# transformers


def test_transformers_loads_what_is_written(pair: tuple[Path, Path], tmp_path: Path):
    write(dequantize(open_checkpoint(pair[0])), tmp_path / "out")
    model = loaded(tmp_path / "out")
    wanted = values_of(pair[0])["model.layers.1.mlp.down_proj.weight"].bfloat16().double()
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, wanted)


def test_transformers_own_dequantization_gives_the_same(make_model: Make, tmp_path: Path):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    path = as_fp8(make_model(dtype=torch.bfloat16, **sizes), tmp_path / "fp8", {"dequantize": True})
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    ours = written(dequantize(open_checkpoint(path)), tmp_path / "out")
    assert len(ours) > 14
    assert all(same(theirs[name].cpu(), value) for name, value in ours.items())


# What is refused


def refused(call: Callable[..., Any], *args: Any, **how: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        call(*args, **how)
    return str(caught.value)


def test_growth_says_to_dequantize_first(pair: tuple[Path, Path]):
    base = open_checkpoint(pair[0])
    text = refused(expand, base, copies=1)
    assert f"{pair[0]} (base) is quantized: fp8 (8-bit floats with scales;" in text
    assert "`surgery dequantize MODEL -o OUT` writes it in bfloat16" in text
    assert "width of 320 isn't a multiple of 128" in refused(grow, base)
    assert grow(dequantize(base)).anatomy.mlps["model.layers", 0].width == 640


def test_what_does_not_fit_is_all_said(tmp_path: Path):
    values, scales = quantized(torch.randn(200, 150))
    tensors = {
        "good.weight": values,
        "good.weight_scale_inv": scales,
        "bare.weight": values,
        "odd.weight": values,
        "odd.weight_scale_inv": torch.ones(3, 2),
        "bytes.weight": values,
        "bytes.weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8),
        "point.weight": values,
        "point.weight_scale": torch.ones(1),
        "point.weight_zero_point": torch.zeros(1),
        "vector.weight": values[0],
        "vector.weight_scale_inv": torch.ones(2),
    }
    model = open_checkpoint(save_raw(tmp_path / "m", tensors, config={"quantization_config": FP8}))
    problems = refused(dequantize, model).splitlines()
    said = {line.removeprefix(f"{tmp_path / 'm'} (model): ").split()[0]: line for line in problems}
    assert "neither bare.weight_scale_inv nor bare.weight_scale is there" in said["bare.weight"]
    assert "is [3, 2], and odd.weight is [200, 150]" in said["odd.weight_scale_inv"]
    assert "scale_fmt ue8m0" in said["bytes.weight_scale_inv"]
    assert "zero point" in said["point.weight"]
    assert "only matrices have scales" in said["vector.weight"]
    assert len(said) == 5


def test_a_scale_of_nothing_and_a_config_that_lies(tmp_path: Path):
    values, scales = quantized(torch.randn(4, 4))
    tensors = {"a.weight": values, "a.weight_scale_inv": scales, "b.weight_scale": torch.ones(1)}
    model = open_checkpoint(save_raw(tmp_path / "m", tensors, config={"quantization_config": FP8}))
    assert "no weight of 8-bit floats that it would scale" in refused(dequantize, model)
    plain = {"a.weight": torch.ones(4, 4)}
    lying = open_checkpoint(save_raw(tmp_path / "l", plain, config={"quantization_config": FP8}))
    assert "and yet no tensor is of 8-bit floats" in refused(lines, lying, lying, alpha=0.5)
    bare = open_checkpoint(save_raw(tmp_path / "b", {"a.weight": values}))
    assert "nothing says by what they are scaled" in refused(diff, bare, bare)


def test_a_model_that_is_not_quantized(make_model: Make):
    model = open_checkpoint(make_model())
    assert "isn't quantized" in refused(dequantize, model)
    with pytest.raises(ArgumentError, match="'bfloat16' or 'float32'"):
        dequantize(model, dtype="float16")  # type: ignore[arg-type]


# The command, and the step of a recipe


def test_the_verb_and_the_step(pair: tuple[Path, Path], tmp_path: Path):
    from surgery.commands.main import app
    from typer.testing import CliRunner

    out = tmp_path / "verb"
    result = CliRunner().invoke(app, ["dequantize", str(pair[0]), "-o", str(out)])
    assert result.exit_code == 0, result.output
    wanted = values_of(pair[0])
    found = load_file(out / "model.safetensors")
    assert all(same(found[name], value.bfloat16()) for name, value in wanted.items())
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"inputs: {{base: {pair[0]}, tuned: {pair[1]}}}\n"
        "steps:\n"
        "  plain: {dequantize: {model: base}}\n"
        "  wide: {grow: {model: plain, factor: 2}}\n"
    )
    result = CliRunner().invoke(
        app, ["run", str(recipe), "-o", str(tmp_path / "grown"), "--no-logits"]
    )
    assert result.exit_code == 0, result.output
    grown = load_file(tmp_path / "grown/model.safetensors")
    assert grown["model.layers.0.mlp.up_proj.weight"].shape == (640, 192)
    report = json.loads(CliRunner().invoke(app, ["inspect", str(pair[0]), "--json"]).stdout)
    assert report["quantization"].startswith("fp8 (8-bit floats with scales")
    assert report["unrecognised"] == []
    assert report["notes"] == []
    assert "width of 320 isn't a multiple of 128" in report["blocks"][0]["no_growth"]
    assert report["blocks"][0]["mlp"]["width"] == 320
