"""What a user says of the experts of a mixture: all layouts, what is printed reads back, renamed
checkpoints grow as they would by their own names, and every contradiction is told with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_raw
from families import EVERY, SAME, apart, build, load, outputs, variant
from hypothesis import given
from hypothesis import strategies as st
from mixtures import EVERY_MIXTURE, build_mixture
from zoo.build import build as build_kind
from zoo.kinds import kinds_of

from surgery import (
    Checkpoint,
    RecipeError,
    UnsupportedError,
    certify,
    find_growths,
    grow,
    open_checkpoint,
    write,
)
from surgery.anatomy import Anatomy, Corrections, Role, mixtures
from surgery.anatomy.experts import Experts
from surgery.anatomy.stored import as_data, from_data
from surgery.recipe import anatomy_yaml, correct_anatomy


def file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "anatomy.yaml"
    path.write_text(text)
    return path


# What is printed reads back


def mlps_of(anatomy: Anatomy) -> tuple[object, ...]:
    return anatomy.mlps, anatomy.several, anatomy.experts, anatomy.no_growth, anatomy.places


@pytest.mark.parametrize("name", [*EVERY, *EVERY_MIXTURE])
def test_all_of_it_is_printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing tells experts any more but what was printed."""
    given = open_checkpoint(build(name) if name in EVERY else build_mixture(name))
    assert not given.anatomy.no_growth
    read = correct_anatomy(given, file(tmp_path, anatomy_yaml(given.anatomy)))
    assert read.anatomy == given.anatomy
    assert from_data(json.loads(json.dumps(as_data(read.corrections)))) == read.corrections
    monkeypatch.setattr(mixtures, "find_experts", lambda *_, **__: Experts())
    alone = replace(read, config={k: v for k, v in read.config.items() if k == "text_config"})
    assert mlps_of(alone.anatomy) == mlps_of(given.anatomy)
    lost = replace(given, corrections=Corrections())
    assert bool(given.anatomy.experts) == (lost.anatomy.experts != given.anatomy.experts)


