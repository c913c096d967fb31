"""Which quantization a checkpoint has: told by its config, or by the names and types of tensors.

Two tables: how configs call each scheme, and what its tensors look like where no config tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from surgery.tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]
_Kind = str | Callable[[str, Tensors], str | None]
CONFIG_KEYS = ("quantization_config", "compression_config")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

ORIGINAL = "give the checkpoint that it was made from"
LOADED = "give the checkpoint that it was made from, or one that transformers has dequantized"
DEQUANTIZED = (
    "give the checkpoint that it was made from, or load it with transformers, call "
    "model.dequantize() and save that"
)
DEQUANTIZE = "`surgery dequantize MODEL -o OUT` writes it in bfloat16, which can be given"


@dataclass(frozen=True)
class Quantization:
    """How weights are packed: `kind` as configs call it, `what` that is, `sign` what told it.
    `remedy` is what a user can do. `scaled` says that every weight is an 8-bit float times a
    scale, so that its values can be had (see fp8.py)."""

    kind: str
    what: str
    sign: str
    remedy: str
    scaled: bool = False

    def __str__(self) -> str:
        return f"{self.kind} ({self.what}; {self.sign})"


SCHEMES: Mapping[str, tuple[str, str]] = {
    "gptq": ("GPTQ, integers of 2 to 8 bits packed in int32 by groups", ORIGINAL),
    "awq": ("AWQ, 4-bit integers packed in int32 by groups", ORIGINAL),
    "auto-round": ("AutoRound, integers packed by groups", ORIGINAL),
    "bitsandbytes": (
        "NF4, FP4 or int8 of bitsandbytes",
        DEQUANTIZED,
    ),
    "mxfp4": (
        "4-bit floats, two to a byte, with a scale for each 32",
        "load it with transformers and Mxfp4Config(dequantize=True), save that, and give it",
    ),
    "mxfp8": ("8-bit floats with a scale for each 32", DEQUANTIZE),
    "nvfp4": ("4-bit floats, two to a byte, with a scale for each 16", LOADED),
    "compressed-tensors": ("integers or 4-bit floats of compressed-tensors", LOADED),
    "hqq": ("HQQ, packed integers with scales and zero points", ORIGINAL),
    "torchao": ("tensors of torchao, taken apart", ORIGINAL),
    "quanto": ("integers or 8-bit floats of Quanto", ORIGINAL),
    "quark": ("packed by AMD Quark", ORIGINAL),
    "modelopt": ("packed by NVIDIA's ModelOpt", ORIGINAL),
    "eetq": ("8-bit integers of EETQ", ORIGINAL),
    "aqlm": ("AQLM, indices into codebooks", ORIGINAL),
    "vptq": ("VPTQ, indices into codebooks", ORIGINAL),
    "higgs": ("HIGGS, indices into grids", ORIGINAL),
    "spqr": ("SpQR, 3-bit integers and sparse outliers", ORIGINAL),
    "bitnet": ("BitNet, ternary weights, four to a byte", ORIGINAL),
    "fp_quant": ("FP-Quant, 4-bit floats", ORIGINAL),
    "fouroversix": ("4-bit floats of Four Over Six", ORIGINAL),
    "sinq": ("SINQ, packed integers with two scales", ORIGINAL),
    "metal": ("packed integers for Metal", ORIGINAL),
    "fp8": ("8-bit floats with scales", DEQUANTIZE),
    "fbgemm_fp8": ("8-bit floats with a scale for each row", DEQUANTIZE),
}
"""What a `quant_method` is, and what to do about it."""


def find_quantization(tensors: Tensors, config: Mapping[str, Any]) -> Quantization | None:
    """How the weights are packed; None if they aren't."""
    given = quantization_config(config)
    signs = list(_signs(tensors))
    others = [sign for sign in signs if sign[0] != "fp8"]  # 8-bit floats can be another's scales
    packed = next(iter(others or signs), None)
    if given is None:
        if packed is None:
            return None
        kind, name = packed
        what, remedy = SCHEMES.get(kind, ("packed weights", ORIGINAL))
        ends = ("_scale_inv", ".weight_scale")  # without a config, as ModelOpt used to write it
        scaled = kind == "fp8" and any(n.endswith(ends) for n in tensors)
        if kind == "fp8" and not scaled:
            what, remedy = "8-bit floats, and nothing says by what they are scaled", ORIGINAL
        tensor = f"{name} is {tensors[name].dtype}"
        return Quantization(kind, what, tensor, remedy, scaled)
    method = str(given.get("quant_method") or given.get("quant_algo") or "unknown")
    what, remedy = SCHEMES.get(method.lower(), ("a scheme that isn't known here", ORIGINAL))
    sign = "its quantization_config says so"
    if packed is not None and packed[0] != method:
        sign += f", and {packed[1]} is {tensors[packed[1]].dtype}"
    scaled = method in ("fp8", "fbgemm_fp8", "mxfp8") or _is_float8(method, given)
    if scaled:
        what, remedy = SCHEMES["fp8"]
        if others:
            kind, name = others[0]
            what += f", and among them {name}, which looks like {kind}"
            remedy, scaled = ORIGINAL, False
    return Quantization(method, what, sign, remedy, scaled)


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The table in which the config describes how weights are packed, nested or not."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        for key in CONFIG_KEYS:
            if isinstance(found := part.get(key), Mapping):
                return found
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of weights that aren't packed."""
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(nested := kept.get("text_config"), Mapping):
        kept["text_config"] = {k: v for k, v in nested.items() if k not in CONFIG_KEYS}
    return kept


