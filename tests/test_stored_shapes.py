"""The tensors that a model would be saved as: from a few blocks of those that are alike, or from
all of them where a few don't tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import quiet
from torch import nn
from transformers import core_model_loading
from transformers.core_model_loading import revert_weight_conversion

from surgery.modeling import stored
from surgery.modeling.stock import empty_model
from surgery.modeling.stored import stored_tensors

LAYERS = 40
MIXTURE = {
    "first_k_dense_replace": 3,
    "intermediate_size": 24,
    "kv_lora_rank": 8,
    "moe_intermediate_size": 12,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "topk_group": 1,
    "v_head_dim": 4,
}
LLAMA = {"intermediate_size": 24}


def config(model_type: str, **values: Any) -> dict[str, Any]:
    common = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    layers = {"num_hidden_layers": LAYERS, "vocab_size": 32, "model_type": model_type}
    return common | layers | values


def one_by_one(model: Any) -> dict[str, tuple[int, ...]]:
    """What transformers makes of all tensors."""
    with torch.device("meta"), quiet():
        tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("model_type", "values"), [("deepseek_v3", MIXTURE), ("llama", LLAMA)])
def test_a_few_blocks_tell_what_all_are_saved_as(
    model_type: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = empty_model(config(model_type, **values))
    expected = one_by_one(model)
    most = []
    plain = stored._saved
    monkeypatch.setattr(stored, "_saved", lambda m, s: most.append(len(s)) or plain(m, s))
    assert stored_tensors(model) == expected
    assert max(most) < len(model.state_dict()) / 4
    experts = [name for name in expected if ".mlp.experts." in name]
    assert len(experts) == (3 * 6 * (LAYERS - 3) if model_type == "deepseek_v3" else 0)


def test_blocks_of_other_sizes_keep_theirs() -> None:
    model = empty_model(config("deepseek_v3", **MIXTURE))
    wider = model.model.layers[20].mlp.experts
    wider.down_proj = nn.Parameter(torch.empty(6, 16, 13, device="meta"))
    found = stored_tensors(model)
    assert found == one_by_one(model)
    assert found["model.layers.20.mlp.experts.5.down_proj.weight"] == (16, 13)
    assert found["model.layers.21.mlp.experts.5.down_proj.weight"] == (16, 12)


@pytest.mark.parametrize("how", ["another number", "no number", "the last", "all in one", "order"])
def test_where_a_few_don_t_tell_all_are_converted(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversions that transformers hasn't got, each of which goes by more than the block."""

    def convert(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name, tensor in state.items():
            for number in range(LAYERS):
                if name == f"model.layers.{number}.input_layernorm.weight":
                    other = {
                        "another number": f"scales.{number + 1}.weight",
                        "no number": f"scale_{number}",
                        "the last": f"last.{number}.weight" if number == LAYERS - 1 else name,
                        "all in one": "scales",
                        "order": f"first.{number}.weight" if not made else name,
                    }[how]
                    before = made.get(other)
                    rows = 1 if before is None else before.shape[0] + 1
                    made[other] = tensor.new_empty((rows, *tensor.shape))
                    break
            else:
                if how != "order" or "layernorm" in name:
                    made[name] = tensor
        return made

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", convert)
    model = empty_model(config("llama", **LLAMA))
    expected = {name: tuple(t.shape) for name, t in convert(model, model.state_dict()).items()}
    assert stored_tensors(model) == expected
