"""Llama-shaped bfloat16 checkpoints to measure on, made on the spot from seeded noise.

    python benchmarks/checkpoints.py DIR [--parameters 1.1B]

makes DIR/1.1B-base and DIR/1.1B-tuned (the base plus small noise), unless they are there already,
and prints where they are. Plain safetensors shards, an index and a config; the weights have a
real spread (standard deviation 0.02), because zeros would flatter anything that reads them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

SPREAD = 0.02
UPDATE = 0.0005
"""Standard deviation of the weights, and of what fine-tuning does to them."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. The output head is a tensor of its own."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    shards: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the files."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            yield f"{block}.input_layernorm.weight", (hidden,)
            yield f"{block}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{block}.self_attn.k_proj.weight", (kv, hidden)
            yield f"{block}.self_attn.v_proj.weight", (kv, hidden)
            yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{block}.post_attention_layernorm.weight", (hidden,)
            yield f"{block}.mlp.gate_proj.weight", (self.mlp, hidden)
            yield f"{block}.mlp.up_proj.weight", (self.mlp, hidden)
            yield f"{block}.mlp.down_proj.weight", (hidden, self.mlp)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    def config(self) -> dict[str, object]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        }


SHAPES = {
    "14M": Shape(256, 6, 8, 2, 688, 16000, 2),
    "134M": Shape(768, 12, 12, 4, 2048, 32000, 2),
    "1.1B": Shape(2048, 22, 32, 4, 5632, 32000, 3),
    "6.7B": Shape(4096, 32, 32, 32, 11008, 32000, 3),
    # by bytes: the 1.1B with as many layers as it takes
    "0.5GB": Shape(2048, 3, 32, 4, 5632, 32000, 1),
    "1GB": Shape(2048, 8, 32, 4, 5632, 32000, 1),
    "2GB": Shape(2048, 20, 32, 4, 5632, 32000, 2),
    "4GB": Shape(2048, 42, 32, 4, 5632, 32000, 4),
    "8GB": Shape(2048, 88, 32, 4, 5632, 32000, 8),
}


def make_models(folder: Path, parameters: str, tuned: int = 1) -> list[Path]:
    """The base and so many fine-tunes of it in `folder`, made unless they are there."""
    names = ["base", *("tuned" + ("" if n == 1 else str(n)) for n in range(1, tuned + 1))]
    paths = [folder / f"{parameters}-{name}" for name in names]
    for number, path in enumerate(paths):
        if not (path / "config.json").exists():  # which is written last
            _make(path, SHAPES[parameters], number)
    return paths


def _make(folder: Path, shape: Shape, tuned: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = dict(shape.tensors())
    total = sum(map(prod, shapes.values()))
    ends = accumulate(map(prod, shapes.values()))
    shard_of = {
        name: min((end - 1) * shape.shards // total + 1, shape.shards)
        for name, end in zip(shapes, ends, strict=True)
    }
    names = {
        shard: f"model-{shard:05d}-of-{shape.shards:05d}.safetensors"
        for shard in range(1, shape.shards + 1)
    }
    for shard, file in names.items():
        tensors = {
            name: _weights(name, size, tuned)
            for name, size in shapes.items()
            if shard_of[name] == shard
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 2 * total},
        "weight_map": {name: names[shard] for name, shard in shard_of.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def _weights(name: str, shape: tuple[int, ...], tuned: int) -> torch.Tensor:
    """Seeded by the name. Norm weights are spread around 1. Fine-tune 1, 2, ... has an update of
    its own; 0 is the base."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    weights = torch.randn(shape, generator=generator).mul_(SPREAD)
    if len(shape) == 1:
        weights.add_(1)
    weights = weights.to(torch.bfloat16)
    if tuned:
        if tuned > 1:
            generator.manual_seed(crc32(f"{tuned}:{name}".encode()))
        weights += torch.randn(shape, generator=generator).mul_(UPDATE)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", choices=SHAPES, default="1.1B")
    given = parser.parse_args()
    for path in make_models(given.folder, given.parameters):
        print(path)


if __name__ == "__main__":
    main()
