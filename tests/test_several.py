"""Blocks with several MLPs, stages of blocks, and MLPs outside the blocks: which matrices belong
together, and that all that one key widens grows together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import apart, config_of, made, quiet, save, variant

from surgery import (
    Checkpoint,
    UnsupportedError,
    certify,
    find_growths,
    grow,
    open_checkpoint,
    write,
)
from surgery.modeling.stock import model_class

Shapes = dict[str, tuple[int, ...]]


def opened(folder: Path, shapes: Shapes, config: dict[str, Any] | None = None) -> Checkpoint:
    torch.manual_seed(0)
    return open_checkpoint(made(folder, {n: torch.randn(s) for n, s in shapes.items()}, config))


def pair(up: str, down: str, hidden: int, width: int) -> Shapes:
    """A plain MLP with biases."""
    return {
        f"{up}.weight": (width, hidden), f"{up}.bias": (width,),
        f"{down}.weight": (hidden, width), f"{down}.bias": (hidden,),
    }  # fmt: skip


def found(checkpoint: Checkpoint) -> set[tuple[str, str, int, int]]:
    return {
        (mlp.ups[0].weight, mlp.down.weight, mlp.hidden, mlp.width)
        for mlp in checkpoint.anatomy.every_mlp
    }


def test_a_stage_of_blocks_has_its_own_sizes(tmp_path: Path) -> None:
    """The second stage's MLPs are as wide as the model is at its end, and as the norm of what
    leads to the next stage: the norms in its blocks tell what goes through them."""
    shapes: Shapes = {}
    wanted = set()
    for stage, (size, blocks) in enumerate(((8, 2), (16, 1), (32, 2))):
        for block in range(blocks):
            at = f"encoder.layers.{stage}.blocks.{block}"
            shapes |= {f"{at}.layernorm_{side}.weight": (size,) for side in ("before", "after")}
            shapes |= {f"{at}.attention.self.query.weight": (size, size)}
            shapes |= {f"{at}.modulation.last.weight": (size, size)}
            up, down = f"{at}.intermediate.dense", f"{at}.output.dense"
            shapes |= pair(up, down, size, 2 * size)
            wanted.add((f"{up}.weight", f"{down}.weight", size, 2 * size))
        if stage < 2:
            shapes[f"encoder.layers.{stage}.downsample.norm.weight"] = (4 * size,)
            shapes[f"encoder.layers.{stage}.downsample.reduction.weight"] = (2 * size, 4 * size)
    checkpoint = opened(tmp_path / "model", shapes, {"hidden_size": 32})
    assert checkpoint.anatomy.stacks == {"encoder.layers": 3}
    assert found(checkpoint) == wanted
    assert checkpoint.anatomy.no_growth == {}


def test_an_mlp_before_attention_and_one_behind_it(tmp_path: Path) -> None:
    shapes: Shapes = {}
    wanted = set()
    for block in range(2):
        at = f"layers.{block}"
        shapes |= {f"{at}.norm_{part}.weight": (16,) for part in ("ff1", "attn", "ff2")}
        shapes[f"{at}.conv.depthwise_conv.weight"] = (16, 1, 3)
        for module in ("feed_forward1", "feed_forward2"):
            up, down = f"{at}.{module}.linear1", f"{at}.{module}.linear2"
            shapes |= pair(up, down, 16, 40)
            wanted.add((f"{up}.weight", f"{down}.weight", 16, 40))
    checkpoint = opened(tmp_path / "model", shapes)
    assert found(checkpoint) == wanted
    grown = grow(checkpoint, factor=1.5)
    assert {mlp.width for mlp in grown.anatomy.every_mlp} == {60}
    growths = find_growths(checkpoint, grown)
    assert len(growths) == 4
    assert certify(checkpoint, grown, growths).holds


def test_words_tell_which_matrices_of_different_modules_belong_together(tmp_path: Path) -> None:
    shapes: Shapes = {}
    wanted = set()
    for block in range(2):
        at = f"x_layers.{block}"
        for kind in ("lang", "visn"):
            up, down = f"{at}.{kind}_inter.dense", f"{at}.{kind}_output.dense"
            shapes |= pair(up, down, 16, 40) | {f"{at}.{kind}_output.LayerNorm.weight": (16,)}
            wanted.add((f"{up}.weight", f"{down}.weight", 16, 40))
    assert found(opened(tmp_path / "model", shapes)) == wanted


def test_two_square_matrices_are_told_by_their_numbers(tmp_path: Path) -> None:
    shapes: Shapes = {}
    for block in range(2):
        shapes |= pair(f"layers.{block}.mlp.dense1", f"layers.{block}.mlp.dense2", 16, 16)
        shapes[f"layers.{block}.norm.weight"] = (16,)
    assert found(opened(tmp_path / "model", shapes)) == {
        (f"layers.{n}.mlp.dense1.weight", f"layers.{n}.mlp.dense2.weight", 16, 16) for n in (0, 1)
    }


def test_one_mlp_isn_t_grown_where_another_isn_t_understood(tmp_path: Path) -> None:
    shapes: Shapes = {}
    for block in range(2):
        shapes |= pair(f"layers.{block}.ff.fc1", f"layers.{block}.ff.fc2", 16, 40)
        for name, shape in (("a", (24, 16)), ("b", (24, 16)), ("c", (16, 24)), ("d", (16, 24))):
            shapes[f"layers.{block}.{name}.weight"] = shape
        shapes[f"layers.{block}.norm.weight"] = (16,)
    with pytest.raises(UnsupportedError, match="can't tell which of"):
        grow(opened(tmp_path / "model", shapes))


def test_what_is_added_to_gate_and_up_together_is_a_reason(tmp_path: Path) -> None:
    """Unless what goes into it is beside it, as in the adapters of Zamba 2; a norm before them has
    the hidden size, and isn't one."""
    fused: Shapes = {}
    for block in range(2):
        at = f"layers.{block}.ff"
        fused |= {f"{at}.gate_up_proj.weight": (80, 16), f"{at}.down_proj.weight": (16, 40)}
        fused |= {f"{at}.norm.weight": (16,), f"layers.{block}.norm.weight": (16,)}
    config = {"model_type": "invented", "hidden_size": 16}
    assert opened(tmp_path / "plain", fused, config).anatomy.no_growth == {}
    added = {f"layers.{block}.ff.adapters.1.weight": (80, 4) for block in range(2)}
    anatomy = opened(tmp_path / "model", fused | added, config).anatomy
    assert anatomy.no_growth == {
        ("layers", block): f"{name} follows the MLP's width of 40"
        for block, name in enumerate(added)
    }


