"""Checkpoints made of blocks: the same bytes under new names, a config that follows, and models
that compute what moving modules in torch computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import bytes_of, files_in, save_raw
from hypothesis import given
from safetensors.torch import load_file

from surgery import (
    ArgumentError,
    Checkpoint,
    MismatchError,
    UnsupportedError,
    compose,
    grow,
    open_checkpoint,
    write,
)
from surgery.writing import plan

Make = Callable[..., Path]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_layer": 4},
    "gpt_neox": {"intermediate_size": 24},
    "gemma2": {"intermediate_size": 24, "head_dim": 4, "sliding_window": 4},
    "gemma3_text": {"intermediate_size": 24, "head_dim": 4, "sliding_window": 4},
    "phi3": {"intermediate_size": 24, "pad_token_id": 0},
    "falcon": {},
    "qwen3_moe": {
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 4,
    },
}


def small(make: Make, kind: str, name: str = "model", seed: int = 0, **changes: Any) -> Path:
    four = {"num_hidden_layers": 4, "num_key_value_heads": 2}
    return make(kind, name, seed=seed, **{**four, **FAMILIES.get(kind, {}), **changes})


def load(folder: Path) -> Any:
    """transformers' own loader, with eager experts: grouped_mm has no float64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    how: dict[str, Any] = {"attn_implementation": "eager"}
    if hasattr(AutoConfig.from_pretrained(folder), "num_experts"):
        how["experts_implementation"] = "eager"

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, **how
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (2, 24))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def blocks_of(model: Any) -> torch.nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return lists[0]


# The same bytes


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_own_blocks_are_the_model_itself(kind: str, make_model: Make, tmp_path: Path) -> None:
    folder = small(make_model, kind, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    given = open_checkpoint(folder)
    made = compose([(given, block) for block in range(4)])
    assert plan(made).untouched == tuple(given)
    write(made, tmp_path / "composed")
    write(
        compose([(given, block) for block in range(4)], before=given, after=given), tmp_path / "b"
    )
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "composed" / name).read_bytes() == (folder / name).read_bytes()
    again = open_checkpoint(tmp_path / "composed")
    assert list(again) == list(given)
    assert all(bytes_of(again[n].whole()) == bytes_of(given[n].whole()) for n in given)
    assert files_in(tmp_path / "composed") == files_in(tmp_path / "b")


def test_a_widened_model_composed_of_itself_is_itself(make_model: Make, tmp_path: Path) -> None:
    write(grow(open_checkpoint(small(make_model, "llama")), layers="1,2"), tmp_path / "grown")
    given = open_checkpoint(tmp_path / "grown")
    write(compose([(given, block) for block in range(4)]), tmp_path / "composed")
    before, after = files_in(tmp_path / "grown"), files_in(tmp_path / "composed")
    for name in ("config.json", "modeling_mlp_widths.py", "model.safetensors"):
        assert after[name] == before[name]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6))
def test_every_tensor_is_that_of_its_block(picks: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        models = [raw(Path(folder) / name, seed) for seed, name in enumerate("ab")]
        made = compose([(models[at], block) for at, block in picks])
        stored = [load_file(Path(folder) / name / "model.safetensors") for name in "ab"]
        wanted = {
            f"model.layers.{new}.{inner}": stored[at][f"model.layers.{old}.{inner}"]
            for new, (at, old) in enumerate(picks)
            for inner in ("attn.w", "mlp.w", "steps")
        }
        first, last = picks[0][0], picks[-1][0]
        wanted["model.embed_tokens.weight"] = stored[first]["model.embed_tokens.weight"]
        wanted["model.norm.weight"] = stored[last]["model.norm.weight"]
        wanted["lm_head.weight"] = stored[last]["lm_head.weight"]
        assert set(made) == set(wanted)
        assert all(torch.equal(made[name].whole(), wanted[name]) for name in wanted)
        assert all(tensor.leaf is not None for tensor in made.values())


def raw(folder: Path, seed: int, depth: int = 3, config: Any = None) -> Checkpoint:
    """Tensors without a config, or of a model type that nobody knows."""
    torch.manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(8, 4),
        "model.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(8, 4),
    }
    for block in range(depth):
        tensors[f"model.layers.{block}.attn.w"] = torch.randn(4, 4)
        tensors[f"model.layers.{block}.mlp.w"] = torch.randn(6, 4)
        tensors[f"model.layers.{block}.steps"] = torch.randint(0, 99, (3,))
    return open_checkpoint(save_raw(folder, tensors, config=config))


