"""Grown checkpoints compute what their base does, by transformers' own loader; and what doesn't,
is found out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    EVERY,
    FAMILIES,
    NORM_AFTER_MLP,
    SAME,
    apart,
    base_outputs,
    build,
    config_of,
    load,
    loaded,
    outputs,
    quiet,
    save,
    variant,
)

from surgery import (
    ArgumentError,
    Checkpoint,
    UnsupportedError,
    grow,
    open_checkpoint,
    verify,
    write,
)

FEW = ["gemma2", "gpt2", "opt", "phi3", "qwen3"]
"""One family of each layout: gate and up, (in, out), biases, fused, a norm after the MLP."""

MORE = {
    "half": {"factor": 1.5},
    "random": {"factor": 1.5, "choose": "random", "seed": 5},
    "norm": {"factor": 1.25, "choose": "norm", "multiple_of": 8},
    "threefold": {"factor": 3},
    "unequal": {"symmetry_break": 0.2, "factor": 2.5},
}


def grown(name: str, target: Path, **options: Any) -> Path:
    write(grow(open_checkpoint(build(name)), **options), target)
    return target


def neurons(family: Any, tensors: dict[str, torch.Tensor], block: int) -> tuple[torch.Tensor, ...]:
    """What leads into every neuron and what leads out of it: (p', in) and (p', hidden)."""
    into = []
    for inner in (*family.up, *family.up_biases):
        tensor = tensors[family.name(block, inner)]
        if family.in_out and tensor.dim() == 2:
            tensor = tensor.T
        into += list(tensor.reshape(family.parts, tensor.shape[0] // family.parts, -1))
    down = tensors[family.name(block, family.down)]
    return torch.cat(into, dim=1), down if family.in_out else down.T


def assert_grown(
    name: str, folder: Path, widths: list[int], copies: Callable[[int], list[int]] | None = None
) -> None:
    """By hand: neurons in place, copies behind, outgoing weights that sum to the old ones."""
    family = FAMILIES[name]
    before, after = load(build(name)), load(folder)
    assert after.keys() == before.keys()
    changed = set()
    for block, width in enumerate(widths):
        changed |= {family.name(block, n) for n in (*family.up, *family.up_biases, family.down)}
        into, out = neurons(family, before, block)
        wide_into, wide_out = neurons(family, after, block)
        assert wide_into.shape[0] == wide_out.shape[0] == width
        assert torch.equal(wide_into[: family.width], into)
        rows = {tuple(row): number for number, row in enumerate(into.tolist())}
        nothing = tuple([0.0] * into.shape[1])
        sums = torch.zeros(out.shape, dtype=torch.float64)
        sources = []
        for row, weights in zip(wide_into.tolist(), wide_out.double(), strict=True):
            if tuple(row) == nothing:
                assert not weights.any()
                continue
            sources.append(rows[tuple(row)])
            sums[sources[-1]] += weights
        assert torch.equal(sums, out.double())
        if copies is not None:
            assert sources[family.width :] == copies(block)
    for key in before.keys() - changed:
        assert torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("name", EVERY)
def test_twice_the_width_is_the_same_function(name: str, tmp_path: Path):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", factor=2)
    assert_grown(name, folder, [2 * family.width] * 3, lambda _: list(range(family.width)))
    assert config_of(folder) == config_of(build(name)) | {family.width_key: 2 * family.width}
    assert list(config_of(folder)) == list(config_of(build(name)))
    assert apart(outputs(folder, family.auto), base_outputs(name)) < SAME


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{key}")
        for name in EVERY
        for key, options in MORE.items()
        if name in FEW or key == "half"
    ],
)
def test_other_widths_are_the_same_function_too(name: str, options: dict[str, Any], tmp_path: Path):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", **options)
    width = -(-int(family.width * options["factor"]) // options.get("multiple_of", 1))
    width *= options.get("multiple_of", 1)
    assert_grown(name, folder, [width] * 3)
    assert config_of(folder)[family.width_key] == width
    assert apart(outputs(folder, family.auto), base_outputs(name)) < SAME


@pytest.mark.parametrize("name", EVERY)
def test_a_width_that_is_given_is_rounded_up(name: str, tmp_path: Path):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", width=family.width + 1, multiple_of=32)
    width = (family.width // 32 + 1) * 32
    assert_grown(name, folder, [width] * 3, lambda _: list(range(width - family.width)))
    assert apart(outputs(folder, family.auto), base_outputs(name)) < SAME


@pytest.mark.parametrize(
    ("name", "layers", "factor", "chosen"),
    [(name, "0,2", 1.5, {0, 2}) for name in EVERY]
    + [(name, "1", 2, {1}) for name in FEW]
    + [(name, "-1", 1.5, {2}) for name in FEW],
)
def test_some_layers_load_with_the_code_beside_the_shards(
    name: str, layers: str, factor: float, chosen: set[int], tmp_path: Path
):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", layers=layers, factor=factor)
    widths = [int(family.width * (factor if block in chosen else 1)) for block in range(3)]
    assert_grown(name, folder, widths)
    config = config_of(folder)
    assert config["mlp_widths"] == widths
    assert config.get(family.width_key) == config_of(build(name)).get(family.width_key)
    assert config["auto_map"][family.auto] == f"modeling_mlp_widths.{family.model}"
    found = outputs(folder, family.auto, trust=True)
    assert apart(found, base_outputs(name)) < SAME


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert_mlm"])
def test_what_a_trainer_saves_of_uneven_layers_is_read_back(name: str, tmp_path: Path):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", layers="1")
    with quiet():
        loaded(folder, family.auto, trust=True).save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved")["mlp_widths"] == config_of(folder)["mlp_widths"]
    assert apart(outputs(tmp_path / "saved", family.auto, trust=True), base_outputs(name)) < SAME
    with pytest.raises(RuntimeError):  # a stock class has one width
        outputs(folder, family.auto)


@pytest.mark.parametrize("name", EVERY)
def test_uniform_layers_load_anywhere(name: str, tmp_path: Path):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", layers="0,2", factor=1.5, uniform=True)
    width = int(1.5 * family.width)
    copied = list(range(width - family.width))
    assert_grown(name, folder, [width] * 3, lambda block: [] if block == 1 else copied)
    assert "auto_map" not in config_of(folder)
    assert "mlp_widths" not in config_of(folder)
    assert apart(outputs(folder, family.auto), base_outputs(name)) < SAME
    assert verify(open_checkpoint(build(name)), open_checkpoint(folder), logits=False).passed


def test_symmetry_is_broken(tmp_path: Path):
    """Equal copies would get equal gradients for ever; unequal ones don't."""
    name, inner = "llama", "mlp.down_proj.weight"
    family = FAMILIES[name]
    unequal = grown(name, tmp_path / "unequal", symmetry_break=0.2, seed=1)
    again = grown(name, tmp_path / "again", symmetry_break=0.2, seed=1)
    other = grown(name, tmp_path / "other", symmetry_break=0.2, seed=2)
    equal = grown(name, tmp_path / "equal", seed=1)
    p = family.width
    for block in range(3):
        key = family.name(block, inner)
        before, after = load(build(name))[key], load(unequal)[key]
        ratio = after[:, :p].double() / before.double()
        assert float(ratio.min()) >= 0.3 - 1e-6
        assert float(ratio.max()) <= 0.7 + 1e-6
        assert 0.1 < float(ratio.std()) < 0.13  # uniform of half-width 0.2: 0.1155
        assert float((after[:, :p] == after[:, p:]).double().mean()) < 0.01
        assert torch.equal(load(equal)[key][:, :p], load(equal)[key][:, p:])
        assert torch.equal(load(equal)[key][:, :p], before / 2)
        assert not torch.equal(after, load(other)[key])
    raw = [(f / "model.safetensors").read_bytes() for f in (unequal, again, other)]
    assert raw[0] == raw[1] != raw[2]

    def gradients(folder: Path) -> torch.Tensor:
        model = loaded(folder)
        ids = torch.arange(20)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        gradient: torch.Tensor = model.model.layers[1].mlp.up_proj.weight.grad
        return gradient

    g = gradients(equal)
    assert apart(g[:p], g[p:]) < 1e-9
    g = gradients(unequal)
    assert apart(g[:p], g[p:]) > 0.05


