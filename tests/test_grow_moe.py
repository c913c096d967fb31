"""Mixtures of experts grow: routed and shared experts, stacked or a tensor each, by transformers'
own loader of what was written; and what went wrong in one of them is found."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from conftest import save_raw
from families import CAUSAL, SAME, apart, config_of, load, quiet, tokens, variant
from hypothesis import given
from hypothesis import strategies as st
from mixtures import EVERY_MIXTURE, MIXTURES, build_mixture, save_mixture
from zoo.build import build
from zoo.examine import outputs as outputs_of
from zoo.kinds import kinds_of
from zoo.quirks import QUIRKS

from surgery import (
    ArgumentError,
    UnsupportedError,
    certify,
    find_growths,
    grow,
    open_checkpoint,
    verify,
    write,
)
from surgery.anatomy import MLP, Projection, Role
from surgery.anatomy.experts import INTERLEAVED
from surgery.growth import Growth
from surgery.measure import neuron_norms
from surgery.verification.discover import discover_growths
from surgery.verification.inputs import make_inputs


def outputs(folder: Path, *, trust: bool = False) -> torch.Tensor:
    """Logits in float64 by the stock loader (with `trust` by the code beside the shards), every
    weight in the files; experts are run one after the other, since the usual kernel has no
    float64."""
    with quiet():
        model, info = getattr(transformers, CAUSAL).from_pretrained(
            folder,
            dtype=torch.float64,
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",
            trust_remote_code=trust,
        )
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits.double()


@cache
def base_outputs(name: str) -> torch.Tensor:
    return outputs(build_mixture(name))


def widths(folder: Path) -> dict[str, dict[int, set[int]]]:
    found: dict[str, dict[int, set[int]]] = {"routed": {}, "shared": {}, "dense": {}}
    for mlp in open_checkpoint(folder).anatomy.every_mlp:
        found[mlp.kind].setdefault(mlp.block, set()).add(mlp.width)
    return found


def expected(name: str, factor: float = 1, multiple_of: int = 1) -> dict[str, dict[int, set[int]]]:
    def new(width: int) -> int:
        return -(-int(width * factor) // multiple_of) * multiple_of

    family = MIXTURES[name]
    kinds = {"routed": family.routed, "shared": family.shared, "dense": family.dense}
    found = {k: {b: {new(w)} for b, w in (by or {}).items()} for k, by in kinds.items()}
    for block, (width,) in found["shared"].items():  # as wide as two routed experts together
        if (family.shared or {})[block] == 2 * family.routed[block]:
            found["shared"][block] = {2 * new(family.routed[block])}
        assert width
    return found


def value(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


# What is found


@pytest.mark.parametrize("name", EVERY_MIXTURE)
def test_every_expert_is_found(name: str):
    family, anatomy = MIXTURES[name], open_checkpoint(build_mixture(name)).anatomy
    assert anatomy.no_growth == {}
    assert widths(build_mixture(name)) == expected(name)
    numbers = Counter((mlp.block, mlp.kind, mlp.down.experts) for mlp in anatomy.every_mlp)
    for block in family.routed:
        wanted = (block, "routed", 4 if family.stacked else None)
        assert numbers[wanted] == (1 if family.stacked else 4)
    assert {mlp.hidden for mlp in anatomy.every_mlp} == {32}
    assert all(mlp.gated for mlp in anatomy.every_mlp)
    for mlp in (mlp for mlps in anatomy.experts.values() for mlp in mlps):
        assert {anatomy.places[key].role for key in mlp.tensors} == {Role.EXPERT}


def test_layouts_of_stacked_experts():
    found = {}
    for name in ("gpt_oss", "llama4_text", "granitemoe", "aria_text", "dbrx"):
        anatomy = open_checkpoint(build_mixture(name)).anatomy
        mlp = next(mlp for mlp in anatomy.every_mlp if mlp.kind == "routed")
        up, down = mlp.ups[0], mlp.down
        found[name] = (up.in_out, down.in_out, up.parts, up.interleaved, up.flat, bool(up.bias))
    assert found == {
        "gpt_oss": (True, True, 2, True, False, True),
        "llama4_text": (True, True, 2, False, False, False),
        "granitemoe": (False, False, 2, False, False, False),
        "aria_text": (True, True, 2, False, False, False),
        "dbrx": (False, True, 1, False, True, False),
    }


def test_families_whose_experts_are_interleaved_are_all_known():
    """transformers says so of a class of experts where it is defined."""
    folder = Path(inspect.getfile(transformers)).parent / "models"
    said = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "is_concatenated=False" in path.read_text(encoding="utf-8")
    }
    assert said == INTERLEAVED


def test_inkling_names_say_that_gate_and_up_alternate(tmp_path: Path):
    """Shapes of one plain block and one mixture, by the names on the Hub."""
    tensors = {"model.llm.embed.weight": torch.zeros(97, 32)}
    for block in (0, 1):
        for name in ("attn.wq_du.weight", "attn.wo_ud.weight"):
            tensors[f"model.llm.layers.{block}.{name}"] = torch.zeros(32, 32)
    tensors["model.llm.layers.0.mlp.w13_dn.weight"] = torch.zeros(80, 32)
    tensors["model.llm.layers.0.mlp.w2_md.weight"] = torch.zeros(32, 40)
    tensors["model.llm.layers.1.mlp.experts.w13_weight"] = torch.zeros(4, 48, 32)
    tensors["model.llm.layers.1.mlp.experts.w2_weight"] = torch.zeros(4, 32, 24)
    base = save_raw(tmp_path / "raw", tensors, config={"hidden_size": 32, "intermediate_size": 40})
    mlps = open_checkpoint(base).anatomy.every_mlp
    assert [(mlp.kind, mlp.width, mlp.ups[0].interleaved) for mlp in mlps] == [
        ("dense", 40, True),
        ("routed", 24, True),
    ]


# What is written


@pytest.mark.parametrize("factor", [2, 1.5])
@pytest.mark.parametrize("name", EVERY_MIXTURE)
def test_a_grown_mixture_is_the_same_function(name: str, factor: float, tmp_path: Path):
    base, multiple = build_mixture(name), 8
    grown = grow(open_checkpoint(base), factor=factor, multiple_of=multiple)
    write(grown, tmp_path / "grown")
    assert widths(tmp_path / "grown") == expected(name, factor, multiple)
    before, after = config_of(base), config_of(tmp_path / "grown")
    for key, old in MIXTURES[name].keys.items():
        assert value(after, key) == -(-int(old * factor) // multiple) * multiple
        top = key.split(".")[0]
        before[top] = after[top]
    assert after == before
    assert list(after) == list(config_of(base))
    assert apart(outputs(tmp_path / "grown"), base_outputs(name)) < SAME
    opened = open_checkpoint(tmp_path / "grown")
    assert verify(open_checkpoint(base), opened, logits=False).passed
    assert opened.anatomy.no_growth == {}


@pytest.mark.parametrize("name", EVERY_MIXTURE)
def test_every_neuron_of_every_expert_by_hand(name: str, tmp_path: Path):
    """Tensor by tensor in float64, from what the modeling code says of each layout."""
    base = build_mixture(name)
    options = {"factor": 1.5, "multiple_of": 8, "choose": "random", "symmetry_break": 0.2}
    write(grow(open_checkpoint(base), **options), tmp_path / "grown")
    before, after = load(base), load(tmp_path / "grown")
    record = json.loads((tmp_path / "grown/surgery.json").read_text())["edits"][-1]
    touched = set()
    for entry in record["details"]["mlps"]:
        old, new = entry["width"]
        copied = [i for start, stop in entry["copied"] for i in range(start, stop)]
        sources = [*range(old), *copied]
        assert len(sources) == new
        for key, told in entry["tensors"].items():
            touched.add(key)
            check = sums if told["role"] == "down" else copies
            check(name, before[key], after[key], sources, old)
    for key in before.keys() - touched:
        assert torch.equal(before[key], after[key]), key


def neurons(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """(width, everything else), written out for each way to lay neurons along an axis."""
    if name == "gpt_oss":  # (experts, in, 2 * width), gate and up alternating; biases alike
        if tensor.shape[-1] == 2 * width:
            pairs = tensor.reshape(*tensor.shape[:-1], width, 2)
            return pairs.movedim(-2, 0).reshape(width, -1)
        return tensor.movedim(1, 0).reshape(width, -1)  # down: (experts, width, hidden)
    if name == "dbrx":
        return tensor.reshape(4, width, -1).movedim(1, 0).reshape(width, -1)
    if tensor.dim() == 3:
        axis = next(a for a in (1, 2) if tensor.shape[a] != 32)
        lines = tensor.movedim(axis, 0)
    else:
        lines = tensor if tensor.shape[0] != 32 else tensor.T
    parts = lines.reshape(lines.shape[0] // width, width, -1)
    return parts.movedim(1, 0).reshape(width, -1)


def copies(
    name: str, before: torch.Tensor, after: torch.Tensor, sources: list[int], old: int
) -> None:
    into = neurons(name, before, old)
    assert torch.equal(neurons(name, after, len(sources)), into[sources])


def sums(name: str, before: torch.Tensor, after: torch.Tensor, sources: list[int], old: int):
    out, wide = (neurons(name, t, w).double() for t, w in ((before, old), (after, len(sources))))
    total = torch.zeros_like(out)
    for neuron, source in enumerate(sources):
        total[source] += wide[neuron]
    assert torch.equal(total, out)
    repeated = [i for i in range(old) if sources.count(i) == 2]
    ratio = wide[repeated] / out[repeated]
    assert 0.29 < float(ratio.min()) < 0.45
    assert 0.55 < float(ratio.max()) < 0.71


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "granitemoe"])
def test_growing_twice_and_in_low_precision(name: str, tmp_path: Path):
    base = save_mixture(name, tmp_path / "base", dtype="bfloat16")
    once = grow(open_checkpoint(base), factor=1.5, choose="norm", multiple_of=8)
    twice = grow(once, factor=2.5, multiple_of=8)
    write(twice, tmp_path / "grown")
    for relation in (open_checkpoint(tmp_path / "grown"), twice):
        assert verify(open_checkpoint(base), relation, logits=False).passed
    assert apart(outputs(tmp_path / "grown"), outputs(base)) < SAME


def test_threads_and_blocks_don_t_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    for name in ("gpt_oss", "granitemoe", "dbrx"):
        found = set()
        for number, (threads, elements) in enumerate([(1, 1 << 18), (4, 1), (2, 700)]):
            monkeypatch.setattr(sys.modules["surgery.writing.write"], "BLOCK_ELEMENTS", elements)
            target = tmp_path / f"{name}-{number}"
            base = open_checkpoint(build_mixture(name))
            write(
                grow(base, factor=2.5, choose="random", symmetry_break=0.2), target, threads=threads
            )
            found.add((target / "model.safetensors").read_bytes())
        assert len(found) == 1


# Some of them


@pytest.mark.parametrize(
    ("name", "experts", "changed"),
    [
        ("qwen2_moe", "routed", {"moe_intermediate_size": 48}),
        ("qwen2_moe", "shared", {"shared_expert_intermediate_size": 80}),
        ("granitemoeshared", "routed", {"intermediate_size": 80}),
        ("granitemoeshared", "shared", {"shared_intermediate_size": 48}),
        ("gemma4_text", "routed", {"moe_intermediate_size": 48}),
        ("lfm2_moe", "routed", {"moe_intermediate_size": 48}),
    ],
)
def test_routed_or_shared_experts_alone(
    name: str, experts: Any, changed: dict[str, int], tmp_path: Path
):
    base = build_mixture(name)
    write(grow(open_checkpoint(base), experts=experts), tmp_path / "grown")
    assert config_of(tmp_path / "grown") == config_of(base) | changed
    old, new = widths(base), widths(tmp_path / "grown")
    for kind in old:
        times = 2 if kind == experts else 1
        assert new[kind] == {b: {times * w for w in ws} for b, ws in old[kind].items()}
    assert apart(outputs(tmp_path / "grown"), base_outputs(name)) < SAME
    record = json.loads((tmp_path / "grown/surgery.json").read_text())["edits"][-1]
    assert record["parameters"]["experts"] == experts
    assert {mlp["kind"] for mlp in record["details"]["mlps"]} == {experts}


def test_plain_layers_have_their_own_key(tmp_path: Path):
    base = build_mixture("qwen2_moe")
    write(grow(open_checkpoint(base), layers="0"), tmp_path / "grown")
    assert config_of(tmp_path / "grown") == config_of(base) | {"intermediate_size": 112}
    assert apart(outputs(tmp_path / "grown"), base_outputs("qwen2_moe")) < SAME


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe", "dbrx"])
def test_some_layers_with_the_others_padded(name: str, tmp_path: Path):
    base = open_checkpoint(build_mixture(name))
    write(grow(base, layers="0,2", factor=1.5, multiple_of=8, uniform=True), tmp_path / "grown")
    found = open_checkpoint(tmp_path / "grown")
    assert verify(base, found, logits=False).passed
    assert len(discover_growths(base, found)) == len(base.anatomy.every_mlp)
    assert apart(outputs(tmp_path / "grown"), base_outputs(name)) < SAME


@pytest.mark.parametrize("name", EVERY_MIXTURE)
def test_some_layers_of_a_mixture_load_with_the_code_beside_the_shards(name: str, tmp_path: Path):
    """The last layer alone, which every mixture has experts in."""
    base = open_checkpoint(build_mixture(name))
    write(grow(base, layers="-1", factor=1.5), tmp_path / "grown")
    last = max(mlp.block for mlp in base.anatomy.every_mlp)
    old, new = widths(build_mixture(name)), widths(tmp_path / "grown")
    for kind in old:
        for block, was in old[kind].items():
            times = 1.5 if block == last else 1
            assert new[kind][block] == {int(times * width) for width in was}
    config = config_of(tmp_path / "grown")
    by_code = "mlp_width_keys" in config
    if by_code:  # a key may be that of the last layer alone
        (blocks,) = config.pop("mlp_width_keys").values()
        assert [number for number, keys in enumerate(blocks) if keys] == [last]
        del config["auto_map"]
        assert config == config_of(build_mixture(name))
    assert verify(base, open_checkpoint(tmp_path / "grown"), device="cpu").passed
    assert apart(outputs(tmp_path / "grown", trust=by_code), base_outputs(name)) < SAME


def test_kinds_of_one_key_grow_apart_with_the_code_beside_the_shards(tmp_path: Path):
    base = build_mixture("jamba")
    write(grow(open_checkpoint(base), experts="routed"), tmp_path / "grown")
    assert (
        config_of(tmp_path / "grown")["intermediate_size"] == config_of(base)["intermediate_size"]
    )
    assert apart(outputs(tmp_path / "grown", trust=True), base_outputs("jamba")) < SAME


def test_kinds_of_one_key_are_padded_together(tmp_path: Path):
    """Jamba's plain layers get zero neurons where its experts grow, so that any loader reads it."""
    base = open_checkpoint(build_mixture("jamba"))
    write(grow(base, experts="routed", factor=1.5, uniform=True), tmp_path / "grown")
    assert not list((tmp_path / "grown").glob("*.py"))
    found = widths(tmp_path / "grown")
    (wide,) = {
        w for of_kind in (found["routed"], found["dense"]) for ws in of_kind.values() for w in ws
    }
    assert config_of(tmp_path / "grown")["intermediate_size"] == wide
    again = open_checkpoint(tmp_path / "grown")
    assert verify(base, again, logits=False).passed
    dense = next(mlp for mlp in again.anatomy.every_mlp if mlp.kind == "dense")
    old = config_of(build_mixture("jamba"))["intermediate_size"]
    assert not again[dense.down.weight].whole()[:, old:].any()
    assert apart(outputs(tmp_path / "grown"), base_outputs("jamba")) < SAME


