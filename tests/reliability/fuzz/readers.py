"""Every reader of strangers' files, as a function of bytes, with inputs to start from.

The oracle is the same for all: a reader returns, or raises a SurgeryError. `run.py` feeds them
from a coverage-guided fuzzer, `test_fuzz.py` from hypothesis, `test_corpus.py` from what was found.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, Edit
from surgery.dtypes import DTYPES
from surgery.errors import SurgeryError
from surgery.header import Header, parse_header
from surgery.hub import Source
from surgery.opening import open_checkpoint
from surgery.tensor import LazyTensor

SHOWN = float(os.environ.get("FUZZ_SHOWN", "1"))
"""The share of inputs that are printed too, which takes longer than reading them."""
FORBIDDEN = {*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)} - {0x0A}
"""Characters that a terminal obeys, or that can't be written: they must not come out raw."""


@dataclass(frozen=True)
class Reader:
    """What reads the bytes, and sound inputs to start from; `kind` is what a mutation respects."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    kind: str = "json"


@cache
def workspace() -> Path:
    """A folder of this process, in memory where the system has one for that."""
    shm = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="surgery-fuzz-", dir=shm if os.access(shm, os.W_OK) else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def shard(tensors: Mapping[str, tuple[str, list[int]]], data: bytes | None = None) -> bytes:
    """A safetensors file of these types and shapes, filled with zeros unless there is `data`."""
    table, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPES[dtype].bits // 8
        for side in shape:
            size *= side
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + (bytes(end) if data is None else data)


def llama(width: int = 6, blocks: int = 2) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a very small model."""
    found = {"model.embed_tokens.weight": ("F32", [8, 4]), "model.norm.weight": ("F32", [4])}
    for block in range(blocks):
        at = f"model.layers.{block}."
        found |= {
            f"{at}self_attn.q_proj.weight": ("F32", [4, 4]),
            f"{at}self_attn.o_proj.weight": ("F32", [4, 4]),
            f"{at}mlp.gate_proj.weight": ("F32", [width, 4]),
            f"{at}mlp.up_proj.weight": ("F32", [width, 4]),
            f"{at}mlp.down_proj.weight": ("F32", [4, width]),
            f"{at}input_layernorm.weight": ("F32", [4]),
            f"{at}post_attention_layernorm.weight": ("F32", [4]),
        }
    return found


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@cache
def folder(name: str, width: int = 6, blocks: int = 2) -> Path:
    """A sound checkpoint, made once."""
    made = workspace() / name
    made.mkdir()
    (made / "model.safetensors").write_bytes(shard(llama(width, blocks)))
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


@cache
def opened() -> Checkpoint:
    return open_checkpoint(folder("opened"))


def look_at(checkpoint: Checkpoint) -> None:
    """All that `inspect` and an edit of the config do without reading a tensor."""
    from surgery.commands.inspect import _print, describe

    report = describe(checkpoint)
    if random.random() < SHOWN:
        _shown(lambda: _print(report))
    _ = checkpoint.anatomy.every_mlp
    edit = Edit("look", {}, {"base": checkpoint.source})
    checkpoint.edited(edit, {}, config={**checkpoint.settled_config, "edited": True}).own_files()
    checkpoint.own_files()


def _shown(show: Callable[[], object]) -> None:
    """What is printed holds nothing that a terminal would obey."""
    from contextlib import redirect_stdout

    text = io.StringIO()
    with redirect_stdout(text):
        show()
    found = {ord(character) for character in text.getvalue()} & FORBIDDEN
    assert not found, f"raw {sorted(map(hex, found))} in what is printed"


def read_header_bytes(data: bytes) -> None:
    """A header as it stands, and with a file that is as long as it says."""
    with suppress(SurgeryError):
        parse_header(data, 8 + len(data) + 8, "fuzz")
    end = 0
    with suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError):
        table = json.loads(data)
        for name, entry in table.items():
            if name != "__metadata__":
                end = max(end, entry["data_offsets"][1])
    if type(end) is not int:
        return
    header = parse_header(data, 8 + len(data) + end, "fuzz")
    _laid_out_again(header)