# The model that comes of it


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_frankenmerge_computes_what_moved_modules_do(
    kind: str, make_model: Make, tmp_path: Path
) -> None:
    folders = [small(make_model, kind, name, seed) for seed, name in enumerate("ab")]
    models = [open_checkpoint(folder) for folder in folders]
    picks = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 2), (1, 3)]
    write(compose([(models[at], block) for at, block in picks]), tmp_path / "franken")
    loaded = load(tmp_path / "franken")
    assert len(blocks_of(loaded)) == 6
    assert loaded.config.num_hidden_layers == 6
    assert torch.equal(logits(loaded), logits(moved([load(folder) for folder in folders], picks)))


def moved(models: Sequence[Any], picks: Sequence[tuple[int, int]]) -> Any:
    """The model that has these blocks, put together of modules."""
    first, last = models[picks[0][0]], models[picks[-1][0]]
    head = last.get_output_embeddings().weight.detach().clone()
    norms = [
        (module, dict(last.named_modules())[name])
        for name, module in first.named_modules()
        if name.rpartition(".")[2] in ("norm", "ln_f", "final_layer_norm")
    ]
    assert len(norms) == 1
    chosen = [blocks_of(models[at])[block] for at, block in picks]
    kinds = getattr(first.config, "layer_types", None)
    if kinds is not None:
        first.config.layer_types = [models[at].config.layer_types[block] for at, block in picks]
    path = next(name for name, module in first.named_modules() if module is blocks_of(first))
    first.set_submodule(path, torch.nn.ModuleList(chosen))
    first.config.num_hidden_layers = len(picks)
    norms[0][0].load_state_dict(norms[0][1].state_dict())
    first.get_output_embeddings().weight = torch.nn.Parameter(head)
    return first