# What is refused


def problem(base: Path, **options: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        grow(open_checkpoint(base), **options)
    (text,) = caught.value.problems
    return text.removeprefix(str(base))


def test_kinds_that_one_key_sets_together_are_refused_apart():
    base = build_mixture("deepseek_v3")
    shared = "model.layers.1.mlp.shared_experts.down_proj.weight"
    assert problem(base, experts="routed") == (
        ": no keys of config.json give these MLPs their new widths (24 -> 48) and leave the "
        f"others; moe_intermediate_size would change {shared} too: grow all layers alike, or pass "
        "--uniform; --experts all grows every kind"
    )


def test_what_isn_t_there_is_refused():
    base = build_mixture("mixtral")
    assert problem(base, experts="shared") == " has no shared experts"
    assert problem(base, experts="shared", layers="1") == (
        "model.layers.1 can't be grown: it has no shared expert"
    )
    with pytest.raises(ArgumentError) as caught:
        grow(open_checkpoint(base), experts="dense")  # type: ignore[arg-type]
    assert caught.value.problems == (
        "experts is 'dense', and has to be 'all', 'routed' or 'shared'",
    )


def test_experts_that_aren_t_understood_are_refused(tmp_path: Path):
    tensors = load(build_mixture("mixtral"))
    key = "model.layers.1.block_sparse_moe.experts.2.{}.weight"
    del tensors[key.format("w2")]
    base = variant(tmp_path / "base", build_mixture("mixtral"), tensors)
    with pytest.raises(UnsupportedError) as caught:
        grow(open_checkpoint(base))
    (text,) = caught.value.problems
    assert text == (
        "model.layers.1 can't be grown: its experts aren't understood: "
        f"block_sparse_moe.experts.2: can't tell which of {key.format('w1')}, {key.format('w3')} "
        "is the down projection"
    )


ZOO: dict[str, dict[str, Any]] = {
    "switch_transformers": {},
    "nllb-moe": {},
    "step3p7": {},
    "muse_spark_text": {"moe_hidden_size": 16},
    "nemotron_h": {"moe_latent_size": 16},
    "longcat_flash": {},
}
"""Families whose experts are called or made otherwise, with keys that make them so."""


@pytest.mark.parametrize("model_type", ZOO)
@pytest.mark.parametrize("factor", [2, 1.5])
def test_experts_of_other_kinds_grow(
    model_type: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All that are named after experts, and nothing else of a mixture."""
    keys = QUIRKS.get(model_type, {}) | ZOO[model_type]
    monkeypatch.setitem(QUIRKS, model_type, keys)
    tiny = build(kinds_of(model_type)[0], tmp_path / "model")
    base = open_checkpoint(str(tiny.folder))
    assert base.anatomy.no_growth == {}
    grown = grow(base, factor=factor)
    assert certify(base, grown, find_growths(base, grown)).holds
    inputs = {"input_ids": tokens()} if tiny.kind.tokens else make_inputs(base).values
    made = [outputs_of(model, inputs) for model in (base, grown)] if model_type != "step3p7" else []
    assert not made or apart(*made) < SAME
    shared = ("pre_expert", "post_expert", "router", "gate.weight")
    for name in base:
        inside = re.search(r"experts?\W|experts?_\d|moe\.", name) and base[name].numel > 32
        if inside and not any(word in name for word in shared):
            assert (grown[name].shape != base[name].shape) == ("bias" not in name or "fc1" in name)
        elif "latent" in name or "_expert_" in name:
            assert grown[name] is base[name]


def test_idle_experts_widen_with_the_others(tmp_path: Path):
    """LongCat's have no last matrix; as many as the config says, or a part is missing."""
    tiny = build(kinds_of("longcat_flash")[0], tmp_path / "model")
    base = open_checkpoint(str(tiny.folder))
    (mixture, *_), blocks = base.anatomy.experts["model.layers", 0], range(3)
    assert {up.weight for up in mixture.idle} == {
        f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"
        for expert in range(4, 8)
        for name in ("gate", "up")
    }
    missing = replace(base, config={**base.config, "zero_expert_num": 3})
    assert [missing.anatomy.no_growth["model.layers", block][:52] for block in blocks] == [
        "its experts aren't understood: mlp.experts.4: can't "
    ] * 3


def test_a_norm_inside_an_expert_is_refused(tmp_path: Path):
    tensors = load(build_mixture("olmoe"))
    key = "model.layers.0.mlp.experts.1.inner_norm.weight"
    base = variant(tmp_path / "base", build_mixture("olmoe"), tensors | {key: torch.ones(40)})
    with pytest.raises(UnsupportedError) as caught:
        grow(open_checkpoint(base))
    (text,) = caught.value.problems
    assert text == (
        "model.layers.0 can't be grown: its experts aren't understood: mlp.experts.1: "
        f"{key} follows the MLP's width of 40"
    )


def test_a_width_that_the_usual_kernel_refuses_is_noted():
    base = open_checkpoint(build_mixture("mixtral"))
    assert grow(base, factor=1.5).notes == ()  # 60, in float32
    (note,) = grow(base, width=61).notes
    assert note == (
        "experts of width 61 in F32 have rows that aren't multiples of 16 bytes, which "
        "transformers' default kernel (grouped_mm) refuses: load with "
        "experts_implementation='eager', or grow with multiple_of=4"
    )


# Controls: what is wrong has to be found


@pytest.mark.parametrize("name", EVERY_MIXTURE)
def test_a_split_forgotten_in_one_expert_is_found(name: str, tmp_path: Path):
    """In the last expert of block 1, to which the tests' tokens are routed."""
    base = open_checkpoint(build_mixture(name))
    write(grow(base, factor=1.5, multiple_of=8), tmp_path / "right")
    tensors = load(tmp_path / "right")
    anatomy = open_checkpoint(tmp_path / "right").anatomy
    (key,) = [key for key in anatomy.experts if key[1] == 1]
    mlp = [one for one in anatomy.experts[key] if one.kind == "routed"][-1]
    down = tensors[mlp.down.weight].clone()
    old = MIXTURES[name].routed[1]
    expert = down.reshape(4, -1, down.shape[-1])[-1] if mlp.down.experts else down
    expert = expert if mlp.down.in_out else expert.T
    expert[: mlp.width - old] *= 2
    expert[old:] *= 2
    wrong = variant(tmp_path / "wrong", tmp_path / "right", {**tensors, mlp.down.weight: down})
    found = verify(base, open_checkpoint(wrong), logits=False)
    assert found.certificate is not None
    assert found.passed is False
    (failure,) = found.certificate.failures
    assert failure.startswith(f"{mlp.down.weight}: the outgoing weights of a neuron's copies don't")
    assert apart(outputs(wrong), base_outputs(name)) > 100 * SAME


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "dbrx"])
def test_a_wrong_copy_in_one_expert_is_found(name: str, tmp_path: Path):
    base = open_checkpoint(build_mixture(name))
    write(grow(base), tmp_path / "right")
    tensors = load(tmp_path / "right")
    mlp = base.anatomy.experts["transformer.blocks" if name == "dbrx" else "model.layers", 0][-1]
    key = mlp.ups[0].weight
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] += 1
    wrong = variant(tmp_path / "wrong", tmp_path / "right", tensors)
    found = verify(base, open_checkpoint(wrong), logits=False)
    assert found.certificate is not None
    assert [text.split(":")[0] for text in found.certificate.failures] == [key]