def _laid_out_again(header: Header) -> None:
    """The plan's header says the same tensors."""
    from surgery.writing.plan import plan

    tensors = {n: LazyTensor(e.shape, e.dtype) for n, e in header.entries.items()}
    checkpoint = Checkpoint(tensors=tensors, config={}, source=Source("fuzz", workspace()))
    (one,) = plan(checkpoint, max_shard_bytes=2**200).shards
    again = parse_header(one.head[8:], one.size, "planned")
    assert {n: (e.shape, e.dtype) for n, e in again.entries.items()} == {
        n: (t.shape, t.dtype) for n, t in checkpoint.items()
    }


def read_named(data: bytes) -> None:
    """{"tensors": {name: [type, shape]}, "config": {...}}: what is made of names and shapes."""
    try:
        table = json.loads(data)
        given = {
            str(name).encode().decode(): (str(dtype), [abs(int(s)) % 2**40 for s in shape][:5])
            for name, (dtype, shape) in list(table["tensors"].items())[:200]
            if dtype in DTYPES and name != "__metadata__"
        }
        config = table["config"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return
    if not isinstance(config, dict):
        return
    tensors = {n: LazyTensor(tuple(shape), DTYPES[dtype]) for n, (dtype, shape) in given.items()}
    look_at(Checkpoint(tensors=tensors, config=config, source=Source("fuzz", workspace())))


def read_index(data: bytes) -> None:
    here = _shards_folder()
    (here / "model.safetensors.index.json").write_bytes(data)
    look_at(open_checkpoint(here))


@cache
def _shards_folder() -> Path:
    made = workspace() / "sharded"
    made.mkdir()
    tensors = list(llama().items())
    for number, part in enumerate((tensors[:6], tensors[6:]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        (made / name).write_bytes(shard(dict(part)))
    return made


def _index() -> bytes:
    tensors = list(llama())
    where = {n: f"model-0000{1 + (i >= 6)}-of-00002.safetensors" for i, n in enumerate(tensors)}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": where}).encode()


def read_config(data: bytes) -> None:
    here = folder("configured")
    (here / "config.json").write_bytes(data)
    look_at(open_checkpoint(here))


def read_hub_index(data: bytes) -> None:
    """What is fetched from the Hub because an index there names it."""
    from surgery.hub import _Repo, _shards

    here = folder("hub")
    name = "model.safetensors.index.json"
    (here / name).write_bytes(data)
    names = ["model-00001-of-00002.safetensors", "config.json", name, "sub/a.safetensors"]
    found = _shards(_Repo("org/x", "org/x", None, True), here, [name], names)
    assert set(found) <= set(names)


def read_recipe(data: bytes) -> None:
    from surgery.recipe import load_recipe
    from surgery.recipe.checks import requirements

    path = workspace() / "recipe.yaml"
    path.write_bytes(data)
    requirements(load_recipe(path), verify=True)


def read_anatomy(data: bytes) -> None:
    from surgery.recipe import anatomy_yaml, correct_anatomy

    path = workspace() / "anatomy.yaml"
    path.write_bytes(data)
    anatomy_yaml(correct_anatomy(opened(), path).anatomy)


def read_adapter_config(data: bytes) -> None:
    """The config alone, and what it says of modules."""
    from surgery.lora.config import parse_config

    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(table, dict):
        config = parse_config(table, "fuzz")
        for module in ("model.layers.0.self_attn.q_proj", "a" * 300, ".".join("ab" * 20)):
            config.scale_of(module)


def read_adapter(data: bytes) -> None:
    """{"config": ..., "tensors": {name: [type, shape]}} as an adapter, opened and baked."""
    from surgery.lora.adapter import open_adapter
    from surgery.lora.bake import apply_adapter

    here = workspace() / "adapter"
    here.mkdir(exist_ok=True)
    try:
        table = json.loads(data)
        (here / "adapter_config.json").write_text(json.dumps(table["config"]))
        tensors = {
            str(name).encode().decode(): (dtype, [abs(int(side)) % 9 for side in shape][:4])
            for name, (dtype, shape) in table["tensors"].items()
            if DTYPES[dtype].bits % 8 == 0
        }
        (here / "adapter_model.safetensors").write_bytes(shard(tensors))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return
    made = apply_adapter(opened(), open_adapter(here))
    for tensor in made.values():
        tensor.read(0, 0)


def read_tokenizer(data: bytes) -> None:
    """{file name: its content}, as the companions of a model."""
    from surgery.vocabulary.target import translated_generation
    from surgery.vocabulary.tokens import read_vocabulary, telling_files

    try:
        table = json.loads(data)
        if not isinstance(table, dict):
            return
        files: dict[str, Path | bytes] = {
            name: (text if isinstance(text, str) else json.dumps(text)).encode()
            for name, text in table.items()
            if name != "tokenizer.model"  # transformers', and slow
        }
    except (ValueError, RecursionError):
        return
    if not {"tokenizer.json", "vocab.json"} & files.keys():
        files.pop("vocab.txt", None)
    model = replace(opened(), companions=files)
    with suppress(SurgeryError):
        translated_generation(model, lambda row: row + 1, None)
    telling_files(model)
    found = read_vocabulary(model)
    assert all(type(row) is int for row in found.ids.values())


def read_record(data: bytes) -> None:
    """A record beside a model that was grown, or deepened: what it says is proved, not believed."""
    from surgery.verification import certify, find_relation
    from surgery.writing.record import _earlier_edits

    base = opened()
    for other in (folder("grown", 9), folder("deep", 6, 3)):
        (other / "surgery.json").write_bytes(data)
        found = open_checkpoint(other)
        relation = find_relation(base, found)
        if relation and "deep" not in other.name:
            certify(base, found, relation, threads=1)
        json.dumps(_earlier_edits(other))


def read_task_vector(data: bytes) -> None:
    from surgery.vectors import open_task_vector

    here = folder("vector")
    (here / "task_vector.json").write_bytes(data)
    if not (here / "task_vector.safetensors").exists():
        (here / "model.safetensors").rename(here / "task_vector.safetensors")
    open_task_vector(here)


def read_card(data: bytes) -> None:
    """A card of the input's, and what of it comes into ours: a table of known keys, and no more."""
    import yaml

    from surgery.writing.card import _KEPT, model_card
    from surgery.writing.plan import plan

    path = workspace() / "README.md"
    path.write_bytes(data)
    text = data.decode("utf-8", "replace")
    name = "".join(c for c in text[:40] if c not in "/\0") or "x"
    edit = Edit("lines", {"alpha": text[:60]}, {"base": Source(text[:9], Path("/nowhere", name))})
    edited = replace(opened().edited(edit, {}), companions={"README.md": path})
    made = model_card(plan(edited), {"command": text[:80], "verification": None})["README.md"]
    assert isinstance(made, bytes)
    lines = made.decode().splitlines()
    end = lines.index("---", 1)
    front = yaml.safe_load("\n".join(lines[1:end]))
    assert set(front) <= {"base_model", "library_name", "tags", *_KEPT}
    assert front["tags"] == ["surgery", "lines"]
    assert lines[end + 1 : end + 3] == ["", "# Edited with Surgery"]
    assert [line for line in lines[end:] if line.startswith("#")] == ["# Edited with Surgery"]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _seeds() -> Iterator[tuple[str, Reader]]:
    small = shard(llama(blocks=1))
    head = small[8 : 8 + int.from_bytes(small[:8], "little")]
    quantized = {"w.weight": ("F8_E4M3", [4, 4]), "w.weight_scale_inv": ("F32", [1, 1])}
    fp8 = shard(quantized)
    yield (
        "header",
        Reader(
            read_header_bytes,
            (
                head,
                fp8[8 : 8 + int.from_bytes(fp8[:8], "little")],
                b'{"__metadata__":{"format":"pt"}}',
            ),
        ),
    )
    mixture = {
        "model.embed_tokens.weight": ("F32", [8, 4]),
        **{
            f"model.layers.{b}.{inner}": ("BF16", shape)
            for b in range(2)
            for inner, shape in {
                "mlp.experts.gate_up_proj": [3, 12, 4],
                "mlp.experts.down_proj": [3, 4, 6],
                "mlp.gate.weight": [3, 4],
                "mlp.shared_expert.up_proj.weight": [6, 4],
                "mlp.shared_expert.down_proj.weight": [4, 6],
                "input_layernorm.weight": [4],
                "ffn.experts.mlp.w1": [12, 4],
                "ffn.experts.mlp.v1": [12, 4],
                "ffn.experts.mlp.w2": [12, 4],
            }.items()
        },
    }
    gpt = {
        f"h.{b}.{inner}": ("F32", shape)
        for b in range(2)
        for inner, shape in {
            "mlp.c_fc.weight": [4, 16],
            "mlp.c_fc.bias": [16],
            "mlp.c_proj.weight": [16, 4],
            "mlp.c_proj.bias": [4],
            "attn.bias": [1, 1, 8, 8],
            "ln_1.weight": [4],
        }.items()
    }
    packed = {**quantized, "a.qweight": ("I32", [2, 4]), "a.scales": ("F16", [1, 4])}
    yield (
        "names",
        Reader(
            read_named,
            (
                _json({"tensors": llama(), "config": CONFIG}),
                _json({"tensors": mixture, "config": {**CONFIG, "num_experts": 3}}),
                _json(
                    {"tensors": gpt, "config": {"n_embd": 4, "model_type": "gpt2", "n_layer": 2}}
                ),
                _json(
                    {"tensors": packed, "config": {"quantization_config": {"quant_method": "fp8"}}}
                ),
            ),
        ),
    )
    yield "index", Reader(read_index, (_index(),))
    groups = {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}}}
    nested = {
        "text_config": {**CONFIG, "mlp_widths": [6, 6]},
        "quantization_config": {"quant_method": "compressed-tensors", **groups},
        "vision_config": {"intermediate_size": 8, "eps": {"__float__": "Infinity"}},
    }
    yield "config", Reader(read_config, (_json(CONFIG), _json(nested)))
    yield "hub_index", Reader(read_hub_index, (_index(), b'{"weight_map":{"a":"config.json"}}'))
    yield "recipe", Reader(read_recipe, tuple(map(str.encode, RECIPES)), "yaml")
    yield "mergekit", Reader(read_recipe, tuple(map(str.encode, MERGEKIT)), "yaml")
    yield "anatomy", Reader(read_anatomy, tuple(map(str.encode, ANATOMIES)), "yaml")
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"k_proj": 4, r".*\.0\.o_proj": 1},
        "alpha_pattern": {"^model.layers": 3},
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [1, 2],
        "init_lora_weights": "gaussian",
        "use_rslora": True,
        "use_dora": True,
    }
    yield "adapter_config", Reader(read_adapter_config, (_json(adapter),))
    q = "base_model.model.model.layers.0.self_attn.q_proj."
    weights = {
        f"{q}lora_A.weight": ("F32", [2, 4]),
        f"{q}lora_B.weight": ("F32", [4, 2]),
        f"{q}lora_magnitude_vector": ("F32", [4]),
        "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", [2, 8]),
        "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", [4, 2]),
        "base_model.model.model.norm.modules_to_save.default.weight": ("F32", [4]),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (
            "F32",
            [2, 4],
        ),
    }
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    plainly = {name: given for name, given in weights.items() if "magnitude" not in name}
    yield (
        "adapter",
        Reader(
            read_adapter,
            (
                _json({"config": {**adapter, "use_dora": False}, "tensors": plainly}),
                _json({"config": adapter, "tensors": weights}),
                _json({"config": plain, "tensors": dict(list(weights.items())[:2])}),
            ),
        ),
    )
    words = {"<s>": 0, "a": 1, "b": 2, "ab": 3}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    token = {"id": 4, "content": "<x>", "special": True, **flags}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "y"},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": words, "merges": ["a b"], "unk_token": None},
    }
    others = {
        "tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "<y>"}}},
        "added_tokens.json": {"<z>": 6},
        "generation_config.json": {"eos_token_id": [2, 1], "suppress_tokens": [1]},
    }
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]}
    piece = {
        "type": "WordPiece",
        "vocab": words,
        "unk_token": "<s>",
        "max_input_chars_per_word": 9,
        "continuing_subword_prefix": "##",
    }
    level = {"type": "WordLevel", "vocab": words, "unk_token": "<s>"}
    yield (
        "tokenizer",
        Reader(
            read_tokenizer,
            (
                _json({"tokenizer.json": tokenizer, **others}),
                _json({"vocab.json": words, **others}),
                *(
                    _json({"tokenizer.json": {**tokenizer, "model": m}})
                    for m in (unigram, piece, level)
                ),
            ),
        ),
    )
    mlps = [
        {
            "tensors": {
                f"model.layers.{b}.mlp.{p}_proj.weight": {} for p in ("gate", "up", "down")
            },
            "width": [6, 9],
            "copied": [[0, 2]],
            "padding": 1,
        }
        for b in range(2)
    ]
    deep = {"stack": "model.layers", "blocks": [0, 1, 1], "new": [{"block": 2}]}
    yield (
        "record",
        Reader(
            read_record,
            (
                _json(
                    {"edits": [{"operation": "grow", "parameters": {}, "details": {"mlps": mlps}}]}
                ),
                _json({"edits": [{"operation": "expand", "parameters": {}, "details": deep}]}),
            ),
        ),
    )
    vector = {"format": 1, "base": {"reference": "org/base", "fingerprint": "0" * 64}}
    yield "task_vector", Reader(read_task_vector, (_json(vector),))
    yield "card", Reader(read_card, tuple(map(str.encode, CARDS)), "yaml")


