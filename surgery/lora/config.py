"""`adapter_config.json`: what it takes to know what PEFT would compute, and what isn't LoRA as
Surgery knows it, refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from surgery.errors import FormatError, UnsupportedError
from surgery.lora.patterns import Matcher, why_not
from surgery.untrusted import brief

CONFIG = "adapter_config.json"
LARGEST = 1e100

_VARIANTS = {
    "alora_invocation_tokens": "activated LoRA, which changes the model only after some tokens",
    "arrow_config": "Arrow, which chooses among adapters token by token",
    "kasa_config": "KaSA, which takes parts of the base away",
    "layer_replication": "it repeats layers of the base",
    "monteclora_config": "MonteCLoRA, whose weights are random",
    "target_parameters": "LoRA on parameters that belong to no layer (fused experts)",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools the inputs",
    "velora_config": "VeLoRA",
}
"""Keys that make the update another than scale * B A, and what they stand for."""
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base as it is. Of the others (PiSSA, OLoRA, CorDA, LoRA-GA,
LoftQ) the adapter belongs to a base from which something was taken first."""


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says about the update. The patterns are regular expressions
    that match the end of a module's name."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    fan_in_fan_out: bool = False
    """Whether the base stores its matrices (in, out)."""
    keeps_tied: bool = False
    """Whether head and embedding were trained as one where the base ties them."""
    saved: tuple[str, ...] = ()
    """The ends of the names of modules that were trained whole."""
    token_indices: Any = None
    base: str | None = None
    """What the base was called where the adapter was trained."""
    matcher: Matcher = field(default_factory=Matcher, repr=False)

    def rank_of(self, module: str) -> int:
        """r of a module."""
        return int(self._of(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = self._of(self.alpha_pattern, module, self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)

    def _of(self, patterns: Mapping[str, float], module: str, otherwise: float) -> float:
        """The value of the first pattern that matches, as PEFT matches them."""
        matching = (v for pattern, v in patterns.items() if self.matcher.matches(pattern, module))
        return next(matching, otherwise)


def parse_config(table: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config in the JSON `table`. Raises UnsupportedError with every key that stands for
    something else than LoRA, or FormatError with all that can't be meant."""
    UnsupportedError.raise_if(f"{where}: {problem}" for problem in _unsupported(table))
    FormatError.raise_if(f"{where}: {problem}" for problem in _malformed(table))
    base = table.get("base_model_name_or_path")
    return AdapterConfig(
        rank=table.get("r", 8),
        alpha=float(table.get("lora_alpha", 8)),
        rank_pattern=table.get("rank_pattern") or {},
        alpha_pattern=table.get("alpha_pattern") or {},
        rslora=bool(table.get("use_rslora")),
        dora=bool(table.get("use_dora")),
        fan_in_fan_out=bool(table.get("fan_in_fan_out")),
        keeps_tied=bool(table.get("ensure_weight_tying")),
        saved=tuple(map(str, table.get("modules_to_save") or ())),
        token_indices=table.get("trainable_token_indices"),
        base=base if isinstance(base, str) and base else None,
    )


def _unsupported(table: Mapping[str, Any]) -> Iterator[str]:
    kind = table.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {brief(kind)}, and only LORA can be computed from the weights"
        return
    for key, meaning in _VARIANTS.items():
        if table.get(key):
            yield f"{key} is set ({meaning}), and that can't be baked into the base"
    start = table.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _HARMLESS_STARTS:
        yield (
            f"init_lora_weights is {start!r}: training took something from the base first, and "
            f"the adapter doesn't say what. Let PEFT convert it (save_pretrained with "
            f"path_initial_model_for_weight_conversion), or merge it with PEFT"
        )


def _malformed(table: Mapping[str, Any]) -> Iterator[str]:
    rank, alpha = table.get("r", 8), table.get("lora_alpha", 8)
    if not (_number(rank) and isinstance(rank, int) and rank > 0):
        yield f"r is {brief(rank)}, and has to be a whole number above 0"
    if not _number(alpha):
        yield f"lora_alpha is {brief(alpha)}, and has to be a number"
    saved = table.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        yield f"modules_to_save is {brief(saved)}, and has to be a list of names"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = table.get(key) or {}
        if not isinstance(patterns, Mapping):
            yield f"{key} is {brief(patterns)}, and has to be a table of numbers by module"
            continue
        for pattern, value in patterns.items():
            if not _number(value) or (key == "rank_pattern" and not value >= 1):
                yield f"{key} has {brief(value)} for {pattern}"
            if (reason := why_not(pattern)) is not None:
                yield f"{key} has {brief(pattern)}, which isn't a regular expression: {reason}"


def _number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -LARGEST < value < LARGEST  # not so of NaN