def test_a_layout_that_is_taken_for_another_shows_in_the_logits(monkeypatch: pytest.MonkeyPatch):
    """The certificate trusts the layout, and so does the permutation that measures the noise;
    there is more of that then than rounding could make."""
    monkeypatch.setattr("surgery.anatomy.experts.INTERLEAVED", frozenset())
    base = open_checkpoint(build_mixture("gpt_oss"))
    found = verify(base, grow(base, factor=1.5))
    assert found.certificate is not None
    assert found.certificate.holds
    assert found.logits is not None
    assert not found.logits.same
    assert not found.passed


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_logits_of_a_grown_mixture_are_within_the_noise(name: str):
    base = open_checkpoint(build_mixture(name))
    found = verify(base, grow(base), dtype="float64")
    assert found.passed
    assert found.logits is not None
    assert found.logits.noise_floor is not None
    assert found.logits.first_departure is None
    assert found.logits.experts is not None
    reached, experts = found.logits.experts
    assert experts == 4 * len(MIXTURES[name].routed)
    assert experts / 2 < reached <= experts


# The laws, for every layout


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Growth, dict[str, torch.Tensor], torch.dtype]:
    experts, hidden, width = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
    )
    parts = draw(st.sampled_from([1, 2]))
    in_out, flat = draw(st.booleans()), False
    if draw(st.booleans()) and parts == 1:
        flat, in_out = True, False
    interleaved = parts == 2 and draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seeded).to(dtype)

    up_shape = (experts, hidden, parts * width) if in_out else (experts, parts * width, hidden)
    down_shape = (experts, width, hidden) if in_out or flat else (experts, hidden, width)
    tensors = {"up": random(*up_shape), "down": random(*down_shape)}
    if flat:
        tensors = {key: tensor.reshape(-1, hidden) for key, tensor in tensors.items()}
    else:
        tensors["bias"] = random(experts, parts * width)
    up = Projection("up", None if flat else "bias", in_out, parts, interleaved, experts, flat)
    down = Projection("down", None, in_out or flat, experts=experts, flat=flat)
    copied = draw(
        st.lists(
            st.tuples(st.integers(0, width - 1), st.integers(1, width)).filter(
                lambda r: r[0] < r[1]
            )
        )
    )
    padding = draw(st.integers(0, 2))
    wide = width + padding + sum(stop - start for start, stop in copied)
    mlp = MLP("s", 0, (up,), down, width, hidden, "routed")
    return Growth(mlp, wide, tuple(copied), padding), tensors, dtype