RECIPES = (
    """inputs: {base: ./base, chat: org/chat@main, code: ./code}
steps:
  merged:
    merge:
      base: base
      models: [chat, {model: code, weight: [0, 0.5, 1]}]
      method: ties
      density: {attention: 0.3, "*.mlp.*": [0, 1], default: 0.5}
      lines: auto
      tokenizer: union
  grown:
    grow: {model: merged, factor: 1.5, layers: 8-15, break_symmetry: 1e-2}
    write: out
output: grown
require:
  - same: [merged, grown]
  - compare: [base, grown]
    at_most: {kl_mean: 0.01}
    at_least: {top1: 0.9}
""",
    """inputs: {base: base, tuned: tuned}
steps:
  v: {task_vector: {base: base, tuned: tuned}}
  a: {apply: {base: base, vectors: [v, v], scale: [1, -0.5]}}
  e: {expand: {model: a, copies: 2}}
  c: {compose: {blocks: [{model: e, layers: "0-3"}, {model: base, layers: all}], before: e}}
  l: {lines: {base: base, tuned: c, alpha: 0.5, outside: depth}}
  x: {lora: {base: base, tuned: l, rank: 4, modules: [q_proj]}}
""",
)
MERGEKIT = (
    """slices:
  - sources:
      - {model: org/a, layer_range: [0, 16]}
      - {model: org/b, layer_range: [0, 16], parameters: {weight: 0.5}}
merge_method: slerp
base_model: org/a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - value: 0.5
dtype: bfloat16
tokenizer_source: union
""",
    """name: one
models:
  - model: {model: {path: org/a, revision: main}, lora: org/l}
    parameters: {weight: 0.3, density: [0.1, 1]}
  - model: org/b
merge_method: dare_ties
base_model: org/c
parameters: {int8_mask: true, normalize: 1.0}
tokenizer: {source: base, pad_to_multiple_of: 64}
---
merge_method: linear
models: [{model: one}, {model: org/d, parameters: {weight: 1}}]
out_dtype: float16
""",
)
ANATOMIES = (
    """stacks: {model.layers: 2}
roles: {"*.mlp.*": mlp, model.norm.weight: norm, "*.q_proj.*": attention}
mlps:
  - {stack: model.layers, blocks: "0-1", ups: [mlp.gate_proj.weight, mlp.up_proj.weight],
     down: mlp.down_proj.weight, parts: 1, in_out: false}
""",
    "mlps: [{stack: model.layers, ups: [mlp.up_proj.weight], down: mlp.down_proj.weight}]\n",
)
CARDS = (
    "---\nlicense: apache-2.0\nlanguage: [en, no]\ntags: [x]\n---\n# A model\n",
    '---\nlicense: "a\\nb"\nlicense_link: &a [*a]\npipeline_tag: |\n  x\n  ---\n---\n---\n',
)
READERS: Mapping[str, Reader] = dict(_seeds())


def outcome(name: str, data: bytes) -> str:
    """Runs one reader on one input. Anything but a result or an error of ours is raised."""
    try:
        READERS[name].read(data)
    except SurgeryError as error:
        if not error.problems:
            raise AssertionError("an error without a problem") from error
        return type(error).__name__
    return "read"