def weight_groups(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How compressed-tensors says that each group of modules has its weights."""
    groups = given.get("config_groups")
    tables = groups.values() if isinstance(groups, Mapping) else ()
    found = [group.get("weights") for group in tables if isinstance(group, Mapping)]
    return [weights for weights in found if isinstance(weights, Mapping)]


def microscaled(given: Mapping[str, Any]) -> bool:
    """Whether 8-bit floats have a scale for each 32 in a row, a byte that is a power of two (OCP's
    microscaling formats, MXFP8)."""
    return given.get("quant_method") == "mxfp8" or _algorithm(given) == "MXFP8"


def _algorithm(given: Mapping[str, Any]) -> str:
    """What ModelOpt did, which it tells here or one level below."""
    nested = given.get("quantization")
    inner = nested if isinstance(nested, Mapping) else {}
    return str(given.get("quant_algo") or inner.get("quant_algo") or "").upper()


def _is_float8(method: str, given: Mapping[str, Any]) -> bool:
    """Whether ModelOpt, or compressed-tensors, has nothing but symmetric 8-bit floats."""
    if method == "modelopt":
        return _algorithm(given) in ("FP8", "MXFP8")
    groups = weight_groups(given)
    return (
        method == "compressed-tensors"
        and given.get("format") in ("float-quantized", "naive-quantized")
        and bool(groups)
        and all(
            group.get("type") == "float"
            and group.get("num_bits") == 8
            and group.get("symmetric", True)
            for group in groups
        )
    )


def _signs(tensors: Tensors) -> Iterator[tuple[str, str]]:
    """The scheme that each packed tensor looks like, and the tensor's name."""
    for name, tensor in tensors.items():
        if (kind := _named(".".join(name.rsplit(".", 3)[-3:]))) is not None:
            found = kind if isinstance(kind, str) else kind(name, tensors)
            if found is not None:
                yield found, name
        elif tensor.dtype.kind != "float":
            if tensor.dtype.name in FLOAT8:
                yield "fp8", name
            elif tensor.dtype.kind == "packed" and tensor.dtype.name not in ("C64", "F8_E8M0"):
                yield tensor.dtype.name.lower(), name
            elif _integer_weight(name, tensor):
                yield "integers", name


@lru_cache(maxsize=4096)
def _named(end: str) -> _Kind | None:
    """What the end of a name tells."""
    return next((kind for pattern, kind in _NAMES if pattern.search(end)), None)


def _integer_weight(name: str, tensor: LazyTensor) -> bool:
    """Whether integers lie where a matrix of weights would."""
    small = tensor.dtype.name in ("I8", "U8", "I16", "U16", "I32", "U32")
    return small and len(tensor.shape) > 1 and name.endswith(".weight")


def _gptq_or_awq(name: str, tensors: Tensors) -> str:
    """GPTQ packs along the inputs, and AWQ along the outputs, of which scales tell the number."""
    stem = name.rpartition(".")[0]
    weight, scales = tensors.get(f"{stem}.qweight"), tensors.get(f"{stem}.scales")
    if f"{stem}.g_idx" in tensors or weight is None or scales is None:
        return "gptq"
    return "gptq" if weight.shape[-1:] == scales.shape[-1:] else "awq"


def _blocks(name: str, tensors: Tensors) -> str | None:
    """MXFP4's bytes, beside their scales."""
    scales = name.removesuffix("_blocks") + "_scales"
    return "mxfp4" if scales in tensors and tensors[name].dtype.name == "U8" else None


def _packed(name: str, tensors: Tensors) -> str:
    """What compressed-tensors calls packed: int32 for integers, bytes for 4-bit floats."""
    return "compressed-tensors" if tensors[name].dtype.name == "I32" else "nvfp4"


def _byte_scaled(name: str, tensors: Tensors) -> str | None:
    """A weight of bytes beside a scale of its scale is NVFP4 as ModelOpt writes it."""
    weight = tensors.get(name.removesuffix("_scale_2"))
    return "nvfp4" if weight is not None and weight.dtype.name == "U8" else None


_NAMES: tuple[tuple[re.Pattern[str], _Kind], ...] = (
    (re.compile(r"(^|\.)(qweight|qzeros|g_idx)$"), _gptq_or_awq),
    (
        re.compile(r"(^|\.)weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$"),
        "bitsandbytes",
    ),
    (re.compile(r"(^|\.)(SCB|absmax)$"), "bitsandbytes"),
    (re.compile(r"_blocks$"), _blocks),
    (re.compile(r"(^|\.)weight_packed$"), _packed),
    (re.compile(r"(^|\.)weight_scale_2$"), _byte_scaled),
    (re.compile(r"(^|\.)W_q$"), "hqq"),
    (re.compile(r"(^|[._])weight[_:]{1,2}(qdata|int_data|data_impl|packed_weight)$"), "torchao"),
    (re.compile(r"(^|\.)weight\._(data|scale|packed)$"), "quanto"),
    (re.compile(r"(^|\.)codebooks$"), "aqlm"),
    (re.compile(r"(^|\.)(res_)?centroids(\.weight)?$"), "vptq"),
    (re.compile(r"(^|\.)dense_weights$"), "spqr"),
    (re.compile(r"_scale_inv$"), "fp8"),
)
"""Names of tensors that one scheme alone has. A function looks further."""
