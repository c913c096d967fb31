"""Packed weights other than FP8: told apart in the layouts that real files have, by config or by
tensors alone, and refused by everything that computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_raw

from surgery import (
    Checkpoint,
    UnsupportedError,
    apply,
    compose,
    dequantize,
    diff,
    expand,
    extract_lora,
    grow,
    lines,
    merge,
    open_checkpoint,
    task_vector,
)
from surgery.quantization.schemes import SCHEMES

OUT, IN, GROUP = 32, 64, 32
WHERE = "model.layers.0.mlp.up_proj"


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


I32, U8, I8 = torch.int32, torch.uint8, torch.int8
F16, F32, E4M3 = torch.float16, torch.float32, torch.float8_e4m3fn

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
        {
            "qweight": zeros(I32, IN // 8, OUT),
            "qzeros": zeros(I32, IN // GROUP, OUT // 8),
            "scales": zeros(F16, IN // GROUP, OUT),
            "g_idx": zeros(I32, IN),
        },
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        {
            "qweight": zeros(I32, IN, OUT // 8),
            "qzeros": zeros(I32, IN // GROUP, OUT // 8),
            "scales": zeros(F16, IN // GROUP, OUT),
        },
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {
            "weight": zeros(U8, OUT * IN // 2, 1),
            "weight.absmax": zeros(F32, OUT * IN // 64),
            "weight.quant_map": zeros(F32, 16),
            "weight.quant_state.bitsandbytes__nf4": zeros(U8, 80),
        },
    ),
    "bitsandbytes 8 bit": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": zeros(I8, OUT, IN), "SCB": zeros(F32, OUT), "weight_format": zeros(U8)},
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {
            "weight_packed": zeros(I32, OUT, IN // 8),
            "weight_scale": zeros(F16, OUT, IN // GROUP),
            "weight_shape": zeros(torch.int64, 2),
        },
    ),
    "compressed-tensors int8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"weight": zeros(I8, OUT, IN), "weight_scale": zeros(F16, OUT, 1)},
    ),
    "nvfp4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "weight": zeros(U8, OUT, IN // 2),
            "weight_scale": zeros(F32, OUT, IN // 16).to(E4M3),
            "weight_scale_2": zeros(F32),
            "input_scale": zeros(F32),
        },
    ),
    "nvfp4 packed": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {
            "weight_packed": zeros(U8, OUT, IN // 2),
            "weight_scale": zeros(F32, OUT, IN // 16).to(E4M3),
            "weight_global_scale": zeros(F32, 1),
        },
    ),
    "hqq": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        {
            "W_q": zeros(U8, OUT * IN // 128, 64),
            "scale": zeros(F16, OUT * IN // 64, 1),
            "zero": zeros(F16, OUT * IN // 64, 1),
        },
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
        {
            "_weight_qdata": zeros(I8, OUT, IN // 2),
            "_weight_scale": zeros(F32, IN // GROUP, OUT),
            "_weight_zero_point": zeros(F32, IN // GROUP, OUT),
        },
    ),
    "quanto": (
        {"quant_method": "quanto", "weights": "int8"},
        {"weight._data": zeros(I8, OUT, IN), "weight._scale": zeros(F16, OUT, 1)},
    ),
    "aqlm": (
        {"quant_method": "aqlm"},
        {
            "codes": zeros(torch.int16, OUT, IN // 8, 1),
            "codebooks": zeros(F16, 1, 65536 // 256, 1, 8),
            "scales": zeros(F16, OUT, 1, 1, 1),
        },
    ),
    "bitnet": (
        {"quant_method": "bitnet"},
        {"weight": zeros(U8, OUT // 4, IN), "weight_scale": zeros(F32, 1)},
    ),
}
"""What a linear layer is stored as, and the config beside it."""

BY_TENSORS = {
    "bitsandbytes 8 bit": "bitsandbytes",
    "compressed-tensors int8": "integers",
    "nvfp4 packed": "nvfp4",
    "bitnet": "integers",
}
"""What the tensors alone are taken for, where that isn't the name of the layout."""


def model(folder: Path, layout: str, *, config: bool) -> Checkpoint:
    given, tensors = LAYOUTS[layout]
    table = {"model_type": "llama", **({"quantization_config": given} if config else {})}
    named = {f"{WHERE}.{name}": tensor for name, tensor in tensors.items()}
    if layout == "torchao":
        named = {name.replace(".weight", "._weight"): tensor for name, tensor in named.items()}
    named["model.embed_tokens.weight"] = torch.zeros(8, IN)
    return open_checkpoint(save_raw(folder, named, config=table))


COMPUTE: Mapping[str, Callable[[Checkpoint], object]] = {
    "lines": lambda m: lines(m, m, alpha=0.5),
    "merge": lambda m: merge([m, m], method="linear"),
    "task_vector": lambda m: task_vector(m, m),
    "diff": lambda m: diff(m, m),
    "grow": grow,
    "expand": lambda m: expand(m, copies=1),
    "compose": lambda m: compose([(m, 0)]),
    "extract_lora": lambda m: extract_lora(m, m, rank=1),
    "dequantize": dequantize,
}


