"""Tiny checkpoints of any model type, with random weights, saved by transformers itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from families import quiet
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgery import open_checkpoint
from surgery.verification.inputs import make_inputs
from surgery.verification.outputs import main_output

from .kinds import Kind
from .quirks import QUIRKS
from .shrink import GROUPS, VOCABULARY, shrink, with_small_images

LIMIT = 20_000_000
"""Parameters beyond which a model isn't tiny."""
MOST_VALUES = 1 << 21
"""Values of inputs that are run: an image of a thousand pixels a side, which a config that can't be
shrunk asks for, takes minutes of attention."""


class NotBuilt(Exception):
    """What transformers said, in a line."""


class FarTooLargeError(NotBuilt):
    """No other config that is tried will be small."""


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk, what it is of, and whether it was seen to run."""

    folder: Path
    kind: Kind
    runs: bool
    lists: dict[str, int]
    """The outermost lists of blocks among the model's modules, and how long they are."""


def build(kind: Kind, folder: Path, *, search: bool = True) -> Tiny:
    """The tiny model of a kind, in `folder`. Raises NotBuilt.

    Of the configs that are tried the first whose model runs is taken, or else the first that can
    be built; without `search` that one in any case.
    """
    first: Exception | None = None
    chosen = fallback = None
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for dropped, values in _attempts(kind):
            if dropped > 1 and fallback is not None:
                break  # it was built, and no single rule is why it doesn't run
            try:
                model = _model(kind, values)
                runs = _runs(kind, model, folder)
                if runs is None:
                    model = _model(kind, with_small_images(values))
                    runs = _runs(kind, model, folder)
            except Exception as error:  # noqa: BLE001  config classes raise all there is
                first = first or error
                if isinstance(first, FarTooLargeError):
                    break  # with every rule, so without some as well
                continue
            fallback = fallback or model
            if runs:
                chosen = model
            if runs or not (search or kind.tokens):
                break
        model = chosen or fallback
        if model is None:
            raise NotBuilt(_line(first)) from first
        _save(model, folder)
    return Tiny(folder, kind, chosen is not None, _lists(model))


def _model(kind: Kind, values: dict[str, Any]) -> Any:
    config = _config(kind, values)
    _check_size(kind, config)
    model = kind.model_class(copy.deepcopy(config))
    _spread(model)
    return model


def _save(model: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder)
    except Exception as error:
        raise NotBuilt(f"save_pretrained: {_line(error)}") from error
    if not any(folder.glob("*.safetensors")):
        raise NotBuilt("save_pretrained writes no tensors")


def _lists(model: Any) -> dict[str, int]:
    """Lists of several modules of some size that aren't part of such a list themselves."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) < 2:
            continue
        sizes = [sum(1 for _ in block.parameters()) if block else 0 for block in module]
        if min(sizes) and max(sizes) > 2 and not any(name.startswith(f"{n}.") for n in found):
            found[name] = len(module)
    return found


def _attempts(kind: Kind) -> Iterator[tuple[int, dict[str, Any]]]:
    """Configs to try: all rules, then without one group of them, then without two."""
    try:
        values = _with_sections(CONFIG_MAPPING[kind.model_type]().to_dict())
    except Exception as error:
        raise NotBuilt(f"its config has no default: {_line(error)}") from error
    for count in range(3):
        for keep in combinations(GROUPS, count):
            small = shrink(values, keep)
            if kind.kind == "causal" and "is_decoder" in small:
                small["is_decoder"] = True
            _merge(small, QUIRKS.get(kind.model_type, {}))
            yield count, small


def _with_sections(values: dict[str, Any]) -> dict[str, Any]:
    """With the parts of a head that turn by time, height and width, where the model's code has
    them and the default config hasn't: the code's are as large as the heads of a real model."""
    values = {k: _with_sections(v) if isinstance(v, dict) else v for k, v in values.items()}
    name, rope = values.get("model_type"), values.get("rope_parameters")
    known = CONFIG_MAPPING[name] if name in CONFIG_MAPPING else None  # noqa: SIM401  it's lazy
    keys = getattr(known, "ignore_keys_at_rope_validation", None) or ()
    flat = isinstance(rope, dict) and not any(isinstance(one, dict) for one in rope.values())
    if rope and flat and "mrope_section" in keys:
        values["rope_parameters"] = {"mrope_section": [16, 24, 24]} | rope
    return values


def _config(kind: Kind, values: dict[str, Any]) -> Any:
    """The config, or the part of it that the class takes: a causal class is often of one part."""
    config = CONFIG_MAPPING[kind.model_type].from_dict(copy.deepcopy(values))
    takes = kind.model_class.config_class
    if takes is None or isinstance(config, takes):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, takes)]
    return parts[0] if parts else config


def _merge(values: dict[str, Any], quirks: dict[str, Any]) -> None:
    for key, value in quirks.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _check_size(kind: Kind, config: Any) -> None:
    with torch.device("meta"):
        model = kind.model_class(copy.deepcopy(config))
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LIMIT:
        kind_of_error = FarTooLargeError if count > 5 * LIMIT else NotBuilt
        raise kind_of_error(f"{count / 1e6:,.0f}M parameters, however small its config is made")
    if count == 0:
        raise NotBuilt("it has no parameters")


def _spread(model: Any) -> None:
    """Random values for every parameter, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                values = 0.2 * torch.randn(parameter.shape, generator=generator)
                norm = "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(values + (1.0 if norm else 0.0))


def tokens() -> torch.Tensor:
    """Two sequences of 24 tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY // 2, (2, 24), generator=generator)


def _runs(kind: Kind, model: Any, folder: Path) -> bool | None:
    """Whether it takes inputs that are made for it, and gives numbers; None if these are too
    large to run."""
    try:
        made = {"input_ids": tokens()} if kind.tokens else _inputs(model, folder)
        if sum(value.numel() for value in made.values()) > MOST_VALUES:
            return None
        with torch.no_grad():
            found = main_output(model.eval()(**made))
        return found is not None and bool(found[1].isfinite().all() and found[1].any())
    except Exception:  # noqa: BLE001  models raise all there is
        return False


def _inputs(model: Any, folder: Path) -> Mapping[str, torch.Tensor]:
    _save(model, folder)
    return make_inputs(open_checkpoint(str(folder))).values


def _line(error: BaseException | None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
