"""Tiny checkpoints of many families, made with transformers itself and written to a directory.

Weights are spread widely (normal, std 0.2; norms around 1), biases aren't zero, and the MLP's
width is a multiple of 8 and not of 32, so that a mistake in any of them shows in the outputs.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(tempfile.mkdtemp(prefix="surgery-families-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
if "transformers" not in sys.modules:  # code beside the shards is copied here to be imported
    os.environ.setdefault("HF_MODULES_CACHE", str(ROOT / "modules"))

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging as hf_logging

torch.set_num_threads(1)  # models are tiny, and tests run beside each other

CAUSAL, MASKED, BARE = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"
VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """A model class with its config, and what is known of its MLPs."""

    model: str
    config: str
    options: Mapping[str, Any]
    width: int
    stack: str = "model.layers"
    up: tuple[str, ...] = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    down: str = "mlp.down_proj.weight"
    auto: str = CAUSAL
    tied: bool = False
    in_out: bool = False
    parts: int = 1
    biases: bool = False
    late: frozenset[str] = frozenset({"model.norm.weight", "lm_head.weight"})
    """What stands behind the blocks: final norm and head."""
    width_key: str = "intermediate_size"
    blocks: int = field(default=3)

    @property
    def hidden(self) -> int:
        return int(self.options.get("n_embd", self.options.get("hidden_size", 0)))

    @property
    def up_biases(self) -> tuple[str, ...]:
        return tuple(n.replace(".weight", ".bias") for n in self.up) if self.biases else ()

    def name(self, block: int, inner: str) -> str:
        return f"{self.stack}.{block}.{inner}"


def _llama_like(name: str, width: int, tied: bool, **options: Any) -> Family:
    return Family(
        model=f"{name}ForCausalLM",
        config=options.pop("config", f"{name}Config"),
        options=COMMON
        | {"intermediate_size": width, "num_key_value_heads": 2, "tie_word_embeddings": tied}
        | options,
        width=width,
        tied=tied,
        late=frozenset({"model.norm.weight"} | (set() if tied else {"lm_head.weight"})),
    )


_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_MLP = {
    "up": ("mlp.c_fc.weight",),
    "down": "mlp.c_proj.weight",
    "in_out": True,
    "biases": True,
    "width": 144,
    "width_key": "n_inner",
}
_BERT = COMMON | {"intermediate_size": 56, "type_vocab_size": 2}
_BERT_MLP = {
    "up": ("intermediate.dense.weight",),
    "down": "output.dense.weight",
    "biases": True,
    "width": 56,
}

FAMILIES: dict[str, Family] = {
    "llama": _llama_like("Llama", 88, False, mlp_bias=False),
    "llama_tied": _llama_like("Llama", 40, True),
    "mistral": _llama_like("Mistral", 72, False, sliding_window=None),
    "qwen2": _llama_like("Qwen2", 88, True),
    "qwen3": _llama_like("Qwen3", 56, False, head_dim=8),
    "gemma": _llama_like("Gemma", 72, True, head_dim=8),
    "gemma2": _llama_like(
        "Gemma2", 56, True, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
    ),
    "gemma3": _llama_like(
        "Gemma3",
        40,
        True,
        config="Gemma3TextConfig",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
    ),
    "olmo2": _llama_like("Olmo2", 88, False),
    "granite": _llama_like(
        "Granite",
        72,
        True,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        attention_multiplier=0.3,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        COMMON | {"intermediate_size": 40, "num_key_value_heads": 2, "tie_word_embeddings": False},
        width=40,
        up=("mlp.gate_up_proj.weight",),
        parts=2,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        stack="transformer.h",
        tied=True,
        late=frozenset({"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        **_GPT2_MLP,
    ),
    "gpt2_base": Family(
        "GPT2Model",
        "GPT2Config",
        _GPT2,
        stack="h",
        auto=BARE,
        tied=True,
        late=frozenset({"ln_f.weight", "ln_f.bias"}),
        **_GPT2_MLP,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        COMMON | {"intermediate_size": 88, "tie_word_embeddings": False},
        width=88,
        stack="gpt_neox.layers",
        up=("mlp.dense_h_to_4h.weight",),
        down="mlp.dense_4h_to_h.weight",
        biases=True,
        late=frozenset(
            {
                "gpt_neox.final_layer_norm.weight",
                "gpt_neox.final_layer_norm.bias",
                "embed_out.weight",
            }
        ),
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        COMMON | {"ffn_dim": 72, "word_embed_proj_dim": 32},
        width=72,
        stack="model.decoder.layers",
        up=("fc1.weight",),
        down="fc2.weight",
        biases=True,
        tied=True,
        late=frozenset(
            {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"}
        ),
        width_key="ffn_dim",
    ),
    "bert": Family(
        "BertModel",
        "BertConfig",
        _BERT,
        stack="encoder.layer",
        auto=BARE,
        tied=True,
        late=frozenset({"pooler.dense.weight", "pooler.dense.bias"}),
        **_BERT_MLP,
    ),
    "bert_mlm": Family(
        "BertForMaskedLM",
        "BertConfig",
        _BERT,
        stack="bert.encoder.layer",
        auto=MASKED,
        tied=True,
        late=frozenset(
            {
                "cls.predictions.bias",
                "cls.predictions.transform.dense.weight",
                "cls.predictions.transform.dense.bias",
                "cls.predictions.transform.LayerNorm.weight",
                "cls.predictions.transform.LayerNorm.bias",
            }
        ),
        **_BERT_MLP,
    ),
}
EVERY = sorted(FAMILIES)
NORM_AFTER_MLP = ("gemma2", "olmo2")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers on the terminal."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()


def spread(model: Any, seed: int = 0) -> None:
    """Give every parameter random values: std 0.2, and around 1 for the weights of norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.2 * torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(values + centre)


