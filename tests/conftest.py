"""What the tests share: small checkpoints, made by transformers or written byte by byte."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

SHARED = Path(__file__).parents[2] / "shared"
INDEX = "model.safetensors.index.json"

_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=25, derandomize=True, **_QUIET)
settings.register_profile("deep", max_examples=1000, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The types that both torch and safetensors have, by their names in a header."""

SMALL_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 24, "num_key_value_heads": 2},
    "gpt2": {"n_inner": 24},
}
"""What makes a family small, beyond what all have in common; others go by that alone."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `zoo` takes minutes, and runs only where it is asked for."""
    if "zoo" in config.option.markexpr:
        return
    asked = [item for item in items if item.get_closest_marker("zoo") is None]
    if len(asked) < len(items) and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def shared(*parts: str) -> Path:
    """A path below the folder of models that lies beside the repository; skips without it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{Path('..', 'shared', *parts)} isn't there: this test reads it")
    return path


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model(kind="llama", name="model", *, dtype=, seed=, max_shard_size=, **config) -> Path

    A transformers causal model of two blocks, saved by save_pretrained in tmp_path / name. Every
    parameter is random, norms and biases too: ones and zeros hide mistakes.
    """

    def make(
        kind: str = "llama",
        name: str = "model",
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        max_shard_size: str | None = None,
        **changes: Any,
    ) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        common = {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = AutoConfig.for_model(kind, **{**common, **SMALL_MODELS.get(kind, {}), **changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        how = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.to(dtype).save_pretrained(tmp_path / name, **how)
        return tmp_path / name

    return make


@pytest.fixture
def raw_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """raw_checkpoint(*shards, name="raw", config=None, files=None) -> Path, see `save_raw`."""

    def make(*shards: Mapping[str, torch.Tensor], name: str = "raw", **how: Any) -> Path:
        return save_raw(tmp_path / name, *shards, **how)

    return make


def save_raw(
    folder: Path,
    *shards: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | str] | None = None,
) -> Path:
    """A checkpoint of these tensors: one shard as model.safetensors, several with an index.

    `config` becomes config.json, and `files` are other files by relative path.
    """
    folder.mkdir(parents=True)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        write_index(folder, where, total)
    for name, shard in zip(names, shards, strict=True):
        owned = {key: tensor.clone() for key, tensor in shard.items()}  # one may be given twice
        save_file(owned, folder / name, metadata={"format": "pt"})
    given = {} if config is None else {"config.json": json.dumps(config, indent=2)}
    for name, content in {**given, **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any], total_size: int | None = None) -> None:
    metadata = {} if total_size is None else {"metadata": {"total_size": total_size}}
    (folder / INDEX).write_text(json.dumps({**metadata, "weight_map": weight_map}))


def safetensors_bytes(
    table: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None
) -> bytes:
    """A file with this header, or these bytes in its place, and a header length that may lie."""
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: Any, start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too, by relative path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: str, shape: Iterable[int], seed: int) -> torch.Tensor:
    """A tensor of random bytes: NaNs, infinities and subnormals are among its values."""
    made = torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype])
    raw = random.Random(seed).randbytes(made.numel() * made.element_size())
    if dtype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    if raw:
        made = torch.frombuffer(bytearray(raw), dtype=made.dtype).reshape(made.shape)
    return made


def shapes(max_dims: int = 3, max_side: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Scalars, empty tensors, vectors and more."""
    return st.lists(st.integers(0, max_side), max_size=max_dims).map(tuple)


def tensors(min_size: int = 0) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """The tensors of a checkpoint: any names, every type, any shape."""
    names = st.text(max_size=8).filter(lambda name: name != "__metadata__")
    made = st.builds(random_tensor, st.sampled_from([*TORCH_DTYPES]), shapes(), st.integers(0, 99))
    return st.dictionaries(names, made, min_size=min_size, max_size=6)
