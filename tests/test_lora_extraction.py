"""LoRA extraction: adapters of a fine-tune, against numpy's SVD, and loaded by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapters import loaded, logits, peft_model, weights_of
from conftest import bytes_of, files_in, save_raw
from safetensors.torch import load_file, save_file
from surgery.commands.main import app
from typer.testing import CliRunner, Result

from surgery import (
    ArgumentError,
    Checkpoint,
    LoraAdapter,
    MismatchError,
    UnsupportedError,
    extract_lora,
    open_checkpoint,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Make = Callable[..., Path]
OUTSIDE = ("embed", "lm_head", "norm", "wte", "wpe", "ln_", "bias")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "gpt2": {},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 2, "intermediate_size": 24},
}


def surgery(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def pair(
    make: Make, kind: str = "llama", *, keep: Sequence[str] = (), **how: Any
) -> tuple[Checkpoint, Checkpoint]:
    """A base and a fine-tune of it, which keeps the tensors whose names hold one of `keep`."""
    base = make(kind, **{**KINDS[kind], **how})
    tuned = base.parent / "tuned"
    tuned.mkdir()
    stored = load_file(base / "model.safetensors")
    torch.manual_seed(5)
    for name, tensor in stored.items():
        if not any(word in name for word in keep):
            stored[name] = (tensor.double() + 0.05 * torch.randn(tensor.shape)).to(tensor.dtype)
    save_file(stored, tuned / "model.safetensors", metadata={"format": "pt"})
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())
    return open_checkpoint(base), open_checkpoint(tuned)


def written(adapter: LoraAdapter, base: Checkpoint) -> Path:
    folder = base.source.path.parent / "adapter"
    write(adapter, folder)
    return folder


def update(base: Checkpoint, tuned: Checkpoint, name: str) -> numpy.ndarray:
    found = tuned[name].whole().double() - base[name].whole().double()
    return found.numpy()


def cut(matrix: numpy.ndarray, rank: int) -> numpy.ndarray:
    left, values, right = numpy.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gets_the_base_and_the_truncated_update(kind: str, make_model: Make) -> None:
    base, tuned = pair(make_model, kind, keep=OUTSIDE)
    adapter = extract_lora(base, tuned, rank=3)
    assert adapter.rest == ()
    merged = peft_model(base.source.path, written(adapter, base)).merge_and_unload().state_dict()
    assert len(adapter.parts) == (8 if kind == "gpt2" else 14)
    for part in adapter.parts:
        tau = update(base, tuned, part.name)
        wanted = base[part.name].whole().double().numpy() + cut(tau, 3)
        assert numpy.abs(merged[part.name].double().numpy() - wanted).max() < 1e-6
        values = numpy.linalg.svd(tau, compute_uv=False) ** 2
        assert part.energy == pytest.approx(values[:3].sum() / values.sum(), rel=1e-9)
        assert part.norm == pytest.approx(values.sum() ** 0.5, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_and_the_rest_give_the_fine_tune_back(kind: str, make_model: Make) -> None:
    base, tuned = pair(make_model, kind)
    adapter = extract_lora(base, tuned, rank=64, save_rest=True)
    assert adapter.lost == ()
    assert len(adapter.rest) + len(adapter.parts) == len(tuned)
    assert all(part.energy == pytest.approx(1, abs=1e-9) for part in adapter.parts)
    folder = written(adapter, base)
    wanted = logits(loaded(tuned.source.path))
    tolerance = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(logits(peft_model(base.source.path, folder)), wanted, **tolerance)
    baked = open_checkpoint(f"{base.source.path}+{folder}")
    for name in tuned:
        torch.testing.assert_close(baked[name].whole(), tuned[name].whole(), rtol=0, atol=5e-7)
    write(baked, folder.parent / "baked")
    torch.testing.assert_close(logits(loaded(folder.parent / "baked")), wanted, **tolerance)
    assert baked.anatomy.tied is (kind == "qwen2")  # GPT-2's wte is none that PEFT can tie


def test_half_of_the_singular_values_on_each_side(make_model: Make) -> None:
    base, tuned = pair(make_model, keep=OUTSIDE)
    stored = weights_of(written(extract_lora(base, tuned, rank=4), base))
    module = "model.layers.1.mlp.up_proj"
    a, b = (stored[f"{module}.lora_{part}.weight"].double().numpy() for part in "AB")
    values = numpy.linalg.svd(update(base, tuned, f"{module}.weight"), compute_uv=False)[:4]
    assert numpy.abs(a @ a.T - numpy.diag(values)).max() < 1e-6
    assert numpy.abs(b.T @ b - numpy.diag(values)).max() < 1e-6


def test_energy_gives_each_module_its_rank(make_model: Make) -> None:
    base, tuned = pair(make_model, keep=OUTSIDE)
    adapter = extract_lora(base, tuned, energy=0.8)
    for part in adapter.parts:
        values = numpy.linalg.svd(update(base, tuned, part.name), compute_uv=False) ** 2
        shares = numpy.cumsum(values) / values.sum()
        assert shares[part.rank - 1] >= 0.8 > (shares[part.rank - 2] if part.rank > 1 else 0)
    assert len({part.rank for part in adapter.parts}) > 1
    folder = written(adapter, base)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    found = logits(peft_model(base.source.path, folder))
    write(open_checkpoint(f"{base.source.path}+{folder}"), folder.parent / "baked")
    torch.testing.assert_close(found, logits(loaded(folder.parent / "baked")), rtol=0, atol=2e-6)
    most = extract_lora(base, tuned, energy=0.8, rank=3)
    assert {part.rank for part in most.parts} == {3}


def test_randomized_is_nearly_exact(tmp_path: Path) -> None:
    """On an update whose singular values fall off: 40 x 60, 2^-k."""
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, n).double()).Q for n in (40, 60))
    tau = (left * 2.0 ** -torch.arange(40)) @ right[:40]
    start = torch.zeros(40, 60)
    weights = {f"layers.{n}.attn.q_proj.weight": start for n in range(2)}
    config = {"base": weights, "tuned": {name: tau.float() for name in weights}}
    base, tuned = (open_checkpoint(save_raw(tmp_path / n, w)) for n, w in config.items())
    exact = extract_lora(base, tuned, rank=5, modules=["q_proj"])
    nearly = extract_lora(base, tuned, rank=5, modules=["q_proj"], method="randomized")
    for one, other in zip(exact.parts, nearly.parts, strict=True):
        assert other.energy == pytest.approx(one.energy, rel=1e-9)
    key = "base_model.model.layers.0.attn.q_proj.lora_"
    made = nearly[f"{key}B.weight"].whole() @ nearly[f"{key}A.weight"].whole()
    assert numpy.abs(made.double().numpy() - cut(tau.numpy(), 5)).max() < 1e-6


def test_randomized_on_values_that_dont_fall_off(make_model: Make) -> None:
    """The worst case: it finds nearly as much, never more, and it goes by the seed alone."""
    base, tuned = pair(make_model, keep=OUTSIDE, hidden_size=48, intermediate_size=64)
    made = {
        (seed, threads): extract_lora(
            base, tuned, rank=4, method="randomized", seed=seed, threads=threads
        )
        for seed, threads in ((0, 1), (0, 3), (1, 1))
    }
    exact = extract_lora(base, tuned, rank=4)
    for one, nearly in zip(exact.parts, made[0, 1].parts, strict=True):
        assert one.energy - 0.02 < nearly.energy <= one.energy + 1e-12
    bits = [[bytes_of(tensor.whole()) for tensor in found.values()] for found in made.values()]
    assert bits[0] == bits[1] != bits[2]


def test_threads_change_no_bit(make_model: Make, tmp_path: Path) -> None:
    base, tuned = pair(make_model)
    made = []
    for threads in (1, 2, 5):
        adapter = extract_lora(base, tuned, rank=4, save_rest=True, threads=threads)
        write(adapter, tmp_path / f"{threads}", threads=threads)
        made.append(files_in(tmp_path / f"{threads}"))
    assert made[0] == made[1] == made[2]


def test_only_what_changed_is_in_it(make_model: Make) -> None:
    base, tuned = pair(make_model, keep=(*OUTSIDE, "layers.0.self_attn.q_proj", "mlp"))
    adapter = extract_lora(base, tuned, rank=2)
    assert "model.layers.0.self_attn.q_proj" not in adapter.config["target_modules"]
    assert "model.layers.1.self_attn.q_proj" in adapter.config["target_modules"]
    assert len(adapter.parts) == 7
    with pytest.raises(UnsupportedError, match="don't differ in any of the 14 matrices"):
        extract_lora(base, base, rank=2)


def test_what_isnt_covered_is_reported(make_model: Make) -> None:
    base, tuned = pair(make_model, keep=("mlp", "self_attn.k", "self_attn.o"))
    adapter = extract_lora(base, tuned, rank=2, modules=["q_proj", "layers.1.self_attn.v*"])
    assert {part.module for part in adapter.parts} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }
    lost = {rest.name: rest.relative for rest in adapter.lost}
    assert set(lost) == {
        "model.layers.0.self_attn.v_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        *(
            f"model.layers.{n}.{norm}_layernorm.weight"
            for n in range(2)
            for norm in ("input", "post_attention")
        ),
    }
    for name, relative in lost.items():
        before = numpy.linalg.norm(base[name].whole().double().numpy())
        assert relative == pytest.approx(numpy.linalg.norm(update(base, tuned, name)) / before)
    recorded = adapter.history[-1].details["rest"]
    assert {entry["tensor"] for entry in recorded} == set(lost)


def test_a_head_of_its_own_that_the_base_lacks(make_model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(make_model(name="base", tie_word_embeddings=True))
    stored = load_file(base.source.path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 0.1
    stored["model.layers.0.mlp.up_proj.weight"] += torch.randn(24, 1) @ torch.randn(1, 16)
    config = {**base.config, "tie_word_embeddings": False}
    tuned = open_checkpoint(save_raw(tmp_path / "tuned", stored, config=config))
    adapter = extract_lora(base, tuned, rank=1, save_rest=True)
    assert adapter.config["modules_to_save"] == ["lm_head"]
    folder = written(adapter, base)
    wanted = logits(loaded(tuned.source.path))
    found = logits(peft_model(base.source.path, folder))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    write(open_checkpoint(f"{base.source.path}+{folder}"), tmp_path / "baked")
    torch.testing.assert_close(logits(loaded(tmp_path / "baked")), wanted, rtol=0, atol=2e-6)


def test_types(make_model: Make) -> None:
    base, tuned = pair(make_model, keep=OUTSIDE, dtype=torch.bfloat16)
    wide = extract_lora(base, tuned, rank=16)
    assert {tensor.dtype.name for tensor in wide.values()} == {"F32"}
    folder = written(wide, base)
    baked = open_checkpoint(f"{base.source.path}+{folder}")
    for name in tuned:  # the adapter's own rounding is far below bfloat16's
        assert torch.equal(baked[name].whole(), tuned[name].whole())
    narrow = extract_lora(base, tuned, rank=16, dtype="bfloat16")
    assert {tensor.dtype.name for tensor in narrow.values()} == {"BF16"}


def test_names_on_disk_without_a_prefix(make_model: Make) -> None:
    """The adapter has the names that transformers gives, whatever the files have."""
    base, tuned = pair(make_model, "gpt2", keep=OUTSIDE)
    for model in (base, tuned):
        path = model.source.path / "model.safetensors"
        stored = load_file(path)
        bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        save_file(bare, path, metadata={"format": "pt"})
    base, tuned = (open_checkpoint(model.source.path) for model in (base, tuned))
    folder = written(extract_lora(base, tuned, rank=16), base)
    assert "transformer.h.0.attn.c_attn.lora_A.weight" in weights_of(folder)
    baked = open_checkpoint(f"{base.source.path}+{folder}")
    for name in tuned:
        torch.testing.assert_close(baked[name].whole(), tuned[name].whole(), rtol=0, atol=5e-7)


def test_one_file_whatever_its_size(make_model: Make, tmp_path: Path) -> None:
    base, tuned = pair(make_model, keep=OUTSIDE)
    write(extract_lora(base, tuned, rank=4), tmp_path / "adapter", max_shard_bytes=100)
    assert set(files_in(tmp_path / "adapter")) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "surgery.json",
        "README.md",
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "rank is missing"),
        ({"energy": 0.9, "method": "randomized"}, "rank is missing"),
        ({"rank": 0}, "rank is 0, and has to be at least 1"),
        ({"rank": 2, "energy": 1.5}, "energy is 1.5, and has to be above 0 and at most 1"),
        ({"rank": 2, "method": "fast"}, "method is 'fast'"),
        ({"rank": 2, "dtype": "int8"}, "dtype is 'int8'"),
        ({"rank": 2, "modules": "q_proj"}, "modules is 'q_proj', and has to be a list of names"),
        ({"rank": 2, "modules": ["q_proj", "nothing"]}, "no linear layer is called 'nothing'"),
    ],
)
def test_arguments_that_cant_be_meant(given: dict[str, Any], said: str, make_model: Make) -> None:
    base, tuned = pair(make_model)
    with pytest.raises(ArgumentError, match=said):
        extract_lora(base, tuned, **given)


def test_models_that_dont_belong_together(make_model: Make) -> None:
    base = open_checkpoint(make_model())
    with pytest.raises(MismatchError, match="are different architectures"):
        extract_lora(base, open_checkpoint(make_model("gpt2", "other")), rank=2)


# ---- the command line


def test_the_command(make_model: Make, tmp_path: Path) -> None:
    base, tuned = pair(make_model)
    args = ["lora", base.source.path, tuned.source.path]
    result = surgery(*args, "-o", tmp_path / "adapter", "--rank", "4", "--threads", "1")
    assert result.exit_code == 0, result.output
    for text in ("self_attn.q_proj", "energy kept", "model.embed_tokens.weight", "Written to"):
        assert text in result.stdout
    assert surgery(*args, "-o", tmp_path / "adapter", "--rank", "4").exit_code == 5
    result = surgery(
        *args, "-o", tmp_path / "adapter", "--rank", "4", "--energy", "0.5", "--modules",
        "q_proj, k_proj", "--dtype", "bfloat16", "--save-rest", "--overwrite", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    edit = json.loads(result.stdout)["edits"][-1]
    assert edit["operation"] == "lora"
    assert len(edit["details"]["modules"]) == 4
    assert all(0.5 <= module["energy"] <= 1 for module in edit["details"]["modules"])
    assert all(rest["saved"] for rest in edit["details"]["rest"])


def test_dry_run_reads_nothing(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery import files

    base, tuned = pair(make_model)
    monkeypatch.setattr(files.InputFile, "read_into", None)
    result = surgery(
        "lora", base.source.path, tuned.source.path, "-o", tmp_path / "out", "--rank", "4",
        "--dry-run", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shard = json.loads(result.stdout)["shards"][0]
    assert shard["name"] == "adapter_model.safetensors"
    assert shard["tensors"] == 28
    assert not (tmp_path / "out").exists()