def test_a_matrix_in_the_middle_of_an_mlp_is_a_reason(tmp_path: Path) -> None:
    shapes: Shapes = {}
    for block in range(2):
        at = f"layers.{block}.mlp"
        shapes |= pair(f"{at}.fc1", f"{at}.fc3", 16, 40) | {f"{at}.fc2.weight": (40, 40)}
        shapes[f"layers.{block}.norm.weight"] = (16,)
    with pytest.raises(UnsupportedError) as caught:
        grow(opened(tmp_path / "model", shapes))
    said = "layers.0 can't be grown: layers.0.mlp.fc2.weight follows the MLP's width of 40"
    assert caught.value.problems[0] == said


def test_what_can_be_grown_is_named_where_something_can_t(tmp_path: Path) -> None:
    shapes: Shapes = {}
    for block in range(2):
        shapes |= pair(f"vision.layers.{block}.fc1", f"vision.layers.{block}.fc2", 16, 40)
        shapes |= pair(f"mask.layers.{block}.fc1", f"mask.layers.{block}.fc2", 16, 24)
        shapes |= {f"{part}.layers.{block}.norm.weight": (16,) for part in ("vision", "mask")}
        shapes[f"mask.layers.{block}.ffn_norm.weight"] = (24,)
    base = opened(tmp_path / "model", shapes)
    with pytest.raises(UnsupportedError) as caught:
        grow(base)
    *reasons, advice = caught.value.problems
    assert len(reasons) == 2
    assert all("ffn_norm.weight follows the MLP's width of 24" in reason for reason in reasons)
    assert advice == "--scope leaves them out: vision.layers can be grown"
    assert grow(base, scope="vision")["vision.layers.0.fc1.weight"].shape == (80, 16)