def test_the_neurons_that_are_copied_are_those_asked_for(tmp_path: Path):
    name = "qwen3"
    family = FAMILIES[name]
    tensors = load(build(name))
    expected = {}
    for block in range(3):
        into, out = neurons(family, tensors, block)
        size = into.double().pow(2).sum(1).sqrt() * out.double().pow(2).sum(1).sqrt()
        expected[block] = sorted(size.argsort(descending=True)[:14].tolist())
    assert len({tuple(numbers) for numbers in expected.values()}) == 3
    by_norm = grown(name, tmp_path / "norm", factor=1.25, choose="norm")
    assert_grown(name, by_norm, [70] * 3, expected.__getitem__)
    chosen: dict[int, set[tuple[int, ...]]] = {}
    for seed in (1, 1, 2):
        folder = tmp_path / f"random-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        grown(name, folder, factor=1.25, choose="random", seed=seed)
        edit = json.loads((folder / "surgery.json").read_text())["edits"][-1]
        copied = [
            tuple(i for start, stop in mlp["copied"] for i in range(start, stop))
            for mlp in edit["details"]["mlps"]
        ]
        assert all(len(numbers) == 14 for numbers in copied)
        assert len(set(copied)) == 3  # each layer draws for itself
        chosen.setdefault(seed, set()).add(tuple(sum(copied, ())))
        assert_grown(name, folder, [70] * 3, lambda block, c=copied: list(c[block]))
    assert len(chosen[1]) == 1
    assert chosen[1] != chosen[2]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("options", [{"factor": 1.5}, {"layers": "0,2", "uniform": True}])