def expert_mlp(
    growth: Growth, tensors: dict[str, torch.Tensor], expert: int, width: int, x: list[float]
) -> list[float]:
    """The MLP of one expert, neuron by neuron, on plain floats; relu, or relu(gate) * up."""
    up, down = growth.mlp.ups[0], growth.mlp.down
    into, out = tensors["up"].double(), tensors["down"].double()
    if up.flat:
        into, out = (
            into.reshape(up.experts or 1, width, -1),
            out.reshape(up.experts or 1, width, -1),
        )
    result = [0.0] * growth.mlp.hidden
    for neuron in range(width):
        values = []
        for part in range(up.parts):
            at = neuron * up.parts + part if up.interleaved else part * width + neuron
            row = into[expert, :, at] if up.in_out else into[expert, at]
            value = sum(float(w) * v for w, v in zip(row, x, strict=True))
            values.append(value + (float(tensors["bias"][expert, at]) if up.bias else 0.0))
        hidden = max(values[0], 0.0) * (values[1] if up.parts == 2 else 1.0)
        for i in range(growth.mlp.hidden):
            weight = out[expert, neuron, i] if down.in_out else out[expert, i, neuron]
            result[i] += float(weight) * hidden
    return result


@given(layouts(), st.sampled_from([0.0, 0.25]))
def test_any_layout_computes_what_it_did(
    made: tuple[Growth, dict[str, torch.Tensor], torch.dtype], symmetry_break: float
):
    from surgery.operations.neurons import grown_tensors
    from surgery.values import held

    growth, tensors, _ = made
    base = {name: held(tensor) for name, tensor in tensors.items()}
    lazy = grown_tensors(base, growth, symmetry_break, 3)
    grown = {name: tensor.whole() for name, tensor in lazy.items()}
    assert {tensor.dtype for tensor in grown.values()} == {tensors["up"].dtype}
    for tensor in lazy.values():  # row by row
        pieces = [tensor.read(row, row + 1) for row in range(tensor.rows)]
        assert torch.equal(torch.cat(pieces), tensor.read())
    x = [0.5 - i for i in range(growth.mlp.hidden)]
    for expert in range(growth.mlp.down.experts or 1):
        before = expert_mlp(growth, tensors, expert, growth.mlp.width, x)
        after = expert_mlp(growth, grown, expert, growth.width, x)
        assert after == pytest.approx(before, rel=1e-12, abs=1e-12)
    for name, projection, axis in growth.mlp.axes():
        new = [i for start, stop in growth.new_ranges(projection) for i in range(start, stop)]
        kept = [i for i in range(grown[name].shape[axis]) if i not in set(new)]
        assert len(kept) == tensors[name].shape[axis]
        if projection is not growth.mlp.down:
            old = grown[name].index_select(axis, torch.tensor(kept))
            assert torch.equal(old, tensors[name])


