"""LoRA adapters: read, baked into their base as PEFT would, and refused where they can't be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapters import (
    change_config,
    loaded,
    logits,
    make_adapter,
    peft_model,
    save_adapter,
    weights_of,
)
from conftest import bytes_of, files_in, save_raw
from hub_standin import Hub, hub  # noqa: F401  (a fixture)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from surgery.commands.main import app
from typer.testing import CliRunner, Result

from surgery import (
    FormatError,
    MismatchError,
    NotFoundError,
    UnsupportedError,
    adapter_task_vector,
    apply,
    apply_adapter,
    open_adapter,
    open_checkpoint,
    write,
)
from surgery.dtypes import DTYPES
from surgery.kernels.low_rank import product
from surgery.lora.matching import Names
from surgery.models import split_reference

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Make = Callable[..., Path]
ATTENTION = ["q_proj", "v_proj"]
CONV1D = ["c_attn", "c_fc", "c_proj"]
UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"target_modules": ATTENTION}),
    "rslora, ranks and alphas by module": (
        "llama",
        {},
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {"layers.1.mlp.down_proj": 9},
        },
    ),
    "whole modules": (
        "llama",
        UNTIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "dora": ("llama", {}, {"target_modules": "all-linear", "use_dora": True}),
    "in, out": ("gpt2", {}, {"target_modules": CONV1D}),
    "in, out, dora": ("gpt2", {}, {"target_modules": CONV1D, "use_dora": True}),
    "biases": ("gpt2", {}, {"target_modules": CONV1D, "bias": "all"}),
    "biases of B": ("gpt2", {}, {"target_modules": CONV1D, "lora_bias": True}),
    "embedding and head": ("llama", UNTIED, {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding, dora": ("llama", UNTIED, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": (
        "llama",
        UNTIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60, 4]},
    ),
}


def surgery(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


# ---- baked


@pytest.mark.parametrize("case", CASES)
def test_baked_is_what_peft_merges(case: str, make_model: Make, tmp_path: Path) -> None:
    kind, changes, config = CASES[case]
    base = make_model(kind, **changes)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    write(open_checkpoint(f"{base}+{adapter}"), tmp_path / "out")
    wanted = peft_model(base, adapter)
    made = loaded(tmp_path / "out")
    torch.testing.assert_close(logits(made), logits(wanted), rtol=0, atol=2e-6)
    merged = wanted.merge_and_unload().state_dict()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("kind", "config", "trained"),
    [
        ("llama", {"target_modules": ["lm_head"]}, "head"),
        ("llama", {"target_modules": ["embed_tokens"]}, "embedding"),
        ("llama", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "both"),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}, "embedding"),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}, "each"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}, "both"),
    ],
)
def test_a_tied_head_stays_what_it_was_in_training(
    kind: str, config: dict[str, Any], trained: str, make_model: Make, tmp_path: Path
) -> None:
    """merge_and_unload would change a head that training left alone: the same matrix. What counts
    is the function that was trained."""
    base = make_model(kind, tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    baked = open_checkpoint(f"{base}+{adapter}")
    write(baked, tmp_path / "out")
    found, wanted = logits(loaded(tmp_path / "out")), logits(peft_model(base, adapter))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    assert baked.config["tie_word_embeddings"] is (trained == "both")
    assert ("lm_head.weight" in baked) is (trained != "both")
    assert any("two tensors now" in note for note in baked.notes) is (trained != "both")


def update_of(adapter: Path, module: str, scale: float) -> numpy.ndarray:
    stored = weights_of(adapter)
    a, b = (stored[f"{module}.lora_{part}.weight"].double().numpy() for part in "AB")
    return scale * (b @ a)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_formula(rslora: bool, make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=ATTENTION, use_rslora=rslora,
        rank_pattern={"layers.1.self_attn.v_proj": 9}, alpha_pattern={"v_proj": 5},
    )  # fmt: skip
    before, after = load_file(base / "model.safetensors"), open_checkpoint(f"{base}+{adapter}")
    for layer, name, rank, alpha in ((0, "q", 4, 6), (0, "v", 4, 5), (1, "v", 9, 5)):
        module = f"model.layers.{layer}.self_attn.{name}_proj"
        scale = alpha / (rank**0.5 if rslora else rank)
        wanted = before[f"{module}.weight"].double().numpy() + update_of(adapter, module, scale)
        found = after[f"{module}.weight"].whole().double().numpy()
        assert numpy.abs(found - wanted).max() < 1e-7
    untouched = [name for name in after if "q_proj" not in name and "v_proj" not in name]
    assert len(untouched) == 17
    assert all(after[name].file_spans() is not None for name in untouched)


def test_doras_formula(make_model: Make, tmp_path: Path) -> None:
    """Norms of outputs: rows of a Linear, columns of GPT-2's Conv1D."""
    for kind, module in (
        ("llama", "model.layers.0.mlp.up_proj"),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
    ):
        base = make_model(kind, name=kind)
        adapter = make_adapter(base, tmp_path / f"{kind}-a", target_modules=[module], use_dora=True)
        before = load_file(base / "model.safetensors")[f"{module}.weight"].double().numpy()
        turned = before.T if kind == "gpt2" else before
        moved = turned + update_of(adapter, module, 6 / 4)
        length = weights_of(adapter)[f"{module}.lora_magnitude_vector"].double().numpy()
        wanted = moved * (length / numpy.linalg.norm(moved, axis=1))[:, None]
        found = open_checkpoint(f"{base}+{adapter}")[f"{module}.weight"].whole().double().numpy()
        assert numpy.abs((found.T if kind == "gpt2" else found) - wanted).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "dora", "in, out, dora", "whole modules", "tokens"])
