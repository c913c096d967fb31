"""Growing FP8 checkpoints as they are: whole blocks are copied, their scales split exactly; as a
function it is the growth of what the weights stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import bytes_of, save_raw
from mixtures import save_mixture
from safetensors.torch import load_file
from test_fp8 import FP8, as_fp8, by_formula, quantized, values_of

from surgery import (
    ArgumentError,
    UnsupportedError,
    certify,
    dequantize,
    find_growths,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.modeling.layers import stored_shapes
from surgery.recipe import correct_anatomy

Make = Callable[..., Path]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 2}
EXPERTS = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "n_routed_experts": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture
def dense(make_model: Make, tmp_path: Path) -> Path:
    source = make_model("qwen3", dtype=torch.bfloat16, head_dim=64, **SIZES)
    return as_fp8(source, tmp_path / "dense")


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    """A dense layer and one of experts, routed and shared, in the layout of DeepSeek-V3."""
    source = save_mixture("deepseek_v3", tmp_path / "full", "bfloat16", **EXPERTS)
    return as_fp8(source, tmp_path / "deepseek")


def grown_by_formula(
    weight: torch.Tensor, sources: list[int], *, down: bool, parts: int = 1
) -> torch.Tensor:
    """What a dense matrix becomes, in float64: copies of rows, or columns over how many there
    are (1, 2, or 1/2, 1/4, 1/4 of three)."""
    wide = weight.double()
    if not down:
        return torch.cat([part[sources] for part in wide.chunk(parts)])
    shares = {1: [1.0], 2: [0.5, 0.5], 3: [0.5, 0.25, 0.25]}
    seen: dict[int, int] = {}
    columns = []
    for source in sources:
        number = seen.get(source, 0)
        seen[source] = number + 1
        columns.append(wide[:, source] * shares[sources.count(source)][number])
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    ("factor", "copied"), [(2, [(0, 256)]), (1.5, [(0, 128)]), (2.5, [(0, 256), (0, 128)])]
)
def test_values_are_those_of_the_grown_full_model(
    dense: Path, factor: float, copied: list[tuple[int, int]], tmp_path: Path
):
    grown = grow(open_checkpoint(dense), factor=factor)
    write(grown, tmp_path / "out")
    before, after = values_of(dense), values_of(tmp_path / "out")
    assert before.keys() == after.keys()
    sources = [n for start, stop in ((0, 256), *copied) for n in range(start, stop)]
    for name, value in before.items():
        if ".mlp." in name:
            wanted = grown_by_formula(value, sources, down="down_proj" in name)
            assert torch.equal(after[name].double(), wanted), name
        else:
            assert bytes_of(after[name]) == bytes_of(value), name


def test_no_weight_is_made_anew(dense: Path, tmp_path: Path):
    """The 8-bit floats are copies, and only the outgoing scales change: to their halves."""
    write(grow(open_checkpoint(dense), factor=1.5), tmp_path / "out")
    old, new = load_file(dense / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    mlp = "model.layers.1.mlp."
    scale = f"{mlp}down_proj.weight_scale_inv"
    assert new[scale].tolist() == [[a / 2, b, a / 2] for a, b in old[scale].tolist()]
    scale = f"{mlp}up_proj.weight_scale_inv"
    assert new[scale].tolist() == [*old[scale].tolist(), old[scale].tolist()[0]]
    weight = f"{mlp}down_proj.weight"
    wanted = torch.cat([old[weight].view(torch.uint8), old[weight].view(torch.uint8)[:, :128]], 1)
    assert torch.equal(new[weight].view(torch.uint8), wanted)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == FP8
    assert config["intermediate_size"] == 384


def test_both_proofs_hold_and_the_files_are_known_again(dense: Path, tmp_path: Path):
    base = open_checkpoint(dense)
    found = verify(base, grow(base, factor=1.5), dtype="float64")
    assert found.passed
    assert found.logits is not None
    write(grow(base, factor=1.5), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert [growth.copied for growth in find_growths(base, again)] == [((0, 128),)] * 2
    (tmp_path / "out/surgery.json").unlink()  # from the weights alone
    assert [growth.copied for growth in find_growths(base, again)] == [((0, 128),)] * 2
    assert verify(base, again, logits=False).passed
    assert verify(dequantize(base), dequantize(grow(base, factor=1.5))).passed


@pytest.mark.parametrize("what", ["scale", "weight", "other scale"])
def test_the_certificate_reads_scales(what: str, dense: Path, tmp_path: Path):
    """A scale that wasn't halved, a byte that isn't a copy, a scale of something else."""
    base = open_checkpoint(dense)
    grown = grow(base)
    write(grown, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    if what == "scale":
        stored["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 3] *= 2
    elif what == "weight":
        stored["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[300, 7] ^= 1
    else:
        stored["model.layers.1.self_attn.o_proj.weight_scale_inv"][0, 0] *= 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    spoilt = open_checkpoint(save_raw(tmp_path / "spoilt", stored, config=config))
    certificate = certify(base, spoilt, find_growths(base, grown))
    assert len(certificate.failures) == 1
    name = {"scale": "0.mlp.down", "weight": "0.mlp.up", "other scale": "1.self_attn.o"}[what]
    weight = f"model.layers.{name}_proj.weight" + ("_scale_inv" if what == "other scale" else "")
    assert f"{weight}: " in certificate.failures[0]


def test_deepseek(deepseek: Path, tmp_path: Path):
    base = open_checkpoint(deepseek)
    grown = grow(base)
    assert verify(base, grown, dtype="float64").passed
    assert [grown.config[key] for key in ("intermediate_size", "moe_intermediate_size")] == [
        768,
        256,
    ]
    write(grown, tmp_path / "out")
    before, after = values_of(deepseek), values_of(tmp_path / "out")
    experts = "model.layers.1.mlp.experts.1."
    sources = [*range(128)] * 2
    wanted = grown_by_formula(before[f"{experts}down_proj.weight"], sources, down=True)
    assert torch.equal(after[f"{experts}down_proj.weight"].double(), wanted)
    # every name and shape is one of the stock model's, and the scales fit
    shapes = {name: tuple(value.shape) for name, value in after.items()}
    stock = stored_shapes(grown.config)
    assert shapes.items() <= stock.items() | {("lm_head.weight", ())}
    # dense layers by half of their blocks, experts as they are
    some = grow(base, factor=4 / 3, layers="0", uniform=False)
    assert some.anatomy.mlps["model.layers", 0].width == 512


def test_transformers_loads_it(deepseek: Path, tmp_path: Path):
    """Its own dequantization, of what was grown and of what it was grown from."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    config = json.loads((deepseek / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (deepseek / "config.json").write_text(json.dumps(config))
    write(grow(open_checkpoint(deepseek)), tmp_path / "out")
    outputs = []
    for folder in (deepseek, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation="eager"
        )
        with torch.no_grad():
            outputs.append(model.double().eval()(torch.arange(3, 40)[None]).logits)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-9 * outputs[0].abs().max()