def test_mlps_outside_the_blocks_are_beside_them(tmp_path: Path) -> None:
    """A projector from one size to another, a pooling head; attention there is none of them."""
    shapes: Shapes = {"lm_head.weight": (50, 16), "embed.weight": (50, 16)}
    for block in range(2):
        shapes |= pair(f"layers.{block}.fc1", f"layers.{block}.fc2", 16, 40)
        shapes[f"layers.{block}.norm.weight"] = (16,)
    shapes |= {"projector.up.weight": (40, 24), "projector.last.weight": (16, 40)}
    shapes |= pair("head.mlp.fc1", "head.mlp.fc2", 16, 40) | {"head.layernorm.weight": (16,)}
    shapes |= {
        "head.attention.in_proj_weight": (48, 16),
        "head.attention.out_proj.weight": (16, 16),
    }
    checkpoint = opened(tmp_path / "model", shapes)
    beside = {(mlp.stack, mlp.block, mlp.hidden, mlp.width) for mlp in checkpoint.anatomy.beside}
    assert beside == {("projector", None, 24, 40), ("head.mlp", None, 16, 40)}
    grown = grow(checkpoint)  # no config says that they share a key
    assert grown["head.mlp.fc1.weight"].shape == (40, 16)


def test_a_block_that_is_run_again_and_again_is_a_stack(tmp_path: Path) -> None:
    at = "encoder.layer_groups.0.inner_layers.0"
    shapes = pair(f"{at}.ffn", f"{at}.ffn_output", 16, 40)
    shapes |= {f"{at}.full_layer_layer_norm.weight": (16,), "pooler.weight": (16, 16)}
    checkpoint = opened(tmp_path / "model", shapes, {"hidden_size": 16})
    assert checkpoint.anatomy.stacks == {"encoder.layer_groups": 1}
    assert found(checkpoint) == {(f"{at}.ffn.weight", f"{at}.ffn_output.weight", 16, 40)}


def vision(folder: Path) -> torch.Tensor:
    """What a vision model makes of noise."""
    config = config_of(folder)
    with quiet():
        cls = getattr(transformers, config["architectures"][0])
        model = cls.from_pretrained(folder, dtype=torch.float64).eval()
    size, channels = config.get("image_size", 32), config.get("num_channels", 3)
    pixels = torch.randn(
        (2, channels, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state


SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2],
    "window_size": 4, "mlp_ratio": 2.25,
}  # fmt: skip
CVT = {
    "embed_dim": [8, 16], "depth": [1, 2], "num_heads": [2, 2], "mlp_ratio": [2.5, 2.25],
    "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1],
    "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0],
    "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn"] * 2,
    "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1],
    "stride_q": [1, 1], "num_stages": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "ratio"),
    [("Swin", SWIN, 4.5), ("Cvt", CVT, [5.0, 4.5])],
)
def test_a_ratio_grows_all_stages(
    name: str, options: dict[str, Any], ratio: object, tmp_path: Path
) -> None:
    folder = save(tmp_path / "base", f"{name}Model", f"{name}Config", options)
    base = open_checkpoint(folder)
    grown = grow(base, choose="random")
    assert grown.config == {**base.config, "mlp_ratio": ratio}
    growths = find_growths(base, grown)
    assert len(growths) == 3
    assert certify(base, grown, growths).holds
    write(grown, tmp_path / "grown")
    assert apart(vision(tmp_path / "grown"), vision(folder)) < 1e-6
    wrong = {name: tensor.whole() for name, tensor in grown.items()}
    for growth in growths:
        down = growth.mlp.down.weight
        wrong[down] = base[down].whole()[:, torch.from_numpy(growth.sources())]
    made_wrong = variant(tmp_path / "wrong", tmp_path / "grown", wrong)
    assert apart(vision(made_wrong), vision(folder)) > 1e-3


def test_a_class_that_isn_t_exported_is_found_beside_its_config() -> None:
    config = {"model_type": "got_ocr2_vision", "architectures": ["GotOcr2VisionEncoder"]}
    assert not hasattr(transformers, "GotOcr2VisionEncoder")
    assert model_class(config).__name__ == "GotOcr2VisionEncoder"
