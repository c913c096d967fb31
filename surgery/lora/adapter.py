"""Adapter: a PEFT adapter directory, opened from its header and config, its tensors sorted."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import FormatError, UnsupportedError
from surgery.hub import Source, resolve
from surgery.lora.config import CONFIG, AdapterConfig, parse_config
from surgery.opening import open_tensors, read_json
from surgery.tensor import LazyTensor
from surgery.untrusted import brief

STEM = "adapter_model"
PREFIX = "base_model.model."

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.(?!(weight|bias)$)(?P<adapter>[^.]+))?(\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_STRANGE = re.compile(r"(^|[._])(lora|hada|lokr|ia3|oft|vera|base_layer|token_adapter)([._]|$)")
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template)[^/]*|[^/]*\.model"
)


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one module, scale * B A: A is (r, in) and B is (out, r)."""

    a: LazyTensor
    b: LazyTensor
    scale: float
    embedding: bool = False
    magnitude: LazyTensor | None = None
    """DoRA's: the norm that every output's weights get."""
    bias: LazyTensor | None = None
    """What is added to the module's bias, before it is scaled."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter by the names that PEFT gives: `updates` by module, `saved` whole parameters
    by name, `tokens` rows of an embedding by module, with the tokens that they are for."""

    source: Source
    config: AdapterConfig
    updates: Mapping[str, LowRank]
    saved: Mapping[str, LazyTensor]
    tokens: Mapping[str, tuple[LazyTensor, tuple[int, ...]]]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where it lies."""
        return (self.source.path,)

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The files of the tokenizer that lie beside it."""
        files = sorted(path for path in self.source.path.iterdir() if path.is_file())
        return {path.name: path for path in files if _TOKENIZER.fullmatch(path.name)}


def open_adapter(reference: str | Path, *, headers_only: bool = False) -> Adapter:
    """Open a PEFT adapter, a directory or a Hub id `org/name[@revision]`.

    Raises NotFoundError, FormatError or UnsupportedError, before any tensor is read.
    """
    source = resolve(reference, headers_only=headers_only)
    _check_files(source)
    config = parse_config(read_json(source.path / CONFIG), f"{source.reference}: {CONFIG}")
    tensors, source = open_tensors(source, STEM)
    modules, saved, tokens = _sorted_out(tensors, source.reference)
    updates, problems = {}, []
    for module, parts in modules.items():
        found = _update(module, parts, config)
        if isinstance(found, LowRank):
            updates[module] = found
        else:
            problems += found
    placed, found = _with_indices(tokens, config)
    FormatError.raise_if(f"{source.reference}: {problem}" for problem in (*problems, *found))
    return Adapter(source, config, updates, saved, placed)


def is_adapter(reference: str | Path) -> bool:
    """Whether that is a directory here that holds a PEFT adapter and no model."""
    folder = Path(reference).expanduser()  # Path's own is_file raises for a long name
    return os.path.isfile(folder / CONFIG) and not os.path.isfile(folder / "config.json")


def _check_files(source: Source) -> None:
    where = source.reference
    if source.path.is_file():
        raise FormatError(f"{where} is a file: give the directory of the adapter, with {CONFIG}")
    if not (source.path / CONFIG).is_file():
        raise FormatError(f"{where} has no {CONFIG}: it is no adapter that PEFT has saved")
    single = f"{STEM}.safetensors"
    if (source.path / single).exists() or single in source.remote_headers:
        return
    pickled = [f for f in (f"{STEM}.bin", f"{STEM}.pt") if (source.path / f).exists()]
    raise FormatError(
        f"{where} has no {single}"
        + (
            f", only {pickled[0]}, a pickle, which can run any code as it is read: Surgery "
            f"unpickles nothing. If you trust it, let PEFT save it again as safetensors"
            if pickled
            else ""
        )
    )


_Parts = dict[str, LazyTensor]