def test_stacked_experts(tmp_path: Path):
    """All experts in one tensor, gate and up in one matrix, with their scales alike."""
    parts = {"gate_up_proj": (512, 128), "down_proj": (128, 256)}
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.randn(64, 128)}
    for block in range(2):
        stem = f"model.layers.{block}."
        tensors[f"{stem}input_layernorm.weight"] = torch.ones(128)
        tensors[f"{stem}mlp.gate.weight"] = torch.randn(3, 128)
        for part, shape in parts.items():
            made = [quantized(torch.randn(shape)) for _ in range(3)]
            tensors[f"{stem}mlp.experts.{part}"] = torch.stack([values for values, _ in made])
            tensors[f"{stem}mlp.experts.{part}_scale_inv"] = torch.stack([s for _, s in made])
    base = open_checkpoint(save_raw(tmp_path / "m", tensors))
    grown = grow(base, factor=1.5, choose="norm")
    growths = find_growths(base, grown)
    assert certify(base, grown, growths).holds
    (start, stop), *_ = growths[0].copied
    assert (start % 128, stop - start) == (0, 128)
    write(grown, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    sources = [*range(256), *range(start, stop)]
    for part, number in (("gate_up_proj", 2), ("down_proj", 1)):
        name = f"model.layers.0.mlp.experts.{part}"
        for expert in range(3):
            old = by_formula(tensors[name][expert], tensors[f"{name}_scale_inv"][expert])
            wanted = grown_by_formula(old, sources, down=number == 1, parts=number)
            found = by_formula(stored[name][expert], stored[f"{name}_scale_inv"][expert])
            assert torch.equal(found.double(), wanted)


def rows_or_whole(model: Path, target: Path, shape: Callable[[int], tuple[int, ...]]) -> Path:
    """A copy with a scale for each row, or for each matrix."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            tensors[name] = (10 * tensor).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.rand(shape(len(tensor))) / 10 + 0.01
        else:
            tensors[name] = tensor
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    return save_raw(target, tensors, config=config)


WAYS: Mapping[str, Callable[[int], tuple[int, ...]]] = {
    "(rows, 1)": lambda rows: (rows, 1),
    "(rows,)": lambda rows: (rows,),
    "()": lambda _: (),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_for_each_row_or_matrix_is_halved_as_a_whole(
    way: str, make_model: Make, tmp_path: Path
):
    base = open_checkpoint(rows_or_whole(make_model(), tmp_path / "m", WAYS[way]))
    grown = grow(base, factor=4)
    assert certify(base, grown, find_growths(base, grown)).holds
    write(grown, tmp_path / "out")
    old = load_file(tmp_path / "m/model.safetensors")
    new = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    assert torch.equal(new[name], old[name] / 4)
    name = "model.layers.0.mlp.gate_proj.weight_scale"
    wanted = old[name] if way == "()" else torch.cat([old[name]] * 4)
    assert torch.equal(new[name], wanted)
    for factor in (1.5, 3):
        with pytest.raises(UnsupportedError, match=r"share a scale.*2, 4, 8.*dequantize"):
            grow(base, factor=factor)


def test_what_blocks_do_not_allow(dense: Path, make_model: Make, tmp_path: Path):
    base = open_checkpoint(dense)
    with pytest.raises(ArgumentError, match=r"width of 308, .* scale for each 128 neurons: give"):
        grow(base, factor=1.2)
    assert grow(base, factor=1.2, multiple_of=128).anatomy.mlps["model.layers", 0].width == 384
    with pytest.raises(UnsupportedError, match="copied as they are: symmetry_break needs"):
        grow(base, symmetry_break=0.1)
    odd = make_model(name="odd", hidden_size=128, intermediate_size=192, num_key_value_heads=4)
    with pytest.raises(UnsupportedError) as caught:
        grow(open_checkpoint(as_fp8(odd, tmp_path / "fp8")))
    assert len(caught.value.problems) == 2
    assert "layers.0 can't be grown: its width of 192 isn't a multiple of 128" in str(caught.value)
    assert "`surgery dequantize` it first" in str(caught.value)


def test_padding_is_zero(dense: Path, tmp_path: Path):
    base = open_checkpoint(dense)
    grown = grow(base, factor=1.5, layers="0", uniform=True)
    assert verify(base, grown, dtype="float64").passed
    write(grown, tmp_path / "out")
    values = values_of(tmp_path / "out")
    assert not values["model.layers.1.mlp.down_proj.weight"][:, 256:].any()
    assert not values["model.layers.1.mlp.up_proj.weight"][256:].any()


def test_the_verb(dense: Path, tmp_path: Path):
    from surgery.commands.main import app
    from typer.testing import CliRunner

    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["grow", str(dense), "-o", str(out), "--factor", "1.5"])
    assert result.exit_code == 0, result.output
    record = json.loads((out / "surgery.json").read_text())
    assert record["verification"]["passed"]
    report = json.loads(CliRunner().invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert [block["no_growth"] for block in report["blocks"]] == [None, None]


def test_shared_names(dense: Path):
    """Scales stand where their weights do, and nothing else changes in the anatomy."""
    plain = dequantize(open_checkpoint(dense)).anatomy
    found = open_checkpoint(dense).anatomy
    assert found.mlps == plain.mlps
    assert {n: p for n, p in found.places.items() if n in plain.places} == plain.places
    place = found.places["model.layers.1.mlp.up_proj.weight_scale_inv"]
    assert (place.stack, place.block) == ("model.layers", 1)
    assert place.inner == "mlp.up_proj.weight_scale_inv"


def test_the_anatomy_is_printed_without_scales(dense: Path, tmp_path: Path):
    from surgery.commands.main import app
    from typer.testing import CliRunner

    printed = CliRunner().invoke(app, ["inspect", str(dense), "--as-anatomy"]).stdout
    assert "scale" not in printed
    (tmp_path / "anatomy.yaml").write_text(printed)
    given = open_checkpoint(dense)
    assert correct_anatomy(given, tmp_path / "anatomy.yaml").anatomy == given.anatomy


def test_a_mixture_is_printed_and_grows_again(tmp_path: Path):
    from surgery.recipe import anatomy_yaml

    three = EXPERTS | {"num_hidden_layers": 3}
    source = save_mixture("deepseek_v3", tmp_path / "full", "bfloat16", **three)
    base = open_checkpoint(as_fp8(source, tmp_path / "deepseek"))
    assert base.scales is not None
    path = tmp_path / "anatomy.yaml"
    path.write_text(anatomy_yaml(base.anatomy, leave_out=base.scales.weight_of))
    read = correct_anatomy(base, path)
    assert read.anatomy == base.anatomy
    write(grow(read, layers="1", factor=2), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    assert "mlp_width_keys" in once.config
    twice = grow(once, layers="2")
    assert certify(once, twice, find_growths(once, twice)).holds
    assert twice.config == grow(base, layers="1,2").config
