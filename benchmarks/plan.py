"""What a command costs before it reads a weight: time to start, to open, to plan, as models grow.

    python benchmarks/plan.py [--sizes 25k,50k,100k] [--repeat 5] [--work DIR]

prints a Markdown table: seconds by the clock and of CPU, medians of processes of their own, and
how many of the seconds of CPU import torch (which no command can do in less). The models are
sparse files, headers without weights: a Llama of 70B in 100 shards, and mixtures with the sizes of
DeepSeek-V3 and as many layers as it takes. The two models of a merge are the same one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from itertools import accumulate
from math import prod
from pathlib import Path
from statistics import median

from checkpoints import Shape
from measure import machine, run

LLAMA = Shape(8192, 80, 64, 8, 28672, 128256, 100)
LAYERS = {"25k": 32, "50k": 64, "100k": 128}
"""Layers that are mixtures, of 782 tensors each; three plain ones come before them."""
PLAIN, EXPERTS, HIDDEN = 3, 256, 7168
Shapes = dict[str, tuple[int, ...]]


def mixture(layers: int) -> Shapes:
    """Names and shapes of a DeepSeek-V3 in bfloat16 with so many layers that are mixtures."""
    shapes: Shapes = {"model.embed_tokens.weight": (129280, HIDDEN)}
    for layer in range(PLAIN + layers):
        inside = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_a_proj": (1536, HIDDEN),
            "self_attn.q_a_layernorm": (1536,),
            "self_attn.q_b_proj": (24576, 1536),
            "self_attn.kv_a_proj_with_mqa": (576, HIDDEN),
            "self_attn.kv_a_layernorm": (512,),
            "self_attn.kv_b_proj": (32768, 512),
            "self_attn.o_proj": (HIDDEN, 16384),
            "post_attention_layernorm": (HIDDEN,),
        } | dict(_mlps(layer >= PLAIN))
        for name, shape in inside.items():
            ending = "" if name.endswith("bias") else ".weight"
            shapes[f"model.layers.{layer}.{name}{ending}"] = shape
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (129280, HIDDEN)}


def _mlps(mixed: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    modules, width = ["mlp"], 18432
    if mixed:
        yield "mlp.gate", (EXPERTS, HIDDEN)
        yield "mlp.gate.e_score_correction_bias", (EXPERTS,)
        modules, width = [f"mlp.experts.{n}" for n in range(EXPERTS)], 2048
        modules.append("mlp.shared_experts")
    for module in modules:
        yield f"{module}.gate_proj", (width, HIDDEN)
        yield f"{module}.up_proj", (width, HIDDEN)
        yield f"{module}.down_proj", (HIDDEN, width)


def mixture_config(layers: int) -> dict[str, object]:
    """`config.json`."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "first_k_dense_replace": PLAIN,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": PLAIN + layers,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "v_head_dim": 128,
        "vocab_size": 129280,
    }


def make_sparse(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], config: object, shards: int
) -> None:
    """A checkpoint in bfloat16 whose weights are holes: files of the right length that take no
    room."""
    folder.mkdir(parents=True)
    total = 2 * sum(map(prod, shapes.values()))
    ends = accumulate(2 * prod(shape) for shape in shapes.values())
    parts: dict[int, list[str]] = {}
    for name, end in zip(shapes, ends, strict=True):
        parts.setdefault((end - 1) * shards // total, []).append(name)
    weight_map = {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, end = {}, 0
        for name in names:
            start, end = end, end + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + end)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def make_models(work: Path, sizes: list[str]) -> dict[str, Path]:
    """The Llama and the mixtures, made unless they are there."""
    folders = {name: work / name for name in ("70B", *sizes)}
    for name, folder in folders.items():
        if folder.exists():
            continue
        if name == "70B":
            make_sparse(folder, dict(LLAMA.tensors()), LLAMA.config(), LLAMA.shards)
        else:
            layers = LAYERS[name]
            make_sparse(folder, mixture(layers), mixture_config(layers), layers * 5 // 4)
    return folders


def commands(models: Mapping[str, Path], work: Path) -> Iterator[tuple[str, list[str], bool]]:
    """What is measured: how it is shown, the arguments, and whether it needs torch."""
    surgery = str(Path(sys.executable).with_name("surgery"))
    yield "surgery --help", [surgery, "--help"], False
    for name, model in models.items():
        yield f"surgery inspect {name}", [surgery, "inspect", str(model)], False
    dry = ["--dry-run", "-o", str(work / "out")]
    for verb, options in {
        "lines": ["--alpha", "0.4"],
        "merge": ["--method", "ties", "--density", "0.2"],
        "grow": ["--factor", "2"],
    }.items():
        for name, model in models.items():
            given = [str(model)] * (1 if verb == "grow" else 2)
            shown = " ".join(["surgery", verb, *[name] * len(given), *options, "--dry-run"])
            yield shown, [surgery, verb, *given, *options, *dry], True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=",".join(LAYERS), help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the models here")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="surgery-benchmark-"))
    try:
        torch = [run([sys.executable, "-c", "import torch"]) for _ in range(given.repeat)]
        importing = median(one.cpu for one in torch)
        models = make_models(work, given.sizes.split(","))
        print("| | import torch | CPU | wall |\n|---|--:|--:|--:|")
        for shown, command, heavy in commands(models, work):
            runs = [run(command) for _ in range(given.repeat)]
            cpu, wall = (median(getattr(one, what) for one in runs) for what in ("cpu", "wall"))
            part = f"{importing:.2f} s" if heavy else ""
            print(f"| `{shown}` | {part} | {cpu:.2f} s | {wall:.2f} s |", flush=True)
        where = machine(work)
    finally:
        if given.work is None:
            shutil.rmtree(work)
    today = datetime.now(timezone.utc).date()
    print(f"\nSparse bfloat16, median of {given.repeat}. {where}. {today}.")


if __name__ == "__main__":
    main()