def test_rounded_once(case: str, dtype: torch.dtype, make_model: Make, tmp_path: Path) -> None:
    """A low-precision base gives what its weights in float32 give, rounded."""
    kind, changes, config = CASES[case]
    base = make_model(kind, dtype=dtype, **changes)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    wide = tmp_path / "wide"
    wide.mkdir()
    stored = load_file(base / "model.safetensors")
    save_file({k: v.float() for k, v in stored.items()}, wide / "model.safetensors")
    (wide / "config.json").write_bytes((base / "config.json").read_bytes())
    found, wanted = open_checkpoint(f"{base}+{adapter}"), open_checkpoint(f"{wide}+{adapter}")
    for name in found:
        assert bytes_of(found[name].whole()) == bytes_of(wanted[name].whole().to(dtype))


def test_float64_stays_float64(tmp_path: Path) -> None:
    weight = torch.randn(5, 3, dtype=torch.float64)
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    base = save_raw(tmp_path / "base", {"up.weight": weight})
    adapter = save_adapter(
        tmp_path / "adapter", {"up.lora_A.weight": a, "up.lora_B.weight": b}, lora_alpha=3
    )
    found = open_checkpoint(f"{base}+{adapter}")["up.weight"].whole()
    torch.testing.assert_close(found, weight + 1.5 * (b @ a), rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", ["plain", "dora", "in, out", "in, out, dora", "tokens"])
def test_blocks_and_threads_change_no_bit(
    case: str, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = import_module("surgery.writing.write")
    kind, changes, config = CASES[case]
    base = make_model(kind, **changes)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    baked = open_checkpoint(f"{base}+{adapter}")
    whole = {name: bytes_of(tensor.whole()) for name, tensor in baked.items()}
    for block, threads in ((1, 3), (50, 1), (333, 2)):
        monkeypatch.setattr(writer, "BLOCK_ELEMENTS", block)
        out = tmp_path / f"out{block}"
        write(open_checkpoint(f"{base}+{adapter}"), out, threads=threads)
        written = load_file(out / "model.safetensors")
        assert {name: bytes_of(tensor) for name, tensor in written.items()} == whole


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    rank=st.integers(1, 9),
    data=st.data(),
)
def test_a_row_of_the_product_is_its_own(
    rows: int, columns: int, rank: int, data: st.DataObject
) -> None:
    torch.manual_seed(rows * columns * rank)
    left, right = torch.randn(rows, rank), torch.randn(rank, columns)
    whole = product(left, right, scale=0.7, compute=DTYPES["F32"])
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = product(left[start:stop], right, scale=0.7, compute=DTYPES["F32"])
    assert bytes_of(part) == bytes_of(whole[start:stop])
    exact = 0.7 * (left.double() @ right.double())
    bound = (left.abs().double() @ right.abs().double()) * (rank + 1) * 2**-23
    assert bool(((whole.double() - exact).abs() <= bound).all())


def test_several_are_added_and_rounded_once(make_model: Make, tmp_path: Path) -> None:
    base = make_model(dtype=torch.bfloat16)
    one = make_adapter(base, tmp_path / "one", target_modules=["q_proj"])
    two = make_adapter(base, tmp_path / "two", target_modules=["q_proj", "k_proj"], seed=2)
    baked = open_checkpoint(f"{base}+{one}+{two}")
    name = "model.layers.0.self_attn.q_proj"
    before = open_checkpoint(base)[f"{name}.weight"].whole().double().numpy()
    exact = before + update_of(one, name, 1.5) + update_of(two, name, 1.5)
    found = baked[f"{name}.weight"].whole()
    assert torch.equal(found, torch.from_numpy(exact).float().bfloat16())
    assert [edit.operation for edit in baked.history] == ["adapter", "adapter"]
    assert baked.source.reference == f"{base}+{one}+{two}"
    assert set(baked.paths) == {base, one, two}


# ---- as a task vector


@pytest.mark.parametrize("case", CASES)
def test_as_a_task_vector(case: str, make_model: Make, tmp_path: Path) -> None:
    kind, changes, config = CASES[case]
    base = open_checkpoint(make_model(kind, **changes))
    adapter = open_adapter(make_adapter(base.source.path, tmp_path / "adapter", **config))
    tau, baked = adapter_task_vector(base, adapter), apply_adapter(base, adapter)
    whole, half = apply(base, tau), apply(base, tau, scale=0.5)
    for name, tensor in baked.items():
        if name not in tau:
            assert bytes_of(tensor.whole()) == bytes_of(base[name].whole())
            continue
        torch.testing.assert_close(whole[name].whole(), tensor.whole(), rtol=0, atol=5e-7)
        middle = (tensor.whole() + base[name].whole()) / 2
        torch.testing.assert_close(half[name].whole(), middle, rtol=0, atol=5e-7)
    assert whole.history[-1].inputs["task_vector_1"].path == tmp_path / "adapter"


def test_a_task_vector_cant_change_the_vocabulary(make_model: Make, tmp_path: Path) -> None:
    base, adapter = resized(make_model, tmp_path)
    with pytest.raises(UnsupportedError, match=r"the shape \[66, 16\], and \[64, 16\] is that"):
        adapter_task_vector(open_checkpoint(base), open_adapter(adapter))


# ---- vocabulary and tokenizer


def resized(make_model: Make, tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an adapter that was trained after two tokens had been added to it."""
    base = make_model(**UNTIED)
    (base / "tokenizer.json").write_text('{"of": "the base"}')
    torch.manual_seed(3)
    embedding, head = torch.randn(66, 16), torch.randn(66, 16)
    saved = {
        "base_model.model.model.embed_tokens.weight": embedding,
        "base_model.model.lm_head.weight": head,
    }
    adapter = save_adapter(tmp_path / "adapter", saved, modules_to_save=["embed_tokens", "lm_head"])
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    (adapter / "added_tokens.json").write_text("{}")
    return base, adapter


def test_new_tokens_come_with_their_tokenizer(make_model: Make, tmp_path: Path) -> None:
    base, adapter = resized(make_model, tmp_path)
    write(open_checkpoint(f"{base}+{adapter}"), tmp_path / "out")
    files = files_in(tmp_path / "out")
    assert json.loads(files["tokenizer.json"]) == {"of": "the adapter"}
    assert "added_tokens.json" in files
    assert json.loads(files["config.json"])["vocab_size"] == 66
    made = loaded(tmp_path / "out")
    stored = weights_of(adapter)
    assert torch.equal(made.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(made.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


def test_a_tied_vocabulary_that_was_resized_stays_tied(make_model: Make, tmp_path: Path) -> None:
    """PEFT saves both where the number of tokens has changed, trained or not."""
    base = make_model(tie_word_embeddings=True)
    both = torch.randn(66, 16)
    names = ("model.embed_tokens", "lm_head")
    saved = {f"base_model.model.{name}.weight": both.clone() for name in names}
    adapter = save_adapter(tmp_path / "adapter", saved)
    baked = open_checkpoint(f"{base}+{adapter}")
    assert "lm_head.weight" not in baked
    assert baked.config["tie_word_embeddings"] is True
    assert baked.config["vocab_size"] == 66
    write(baked, tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out").lm_head.weight, both)


def test_head_and_embedding_have_the_same_tokens(make_model: Make, tmp_path: Path) -> None:
    base, adapter = resized(make_model, tmp_path)
    stored = load_file(adapter / "adapter_model.safetensors")
    del stored["base_model.model.lm_head.weight"]
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(
        MismatchError, match=r"embed_tokens.weight has 66 and lm_head.weight has 64"
    ):
        open_checkpoint(f"{base}+{adapter}")


def test_without_new_tokens_the_models_tokenizer_is_kept(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    (base / "tokenizer.json").write_text("{}")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    baked = open_checkpoint(f"{base}+{adapter}")
    assert baked.companions["tokenizer.json"] == base / "tokenizer.json"
    assert baked.notes == (
        f"{adapter} brings a tokenizer of its own, and the model's is kept: the vocabulary is the same",
    )


# ---- names


def test_names_on_disk_may_lack_a_prefix(make_model: Make, tmp_path: Path) -> None:
    """GPT-2's own files have h.0, and transformers' module is transformer.h.0."""
    base = make_model("gpt2")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=CONV1D)
    stored = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, base / "model.safetensors")
    baked = open_checkpoint(f"{base}+{adapter}")
    assert "h.0.attn.c_attn.weight" in baked
    assert sum(tensor.file_spans() is None for tensor in baked.values()) == 8


def test_an_adapters_name_in_its_keys(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    wanted = open_checkpoint(f"{base}+{adapter}")
    stored = load_file(adapter / "adapter_model.safetensors")
    named = {k.replace(".weight", ".default.weight"): v for k, v in stored.items()}
    other = tmp_path / "other"  # the first is still read
    shutil.copytree(adapter, other)
    save_file(named, other / "adapter_model.safetensors")
    found = open_checkpoint(f"{base}+{other}")
    assert all(bytes_of(found[n].whole()) == bytes_of(wanted[n].whole()) for n in found)


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("model.layers.1.q.weight", "model.layers.1.q.weight"),
        ("language_model.model.layers.0.q.weight", "model.layers.0.q.weight"),
        ("layers.0.q.weight", "model.layers.0.q.weight"),
        ("model.layers.2.q.weight", None),  # and not the q of another block
        ("vision.blocks.0.q.weight", None),
        ("q.weight", None),
        ("norm.weight", "model.norm.weight"),
    ],
)
def test_a_name_is_found_by_its_only_ending(parameter: str, name: str | None) -> None:
    names = Names(["model.layers.0.q.weight", "model.layers.1.q.weight", "model.norm.weight"])
    assert names.find(parameter) == name


def test_an_ending_of_two_is_nobodys() -> None:
    names = Names(["text.layers.0.q.weight", "vision.layers.0.q.weight"])
    assert names.find("model.layers.0.q.weight") is None


def test_where_a_reference_is_split(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    (tmp_path / "c").mkdir()
    one, two = f"{tmp_path}/a+b", f"{tmp_path}/c"
    assert split_reference(one) == [one]
    assert split_reference(f"{one}+{two}") == [one, two]
    assert split_reference(f"{two}+{one}+org/x@main") == [two, one, "org/x@main"]
    assert split_reference("org/model+org/one+org/two") == ["org/model", "org/one", "org/two"]
    for text in ("org/model+", "+org/adapter", "org/model++org/adapter"):
        with pytest.raises(NotFoundError, match=r"names nothing beside a \+: write MODEL\+ADAPTER"):
            split_reference(text)


# ---- refused


def small(tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    """A base of one matrix, and an adapter for it."""
    base = save_raw(tmp_path / "base", {"layers.0.up.weight": torch.ones(5, 3)})
    parts = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(5, 2)}
    tensors = {f"base_model.model.layers.0.up.{k}.weight": v for k, v in parts.items()}
    return base, save_adapter(tmp_path / "adapter", tensors, **config)


def message(base: Path, adapter: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(f"{base}+{adapter}")
    return str(caught.value)


def test_an_adapter_for_another_base(make_model: Make, tmp_path: Path) -> None:
    base = make_model(hidden_size=32, num_hidden_layers=1)
    other = make_model(name="other")
    adapter = make_adapter(other, tmp_path / "adapter", target_modules=["up_proj"])
    shapes, missing = message(base, adapter, MismatchError).splitlines()
    assert shapes == (
        f"{adapter} was made for another base: its model.layers.0.mlp.up_proj is [24, 16], and "
        f"model.layers.0.mlp.up_proj.weight of {base} is [24, 32]"
    )
    assert missing == (
        f"{adapter} was made for another base: it has model.layers.1.mlp.up_proj.weight, and "
        f"{base} has no such tensor"
    )


def test_another_base_of_the_same_shape_is_noticed(make_model: Make, tmp_path: Path) -> None:
    base, other = make_model(), make_model(name="other", seed=1)
    adapter = make_adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    assert open_checkpoint(f"{base}+{adapter}").notes == (
        f"{adapter} was trained on {other}, and is applied to {base}",
    )
    assert open_checkpoint(f"{other}+{adapter}").notes == ()


def test_pickles_are_never_read(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    said = message(base, adapter, FormatError)
    assert "only adapter_model.bin, a pickle, which can run any code as it is read" in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set (it repeats layers"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ],
)
def test_what_isnt_lora_is_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in message(*small(tmp_path, **config), UnsupportedError)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_starts_that_leave_the_base_alone(start: object, tmp_path: Path) -> None:
    base, adapter = small(tmp_path, init_lora_weights=start)
    assert float(open_checkpoint(f"{base}+{adapter}")["layers.0.up.weight"].whole()[0, 0]) == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, "r is 0, and has to be a whole number above 0"),
        ({"lora_alpha": "high"}, "lora_alpha is 'high'"),
        ({"r": 3}, "lora_A is [2, 3] and lora_B is [5, 2], and adapter_config.json says that its"),
        ({"rank_pattern": {"(": 2}}, "which isn't a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], and has to be a table"),
        ({"use_dora": True}, "layers.0.up has no lora_magnitude_vector, and use_dora is set"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head', and has to be a list"),
    ],
)
def test_a_config_that_cant_be_meant(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in message(*small(tmp_path, **config), FormatError)


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        ({"up.lora_A.weight": (2, 3)}, FormatError, "needs both lora_A and lora_B"),
        (
            {"up.lora_A.weight": (2, 3, 3, 3), "up.lora_B.weight": (5, 2, 1, 1)},
            FormatError,
            "only matrices can be baked, and no convolutions",
        ),
        ({"up.lora_diag": (2,)}, UnsupportedError, "up.lora_diag is no part of a LoRA"),
        (
            {"up.base_layer.lora_A.weight": (2, 3), "up.base_layer.lora_B.weight": (5, 2)},
            UnsupportedError,
            "is no part of a LoRA that can be baked",
        ),
        (
            {f"up.lora_{p}.{n}.weight": s for p, s in (("A", (2, 3)), ("B", (5, 2))) for n in "xy"},
            FormatError,
            "holds several adapters (x, y)",
        ),
        (
            {"up.lora_A.weight": (2, 3), "up.lora_B.weight": (5, 2), "up.lora_B.bias": (5,)},
            MismatchError,
            "it has layers.0.up.bias, and",
        ),
    ],
)
def test_tensors_that_make_no_adapter(
    tensors: dict[str, tuple[int, ...]], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    base, adapter = small(tmp_path)
    made = {f"base_model.model.layers.0.{k}": torch.ones(v) for k, v in tensors.items()}
    save_file(made, adapter / "adapter_model.safetensors")
    assert said in message(base, adapter, kind)


def test_no_adapter_at_all(make_model: Make) -> None:
    base = make_model()
    assert "has no adapter_config.json: it is no adapter" in message(base, base, FormatError)


def test_an_adapter_alone_says_how_to_write_it(tmp_path: Path) -> None:
    _, adapter = small(tmp_path)
    with pytest.raises(FormatError, match=r"is a LoRA adapter and no model: .* MODEL\+"):
        open_checkpoint(adapter)


def test_what_isnt_finite_is_named(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    stored = load_file(adapter / "adapter_model.safetensors")
    stored["base_model.model.layers.0.up.lora_A.weight"][0, 1] = float("nan")
    save_file(stored, adapter / "adapter_model.safetensors")
    baked = open_checkpoint(f"{base}+{adapter}")
    with pytest.raises(FormatError, match=r"layers.0.up of .*adapter holds NaN or infinity"):
        baked["layers.0.up.weight"].whole()


def test_a_quantized_base(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    assert "is quantized: gptq" in message(base, adapter, UnsupportedError)


def test_two_that_get_in_each_others_way(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    one = make_adapter(base, tmp_path / "one", target_modules=["q_proj"], use_dora=True)
    two = make_adapter(base, tmp_path / "two", target_modules=["q_proj"])
    for pair in (f"{base}+{one}+{two}", f"{base}+{two}+{one}"):
        with pytest.raises(UnsupportedError, match="which another update changes too"):
            open_checkpoint(pair)


def test_trainable_tokens_that_dont_fit(make_model: Make, tmp_path: Path) -> None:
    base = make_model(**UNTIED)
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}
    adapter = make_adapter(base, tmp_path / "adapter", **tokens)
    change_config(adapter, trainable_token_indices=[3, 99])
    assert "rows of 16 for tokens up to 99" in message(base, adapter, MismatchError)
    change_config(adapter, trainable_token_indices=[3])
    assert "rows of shape [2, 16] for tokens" in message(base, adapter, FormatError)


# ---- the command line


def test_anywhere_a_model_is_accepted(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(base, tmp_path / "a+b", target_modules=ATTENTION)
    model, out = f"{base}+{adapter}", tmp_path / "out"
    report = json.loads(surgery("inspect", model, "--json").stdout)
    assert report["model"] == model
    assert report["tensors"] == 21
    for args in (
        ["merge", base, model, "--method", "ties"],
        ["lines", base, model, "--alpha", "0.5"],
        ["grow", model, "--factor", "1.5"],
        ["merge", base, model, "--method", "ties", "--dry-run"],
    ):
        result = surgery(*args, "-o", out, "--overwrite")
        assert result.exit_code == 0, result.output
    assert surgery("diff", base, model).exit_code == 0
    edits = json.loads((out / "surgery.json").read_text())["edits"]
    assert [edit["operation"] for edit in edits] == ["adapter", "grow"]
    assert edits[0]["inputs"]["adapter"]["reference"] == str(adapter)
    assert edits[0]["parameters"] == {"rank": 4, "alpha": 6.0, "rslora": False, "dora": False}
    assert (
        "- **adapter** of base `model`, adapter `a+b`: rank = 4" in (out / "README.md").read_text()
    )


def test_inspect_reads_no_tensor_and_says_what_was_noticed(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery import files

    base = make_model(tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"], use_dora=True)
    monkeypatch.setattr(files.InputFile, "read_into", None)
    result = surgery("inspect", f"{base}+{adapter}")
    assert result.exit_code == 0, result.output
    assert "were tied, and an adapter trained them apart" in result.stdout


def test_an_adapter_of_the_hub(make_model: Make, hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    base = make_model()
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    hub.push("org/base", base)
    commit = hub.push("org/adapter", adapter)
    assert surgery("inspect", "org/base+org/adapter").exit_code == 0
    assert all(request.range is not None for request in hub.fetched())
    result = surgery(
        "lines", "org/base", "org/base+org/adapter@main", "--alpha", "0.5", "-o", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    edits = json.loads((tmp_path / "out" / "surgery.json").read_text())["edits"]
    assert edits[0]["inputs"]["adapter"]["revision"] == commit


def test_the_output_may_not_be_an_input(make_model: Make, tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    result = surgery("grow", f"{base}+{adapter}", "-o", adapter, "--overwrite", "--no-verify")
    assert result.exit_code == 5
    assert (adapter / "adapter_model.safetensors").exists()