@pytest.mark.parametrize(
    "model_type", ["longcat_flash", "nemotron_h", "step3p7", "inkling_mm_model", "gemma3n_text"]
)
def test_odd_ones_are_printed_too(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle experts, states of another size, several plain MLPs beside them, sparse activations."""
    given = open_checkpoint(build_kind(kinds_of(model_type)[0], tmp_path / "model").folder)
    path = file(tmp_path, anatomy_yaml(given.anatomy))
    assert correct_anatomy(given, path).anatomy == given.anatomy
    monkeypatch.setattr(mixtures, "find_experts", lambda *_, **__: Experts())
    assert mlps_of(correct_anatomy(given, path).anatomy) == mlps_of(given.anatomy)
    sparse = [mlp.sparse for mlp in given.anatomy.mlps.values() if mlp.sparse]
    assert [entry["sparse"] for entry in entries(path) if "sparse" in entry] == sorted(set(sparse))


def entries(path: Path) -> list[dict[str, object]]:
    return list(yaml.safe_load(path.read_text())["mlps"])


# A checkpoint whose names say nothing

AROUND = {
    "lm_head.weight": "z1",
    "model.embed_tokens.weight": "z0",
    "transformer.wte.weight": "z0",
    "self_attn.q_proj": "t.1",
    "self_attn.k_proj": "t.2",
    "self_attn.v_proj": "t.3",
    "self_attn.o_proj": "t.4",
    "self_attn.sinks": "t.5",
    "norm_attn_norm.attn.Wqkv": "t.1",
    "norm_attn_norm.attn.out_proj": "t.2",
    "norm_attn_norm.norm_1": "n1",
    "norm_attn_norm.norm_2": "n2",
    "input_layernorm": "n1",
    "post_attention_layernorm": "n2",
    "model.norm": "n0",
    "transformer.norm_f": "n0",
    "model.layers": "s",
    "transformer.blocks": "s",
    ".weight": ".x",
    ".bias": ".y",
}
RENAMED: dict[str, tuple[dict[str, str], str]] = {
    "mixtral": (
        {r"block_sparse_moe.experts.(\d+).w1": r"p.\1.k", r"block_sparse_moe.experts.(\d+).w2": r"p.\1.l",
         r"block_sparse_moe.experts.(\d+).w3": r"p.\1.m", "block_sparse_moe.gate": "q"},
        "- {stack: s, kind: routed, ups: [p.*.k.x, p.*.m.x], down: p.*.l.x}",
    ),
    "qwen2_moe": (
        {r"mlp.experts.(\d+).gate_proj": r"p.k\1_", r"mlp.experts.(\d+).up_proj": r"p.m\1_",
         r"mlp.experts.(\d+).down_proj": r"p.l\1_", "mlp.shared_expert.gate_proj": "p.a",
         "mlp.shared_expert.up_proj": "p.b", "mlp.shared_expert.down_proj": "p.c",
         "mlp.shared_expert_gate": "p.d", "mlp.gate.": "q.", "mlp.gate_proj": "p.a",
         "mlp.up_proj": "p.b", "mlp.down_proj": "p.c"},
        """
- {stack: s, blocks: 1-2, kind: routed, ups: [p.k*_.x, p.m*_.x], down: p.l*_.x}
- {stack: s, blocks: 1-2, kind: shared, ups: [p.a.x, p.b.x], down: p.c.x}
- {stack: s, blocks: 0, ups: [p.a.x, p.b.x], down: p.c.x}
""",
    ),
    "gpt_oss": (
        {"mlp.experts.down_proj_bias": "g", "mlp.experts.gate_up_proj_bias": "h",
         "mlp.experts.down_proj": "i", "mlp.experts.gate_up_proj": "j", "mlp.router": "q"},
        """
- {stack: s, kind: routed, ups: [j], down: i, parts: 2, in_out: true, interleaved: true,
   biases: {j: h, i: g}}
""",
    ),
    "granitemoeshared": (
        {"block_sparse_moe.input_linear": "i", "block_sparse_moe.output_linear": "j",
         "block_sparse_moe.router.layer": "q", "shared_mlp.input_linear": "k",
         "shared_mlp.output_linear": "l"},
        """
- {stack: s, kind: routed, ups: [i.x], down: j.x, parts: 2}
- {stack: s, kind: shared, ups: [k.x], down: l.x, parts: 2}
""",
    ),
    "llama4_text": (
        {"feed_forward.experts.down_proj": "i", "feed_forward.experts.gate_up_proj": "j",
         "feed_forward.router": "q", "feed_forward.shared_expert.gate_proj": "a",
         "feed_forward.shared_expert.up_proj": "b", "feed_forward.shared_expert.down_proj": "c",
         "feed_forward.gate_proj": "a", "feed_forward.up_proj": "b", "feed_forward.down_proj": "c"},
        """
- {stack: s, blocks: 1, kind: routed, ups: [j], down: i, parts: 2, in_out: true}
- {stack: s, blocks: 1, kind: shared, ups: [a.x, b.x], down: c.x}
- {stack: s, blocks: "0,2", ups: [a.x, b.x], down: c.x}
""",
    ),
    "dbrx": (
        {"ffn.experts.mlp.w1": "i", "ffn.experts.mlp.v1": "j", "ffn.experts.mlp.w2": "k",
         "ffn.router.layer": "q"},
        "- {stack: s, kind: routed, ups: [i, j], down: k, experts: 4}",
    ),
}  # fmt: skip
"""By the mixture: what its names become, and the entries that a user writes."""


def new_name(name: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        pattern = old if "(" in old else re.escape(old)
        name = re.sub(rf"(?:^|(?<=\.)|(?=\.)){pattern}", new, name)
    return name


def renamed(name: str, folder: Path) -> tuple[Checkpoint, Checkpoint, dict[str, str]]:
    """The mixture, its renamed copy without a config, as a user says it is, and the new names."""
    words, mlps = RENAMED[name]
    given = open_checkpoint(build_mixture(name))
    names = {old: new_name(old, {**words, **AROUND}) for old in given}
    assert len(set(names.values())) == len(names)
    assert not any(
        re.search("expert|proj|layer|norm|weight|mlp|attn", new) for new in names.values()
    )
    tensors = {names[old]: value for old, value in load(build_mixture(name)).items()}
    copy = open_checkpoint(save_raw(folder / "copy", tensors))
    text = "roles: {'s.*.t.*': attention, 's.*.n?.x': norm}\nmlps:\n" + mlps
    return given, correct_anatomy(copy, file(folder, text)), names


@pytest.mark.parametrize("name", RENAMED)
def test_what_nothing_tells_is_said_by_hand(name: str, tmp_path: Path) -> None:
    given, copy, names = renamed(name, tmp_path)
    if name != "mixtral":  # a numbered list as long as a matrix has rows may well be of experts
        with pytest.raises(UnsupportedError):
            grow(replace(copy, corrections=replace(copy.corrections, mlps=())))
    said, known = copy.anatomy, given.anatomy
    assert not said.no_growth
    assert {
        (mlp.block, mlp.kind, mlp.width, mlp.hidden, mlp.gated, frozenset(mlp.tensors))
        for mlp in said.every_mlp
    } == {
        (
            *(mlp.block, mlp.kind, mlp.width, mlp.hidden, mlp.gated),
            frozenset(names[tensor] for tensor in mlp.tensors),
        )
        for mlp in known.every_mlp
    }
    for old, new in names.items():
        if known.places[old].role in (Role.EXPERT, Role.ROUTER) and "gate.weight" not in old:
            assert said.places[new].role is known.places[old].role or "bias" in old
    again = correct_anatomy(copy, file(tmp_path / "again", anatomy_yaml(said)))
    assert again.anatomy == said


@pytest.mark.parametrize("name", RENAMED)
def test_it_grows_and_keeps_the_function(name: str, tmp_path: Path) -> None:
    """By the certificate, with a control, and by transformers, once the old names are back."""
    given, copy, names = renamed(name, tmp_path)
    grown = grow(copy, factor=1.5, choose="random", symmetry_break=0.125)
    growths = find_growths(copy, grown)
    assert len(growths) == len(given.anatomy.every_mlp)
    assert certify(copy, grown, growths).holds
    down = copy.anatomy.every_mlp[-1].down.weight
    wrong = {**grown.tensors, down: grow(copy, factor=1.5, choose="random", seed=1)[down]}
    assert not certify(copy, replace(grown, tensors=wrong), growths).holds
    write(grown, tmp_path / "grown")
    tensors = load(tmp_path / "grown")
    config = grow(given, factor=1.5).config
    back = {old: tensors[new] for old, new in names.items()}
    model = variant(tmp_path / "back", build_mixture(name), back, **config)
    assert apart(outputs(model), outputs(build_mixture(name))) < SAME


def test_it_goes_with_the_result_and_the_blocks(tmp_path: Path) -> None:
    _, copy, _ = renamed("granitemoeshared", tmp_path)
    write(grow(copy, factor=2), tmp_path / "out")
    again = open_checkpoint(tmp_path / "out")
    assert again.corrections == copy.corrections
    widths = {(mlp.kind, mlp.width) for mlp in again.anatomy.every_mlp}
    assert widths == {("routed", 80), ("shared", 48)}
    twice = grow(again, factor=2)
    assert certify(again, twice, find_growths(again, twice)).holds
    _, copy, _ = renamed("qwen2_moe", tmp_path / "more")
    moved = copy.corrections.moved("s", {0: [0, 1], 1: [2], 2: [3]})
    assert [sorted(mlp.blocks or ()) for mlp in moved.mlps] == [[2, 3], [2, 3], [0, 1]]


# What can't be meant


def problems(given: Checkpoint, folder: Path, text: str) -> list[str]:
    path = file(folder, text)
    with pytest.raises(RecipeError) as caught:
        correct_anatomy(given, path)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def stacked_and_single(folder: Path) -> Checkpoint:
    """Two blocks: experts one by one (of 2 an idle one), stacked ones, and others below each
    other; the hidden size is 8."""
    tensors = {}
    for block in range(2):
        inside = {
            **{f"e.{n}.up.w": torch.zeros(6, 8) for n in range(3)},
            **{f"e.{n}.down.w": torch.zeros(8, 6) for n in range(2)},
            "both": torch.zeros(4, 10, 8),
            "back": torch.zeros(4, 8, 5),
            "b1": torch.zeros(4, 10),
            "b2": torch.zeros(4, 8),
            "flat_up": torch.zeros(12, 8),
            "flat_down": torch.zeros(12, 8),
            "one": torch.zeros(8),
            "n.5": torch.zeros(5),
        }
        tensors |= {f"s.{block}.{name}": value for name, value in inside.items()}
    return open_checkpoint(save_raw(folder / "m", tensors))


WRONG = """
mlps:
  - {stack: s, kind: rooted, ups: [both], down: back}
  - {stack: s, kind: routed, ups: [e.*.up.w], down: e.0.down.w}
  - {stack: s, kind: routed, ups: [e.*.*.w], down: e.*.down.w}
  - {stack: s, kind: routed, ups: [e.*.up.w], down: e.*.down.w, blocks: 1}
  - {stack: s, kind: routed, ups: [e.*.up.w], down: e.*.down.w, idle: 2, blocks: 0}
  - {stack: s, kind: shared, ups: [e.*.up.w], down: e.*.down.w, idle: 1, blocks: 0}
  - {stack: s, kind: routed, ups: [e.*.op.w], down: e.*.down.w, blocks: 0}
  - {stack: s, kind: routed, ups: [both], down: back, blocks: 0}
  - {stack: s, kind: routed, ups: [both], down: back, blocks: 0, parts: 2, in_out: true}
  - {stack: s, kind: routed, ups: [both], down: back, blocks: 0, parts: 2, biases: {both: b2, b: a}}
  - {stack: s, kind: routed, ups: [both], down: back, blocks: 0, parts: 2, biases: {both: b2}}
  - {stack: s, ups: [both], down: back, blocks: 0, parts: 2}
  - {stack: s, kind: routed, ups: [one], down: back, blocks: 0}
  - {stack: s, kind: routed, ups: [flat_up], down: flat_down, experts: 5, blocks: 1}
  - {stack: s, kind: routed, ups: [flat_up], down: flat_down, experts: 0}
  - {stack: s, ups: [flat_up], down: flat_down, experts: 2, in_out: true}
  - {stack: s, kind: routed, ups: [both], down: both, followers: {n.5: each}}
  - {stack: s, kind: routed, ups: [both], down: back, parts: 2, biases: {both: b1, back: b2}}
  - {stack: s, kind: shared, ups: [both], down: back, parts: 2, blocks: 1}
  - {stack: s, kind: routed, ups: [both], down: back, sparse: true, idle: yes, experts: a}
"""


def test_every_contradiction_at_once(tmp_path: Path) -> None:
    below = "this is for experts below each other in one matrix: a kind of them, and no *"
    numbers = "a * stands for one number: every name has one, or none has"
    assert problems(stacked_and_single(tmp_path), tmp_path, WRONG) == [
        "3: mlps[0].kind: 'rooted' isn't 'dense', 'routed' or 'shared'",
        f"4: mlps[1].down: {numbers}",
        f"5: mlps[2].down: {numbers}",
        "6: mlps[3]: there is no s.1.e.2.down.w",
        "7: mlps[4]: 1 numbers have no s.0.e.*.down.w, and idle is 2",
        "8: mlps[5].idle: this is how many numbers of routed experts, named with a *, have no down",
        "9: mlps[6]: there is no s.0.e.*.op.w",
        (
            "10: mlps[7]: s.0.both is [4, 10, 8], and beside s.0.back, which is [4, 8, 5], it "
            "would be [4, 5, 8]"
        ),
        (
            "11: mlps[8]: s.0.both is [4, 10, 8], and beside s.0.back, which is [4, 8, 5], it "
            "would be [4, 5, 16]"
        ),
        "12: mlps[9].biases: b is none of ups and down",
        "13: mlps[10]: s.0.b2 is [4, 8], and as the bias of s.0.both it would be [4, 10]",
        "14: mlps[11]: s.0.both is [4, 10, 8], and no matrix",
        "14: mlps[11]: s.0.back is [4, 8, 5], and no matrix",
        "15: mlps[12]: s.0.one is [8], and neither a matrix nor one for each expert",
        "16: mlps[13]: s.1.flat_down has 12 rows, which 5 experts can't share",
        "17: mlps[14].experts: 0 is no number of experts",
        f"18: mlps[15].experts: {below}",
        "18: mlps[15].in_out: this isn't for experts that lie below each other in one matrix",
        "19: mlps[16].ups: a name is given twice",
        "21: mlps[18]: s.1.both is in mlps[17] too",
        "21: mlps[18]: s.1.back is in mlps[17] too",
        "22: mlps[19].experts: 'a' isn't a whole number",
        "22: mlps[19].idle: True isn't a whole number",
        "22: mlps[19].sparse: True isn't text",
    ]


def test_what_is_right_of_them(tmp_path: Path) -> None:
    """Idle ones, a follower of every expert, a setting by which all neurons count."""
    given = stacked_and_single(tmp_path)
    text = """
mlps:
  - {stack: s, kind: routed, ups: [e.*.up.w], down: e.*.down.w, idle: 1, sparse: top 3 of all}
  - {stack: s, kind: shared, ups: [both], down: back, parts: 2, biases: {both: b1, back: b2},
     followers: {n.5: all}}
  - {stack: s, kind: routed, ups: [flat_up], down: flat_down, experts: 3}
"""
    said = correct_anatomy(given, file(tmp_path, text))
    first, second, shared, flat = sorted(
        said.anatomy.experts["s", 1], key=lambda mlp: (mlp.width == 4, mlp.width == 5)
    )
    assert [up.weight for up in first.idle] == ["s.1.e.2.up.w"]
    assert (second.idle, second.even_because) == (
        (),
        "its activation goes by all its neurons (top 3 of all)",
    )
    assert (shared.ups[0].bias, shared.down.bias) == ("s.1.b1", "s.1.b2")
    assert (shared.width, shared.ups[0].experts, flat.width, flat.hidden) == (5, 4, 4, 8)
    assert "n.5 may be of a norm over all its neurons" in str(shared.even_because)
    read = correct_anatomy(given, file(tmp_path / "again", anatomy_yaml(said.anatomy)))
    assert read.anatomy == said.anatomy
    assert from_data(as_data(said.corrections)) == said.corrections
    grown = grow(said, factor=2)
    assert certify(said, grown, find_growths(said, grown)).holds
    assert grown["s.0.e.2.up.w"].shape == (12, 8)
    assert grown["s.0.n.5"].shape == (10,)
    assert grown["s.0.flat_up"].shape == (24, 8)
    with pytest.raises(UnsupportedError, match=r"may be of a norm|goes by all its neurons"):
        grow(said, factor=1.5)


def test_what_is_not_understood_is_in_comments(tmp_path: Path) -> None:
    _, copy, _ = renamed("gpt_oss", tmp_path)
    plain = replace(copy, corrections=replace(copy.corrections, mlps=()))
    text = anatomy_yaml(plain.anatomy)
    assert len(plain.anatomy.no_growth) == 3
    (told, *_) = [line for line in text.splitlines() if line.startswith("#")]
    assert told.startswith("# s 0,1,2: ")
    assert "\n# Experts: with kind: routed (or shared)" in text
    assert correct_anatomy(plain, file(tmp_path / "again", text)).anatomy == plain.anatomy
    assert "#" not in anatomy_yaml(copy.anatomy)


ENTRY = {
    "stack": "s",
    "ups": ["a.*"],
    "down": "b.*",
    "parts": 1,
    "in_out": False,
    "interleaved": False,
    "blocks": None,
    "kind": "routed",
}


@pytest.mark.parametrize(
    "spoilt",
    [
        *({"kind": "rooted"}, {"kind": []}, {"down": "b"}, {"ups": ["a.*.*"]}, {"idle": -1}),
        *({"idle": True}, {"experts": "4"}, {"experts": 4}, {"biases": [["a.*"]]}),
        *({"biases": {"a.*": "c.*"}}, {"biases": [["x", "y.*"]]}, {"sparse": 1}, {"more": 1}),
        {"followers": [["x", True]]},
    ],
)
def test_what_strangers_say_of_experts_is_not_believed(spoilt: dict[str, object]) -> None:
    stored = {"stacks": [], "roles": [], "mlps": [ENTRY]}
    assert as_data(from_data(stored)) == stored
    with pytest.raises(ValueError, match=r" (is|has|have|isn't|one of|are) "):
        from_data({**stored, "mlps": [{**ENTRY, **spoilt}]})


# Every layout, by a formula


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """How the experts of a block are stored: whatever can be said together."""
    where = draw(st.sampled_from(["one by one", "stacked", "below each other"]))
    parts = draw(st.sampled_from([1, 2]))
    gated = parts == 1 and draw(st.booleans())
    return {
        "where": where,
        "parts": parts,
        "gated": gated,
        "interleaved": parts == 2 and draw(st.booleans()),
        "in_out": where != "below each other" and draw(st.booleans()),
        "biases": where != "below each other" and draw(st.booleans()),
        "experts": draw(st.integers(2, 3)),
        "width": draw(st.integers(2, 5)),
        "kind": draw(st.sampled_from(["routed", "shared"])),
    }


def stored(how: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One block of such experts of hidden size 7, and the entry that says them."""
    count, width, parts = how["experts"], how["width"], how["parts"]
    ups = ["a", "b"] if how["gated"] else ["a"]
    shapes = {**dict.fromkeys(ups, (parts * width, 7)), "c": (7, width)}
    tensors: dict[str, torch.Tensor] = {}
    single = how["where"] == "one by one"
    for name, shape in shapes.items():
        whole = torch.randn(count, *shape)
        whole = whole.mT.contiguous() if how["in_out"] else whole
        if how["where"] == "below each other":
            whole = (whole.mT if name == "c" else whole).reshape(-1, 7)
        biases = {f"{name}_": torch.randn(count, shape[0])} if how["biases"] else {}
        for key, value in {name: whole, **biases}.items():
            tensors |= {f"e.{n}.{key}": value[n] for n in range(count)} if single else {key: value}
    dot = "e.*." if single else ""
    entry: dict[str, Any] = {"stack": "s", "kind": how["kind"], "ups": [dot + up for up in ups]}
    entry |= {"down": f"{dot}c", "parts": parts, "in_out": how["in_out"]}
    entry |= {"interleaved": how["interleaved"]}
    entry |= {"biases": {dot + n: f"{dot}{n}_" for n in shapes} if how["biases"] else {}}
    entry |= {"experts": count} if how["where"] == "below each other" else {}
    return {f"s.0.{name}": value.contiguous() for name, value in tensors.items()}, entry


def computed(tensors: Mapping[str, torch.Tensor], how: Mapping[str, Any]) -> torch.Tensor:
    """What every expert makes of some states, in float64."""
    count, x = how["experts"], torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)

    def of(name: str, expert: int) -> torch.Tensor | float:
        if how["where"] == "one by one":
            found = tensors.get(f"s.0.e.{expert}.{name}")
        elif (found := tensors.get(f"s.0.{name}")) is not None:
            below = how["where"] == "below each other"
            found = found.reshape(count, -1, 7)[expert] if below else found[expert]
            found = found.T if below and name == "c" else found
        if found is None:
            return 0.0
        return found.double().T if how["in_out"] and found.ndim == 2 else found.double()

    results = []
    for expert in range(count):
        lead = [
            x @ of(up, expert).T + of(f"{up}_", expert) for up in ("a", "b")[: 1 + how["gated"]]
        ]
        if how["parts"] == 2:
            [both] = lead
            half = both.shape[1] // 2
            two = how["interleaved"]
            lead = [both[:, ::2], both[:, 1::2]] if two else [both[:, :half], both[:, half:]]
        inner = torch.tanh(lead[0]) * (lead[1] if len(lead) == 2 else 1)
        results.append(inner @ of("c", expert).T + of("c_", expert))
    return torch.stack(results)


@given(how=layouts(), grown_by=st.integers(1, 7))
def test_experts_in_any_layout(
    how: dict[str, Any], grown_by: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    tensors, entry = stored(how)
    text = yaml.safe_dump({"stacks": {"s": 1}, "mlps": [entry]})
    base = correct_anatomy(open_checkpoint(save_raw(folder / "m", tensors)), file(folder, text))
    mlps = base.anatomy.experts["s", 0]
    assert [(mlp.width, mlp.hidden, mlp.kind) for mlp in mlps] == [
        (how["width"], 7, how["kind"])
    ] * (how["experts"] if how["where"] == "one by one" else 1)
    printed = file(folder / "again", anatomy_yaml(base.anatomy))
    assert correct_anatomy(base, printed).anatomy == base.anatomy
    grown = grow(base, width=how["width"] + grown_by)
    after = {name: tensor.whole() for name, tensor in grown.items()}
    assert sum(map(torch.numel, after.values())) > sum(map(torch.numel, tensors.values()))
    assert torch.allclose(computed(after, how), computed(tensors, how), rtol=1e-9, atol=1e-6)
