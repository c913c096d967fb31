"""What the operations do to one tiny checkpoint, each against plain arithmetic of its own.

What isn't right goes under `refused`: the sentence with which the tool refuses, or an error.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import load
from safetensors.torch import save_file

from surgery import (
    Checkpoint,
    UnsupportedError,
    certify,
    diff,
    grow,
    lines,
    merge,
    open_checkpoint,
)
from surgery.anatomy import MLP
from surgery.growth import Growth
from surgery.modeling.build import build_model
from surgery.tensor import LazyTensor
from surgery.verification import find_growths
from surgery.verification.inputs import make_inputs
from surgery.verification.outputs import main_output

from .build import MOST_VALUES, Tiny, tokens

Values = Mapping[str, torch.Tensor]

ALPHA = 0.3
SAME = 1e-5
"""What rounding explains of max |d| / max |logit|: norms and softmax compute in float32 whatever
the weights are. A split that was forgotten gives a hundred times as much at the least."""


def examine(tiny: Tiny, *, search: bool = True) -> dict[str, Any]:
    """Everything that `expected.json` says of a type that can be built. Without `search` one that
    wasn't seen to run has no inputs, and nobody asks why."""
    base = open_checkpoint(str(tiny.folder))
    tuned = [_tuned(tiny.folder, seed) for seed in (1, 2)]
    result: dict[str, Any] = {
        "class": tiny.kind.model_class.__name__,
        "stacks": dict(base.anatomy.stacks),
        "mlp": mlp_kind(base),
    }
    left = left_out(base)
    if left:
        result["left out"] = left
    wanted = search or tiny.runs or tiny.kind.tokens
    inputs, what, unreached = what_it_runs_on(tiny, base) if wanted else ({}, "", [])
    before = cache(lambda: outputs(base, inputs))
    chosen = [mlp for mlp in base.anatomy.every_mlp if mlp.stack not in left]
    last = some(chosen)
    even = any(mlp.even_because for mlp in chosen)
    # a fraction where it may be: a norm behind the MLP would hide that the split is forgotten
    part = 3 if any(mlp.even_because for mlp in chosen if str(mlp.block) == last) else 1.5
    checks: dict[str, Callable[[], object]] = {
        "anatomy": lambda: check_anatomy(tiny, base),
        "lines": lambda: check_lines(base, tuned[0]),
        "merge": lambda: check_merge(base, tuned),
        "diff": lambda: check_diff(base, tuned[0]),
        "grow 2": lambda: check_growth(base, before, inputs, factor=2),
        "grow 1.5": lambda: check_growth(base, before, inputs, factor=1.5),
        "some": lambda: check_growth(base, before, inputs, factor=part, layers=last),
        "padded": lambda: check_growth(
            base, before, inputs, factor=part, layers=last, uniform=True
        ),
    }
    if even:
        checks["grow 3"] = lambda: check_growth(base, before, inputs, factor=3)
    if left:
        whole = any(mlp.even_because for mlp in base.anatomy.every_mlp)
        checks["grow all"] = lambda: check_growth(
            base, before, inputs, factor=3 if whole else 1.5, scope="all"
        )
    refused = {}
    for name, check in checks.items():
        try:
            check()
        except UnsupportedError as refusal:
            refused[name] = reason(refusal.problems, base)
        except Exception as error:  # noqa: BLE001  whatever is raised is a finding
            refused[name] = f"ERROR {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    result |= {"logits": bool(inputs)} | ({"inputs": what} if not tiny.kind.tokens else {})
    result |= {"not run": unreached} if unreached else {}
    return result | {"refused": refused}


def what_it_runs_on(tiny: Tiny, base: Checkpoint) -> tuple[Values, str, list[str]]:
    """The inputs that outputs are compared on, nothing where there are none; in words; and the
    stacks with MLPs that they don't go through."""
    if tiny.kind.tokens:
        return ({"input_ids": tokens()} if tiny.runs else {}), "48 tokens", []
    try:
        made = make_inputs(base)
        if sum(value.numel() for value in made.values.values()) > MOST_VALUES:
            return {}, "inputs that are too large to run here", []
        if not bool(outputs(base, made.values).isfinite().all()):
            return {}, "outputs that aren't finite", []
    except UnsupportedError as refusal:
        return {}, reason(refusal.problems, base)[:160], []
    except Exception as error:  # noqa: BLE001  models raise all there is
        return {}, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}", []
    return made.values, made.what, sorted({stack for stack, _, _ in made.unreached or ()})


