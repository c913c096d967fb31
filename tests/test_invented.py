"""Architectures that nobody made, as raw files without a config: what is recognised has to be right,
checked by running them, and what can't be told has to be refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import save_raw
from torch.nn.functional import silu

from surgery import (
    Checkpoint,
    RecipeError,
    UnsupportedError,
    certify,
    find_growths,
    grow,
    lines,
    merge,
    open_checkpoint,
)
from surgery.recipe import correct_anatomy

H, KEYS, WIDTH, EXPERTS, DEPTH = 16, 8, 40, 4, 3
Tensors = Mapping[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Invented:
    """The tensors of a block, the list that blocks are in, and what the MLP of one computes."""

    block: Shapes
    mlp: Callable[[torch.Tensor, Tensors], torch.Tensor]
    stack: str = "transformer.stage_list"
    grown: tuple[str, ...] = ()
    """The tensors of a block that widen."""
    refused: str | None = None


def plain(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return silu(x @ t["ffn_in.weight"].T + t["ffn_in.bias"]) @ t["ffn_out.weight"].T


def plain_in_out(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return silu(x @ t["ffn_in.weight"]) @ t["ffn_out.weight"]


def unnamed(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return silu(x @ t["a.weight"]) @ t["b.weight"]


def gated_in_out(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return (silu(x @ t["g.weight"]) * (x @ t["u.weight"])) @ t["d.weight"]


def gated(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    gate, up, down = (t[name] for name in GATED)
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def interleaved(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    both = x @ t["ff.proj_1.weight"].T
    return (silu(both[:, ::2]) * both[:, 1::2]) @ t["ff.proj_2.weight"].T


def geglu(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    value, gate = (x @ t["ff.net.0.proj.weight"].T + t["ff.net.0.proj.bias"]).chunk(2, 1)
    return (value * torch.nn.functional.gelu(gate)) @ t["ff.net.2.weight"].T + t["ff.net.2.bias"]


def numbered(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    weights = torch.softmax(x @ t["moe.chooser.weight"].T, 1)
    each = [
        silu(x @ t[f"moe.specialists.{e}.one.weight"].T) @ t[f"moe.specialists.{e}.two.weight"].T
        for e in range(EXPERTS)
    ]
    return sum(weights[:, e, None] * made for e, made in enumerate(each))  # type: ignore[return-value]


def flat(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    return side_by_side(x, x @ t["moe.selector.weight"].T, t)


def flat_in_two_steps(x: torch.Tensor, t: Tensors) -> torch.Tensor:
    steps = (t[f"moe.chooser.{n}.weight"] for n in (0, 2))
    return side_by_side(x, silu(x @ next(steps).T) @ next(steps).T, t)


def side_by_side(x: torch.Tensor, scores: torch.Tensor, t: Tensors) -> torch.Tensor:
    weights = torch.softmax(scores, 1)
    first, second = t["moe.w_in.weight"].chunk(EXPERTS), t["moe.w_out.weight"].chunk(EXPERTS, 1)
    each = [silu(x @ a.T) @ b.T for a, b in zip(first, second, strict=True)]
    return sum(weights[:, e, None] * made for e, made in enumerate(each))  # type: ignore[return-value]


ATTENTION: Shapes = {
    "mix_q.weight": (H, H),
    "mix_k.weight": (KEYS, H),
    "mix_v.weight": (KEYS, H),
    "mix_o.weight": (H, H),
    "pre.scale": (H,),
    "post.scale": (H,),
}
TURNED = {name: shape[::-1] for name, shape in ATTENTION.items()}
SQUARE = {name: (H, H) if len(shape) == 2 else shape for name, shape in ATTENTION.items()}
SPECIALISTS: Shapes = {
    f"moe.specialists.{e}.{name}.weight": shape
    for e in range(EXPERTS)
    for name, shape in (("one", (WIDTH, H)), ("two", (H, WIDTH)))
}
GEGLU: Shapes = {
    "ff.net.0.proj.weight": (2 * WIDTH, H),
    "ff.net.0.proj.bias": (2 * WIDTH,),
    "ff.net.2.weight": (H, WIDTH),
    "ff.net.2.bias": (H,),
}
FFN: Shapes = {"ffn_in.weight": (WIDTH, H), "ffn_in.bias": (WIDTH,), "ffn_out.weight": (H, WIDTH)}

GATED: Shapes = {
    "ff.gate_proj.weight": (WIDTH, H),
    "ff.up_proj.weight": (WIDTH, H),
    "ff.down_proj.weight": (H, WIDTH),
}

INVENTED = {
    "names of its own": Invented({**ATTENTION, **FFN}, plain, grown=tuple(FFN)),
    "(in, out), told by names": Invented(
        {**SQUARE, "ffn_in.weight": (H, WIDTH), "ffn_out.weight": (WIDTH, H)},
        plain_in_out,
        grown=("ffn_in.weight", "ffn_out.weight"),
    ),
    "(in, out), told by attention": Invented(
        {**TURNED, "a.weight": (H, WIDTH), "b.weight": (WIDTH, H)},
        unnamed,
        grown=("a.weight", "b.weight"),
    ),
    "(in, out), told by the gate": Invented(
        {**SQUARE, "g.weight": (H, WIDTH), "u.weight": (H, WIDTH), "d.weight": (WIDTH, H)},
        gated_in_out,
        grown=("g.weight", "u.weight", "d.weight"),
    ),
    "the GEGLU of diffusers": Invented({**ATTENTION, **GEGLU}, geglu, grown=tuple(GEGLU)[:3]),
    "experts by another name": Invented(
        {**ATTENTION, "moe.chooser.weight": (EXPERTS, H), **SPECIALISTS},
        numbered,
        grown=tuple(SPECIALISTS),
    ),
    "(in, out), told by nothing": Invented(
        {**SQUARE, "a.weight": (H, WIDTH), "b.weight": (WIDTH, H)},
        unnamed,
        refused=r"nothing tells whether b.weight and a.weight are stored \(out, in\) or",
    ),
    "gate and up neuron by neuron": Invented(
        {**ATTENTION, "ff.proj_1.weight": (2 * WIDTH, H), "ff.proj_2.weight": (H, WIDTH)},
        interleaved,
        refused="whether gate and up are the halves of ff.proj_1.weight or lie neuron by neuron",
    ),
    "an adapter beside the MLP": Invented(
        {**ATTENTION, **GATED, "side_gate.weight": (KEYS, H), "side_back.weight": (H, KEYS)},
        gated,
        refused="side_gate.weight may choose between experts that lie in ff.down_proj.weight",
    ),
    "experts side by side": Invented(
        {
            **ATTENTION,
            "moe.selector.weight": (EXPERTS, H),
            "moe.w_in.weight": (EXPERTS * WIDTH, H),
            "moe.w_out.weight": (H, EXPERTS * WIDTH),
        },
        flat,
        refused="moe.selector.weight may choose between experts that lie in moe.w_out.weight",
    ),
    "experts side by side, routed in two steps": Invented(
        {
            **ATTENTION,
            "norm.weight": (H,),
            "moe.chooser.0.weight": (KEYS, H),
            "moe.chooser.2.weight": (EXPERTS, KEYS),
            "moe.w_in.weight": (EXPERTS * WIDTH, H),
            "moe.w_out.weight": (H, EXPERTS * WIDTH),
        },
        flat_in_two_steps,
        refused="moe.chooser.0.weight may choose between experts that lie in moe.w_out.weight",
    ),
}
EVERY = sorted(INVENTED)
GROWN = [name for name in EVERY if INVENTED[name].refused is None]


def save(kind: Invented, folder: Path, seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    tensors = {"tok.table": torch.randn(50, H), "final.scale": torch.randn(H)}
    for number in range(DEPTH):
        for name, shape in kind.block.items():
            tensors[f"{kind.stack}.{number}.{name}"] = torch.randn(shape, dtype=torch.float64)
    return open_checkpoint(save_raw(folder, tensors))


def computed(kind: Invented, model: Checkpoint, block: int) -> torch.Tensor:
    prefix = f"{kind.stack}.{block}."
    inside = {n.removeprefix(prefix): t.whole() for n, t in model.items() if n.startswith(prefix)}
    generator = torch.Generator().manual_seed(1)
    return kind.mlp(torch.randn(5, H, dtype=torch.float64, generator=generator), inside)


def same_function(kind: Invented, base: Checkpoint, grown: Checkpoint) -> bool:
    """By the formula, which knows nothing of what was recognised."""
    pairs = [(computed(kind, base, n), computed(kind, grown, n)) for n in range(DEPTH)]
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_and_attention(name: str, tmp_path: Path):
    kind = INVENTED[name]
    anatomy = save(kind, tmp_path / "m").anatomy
    assert anatomy.stacks == {kind.stack: DEPTH}
    roles = {anatomy.places[f"{kind.stack}.1.mix_{letter}.weight"].role for letter in "qkvo"}
    assert {role.value for role in roles} == {"attention"}


@pytest.mark.parametrize("name", GROWN)
@pytest.mark.parametrize("factor", [2, 1.5])
def test_growth_is_right(name: str, factor: float, tmp_path: Path):
    kind = INVENTED[name]
    base = save(kind, tmp_path / "m")
    grown = grow(base, factor=factor)
    assert same_function(kind, base, grown)
    assert certify(base, grown, find_growths(base, grown)).holds
    wider = {n for n in base if base[n].shape != grown[n].shape}
    assert wider == {f"{kind.stack}.{n}.{inner}" for n in range(DEPTH) for inner in kind.grown}


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(GROWN)))
def test_what_cannot_be_told_is_refused(name: str, tmp_path: Path):
    with pytest.raises(UnsupportedError, match=INVENTED[name].refused) as caught:
        grow(save(INVENTED[name], tmp_path / "m"))
    assert len(caught.value.problems) == DEPTH
    assert "--anatomy can say it" in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_lines_and_merge(name: str, tmp_path: Path):
    kind = INVENTED[name]
    base, tuned = save(kind, tmp_path / "a"), save(kind, tmp_path / "b", seed=1)
    scaled = lines(base, tuned, alpha=0.2)
    mean = merge([base, tuned], method="linear")
    for tensor, old in base.items():
        a, b = old.whole().double(), tuned[tensor].whole().double()
        block = tensor.removeprefix(f"{kind.stack}.")
        depth = int(block.split(".")[0]) / (DEPTH - 1) if block != tensor else 0
        wanted = a + (0.2 + 0.8 * depth) * (b - a)
        assert torch.allclose(scaled[tensor].whole().double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.allclose(mean[tensor].whole().double(), (a + b) / 2, rtol=1e-5, atol=1e-6)


SAID = {
    "(in, out), told by nothing": "ups: [a.weight], down: b.weight, in_out: true",
    "gate and up neuron by neuron": (
        "ups: [ff.proj_1.weight], down: ff.proj_2.weight, parts: 2, interleaved: true"
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_user_can_say_it(name: str, tmp_path: Path):
    kind = INVENTED[name]
    base = save(kind, tmp_path / "m")
    path = tmp_path / "anatomy.yaml"
    path.write_text(f"mlps: [{{stack: {kind.stack}, {SAID[name]}}}]")
    given = correct_anatomy(base, path)
    assert same_function(kind, base, grow(given, factor=1.5))
    wrong = SAID[name].replace("interleaved: true", "interleaved: false")
    path.write_text(f"mlps: [{{stack: {kind.stack}, {wrong}}}]")
    if wrong != SAID[name]:
        assert not same_function(kind, base, grow(correct_anatomy(base, path), factor=1.5))
    path.write_text(
        f"mlps: [{{stack: {kind.stack}, ups: [a.weight], down: b.weight, interleaved: true}}]"
    )
    with pytest.raises(RecipeError, match="this is for gate and up in one matrix: parts: 2"):
        correct_anatomy(base, path)


def test_attention_and_mlps_in_lists_of_their_own(tmp_path: Path):
    """As XLM numbers them: each list is a stack, and its members have their own depth."""
    tensors = {"embeddings.weight": torch.randn(50, H)}
    for block in range(DEPTH):
        tensors |= {f"attentions.{block}.{c}.weight": torch.randn(H, H) for c in "qkvo"}
        tensors[f"ffns.{block}.lin1.weight"] = torch.randn(WIDTH, H)
        tensors[f"ffns.{block}.lin1.bias"] = torch.randn(WIDTH)
        tensors[f"ffns.{block}.lin2.weight"] = torch.randn(H, WIDTH)
    base = open_checkpoint(save_raw(tmp_path / "m", tensors))
    assert base.anatomy.stacks == {"attentions": DEPTH, "ffns": DEPTH}
    grown = grow(base, factor=1.5)
    x = torch.randn(5, H)
    for block in range(DEPTH):
        results = []
        for model in (base, grown):
            up, bias, down = (
                model[f"ffns.{block}.{name}"].whole().double()
                for name in ("lin1.weight", "lin1.bias", "lin2.weight")
            )
            results.append(silu(x.double() @ up.T + bias) @ down.T)
        assert torch.allclose(*results, rtol=1e-12, atol=1e-12)
    assert all(grown[n] is base[n] for n in base if n.startswith("attentions"))


def test_a_key_and_a_value_are_no_attention(tmp_path: Path):
    """RWKV's channel mix is called so: without a query it isn't one."""
    tensors = {"embeddings.weight": torch.randn(50, H)}
    for block in range(DEPTH):
        tensors[f"b.{block}.norm.weight"] = torch.randn(H)
        tensors[f"b.{block}.mix.key.weight"] = torch.randn(WIDTH, H)
        tensors[f"b.{block}.mix.value.weight"] = torch.randn(H, WIDTH)
    found = open_checkpoint(save_raw(tmp_path / "m", tensors)).anatomy
    assert {mlp.width for mlp in found.mlps.values()} == {WIDTH}
