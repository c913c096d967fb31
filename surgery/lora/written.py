"""An adapter that was made here, as PEFT wants it written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.checkpoint import Checkpoint, Weights
from surgery.lora.adapter import PREFIX, STEM
from surgery.lora.config import CONFIG
from surgery.lora.modules import Modules, short_names
from surgery.tensor import LazyTensor


@dataclass(frozen=True)
class Part:
    """A weight that was taken apart: `energy` is the part of ||tau||^2 that its rank keeps, and
    `norm` is ||tau||."""

    name: str
    module: str
    rank: int
    energy: float
    norm: float

    def as_json(self) -> dict[str, Any]:
        return {
            "tensor": self.name,
            "rank": self.rank,
            "energy": float(f"{self.energy:.6g}"),
            "norm": float(f"{self.norm:.6g}"),
        }


@dataclass(frozen=True)
class Rest:
    """A tensor that changed and isn't among the parts: by `relative`, ||tau|| / ||base||. It is
    `saved` whole in the adapter, or else lost."""

    name: str
    relative: float
    saved: bool

    def as_json(self) -> dict[str, Any]:
        relative = float(f"{self.relative:.6g}")
        return {"tensor": self.name, "relative": relative, "saved": self.saved}


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraAdapter(Weights):
    """A LoRA adapter that was extracted, ready to be written; PEFT and `open_adapter` read it."""

    stem: ClassVar[str] = STEM
    library: ClassVar[str | None] = "peft"
    sharded: ClassVar[bool] = False

    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    rest: tuple[Rest, ...]

    @property
    def lost(self) -> tuple[Rest, ...]:
        """What changed and isn't in the adapter."""
        return tuple(rest for rest in self.rest if not rest.saved)

    def own_files(self) -> dict[str, bytes]:
        """`adapter_config.json`."""
        return {CONFIG: (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()}


def adapter_config(
    base: Checkpoint,
    parts: Sequence[Part],
    modules: Modules,
    saved: Mapping[str, LazyTensor],
    *,
    tied: bool,
) -> dict[str, Any]:
    """`adapter_config.json`. Alpha is the rank, so that the factor on B A is 1.
    `tied` says that an embedding and the head tied to it are both among what is saved."""
    rank = Counter(part.rank for part in parts).most_common(1)[0][0]
    ranks = {part.module: part.rank for part in parts if part.rank != rank}
    linear = [module for module, layer in modules.layers.items() if layer.linear]
    bare = [name.removeprefix(PREFIX).rpartition(".")[0] for name in saved]
    whole = dict.fromkeys(module for module in bare if not module.endswith(".base_layer"))
    ends = {module.rpartition(".")[2] for module in whole}
    architecture = str((base.config.get("architectures") or [""])[0])
    causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base.source.repo_id or base.source.reference,
        "revision": base.source.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": short_names([part.module for part in parts], linear),
        "modules_to_save": list(whole) or None,
        "bias": "lora_only" if len(bare) > len([m for m in bare if m in whole]) else "none",
        "fan_in_fan_out": any(m.in_out for m in modules.matrices),
        "ensure_weight_tying": tied and "embed_tokens" in ends,  # PEFT knows no other name
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