def some(mlps: Sequence[MLP]) -> str:
    """The last of the layers that have an MLP, in all stacks that grow."""
    last: dict[str, int] = {}
    for mlp in mlps:
        last[mlp.stack] = max(mlp.block or 0, last.get(mlp.stack, 0))
    return str(min(last.values(), default=0))


def reason(problems: tuple[str, ...], base: Checkpoint) -> str:
    """The first sentence of a refusal, without what is particular to a block or a folder."""
    text = problems[0].replace(base.source.reference, "the checkpoint")
    return re.sub(r"\.\d+(?=[ .])", ".*", text)


def left_out(base: Checkpoint) -> list[str]:
    """The stacks with MLPs that grow only if they are asked for."""
    try:
        grown = {growth.mlp.stack for growth in find_growths(base, grow(base))}
    except Exception:  # noqa: BLE001  the check of growth says what it is
        return []
    return sorted({mlp.stack for mlp in base.anatomy.every_mlp} - grown)


def mlp_kind(base: Checkpoint) -> str:
    """What kinds of MLP were found."""
    kinds = set()
    for mlp in base.anatomy.every_mlp:
        if mlp.kind != "dense":
            continue
        fused = ", fused" if mlp.ups[0].parts == 2 else ""
        kinds.add(("gated" if mlp.gated else "plain") + fused)
    if any(place.role.value == "expert" for place in base.anatomy.places.values()):
        kinds.add("experts")
    return " and ".join(sorted(kinds)) or "none"


def check_anatomy(tiny: Tiny, base: Checkpoint) -> None:
    """Blocks as the model has them; the same from names alone; nothing lost."""
    anatomy = base.anatomy
    assert set(anatomy.places) == set(load(tiny.folder)) == set(base)
    missing = {
        name: length
        for name, length in tiny.lists.items()
        if any(key.startswith(f"{name}.0.") for key in base)
        and anatomy.stacks.get(name) != length
        and not any(name.startswith(f"{stack}.") for stack in anatomy.stacks)
    }
    assert not missing, f"lists of blocks that weren't found: {missing}"
    if tiny.kind.kind == "causal":
        config = base.config.get("text_config", base.config)
        depth = next(
            (
                config[k]
                for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
                if k in config
            ),
            None,
        )
        if depth in tiny.lists.values():  # some configs mean another number by it
            assert depth in anatomy.stacks.values(), f"{depth}: {anatomy.stacks}"
    bare = replace(base, config={}).anatomy
    assert bare.stacks == anatomy.stacks, f"without a config: {bare.stacks}"
    for name, place in bare.places.items():
        wanted = anatomy.places[name]
        assert (place.stack, place.block) == (wanted.stack, wanted.block), name


def check_lines(base: Checkpoint, tuned: Checkpoint) -> None:
    """theta_base + lambda * (theta_tuned - theta_base), lambda by the numbers in the names."""
    edited = lines(base, tuned, alpha=ALPHA)
    scales = scales_by_name(list(tuned), list(base.anatomy.stacks))
    assert list(edited) == list(tuned)
    for name, tensor in edited.items():
        a, b = base[name].whole(), tuned[name].whole()
        found = tensor.whole()
        assert (found.dtype, found.shape) == (b.dtype, b.shape), name
        if not found.is_floating_point():
            assert torch.equal(found, b), name
            continue
        if base.anatomy.places[name].role.value == "buffer":
            assert torch.equal(found, b), name
            continue
        wanted = a.double() + scales[name] * (b.double() - a.double())
        assert_close(name, found, wanted)


def scales_by_name(names: list[str], stacks: list[str]) -> dict[str, float]:
    """lambda of every tensor from its name: the number behind the stack, of as many as there are."""
    blocks: dict[str, tuple[str, int]] = {}
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            prefix = ".".join(parts[:at])
            if part.isdigit() and prefix in stacks:
                blocks[name] = prefix, int(part)
                numbers[prefix].add(int(part))
                break
    scales = dict.fromkeys(names, ALPHA)
    for name, (stack, block) in blocks.items():
        last = max(numbers[stack])
        scales[name] = ALPHA + (1 - ALPHA) * (block / last if last else 1.0)
    return scales