def refusal(call: Callable[[Checkpoint], object], given: Checkpoint) -> str:
    with pytest.raises(UnsupportedError) as caught:
        call(given)
    return caught.value.problems[0]


@pytest.mark.parametrize("verb", COMPUTE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_refused_by_everything_that_computes(layout: str, verb: str, tmp_path: Path):
    given = model(tmp_path / "m", layout, config=True)
    method = LAYOUTS[layout][0]["quant_method"]
    what, remedy = SCHEMES[method]
    text = refusal(COMPUTE[verb], given)
    assert text.startswith(f"{tmp_path / 'm'} (")
    assert f"is quantized: {method} ({what}; its quantization_config says so" in text
    assert text.endswith(f"arithmetic on packed weights is meaningless: {remedy}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_alone_tell(layout: str, tmp_path: Path):
    given = model(tmp_path / "m", layout, config=False)
    found = given.quantization
    assert found is not None
    assert found.kind == BY_TENSORS.get(layout, layout)
    assert not found.scaled
    assert found.sign.split(" is ")[0] in given
    assert f"is quantized: {found.kind} (" in refusal(COMPUTE["lines"], given)


def test_mxfp4_s_blocks(tmp_path: Path):
    """GPT-OSS: experts of one matrix, 32 values to 16 bytes and a scale."""
    inner = "model.layers.0.mlp.experts"
    tensors = {
        f"{inner}.gate_up_proj_blocks": zeros(U8, 2, 2 * OUT, IN // 32, 16),
        f"{inner}.gate_up_proj_scales": zeros(U8, 2, 2 * OUT, IN // 32),
        f"{inner}.gate_up_proj_bias": zeros(torch.bfloat16, 2, 2 * OUT),
    }
    for number, config in enumerate([{}, {"quantization_config": {"quant_method": "mxfp4"}}]):
        given = open_checkpoint(save_raw(tmp_path / str(number), tensors, config=config))
        text = refusal(COMPUTE["lines"], given)
        assert "is quantized: mxfp4 (4-bit floats, two to a byte, with a scale for each 32" in text
        assert "Mxfp4Config(dequantize=True)" in text


def test_float8_among_packed_integers_is_no_fp8(tmp_path: Path):
    """Groups of both kinds in one model: no part of it is computed with."""
    groups = {
        "a": {"weights": {"num_bits": 8, "type": "float"}},
        "b": {"weights": {"num_bits": 4, "type": "int"}},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    }
    tensors = {"a.weight": zeros(F32, 4, 4).to(E4M3), "a.weight_scale": torch.ones(1)}
    mixed = save_raw(tmp_path / "mixed", tensors, config={"quantization_config": config})
    assert "integers or 4-bit floats of compressed-tensors" in refusal(
        dequantize, open_checkpoint(mixed)
    )
    tensors |= {"b.weight_packed": zeros(I32, 4, 1)}
    fp8 = {"quant_method": "fp8"}
    lying = save_raw(tmp_path / "lying", tensors, config={"quantization_config": fp8})
    text = refusal(dequantize, open_checkpoint(lying))
    assert "among them b.weight_packed, which looks like compressed-tensors" in text


def test_a_nested_config_and_an_older_key(tmp_path: Path):
    plain = {"a.weight": torch.ones(2, 2)}
    for number, config in enumerate(
        [
            {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
            {"compression_config": {"quant_method": "compressed-tensors"}},
            {"quantization_config": {"quant_method": "new-thing"}},
        ]
    ):
        given = open_checkpoint(save_raw(tmp_path / str(number), plain, config=config))
        assert given.quantization is not None
        assert not given.quantization.scaled


def test_what_is_not_packed(tmp_path: Path):
    tensors = {
        "model.embed_tokens.weight": torch.ones(4, 4),
        "embeddings.position_ids": zeros(torch.int64, 1, 8),
        "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "bn.num_batches_tracked": zeros(torch.int64),
        "text_blocks": torch.ones(4, 4),
        "logit_scale": torch.ones(1),
    }
    assert open_checkpoint(save_raw(tmp_path / "m", tensors)).quantization is None


def test_apply_refuses_too(tmp_path: Path):
    plain = open_checkpoint(save_raw(tmp_path / "plain", {"a.weight": torch.ones(2, 2)}))
    vector = task_vector(plain, plain)
    text = refusal(lambda m: apply(m, vector), model(tmp_path / "m", "gptq", config=True))
    assert "(base) is quantized: gptq" in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_says_what_it_is(layout: str, tmp_path: Path):
    from surgery.commands.main import app
    from typer.testing import CliRunner

    model(tmp_path / "m", layout, config=True)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "m"), "--json"])
    assert result.exit_code == 0, result.output
    method = LAYOUTS[layout][0]["quant_method"]
    assert json.loads(result.stdout)["quantization"].startswith(f"{method} ({SCHEMES[method][0]}")