def save(
    folder: Path, model: str, config: str, options: Mapping[str, Any], dtype: str = "float32"
) -> Path:
    """A model of transformers with spread weights, saved by transformers."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
        spread(built)
        built.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def build(name: str, dtype: str = "float32") -> Path:
    """The directory of a family's checkpoint, shared by all tests: read it, never change it."""
    return _build(name, dtype)


@cache
def _build(name: str, dtype: str) -> Path:
    family = FAMILIES[name]
    return save(ROOT / f"{name}-{dtype}", family.model, family.config, family.options, dtype)


def build_tuned(name: str, dtype: str = "float32") -> Path:
    """`build` after a made-up fine-tuning: every float tensor moved by about a quarter."""
    return _build_tuned(name, dtype)


@cache
def _build_tuned(name: str, dtype: str) -> Path:
    folder = ROOT / f"{name}-{dtype}-tuned"
    tensors = load(build(name, dtype))
    generator = torch.Generator().manual_seed(1)
    for key, value in tensors.items():
        step = 0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        tensors[key] = (value.double() + step).to(value.dtype)
    return variant(folder, build(name, dtype), tensors)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by safetensors' own reader."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def variant(
    folder: Path,
    source: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """A copy of `source` with other tensors, and some keys of the config changed (None removes)."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    made(folder, load(source) if tensors is None else tensors)
    table = config_of(folder) | config
    table = {key: value for key, value in table.items() if value is not None or key not in config}
    (folder / "config.json").write_text(json.dumps(table, indent=2))
    return folder


def made(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint made by hand: one shard, and a config unless there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.contiguous() for name, value in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def tokens(vocabulary: int = VOCABULARY, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (2, 24), generator=generator)


def loaded(folder: Path, auto: str = CAUSAL, *, trust: bool = False) -> Any:
    """The model that a user gets, in float64. Every weight has to be in the files, and fit."""
    eager = {"attn_implementation": "eager"}
    if "num_experts_per_tok" in config_of(folder):
        eager["experts_implementation"] = "eager"  # the usual one has no float64
    with quiet():
        model, info = getattr(transformers, auto).from_pretrained(
            folder, dtype=torch.float64, trust_remote_code=trust, output_loading_info=True, **eager
        )
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


def outputs(folder: Path, auto: str = CAUSAL, *, trust: bool = False) -> torch.Tensor:
    """Logits, or last hidden states of a model without a head, of `tokens()`; float64."""
    model = loaded(folder, auto, trust=trust)
    with torch.no_grad():
        result = model(input_ids=tokens(model.config.vocab_size))
    return (result.logits if "logits" in result else result.last_hidden_state).double()


@cache
def base_outputs(name: str) -> torch.Tensor:
    return outputs(build(name), FAMILIES[name].auto)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|. transformers' norms round to float32 in any dtype: about 1e-7."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


SAME = 3e-6
"""What rounding explains of `apart`; a weight that is wrong by a percent gives 1e-4 and more."""