def assert_close(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal within two roundings of float32."""
    if found.numel():
        off = (found.double() - wanted).abs()
        bound = 4 * torch.finfo(found.dtype).eps * wanted.abs().clamp(min=1.0)
        assert bool((off <= bound).all()), f"{name} is off by {float(off.max()):.3g}"


def check_merge(base: Checkpoint, tuned: list[Checkpoint]) -> None:
    """Task arithmetic of two: theta_base + 0.7 (tau_1 + tau_2)."""
    merged = merge(tuned, base=base, method="task_arithmetic", weight=0.7)
    assert list(merged) == list(base)
    for name, tensor in merged.items():
        a, found = base[name].whole(), tensor.whole()
        buffer = base.anatomy.places[name].role.value == "buffer"
        if buffer or not found.is_floating_point():
            assert torch.equal(found, a), name
            continue
        taus = sum(0.7 * (model[name].whole().double() - a.double()) for model in tuned)
        assert_close(name, found, a.double() + taus)


def check_diff(base: Checkpoint, tuned: Checkpoint) -> None:
    """Every tensor that moved is reported, with the norm of its update."""
    found = diff(base, tuned)
    assert {change.name for change in found.changes} == set(base)
    assert not found.added + found.removed
    assert not {**found.reshaped, **found.retyped}
    for change in found.changes:
        a, b = base[change.name].whole(), tuned[change.name].whole()
        if not bool(torch.isfinite(a).all()):  # limits that were never calibrated
            continue
        wanted = float((b.double() - a.double()).norm())
        assert abs(change.norm - wanted) <= 1e-9 * max(1.0, wanted), change.name


def check_growth(
    base: Checkpoint, before: Callable[[], torch.Tensor], inputs: Values, **options: Any
) -> list[Growth]:
    """The certificate holds and the outputs stay what they were before; with the split forgotten
    neither is so. A random choice, so that neurons that aren't of one MLP would be told."""
    grown = grow(base, choose="random", **options)
    growths = list(find_growths(base, grown))
    assert growths, "no growth was found in what was grown"
    certificate = certify(base, grown, growths)
    assert certificate.holds, certificate.failures[:2]
    wrong = _without_split(base, grown, growths) if options["factor"] != 2 else None
    if wrong is not None:
        assert not certify(base, wrong, growths).holds, "the certificate holds without the split"
    if not inputs:
        return growths
    were = before()
    off = apart(outputs(grown, inputs), were)
    assert off <= SAME, f"logits are apart by {off:.3g}"
    if wrong is not None and "input_ids" in inputs:  # a head may not look at what a tower makes
        off = apart(outputs(wrong, inputs), were)
        assert off > 3 * SAME, f"without the split logits are apart by {off:.3g} only"
    return growths


def _without_split(base: Checkpoint, grown: Checkpoint, growths: list[Growth]) -> Checkpoint:
    """The control: neurons copied, and the weights that lead out of them copied whole."""
    tensors: dict[str, LazyTensor] = dict(grown.tensors)
    for growth in growths:
        down = growth.mlp.down
        whole = base[down.weight].whole()
        index = down.indices(growth.sources(), growth.mlp.width, below=down.flat)
        copied = torch.from_numpy(index).clamp(min=0)
        values = whole.index_select(down.axis(down=True), copied)
        tensors[down.weight] = replace(
            grown[down.weight], leaf=Given(values), inputs=(), kernel=None
        )
    return replace(grown, tensors=tensors)


@dataclass(frozen=True, eq=False)
class Given:
    """A leaf that is a tensor in memory."""

    values: torch.Tensor

    def read(self, tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
        return self.values.reshape(tensor.shape_of(tensor.rows))[start:stop].clone()


def outputs(checkpoint: Checkpoint, inputs: Values) -> torch.Tensor:
    """Logits, or what else a model gives first, in float64 where the model can."""
    for dtype in (torch.float64, torch.float32):
        built = build_model(checkpoint, dtype, "cpu")
        assert not built.missing, f"not in the files: {built.missing[:3]}"
        try:
            given = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in inputs.items()
            }
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                found = main_output(built.model(**given))
            assert found is not None
            return found[1].double()
        except RuntimeError:
            if dtype is torch.float32:
                raise
    raise AssertionError


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape
    assert bool(torch.isfinite(b).all())
    return float((a - b).abs().max() / b.abs().max())


def _tuned(folder: Path, seed: int) -> Checkpoint:
    """The checkpoint after a made-up fine-tuning: every float tensor moved, integers kept."""
    target = folder.parent / f"{folder.name}-tuned-{seed}"
    generator = torch.Generator().manual_seed(seed)
    tensors: Mapping[str, torch.Tensor] = {
        name: value + (0.05 * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in load(folder).items()
    }
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if (folder / "config.json").is_file():
        shutil.copy(folder / "config.json", target)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return open_checkpoint(str(target))