def test_norms_of_stacked_neurons_are_taken_over_all_experts():
    base = open_checkpoint(build_mixture("gpt_oss"))
    mlp = base.anatomy.experts["model.layers", 0][0]
    up = base[mlp.ups[0].weight].whole().double().numpy()
    down = base[mlp.down.weight].whole().double().numpy()
    total = numpy.zeros(40)
    for expert in range(4):
        for neuron in range(40):
            incoming = (up[expert, :, 2 * neuron : 2 * neuron + 2] ** 2).sum()
            total[neuron] += incoming * (down[expert, neuron] ** 2).sum()
    assert neuron_norms(base, mlp).numpy() == pytest.approx(numpy.sqrt(total))


def test_experts_without_a_config_are_known_by_their_names(tmp_path: Path):
    base = save_raw(tmp_path / "raw", load(build_mixture("mixtral")))
    grown = grow(open_checkpoint(base))
    assert len(grown.history[-1].details["mlps"]) == 12


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "granitemoe", "dbrx"])
@pytest.mark.parametrize("width", [16, 32])
def test_widths_that_make_a_matrix_square(name: str, width: int, tmp_path: Path):
    """The hidden size is 32: a projection, or the two of a fused one, can't be told by shape."""
    key = {"intermediate_size": width}
    if name == "dbrx":
        key = {"ffn_config": MIXTURES[name].options["ffn_config"] | {"ffn_hidden_size": width}}
    base = save_mixture(name, tmp_path / "base", **key)
    write(grow(open_checkpoint(base), factor=1.5), tmp_path / "grown")
    assert apart(outputs(tmp_path / "grown"), outputs(base)) < SAME
    assert verify(open_checkpoint(base), open_checkpoint(tmp_path / "grown"), logits=False).passed


def test_blocks_that_predict_further_tokens_grow_along(tmp_path: Path):
    """DeepSeek-V3 stores one behind its layers, which transformers' class ignores: what reads it
    takes the widths of its MLPs from the same keys."""
    source = build_mixture("deepseek_v3")
    tensors = load(source)
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace("layers.2.", "layers.3.")] = tensors[name] + 0.01
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(32, 64)
    base = open_checkpoint(save_raw(tmp_path / "base", tensors, config=config_of(source)))
    grown = grow(base, factor=1.5)
    assert grown["model.layers.3.mlp.experts.1.up_proj.weight"].shape == (36, 32)
    assert grown["model.layers.3.eh_proj.weight"] is base["model.layers.3.eh_proj.weight"]
    assert grown.config["moe_intermediate_size"] == 36
    assert verify(base, grown).passed