def test_the_record_names_what_is_new(name: str, options: dict[str, Any], tmp_path: Path):
    family = FAMILIES[name]
    folder = grown(name, tmp_path / "grown", **options)
    before, after = load(build(name)), load(folder)
    edit = json.loads((folder / "surgery.json").read_text())["edits"][-1]
    assert edit["operation"] == "grow"
    mlps = sorted(edit["details"]["mlps"], key=lambda entry: entry["block"])
    assert [entry["block"] for entry in mlps] == [0, 1, 2]
    for entry in mlps:
        block, p = entry["block"], family.width
        wide = entry["width"][1]
        assert entry["stack"] == family.stack
        assert entry["width"] == [p, int(p * options.get("factor", 2))]
        names = [*family.up, *family.up_biases, family.down]
        assert entry["tensors"].keys() == {family.name(block, n) for n in names}
        padded = "uniform" in options and block == 1
        assert entry["padding"] == (wide - p if padded else 0)
        for key, described in entry["tensors"].items():
            assert described["role"] == ("down" if key.endswith(family.down) else "up")
            axis, ranges = described["axis"], described["new"]
            new = [i for start, stop in ranges for i in range(start, stop)]
            old = [i for i in range(after[key].shape[axis]) if i not in set(new)]
            kept = after[key].index_select(axis, torch.tensor(old))
            added = after[key].index_select(axis, torch.tensor(new))
            assert kept.shape == before[key].shape
            if padded:
                assert torch.equal(kept, before[key])
                assert not added.any()
                continue
            parts = before[key].shape[axis] // p
            count = wide - p
            sources = [part * p + i for part in range(parts) for i in range(count)]
            copied = before[key].index_select(axis, torch.tensor(sources))
            if described["role"] == "up":
                assert torch.equal(kept, before[key])
                assert torch.equal(added, copied)
            else:
                assert torch.equal(added * 2, copied)
                assert torch.equal(kept.index_select(axis, torch.arange(count)), added)


