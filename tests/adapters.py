"""LoRA adapters for tests: made by PEFT, with random values in every parameter that it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

IDS = torch.arange(24).reshape(2, 12) * 2


def make_adapter(base: Path, folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """The adapter of a model in `base`, saved by PEFT; `config` is LoraConfig's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **config}
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    """Base and adapter in PEFT, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def weights_of(adapter: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by PEFT's names, without the prefix."""
    stored = load_file(adapter / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter written by hand."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def change_config(adapter: Path, **changes: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return adapter