def test_lists_by_layer_follow_their_blocks(make_model: Make) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    a = open_checkpoint(small(make_model, "gemma3_text", "a"))
    b = open_checkpoint(small(make_model, "gemma3_text", "b", seed=1, layer_types=kinds))
    assert a.config["layer_types"] == ["sliding_attention"] * 4
    made = compose([(a, 0), (b, 0), (b, 1), (a, 3), (b, 3)])
    assert made.config["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]
    assert made.config["num_hidden_layers"] == 5


def test_a_pattern_becomes_the_list_that_it_no_longer_gives(
    make_model: Make, tmp_path: Path
) -> None:
    """Files from before lists: `sliding_window_pattern` = 2, every second layer is global."""
    folder = small(make_model, "gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    config["sliding_window_pattern"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    given = open_checkpoint(folder)
    same = compose([(given, block) for block in (0, 1, 0, 1, 2, 3)])
    assert "layer_types" not in same.config
    assert same.config["num_hidden_layers"] == 6
    other = compose([(given, block) for block in (0, 1, 1, 2)])
    assert other.config["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "full_attention",
        "sliding_attention",
    ]
    write(other, tmp_path / "out")
    assert load(tmp_path / "out").config.layer_types == other.config["layer_types"]


def test_numbers_of_layers_follow_their_blocks(make_model: Make) -> None:
    """Layers 0, 1 and 2 of four are dense: all but every second, and 1 besides."""
    how = {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    given = open_checkpoint(small(make_model, "qwen3_moe", **how))
    dense = {b for b in range(4) if f"model.layers.{b}.mlp.down_proj.weight" in given}
    assert dense == {0, 1, 2}
    for picks in ((0, 1, 2, 3, 3), (3, 3, 0), (0, 3, 3, 1), (0, 1)):
        config = compose([(given, block) for block in picks]).config
        step, only = config["decoder_sparse_step"], config["mlp_only_layers"]
        found = [(at + 1) % step != 0 or at in only for at in range(len(picks))]
        assert found == [block in dense for block in picks]


def test_the_first_dense_layers_are_counted_anew(make_model: Make) -> None:
    given = open_checkpoint(
        make_model(
            "dots1",
            num_hidden_layers=4,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=24,
            moe_intermediate_size=8,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=2,
        )
    )
    made = compose([(given, block) for block in (0, 1, 1, 2, 3)])
    assert made.config["first_k_dense_replace"] == 3
    with pytest.raises(UnsupportedError, match="first_k_dense_replace = 2"):
        compose([(given, block) for block in (0, 2, 1, 3)])


def test_what_the_number_of_a_layer_decides_is_refused(make_model: Make) -> None:
    given = open_checkpoint(small(make_model, "gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(UnsupportedError) as refused:
        compose([(given, block) for block in (0, 2, 1)])
    assert "block 2 of" in str(refused.value)
    assert "attn.scaling = 0.1" in str(refused.value)
    assert "scale_attn_by_inverse_layer_idx = True" in str(refused.value)
    assert compose([(given, block) for block in (0, 1, 2)]).config["n_layer"] == 3


def test_a_tensor_that_follows_the_number_of_layers_is_refused(make_model: Make) -> None:
    given = open_checkpoint(
        small(
            make_model,
            "gemma3n_text",
            head_dim=4,
            intermediate_size=24,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=4,
            laurel_rank=2,
            layer_types=["full_attention"] * 4,
        )
    )
    with pytest.raises(UnsupportedError, match="it follows the number of layers"):
        compose([(given, block) for block in (0, 1, 2)])


def test_a_model_type_that_nobody_knows(tmp_path: Path) -> None:
    config = {"model_type": "nobody", "num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}
    given = raw(tmp_path / "a", 0, config=config)
    made = compose([(given, 2), (given, 0)])
    assert made.config == {
        "model_type": "nobody",
        "num_hidden_layers": 2,
        "layer_types": ["z", "x"],
    }
    given = raw(tmp_path / "b", 0, config={**config, "global_attn_every_n_layers": 3})
    with pytest.raises(UnsupportedError, match="global_attn_every_n_layers is 3"):
        compose([(given, 2), (given, 0)])


# Heads and embeddings


def test_tied_heads_of_two_models_become_a_head_of_its_own(
    make_model: Make, tmp_path: Path
) -> None:
    a, b = (
        open_checkpoint(small(make_model, "llama", name, seed, tie_word_embeddings=True))
        for seed, name in enumerate("ab")
    )
    one = compose([(a, 0), (a, 1)])
    assert "lm_head.weight" not in one
    assert one.config["tie_word_embeddings"] is True
    two = compose([(a, 0), (b, 1)])
    assert two.config["tie_word_embeddings"] is False
    write(two, tmp_path / "two")
    loaded = load(tmp_path / "two")
    for weight, model in (
        (loaded.get_input_embeddings().weight, a),
        (loaded.get_output_embeddings().weight, b),
    ):
        assert torch.equal(weight, model["model.embed_tokens.weight"].whole().double())


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tied_and_an_untied_model(tied_first: bool, make_model: Make, tmp_path: Path) -> None:
    a = open_checkpoint(small(make_model, "llama", "a", 0, tie_word_embeddings=tied_first))
    b = open_checkpoint(small(make_model, "llama", "b", 1, tie_word_embeddings=not tied_first))
    made = compose([(a, 0), (b, 1)])
    assert made.config["tie_word_embeddings"] is False
    head = b["model.embed_tokens.weight" if tied_first is False else "lm_head.weight"]
    assert torch.equal(made["lm_head.weight"].whole(), head.whole())
    same = compose([(a, 0), (b, 1)], after=a)
    assert same.config["tie_word_embeddings"] is tied_first
    assert ("lm_head.weight" in same) is not tied_first


# Widths


def test_blocks_of_different_widths(make_model: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    narrow = open_checkpoint(small(make_model, "llama", "a"))
    wide = open_checkpoint(small(make_model, "llama", "b", 1, intermediate_size=40))
    assert compose([(wide, 0), (wide, 3)], before=narrow).config["intermediate_size"] == 40
    made = compose([(narrow, 0), (wide, 1), (narrow, 2)])
    assert made.config["mlp_widths"] == [24, 40, 24]
    assert "modeling_mlp_widths.py" in made.companions
    write(made, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [block.mlp.up_proj.out_features for block in model.model.layers] == [24, 40, 24]
    again = open_checkpoint(tmp_path / "out")
    back = compose([(again, 0), (again, 2)])
    assert "mlp_widths" not in back.config
    assert "auto_map" not in back.config
    assert "modeling_mlp_widths.py" not in back.companions
    assert back.config["intermediate_size"] == 24
    assert compose([(again, 2), (again, 1)]).config["mlp_widths"] == [24, 40]


# What is refused


def test_blocks_that_are_not_there(make_model: Make) -> None:
    given = open_checkpoint(small(make_model, "llama"))
    with pytest.raises(ArgumentError, match="blocks is empty"):
        compose([])
    with pytest.raises(ArgumentError) as refused:
        compose([(given, 4), (given, 1), (given, -1)])
    assert len(refused.value.problems) == 2
    assert "has no block 4: its 4 blocks are 0 to 3" in refused.value.problems[0]


def test_models_that_do_not_fit(make_model: Make) -> None:
    a = open_checkpoint(small(make_model, "llama", "a"))
    others = {
        "heads": (
            {"num_key_value_heads": 4},
            "model.layers.1.self_attn.k_proj.weight is float [16, 16] in",
        ),
        "bias": ({"attention_bias": True}, "only one of them has self_attn.k_proj.bias"),
        "rope": ({"rope_theta": 5e5}, "a model has one"),
        "eps": ({"rms_norm_eps": 1e-3}, "norm_eps is 1e-06"),
        "act": ({"hidden_act": "relu"}, "mlp.act_fn.class = ReLU"),
        "vocabulary": ({"vocab_size": 72}, "the vocabularies differ"),
    }
    for name, (changes, message) in others.items():
        b = open_checkpoint(small(make_model, "llama", name, 1, **changes))
        with pytest.raises((MismatchError, UnsupportedError)) as refused:
            compose([(a, 0), (b, 1)])
        assert message in str(refused.value), name


def test_models_of_another_kind(make_model: Make, tmp_path: Path) -> None:
    a = open_checkpoint(small(make_model, "llama", "a"))
    with pytest.raises(MismatchError, match="model_type is gpt2 and llama"):
        compose([(a, 0), (open_checkpoint(small(make_model, "gpt2", "b")), 1)])
    quantized = raw(tmp_path / "q", 0, config={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(UnsupportedError, match="quantized"):
        compose([(quantized, 0)])
    extra = raw(tmp_path / "x", 0, config={"model_type": "nobody", "num_hidden_layers": 2})
    with pytest.raises(UnsupportedError, match="has 3 blocks in the files, and the config gives 2"):
        compose([(extra, 0)])


def test_two_stacks_are_refused_and_a_tower_travels(tmp_path: Path) -> None:
    def model(name: str, other: str) -> Checkpoint:
        torch.manual_seed(len(name))
        tensors = {"model.embed_tokens.weight": torch.randn(8, 4), f"{other}.norm.w": torch.ones(4)}
        for stack in ("model.layers", f"{other}.layers"):
            for block in range(3):
                for inner in ("attn.w", "mlp.up.w", "mlp.down.w"):
                    tensors[f"{stack}.{block}.{inner}"] = torch.randn(4, 4)
        return open_checkpoint(save_raw(tmp_path / name, tensors))

    with pytest.raises(UnsupportedError, match=r"several stacks of blocks \(.*decoder.layers"):
        compose([(model("two", "decoder"), 0)])
    a, b = model("a", "vision_tower"), model("bb", "vision_tower")
    made = compose([(a, 0), (b, 1)])
    for name in made:
        if name.startswith("vision_tower"):
            assert made[name] is a[name]
    assert sum(name.startswith("vision_tower") for name in made) == 10


def test_a_tensor_on_neither_side_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{block}.{inner}": torch.ones(2, 2) for block in range(2) for inner in "abc"
    }
    a, b = (
        open_checkpoint(
            save_raw(tmp_path / name, {**tensors, "model.project.weight": torch.ones(2)})
        )
        for name in "ab"
    )
    with pytest.raises(UnsupportedError, match="whether before or behind them can't be told"):
        compose([(a, 0), (b, 1)])
    assert compose([(a, 0), (b, 1)], after=a)["model.project.weight"] is a["model.project.weight"]


def test_the_record_says_what_came_from_where(make_model: Make, tmp_path: Path) -> None:
    a, b = (open_checkpoint(small(make_model, "llama", name)) for name in "ab")
    write(compose([(a, 3), (b, 0), (a, 3)]), tmp_path / "out")
    edit = json.loads((tmp_path / "out/surgery.json").read_text())["edits"][-1]
    assert edit["operation"] == "compose"
    assert edit["details"]["blocks"] == [["model_1", 3], ["model_2", 0], ["model_1", 3]]
    assert edit["details"]["before"] == edit["details"]["after"] == "model_1"
    assert [Path(source["reference"]).name for source in edit["inputs"].values()] == ["a", "b"]


def test_the_inputs_of_an_edited_source_are_known(make_model: Make, tmp_path: Path) -> None:
    """So that they can't be written over."""
    from surgery import OutputError, lines

    a, b, c = (open_checkpoint(small(make_model, "llama", n, s)) for s, n in enumerate("abc"))
    made = compose([(a, 0), (lines(b, c, alpha=0.5), 1)])
    assert [edit.operation for edit in made.history] == ["lines", "compose"]
    with pytest.raises(OutputError):
        write(made, tmp_path / "b", overwrite=True)


def test_what_was_not_checked_is_said(tmp_path: Path) -> None:
    given = raw(tmp_path / "a", 0, config={"model_type": "nobody", "num_hidden_layers": 3})
    assert "wasn't checked" in compose([(given, 0)]).notes[0]
    plain = raw(tmp_path / "b", 0)
    assert compose([(plain, 0)]).notes == ()


def test_a_list_that_only_one_model_has_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "nobody", "num_hidden_layers": 3}
    a = raw(tmp_path / "a", 0, config={**config, "layer_types": ["x", "y", "z"]})
    b = raw(tmp_path / "b", 0, config=config)
    with pytest.raises(UnsupportedError, match="has layer_types, with something for every layer"):
        compose([(a, 0), (b, 1)])


def test_a_model_of_one_block_is_stacked(make_model: Make, tmp_path: Path) -> None:
    """Lists as long as the model is deep are many here: `normalized_shape` of a norm."""
    one = open_checkpoint(small(make_model, "gpt2", n_layer=1, num_hidden_layers=1))
    write(compose([(one, 0)] * 3), tmp_path / "out")
    assert len(blocks_of(load(tmp_path / "out"))) == 3