@pytest.mark.parametrize("name", ["llama_tied", "phi3", "gpt2", "bert_mlm"])
def test_growing_twice(name: str, tmp_path: Path):
    family = FAMILIES[name]
    base = open_checkpoint(build(name))
    first = grow(base, factor=1.5, choose="random")
    second = grow(first, factor=2, symmetry_break=0.1)  # a chain, never written in between
    assert verify(base, second, logits=False).passed
    assert verify(first, second, logits=False).passed
    write(second, tmp_path / "chained")
    grown(name, tmp_path / "one", factor=1.5, choose="random")
    write(grow(open_checkpoint(tmp_path / "one"), factor=2, symmetry_break=0.1), tmp_path / "two")
    assert (tmp_path / "two/model.safetensors").read_bytes() == (
        tmp_path / "chained/model.safetensors"
    ).read_bytes()
    for folder in (tmp_path / "chained", tmp_path / "two"):
        assert_grown(name, folder, [3 * family.width] * 3)
        assert apart(outputs(folder, family.auto), base_outputs(name)) < SAME
        assert verify(base, open_checkpoint(folder), logits=False).passed


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("llama", [{"layers": "0"}, {"layers": "1", "factor": 1.5}]),
        ("llama", [{"layers": "0"}, {"layers": "1,2"}]),
        ("gpt2", [{"layers": "0"}, {"layers": "1,2"}]),
        ("llama", [{"layers": "0,1"}, {"layers": "2", "factor": 4}, {"layers": "0,1"}]),
        ("llama", [{"layers": "0"}, {"layers": "1", "factor": 2.5, "uniform": True}]),
        ("llama", [{"layers": "0"}, {"layers": "1", "factor": 1.5, "uniform": True}]),
    ],
    ids=["still-mixed", "even", "even-null", "even-other", "uniform", "uniform-below"],
)
def test_growing_layers_one_after_another(name: str, steps: list[dict[str, Any]], tmp_path: Path):
    family = FAMILIES[name]
    folder = build(name)
    widths = [family.width] * 3
    for number, options in enumerate(steps):
        for block in map(int, options["layers"].split(",")):
            widths[block] = int(widths[block] * options.get("factor", 2))
        if options.get("uniform"):
            widths = [max(widths)] * 3
        step = grow(open_checkpoint(folder), **options)
        folder = tmp_path / f"step-{number}"
        write(step, folder)
    config = config_of(folder)
    if len(set(widths)) == 1:
        assert "auto_map" not in config
        assert "mlp_widths" not in config
        assert config[family.width_key] == widths[0]
    else:
        assert config["mlp_widths"] == widths
    assert_grown(name, folder, widths)
    found = outputs(folder, family.auto, trust=len(set(widths)) > 1)
    assert apart(found, base_outputs(name)) < SAME


def test_a_modeling_file_that_isn_t_needed_any_more_goes(tmp_path: Path):
    grown("llama", tmp_path / "mixed", layers="0")
    write(grow(open_checkpoint(tmp_path / "mixed"), layers="1,2"), tmp_path / "even")
    assert (tmp_path / "mixed/modeling_mlp_widths.py").is_file()
    assert not (tmp_path / "even/modeling_mlp_widths.py").exists()