def _sorted_out(
    tensors: Mapping[str, LazyTensor], where: str
) -> tuple[dict[str, _Parts], dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The parts of every module's update, whole parameters, and rows for tokens."""
    modules: dict[str, _Parts] = defaultdict(dict)
    saved, tokens, names, strange = {}, {}, set(), []
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        if (match := _PART.fullmatch(bare)) and "base_layer" not in match["module"]:
            part = match["part"].replace("embedding_", "")
            part += ".bias" if match["leaf"] == "bias" else ""
            part += " of an embedding" if "embedding" in match["part"] else ""
            modules[match["module"]][part] = tensor
            names.add(match["adapter"])
        elif match := _TOKENS.fullmatch(bare):
            tokens[match["module"]] = tensor
        elif ".original_module." not in bare:  # the base's own, from before the training
            whole = re.sub(r"\.modules_to_save\.[^.]+\.|\.modules_to_save\.", ".", bare)
            whole = whole.replace(".base_layer.", ".")
            if _STRANGE.search(whole):
                strange.append(f"{where}: {key} is no part of a LoRA that can be baked")
            saved[whole] = tensor
    if len(names) > 1:
        several = ", ".join(sorted(map(str, names)))
        raise FormatError(f"{where} holds several adapters ({several}): save one alone")
    UnsupportedError.raise_if(strange)
    return modules, saved, tokens


def _update(module: str, parts: _Parts, config: AdapterConfig) -> LowRank | list[str]:
    """The update of a module, or what is wrong with its parts."""
    embedding = any(part.endswith("embedding") for part in parts)
    end = " of an embedding" if embedding else ""
    a, b = parts.get(f"lora_A{end}"), parts.get(f"lora_B{end}")
    if a is None or b is None:
        return [f"{module} has {' and '.join(sorted(parts))}, and needs both lora_A and lora_B"]
    magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    problems = list(_problems(module, a, b, magnitude, bias, config))
    return problems or LowRank(a, b, config.scale_of(module), embedding, magnitude, bias)


def _problems(
    module: str,
    a: LazyTensor,
    b: LazyTensor,
    magnitude: LazyTensor | None,
    bias: LazyTensor | None,
    config: AdapterConfig,
) -> Iterator[str]:
    shapes = f"lora_A is {list(a.shape)} and lora_B is {list(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        yield f"{module}: {shapes}; only matrices can be baked, and no convolutions"
        return
    rank = config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        yield f"{module}: {shapes}, and {CONFIG} says that its rank is {rank}"
    if any(t is not None and t.dtype.kind != "float" for t in (a, b, magnitude, bias)):
        yield f"{module}: an update is made of floats, and lora_A is {a.dtype}"
    if config.dora and magnitude is None:
        yield f"{module} has no lora_magnitude_vector, and use_dora is set"
    if not config.dora and magnitude is not None:
        yield f"{module} has a lora_magnitude_vector, and use_dora isn't set"
    for name, vector in (("lora_magnitude_vector", magnitude), ("lora_B.bias", bias)):
        if vector is not None and vector.numel != b.shape[0]:
            yield f"{module}: {name} is {list(vector.shape)}, and there are {b.shape[0]} outputs"


def _with_indices(
    tokens: Mapping[str, LazyTensor], config: AdapterConfig
) -> tuple[dict[str, tuple[LazyTensor, tuple[int, ...]]], list[str]]:
    """Which token every row is for, as `trainable_token_indices` says, and what is wrong."""
    placed, problems = {}, []
    given = config.token_indices
    for module, rows in tokens.items():
        listed = given
        if isinstance(given, Mapping):
            ends = [key for key in given if module == key or module.endswith(f".{key}")]
            listed = given[ends[0]] if ends else None
        known = isinstance(listed, list) and all(type(at) is int and at >= 0 for at in listed)
        if not known or len(rows.shape) != 2 or not rows.rows == len(listed) == len(set(listed)):
            problems.append(
                f"{module} has rows of shape {list(rows.shape)} for tokens, and "
                f"trainable_token_indices is {brief(listed)}"
            )
        else:
            placed[module] = rows, tuple(listed)
    return placed, problems