def test_a_factor_is_the_decimal_number_that_was_written(tmp_path: Path):
    family = FAMILIES["llama"]
    options = family.options | {"intermediate_size": 200}
    base = open_checkpoint(save(tmp_path, family.model, family.config, options))
    down = grow(base, factor=1.1)["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == (32, 220)


def test_a_config_with_a_null_width_gets_a_number(tmp_path: Path):
    assert config_of(build("gpt2"))["n_inner"] is None
    assert config_of(grown("gpt2", tmp_path / "a", factor=1.5))["n_inner"] == 216
    config = config_of(build("gpt2"))
    del config["n_inner"]
    base = variant(tmp_path / "base", build("gpt2"), n_inner=72)
    with pytest.raises(UnsupportedError) as caught:  # the files have 144
        grow(open_checkpoint(base))
    assert caught.value.problems[0] == (
        f"{base}: no key of config.json holds the MLP's width 144, so none can be told the new "
        f"one; looked at intermediate_size, n_inner, ffn_dim, d_ff, ffn_hidden_size, hidden_dim"
    )


def test_other_files_travel(tmp_path: Path):
    base = shutil.copytree(build("llama"), tmp_path / "base")
    given = {
        "generation_config.json": b'{"eos_token_id": [2, 5, 7],\n "top_k": 3}',
        "tokenizer.json": b'{"made": "up"}',
        "tokenizer.model": bytes(range(256)),
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "assets/vocab.txt": b"a\nb\n",
        "LICENSE": b"do as you like",
    }
    for name, content in given.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    (base / "optimizer.pt").write_bytes(b"state")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    for layers in ("all", "1"):
        target = tmp_path / f"grown-{layers}"
        write(grow(open_checkpoint(base), layers=layers), target)
        for name, content in given.items():
            assert (target / name).read_bytes() == content
        assert not (target / "optimizer.pt").exists()
        assert not (target / "pytorch_model.bin").exists()


# The same bytes, whatever the machine does


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_threads_and_blocks_don_t_change_a_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found, shards = set(), {5_000_000_000: [], 30_000: []}
    for number, (threads, elements, shard) in enumerate(
        [(1, 1 << 18, 5_000_000_000), (4, 1 << 18, 5_000_000_000), (4, 1, 30_000), (1, 700, 30_000)]
    ):
        writer = sys.modules["surgery.writing.write"]  # the package has a function of that name
        monkeypatch.setattr(writer, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(writer, "COPY_BYTES", 64 if elements == 1 else 1 << 26)
        target = tmp_path / str(number)
        base = open_checkpoint(build(name, "float16"))
        result = grow(base, factor=2.5, choose="random", symmetry_break=0.2)
        write(result, target, threads=threads, max_shard_bytes=shard)
        tensors = load(target)
        found.add(tuple((key, tensors[key].numpy().tobytes()) for key in sorted(tensors)))
        shards[shard].append([p.read_bytes() for p in sorted(target.glob("*.safetensors"))])
    assert len(found) == 1
    assert len(next(iter(found))) == len(load(build(name)))
    for one, other in shards.values():
        assert one == other
    assert [len(files) for files, _ in shards.values()] == [1, len(shards[30_000][0])]
    assert len(shards[30_000][0]) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_low_precision_is_split_exactly_too(name: str, dtype: str, tmp_path: Path):
    base = open_checkpoint(build(name, dtype))
    for options in ({"factor": 1.5}, {"symmetry_break": 0.2}):
        target = tmp_path / str(len(options) + len(str(options)))
        write(grow(base, **options), target)
        assert verify(base, open_checkpoint(target), logits=False).passed
        assert {t.dtype for t in load(target).values()} == {getattr(torch, dtype)}


# Controls: what is wrong has to be found


def forget_to_halve(tensors: dict[str, torch.Tensor], family: Any) -> str:
    """Down columns copied without splitting; where half the neurons are doubled, no norm after
    the MLP can hide it."""
    for block in range(3):
        key = family.name(block, family.down)
        axis = 0 if family.in_out else 1
        p, wide = family.width, tensors[key].shape[axis]
        whole = tensors[key].double()
        new = whole.narrow(axis, p, wide - p)
        whole.narrow(axis, 0, wide - p).mul_(2)
        new.mul_(2)
        tensors[key] = whole.to(tensors[key].dtype)
    return family.name(0, family.down)


def wrong_source(tensors: dict[str, torch.Tensor], family: Any) -> str:
    key = family.name(1, family.up[0])
    axis = 1 if family.in_out else 0
    p = family.width
    tensors[key] = tensors[key].clone()
    tensors[key].narrow(axis, p, 1).copy_(tensors[key].narrow(axis, 3, 1))
    return key


def zeroed_bias(tensors: dict[str, torch.Tensor], family: Any) -> str:
    key = family.name(2, family.up_biases[0])
    tensors[key] = tensors[key].clone()
    tensors[key][family.width + 2] = 0
    return key


CONTROLS = [
    (damage, name)
    for damage in (forget_to_halve, wrong_source, zeroed_bias)
    for name in EVERY
    if (damage is not zeroed_bias or FAMILIES[name].biases)
    and (damage is not wrong_source or name in FEW)
]


@pytest.mark.parametrize(("damage", "name"), CONTROLS)
def test_a_growth_that_went_wrong_is_named(
    damage: Callable[[dict[str, torch.Tensor], Any], str], name: str, tmp_path: Path
):
    family = FAMILIES[name]
    right = grown(name, tmp_path / "right", factor=1.5)
    tensors = load(right)
    blamed = damage(tensors, family)
    wrong = variant(tmp_path / "wrong", right, tensors)
    found = verify(open_checkpoint(build(name)), open_checkpoint(wrong), logits=False)
    assert found.passed is False
    assert found.certificate is not None
    assert len(found.certificate.failures) == (3 if damage is forget_to_halve else 1)
    assert found.certificate.failures[0].startswith(f"{blamed}: ")
    assert apart(outputs(wrong, family.auto), base_outputs(name)) > 100 * SAME


@pytest.mark.parametrize("name", NORM_AFTER_MLP)
def test_a_norm_hides_a_doubled_mlp_from_the_logits_but_not_from_the_certificate(
    name: str, tmp_path: Path
):
    """TRAPS, proofs that prove nothing: all neurons doubled, none halved."""
    family = FAMILIES[name]
    right = grown(name, tmp_path / "right", factor=2)
    tensors = load(right)
    blamed = forget_to_halve(tensors, family)
    wrong = variant(tmp_path / "wrong", right, tensors)
    assert apart(outputs(wrong), base_outputs(name)) < 1e-4  # but for the norm's epsilon
    found = verify(open_checkpoint(build(name)), open_checkpoint(wrong), logits=False)
    assert found.certificate is not None
    assert found.certificate.failures[0].startswith(
        f"{blamed}: the outgoing weights of a neuron's copies don't sum to what it had (off by up"
    )
    assert found.passed is False


# What is refused


def problems_of(error: type[Exception], base: Path, **options: Any) -> list[str]:
    with pytest.raises(error) as caught:
        grow(open_checkpoint(base), **options)
    return list(caught.value.problems)


def test_parameters_are_checked_at_once():
    base = build("llama")
    assert problems_of(
        ArgumentError, base, factor=0.5, width=7, multiple_of=0, choose="best", symmetry_break=0.5
    ) == [
        "give either factor or width, not both",
        "factor is 0.5, and has to be above 1: growth adds neurons",
        "multiple_of is 0, and has to be at least 1",
        "choose is 'best', and has to be 'first', 'random' or 'norm'",
        "symmetry_break is 0.5, and has to be in [0, 0.5)",
    ]
    for factor in (float("nan"), float("inf"), 1):
        assert problems_of(ArgumentError, base, factor=factor) == [
            f"factor is {factor}, and has to be above 1: growth adds neurons"
        ]
    assert problems_of(ArgumentError, base, width=88) == [
        "model.layers.0 has an MLP of width 88, and 88 isn't wider; growth only adds neurons"
    ]
    low = build("llama", "bfloat16")
    assert problems_of(ArgumentError, low, symmetry_break=0.001) == [
        "symmetry_break is 0.001, and BF16 weights can't be split that finely: give at least 0.0078"
    ]


def test_arguments_of_another_type_are_refused():
    base = build("llama")
    assert problems_of(ArgumentError, base, factor="2", multiple_of=1.5, seed="a") == [
        "multiple_of is 1.5, and has to be a whole number",
        "seed is 'a', and has to be a whole number",
        "factor is '2', and has to be a number",
    ]
    assert problems_of(ArgumentError, base, layers=[1, 2]) == [
        "layers is [1, 2], and has to be text: 'all', '8-15' or '0,4,-1'"
    ]


def test_what_loads_by_the_code_beside_the_shards_says_so(tmp_path: Path):
    base = open_checkpoint(build("llama"))
    told = "layers differ in MLP width: load it with trust_remote_code=True"
    uneven = grow(base, layers="0")
    assert write(uneven, tmp_path / "uneven").record["notes"] == [told]
    again = grow(open_checkpoint(tmp_path / "uneven"), layers="1,2", width=uneven_width(uneven))
    assert write(again, tmp_path / "even").record["notes"] == []
    own = replace(base, config={**base.config, "auto_map": {"AutoModel": "code.Theirs"}})
    write(own, tmp_path / "own")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("uneven", "even", "own")]
    assert ["trust_remote_code" in card for card in cards] == [True, False, False]


def uneven_width(checkpoint: Checkpoint) -> int:
    return max(mlp.width for mlp in checkpoint.anatomy.every_mlp)


def test_layers_that_aren_t_there_are_refused():
    assert problems_of(ArgumentError, build("llama"), layers="3") == [
        "layers: 3 isn't among the 3 layers, which are 0 to 2"
    ]


def test_widths_equal_to_the_hidden_size(tmp_path: Path):
    """Square projections: shapes can't tell up from down, and GPT-2's layout from a Linear's."""
    for name, key in (("bert", "intermediate_size"), ("llama", "intermediate_size")):
        family = FAMILIES[name]
        options = family.options | {key: family.hidden}
        base = save(tmp_path / name, family.model, family.config, options)
        write(grow(open_checkpoint(base), factor=1.5), tmp_path / f"{name}-grown")
        found = outputs(tmp_path / f"{name}-grown", family.auto)
        assert apart(found, outputs(base, family.auto)) < SAME


def test_a_gpt2_with_square_projections_is_refused_or_grown_right(tmp_path: Path):
    family = FAMILIES["gpt2"]
    base = save(
        tmp_path / "base", family.model, family.config, family.options | {"n_inner": family.hidden}
    )
    try:
        result = grow(open_checkpoint(base), factor=1.5)
    except UnsupportedError:
        return
    write(result, tmp_path / "grown")
    assert apart(outputs(tmp_path / "grown"), outputs(base)) < SAME
