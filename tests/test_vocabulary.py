"""Models whose vocabularies differ: rows against dictionaries of plain tensors, the results
through transformers' own loaders, errors by their text, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_in
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from surgery.commands.main import app
from typer.testing import CliRunner

from surgery import (
    ArgumentError,
    Checkpoint,
    FormatError,
    MismatchError,
    NotFoundError,
    SurgeryError,
    UnsupportedError,
    diff,
    lines,
    merge,
    open_checkpoint,
    write,
)
from surgery.operations.vocabulary import align_vocabulary
from surgery.tensor import FileSpan
from surgery.vocabulary.places import resized_config
from surgery.vocabulary.rows import Matching, Rows
from surgery.vocabulary.tokens import read_vocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [*SPECIAL, "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
CHAT = "<|chat|>"
END = "<|endoftext|>"  # a class of GPT-2's kind adds it where it isn't
SENTENCE = "the cat sat on a mat the dog ran"
Make = Callable[..., Path]


@dataclass(frozen=True)
class Added:
    content: str
    special: bool = True
    lstrip: bool = False


@pytest.fixture
def model(make_model: Make) -> Make:
    """model(name, words, *added, rows=, kind=, legacy=, **config) -> Path: a small causal model
    and its tokenizer, one token a word, with padded rows up to `rows`."""

    def make(
        name: str,
        words: Sequence[str],
        *added: Added,
        rows: int | None = None,
        kind: str = "llama",
        legacy: bool = False,
        **how: Any,
    ) -> Path:
        count = rows or len(words) + len(added)
        ids = {f"{role}_token_id": words.index(t) for role, t in (("bos", "<s>"), ("eos", "</s>"))}
        folder = make_model(kind, name, vocab_size=count, **{**ids, **how})
        save_tokenizer(folder, words, added)
        if legacy:
            as_version_4(folder)
        return folder

    return make


def save_tokenizer(folder: Path, words: Sequence[str], added: Sequence[Added]) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for token in added:
        fast.add_tokens(
            [
                AddedToken(
                    token.content, special=token.special, lstrip=token.lstrip, normalized=False
                )
            ],
            special_tokens=token.special,
        )
    fast.save_pretrained(folder)


def as_version_4(folder: Path) -> None:
    """As transformers 4 wrote it: the added tokens a second and a third time, by their ids."""
    table = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
        for entry in table["added_tokens"]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    known = table["model"]["vocab"]
    beside = {e["content"]: e["id"] for e in table["added_tokens"] if e["content"] not in known}
    (folder / "added_tokens.json").write_text(json.dumps(beside))


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), tokenizer


def logits(folder: Path, text: str) -> dict[str, torch.Tensor]:
    """What a model says to a text, by the string of the next token."""
    network, tokenizer = loaded(folder)
    with torch.no_grad():
        found = network(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0]
    ids = tokenizer.get_vocab()
    return {token: found[:, row] for token, row in ids.items() if row < found.shape[1]}


def vocabulary(folder: Path) -> dict[str, int]:
    """By transformers."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def by_token(folder: Path, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """token -> row."""
    matrix = load_file(folder / "model.safetensors")[name]
    return {t: matrix[row] for t, row in vocabulary(folder).items() if row < len(matrix)}


def expected(
    token: str,
    own: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor] | None,
    models: Sequence[Mapping[str, torch.Tensor]],
) -> torch.Tensor:
    """The row of `token`, by the rule: own, else the base's, else the mean of those there are."""
    if token in own:
        return own[token]
    if base is not None and token in base:
        return base[token]
    have = [rows[token] for rows in models if token in rows]
    total = have[0].float()
    for row in have[1:]:
        total = total + row.float()
    return (total / len(have)).to(have[0].dtype)


def opened(*folders: Path) -> list[Checkpoint]:
    return [open_checkpoint(folder) for folder in folders]


def problems(error: type[SurgeryError], call: Callable[[], object]) -> list[str]:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return list(caught.value.problems)


def shuffled(words: Sequence[str], seed: int) -> list[str]:
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    return [words[at] for at in order.tolist()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokenizer", ["base", "union", "model"])
@pytest.mark.parametrize("with_base", [True, False])
def test_rows_are_those_of_a_dictionary(
    tied: bool, dtype: torch.dtype, tokenizer: str, with_base: bool, model: Make, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"dtype": dtype, "tie_word_embeddings": tied}
    x, y = Added(CHAT), Added("plain", special=False)
    folders = [
        model("m0", WORDS, rows=16, **how),
        model("m1", shuffled(WORDS, 1), x, y, Added("<only>"), seed=1, **how),
        model("m2", [*WORDS[:-1], "fish"], y, x, rows=20, seed=2, **how),
    ]
    base, *others = opened(*folders)
    models = others if with_base else [base, *others]
    aligned_base, aligned = align_vocabulary(
        models,
        base=base if with_base else None,
        tokenizer=others[0] if tokenizer == "model" else tokenizer,  # type: ignore[arg-type]
    )
    found = [*([aligned_base] if aligned_base else []), *aligned]
    owner = {"base": [0], "union": [0, 1, 2], "model": [1]}[tokenizer]
    have = [by_token(folder) for folder in folders]
    wanted = set().union(*(have[at] for at in owner))
    for at, checkpoint in enumerate(found):
        out = write(checkpoint, tmp_path / f"out{at}").target
        ids = vocabulary(out)
        assert set(ids) == wanted
        for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
            rows = [by_token(folder, name) for folder in folders]
            made = load_file(out / "model.safetensors")[name]
            assert made.dtype == dtype
            first = rows[0] if with_base else None
            for token, row in ids.items():
                assert torch.equal(made[row], expected(token, rows[at], first, rows)), token
        assert json.loads((out / "config.json").read_text())["vocab_size"] == len(made)
    assert len({checkpoint[EMBEDDING].shape for checkpoint in found}) == 1


def test_what_does_not_move_is_untouched(model: Make, tmp_path: Path) -> None:
    base = open_checkpoint(model("base", WORDS, rows=16))
    tuned = open_checkpoint(model("tuned", WORDS, Added(CHAT), rows=12, seed=1))
    aligned, (other,) = align_vocabulary([tuned], base=base, tokenizer="base")
    assert aligned is not None
    assert all(aligned[name] is base[name] for name in base)
    assert aligned.companions == base.companions
    assert aligned.config == base.config
    # rows 11 to 15 have no token: the tuned model has a token at 11, and no rows from 12 on
    wanted = torch.cat([tuned[EMBEDDING].read(0, 11), base[EMBEDDING].read(11, 16)])
    assert torch.equal(other[EMBEDDING].whole(), wanted)
    assert other[EMBEDDING].file_spans() is not None
    assert other[EMBEDDING].runs == ((0, 0, 11), (1, 11, 16))


def test_padded_rows_are_each_model_s_own_where_it_has_them(model: Make) -> None:
    base = open_checkpoint(model("base", WORDS, rows=16))
    tuned = open_checkpoint(model("tuned", shuffled(WORDS, 3), rows=14, seed=1))
    _, (other,) = align_vocabulary([tuned], base=base, tokenizer="base")
    made = other[EMBEDDING].whole()
    assert torch.equal(made[11:14], tuned[EMBEDDING].read(11, 14))
    assert torch.equal(made[14:], base[EMBEDDING].read(14, 16))


def test_a_permuted_model_is_the_same_function(model: Make, tmp_path: Path) -> None:
    """A model and the same with its tokens in another order, merged: the function of both."""
    first = model("first", WORDS, Added(CHAT))
    words = shuffled(WORDS, 7)
    second = model("second", words, Added(CHAT))
    tensors = load_file(first / "model.safetensors")
    order = [vocabulary(first)[word] for word in [*words, CHAT]]
    for name in (EMBEDDING, HEAD):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    text = SENTENCE + CHAT + " cat"
    wanted = logits(first, text)
    for tokenizer in ("base", "union"):
        edited = merge(opened(first, second), method="linear", tokenizer=tokenizer)  # type: ignore[arg-type]
        found = logits(write(edited, tmp_path / tokenizer).target, text)
        for token, value in wanted.items():
            torch.testing.assert_close(found[token], value, atol=1e-5, rtol=1e-5)
    edited = merge(opened(first, second), method="linear", tokenizer=open_checkpoint(second))
    out = write(edited, tmp_path / "second's").target
    assert vocabulary(out) == vocabulary(second)
    found = logits(out, text)
    for token, value in wanted.items():
        torch.testing.assert_close(found[token], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_union_loads_and_keeps_what_the_models_know(
    legacy: bool, model: Make, tmp_path: Path
) -> None:
    strip = Added("<|strip|>", lstrip=True)
    base = model("base", WORDS, rows=12, legacy=legacy)
    a = model("a", WORDS, Added(CHAT), strip, seed=1, legacy=legacy)
    b = model("b", WORDS, Added("ing", special=False), Added(CHAT), seed=2, legacy=legacy)
    edited = merge(
        opened(a, b), base=open_checkpoint(base), method="task_arithmetic", tokenizer="union"
    )
    out = write(edited, tmp_path / "out").target
    network, tokenizer = loaded(out)
    ids = tokenizer.get_vocab()
    assert ids == vocabulary(base) | {CHAT: 11, "<|strip|>": 12, "ing": 13}
    assert network.get_input_embeddings().weight.shape == (14, 16)
    assert network.config.vocab_size == 14
    assert tokenizer.encode(SENTENCE) == loaded(base)[1].encode(SENTENCE)
    text = f"the {CHAT} cat   <|strip|> sat ing"
    encoded = tokenizer.encode(text)
    assert encoded == [3, 11, 4, 12, 5, 13]
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "the cat sat ing"
    table = json.loads((out / "tokenizer.json").read_text())
    flags = {e["content"]: (e["id"], e["special"], e["lstrip"]) for e in table["added_tokens"]}
    assert flags[CHAT] == (11, True, False)
    assert flags["<|strip|>"] == (12, True, True)
    assert flags["ing"] == (13, False, False)
    # a token of one model: its row, whole; of both: base + the two updates from their average
    rows = {name: by_token(folder) for name, folder in (("a", a), ("b", b), ("out", out))}
    assert torch.equal(rows["out"]["<|strip|>"], rows["a"]["<|strip|>"])
    assert torch.equal(rows["out"]["ing"], rows["b"]["ing"])
    mean = (rows["a"][CHAT] + rows["b"][CHAT]) / 2
    torch.testing.assert_close(
        rows["out"][CHAT], mean + (rows["a"][CHAT] - mean) + (rows["b"][CHAT] - mean)
    )
    if legacy:
        decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert {int(k): v["content"] for k, v in decoder.items()}[13] == "ing"
        beside = json.loads((out / "added_tokens.json").read_text())
        assert beside == {CHAT: 11, "<|strip|>": 12, "ing": 13}


def pieces(kind: str, words: Sequence[str]) -> Any:
    """A tokenizer that makes words of bytes, or of letters: a word of `words` is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if kind == "unigram":
        letters = sorted({letter for word in WORDS for letter in word} | {"▁"})
        scores = [("<unk>", 0.0), *((letter, -9.0) for letter in letters)]
        made = Tokenizer(models.Unigram([*scores, *((w, -1.0) for w in words)], unk_id=0))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        return made
    ids = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        for at in range(1, len(word)):
            if word[: at + 1] not in ids:
                merges.append((word[:at], word[at]))
                ids[word[: at + 1]] = len(ids)
    made = Tokenizer(models.BPE(ids, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def save_pieces(folder: Path, kind: str, words: Sequence[str], *added: str, cls: str = "") -> int:
    """Returns the number of tokens."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=pieces(kind, words))
    fast.add_special_tokens({"additional_special_tokens": list(added)})
    fast.save_pretrained(folder)
    if cls:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["tokenizer_class"] = cls
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(fast)


@pytest.mark.parametrize("cls", ["", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_pieces_of_words_cut_no_words(cls: str, make_model: Make, tmp_path: Path) -> None:
    """The other's pieces get rows, and texts are encoded as they were: "at" isn't cut out."""
    folders = [tmp_path / "base", tmp_path / "tuned"]
    sizes = [
        save_pieces(folders[0], "bpe", ["Ġcat", "ran"], END, "<|b|>", cls=cls),
        save_pieces(folders[1], "bpe", ["at", "Ġdog"], END, "<|t|>", cls=cls),
    ]
    for seed, (folder, size) in enumerate(zip(folders, sizes, strict=True)):
        make_model(name=folder.name, seed=seed, vocab_size=size)
    base, tuned = opened(*folders)
    edited = merge([tuned], base=base, method="task_arithmetic", tokenizer="union")
    out = write(edited, tmp_path / "out").target
    was, now = loaded(folders[0])[1], loaded(out)[1]
    text = "the cat sat on a mat, the dog ran<|b|> at"
    assert now.encode(text) == was.encode(text)
    assert now.encode("a<|t|>") == [was.encode("a")[0], now.get_vocab()["<|t|>"]]
    assert now.decode([now.get_vocab()["Ġdog"]]) == " dog"
    ids = now.get_vocab()
    assert ids.items() >= was.get_vocab().items()
    assert sorted(ids.values()) == list(range(len(ids)))
    rows, own = by_token(out), by_token(folders[1])
    for token in ("at", "Ġdog", "<|t|>"):
        assert torch.equal(rows[token], own[token])
    (note,) = edited.notes
    assert note.startswith("new tokens that are pieces of words: 4 ('at', 'Ġd', 'Ġdo', ...); no t")


def test_pieces_of_another_kind_are_added_and_said(make_model: Make, tmp_path: Path) -> None:
    folders = [tmp_path / "base", tmp_path / "tuned"]
    for seed, (folder, words) in enumerate(zip(folders, (["▁cat"], ["▁dog"]), strict=True)):
        size = save_pieces(folder, "unigram", words, "<|x|>")
        make_model(name=folder.name, seed=seed, vocab_size=size)
    base, tuned = opened(*folders)
    edited = merge([tuned], base=base, method="task_arithmetic", tokenizer="union")
    out = write(edited, tmp_path / "out").target
    assert vocabulary(out) == vocabulary(folders[0]) | {"▁dog": len(vocabulary(folders[0]))}
    assert torch.equal(by_token(out)["▁dog"], by_token(folders[1])["▁dog"])
    (note,) = edited.notes
    assert note == (
        "new tokens that are pieces of words: 1 ('▁dog'); texts that hold one are encoded "
        "differently now"
    )


def test_union_pads_and_says_what_it_did(model: Make, tmp_path: Path) -> None:
    base = model("base", WORDS, rows=12)
    tuned = model("tuned", WORDS, Added(CHAT), Added("<x>"), seed=1)
    edited = merge(
        opened(tuned),
        base=open_checkpoint(base),
        method="task_arithmetic",
        tokenizer="union",
        pad_to_multiple_of=8,
    )
    out = write(edited, tmp_path / "out").target
    matrix = load_file(out / "model.safetensors")[EMBEDDING]
    assert matrix.shape == (16, 16)
    assert not matrix[13:].any()
    assert loaded(out)[0].config.vocab_size == 16
    edit = json.loads((out / "surgery.json").read_text())["edits"][0]
    assert edit["operation"] == "vocabulary"
    assert edit["parameters"] == {"tokenizer": "union", "pad_to_multiple_of": 8}
    assert edit["details"]["rows"] == 16
    assert edit["details"]["new_tokens"] == 2
    assert edit["details"]["models"] == {
        "base": {"rows_before": 12, "from_another": 2, "matched": 11, "zeros": 3},
        "model_1": {"rows_before": 13, "matched": 13, "zeros": 3},
    }


def test_another_model_s_tokenizer_brings_its_special_tokens(model: Make, tmp_path: Path) -> None:
    base = model("base", WORDS, rows=16, pad_token_id=0)
    words = shuffled(WORDS, 5)
    tuned = model("tuned", words, Added(CHAT), eos_token_id=11, seed=1)
    for folder, ids in ((base, {"eos_token_id": [2], "temperature": 0.5}), (tuned, {})):
        given = {"eos_token_id": [11, words.index("</s>")], **ids, "_from_model_config": False}
        (folder / "generation_config.json").write_text(json.dumps(given))
    (tuned / "chat_template.jinja").write_text("hello")
    edited = merge(
        opened(tuned),
        base=open_checkpoint(base),
        method="task_arithmetic",
        tokenizer=open_checkpoint(tuned),
    )
    out = write(edited, tmp_path / "out").target
    assert edited.history[0].parameters["tokenizer"] == "model_1"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 11
    assert config["bos_token_id"] == words.index("<s>")
    assert config["vocab_size"] == 12
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [11, words.index("</s>")]
    assert generation["temperature"] == 0.5
    # the tuned model's pad token isn't said in its config: the base's, under its new id
    if "pad_token_id" not in json.loads((tuned / "config.json").read_text()):
        assert config["pad_token_id"] == words.index("<unk>")


def test_a_tokenizer_of_none_of_the_models(model: Make) -> None:
    base, tuned = opened(model("base", WORDS, rows=16), model("tuned", WORDS, seed=1))
    foreign = open_checkpoint(model("foreign", shuffled(WORDS, 2), rows=13))
    aligned, _ = align_vocabulary([tuned], base=base, tokenizer=foreign)
    assert aligned is not None
    assert aligned.history[-1].parameters["tokenizer"] == "tokenizer"
    assert aligned.history[-1].inputs["tokenizer"] is foreign.source
    assert aligned[EMBEDDING].shape == (13, 16)
    assert aligned.companions["tokenizer.json"] == foreign.companions["tokenizer.json"]
    assert torch.equal(aligned[EMBEDDING].read(11, 13), base[EMBEDDING].read(11, 13))
    more = open_checkpoint(model("more", [*WORDS, "fish", "bird"]))
    (text,) = problems(MismatchError, lambda: align_vocabulary([tuned], base=base, tokenizer=more))
    assert text.startswith(f"{more.source.reference}, whose tokenizer was asked for, has 2 tokens")
    assert "('fish', 'bird')" in text


def test_a_tokenizer_with_more_tokens_than_rows(model: Make, tmp_path: Path) -> None:
    """Some models name a padding token that they have no row for."""
    base = model("base", WORDS)
    save_tokenizer(base, WORDS, [Added("[PAD]")])
    tuned = model("tuned", WORDS, Added(CHAT), Added("[PAD]"), seed=1)
    kept, _ = align_vocabulary(opened(tuned), base=open_checkpoint(base), tokenizer="base")
    assert kept is not None
    assert kept[EMBEDDING].shape == (11, 16)
    united, _ = align_vocabulary(opened(tuned), base=open_checkpoint(base), tokenizer="union")
    assert united is not None
    out = write(united, tmp_path / "out").target
    assert vocabulary(out) == vocabulary(base) | {CHAT: 12}
    assert torch.equal(by_token(out)["[PAD]"], by_token(tuned)["[PAD]"])
    alone, _ = align_vocabulary(
        opened(model("plain", WORDS, seed=3)), base=open_checkpoint(base), tokenizer="union"
    )
    assert alone is not None
    assert not alone[EMBEDDING].read(11, 12).any()
    assert alone.notes[-1] == (
        "tokens that no model has a row for: 1 ('[PAD]'); where there is room for one, it is zeros"
    )


def test_types_may_differ(model: Make) -> None:
    """The base's rows come to a narrower model as they are, so that they aren't an update."""
    base = open_checkpoint(model("base", [*WORDS, "fish"]))
    tuned = open_checkpoint(model("tuned", WORDS, seed=1, dtype=torch.bfloat16))
    aligned, (other,) = align_vocabulary([tuned], base=base, tokenizer="base")
    assert torch.equal(other[EMBEDDING].read(11, 12), base[EMBEDDING].read(11, 12))
    assert torch.equal(other[EMBEDDING].read(0, 11), tuned[EMBEDDING].read(0, 11).float())
    aligned, _ = align_vocabulary([base], base=tuned, tokenizer="union")
    assert aligned is not None
    assert torch.equal(aligned[EMBEDDING].read(11, 12), base[EMBEDDING].read(11, 12).bfloat16())


def test_biases_of_heads_follow(model: Make, tmp_path: Path) -> None:
    how: dict[str, Any] = {"kind": "phi", "num_attention_heads": 2}
    base, tuned = (
        model("base", WORDS, rows=16, **how),
        model("tuned", shuffled(WORDS, 4), Added(CHAT), seed=1, **how),
    )
    edited = merge(
        opened(tuned), base=open_checkpoint(base), method="task_arithmetic", tokenizer="union"
    )
    out = write(edited, tmp_path / "out").target
    found = logits(out, SENTENCE)
    assert found.keys() == {*WORDS, CHAT}
    bias = "lm_head.bias"
    biases = [by_token(folder, bias) for folder in (base, tuned, out)]
    for token in WORDS:
        torch.testing.assert_close(biases[2][token], biases[1][token])
    assert torch.equal(biases[2][CHAT], biases[1][CHAT])
    wanted = logits(tuned, SENTENCE)
    for token, value in wanted.items():
        torch.testing.assert_close(found[token], value, atol=1e-4, rtol=1e-4)


def test_a_bias_that_is_a_row_of_columns_follows(model: Make) -> None:
    folders = [model("base", WORDS), model("tuned", shuffled(WORDS, 4), Added(CHAT), seed=1)]
    for at, folder in enumerate(folders):
        tensors = load_file(folder / "model.safetensors")
        tensors["final_logits_bias"] = torch.randn(1, 11 + at)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base, tuned = opened(*folders)
    aligned, (other,) = align_vocabulary([tuned], base=base, tokenizer="union")
    assert aligned is not None
    bias = aligned["final_logits_bias"].whole()
    assert bias.shape == (1, 12)
    assert torch.equal(bias[:, :11], base["final_logits_bias"].whole())
    assert torch.equal(bias[:, 11:], tuned["final_logits_bias"].whole()[:, 11:])
    made = other["final_logits_bias"].whole()[0]
    own = vocabulary(folders[1])
    for token, row in vocabulary(folders[0]).items():
        assert made[row] == tuned["final_logits_bias"].whole()[0, own[token]]


def test_tied_and_untied_heads_together(model: Make, tmp_path: Path) -> None:
    base = model("base", WORDS, rows=16, tie_word_embeddings=True)
    tuned = model("tuned", shuffled(WORDS, 4), Added(CHAT), seed=1)
    edited = merge(
        opened(tuned), base=open_checkpoint(base), method="task_arithmetic", tokenizer="union"
    )
    out = write(edited, tmp_path / "out").target
    wanted, found = logits(tuned, SENTENCE), logits(out, SENTENCE)
    for token, value in wanted.items():
        torch.testing.assert_close(found[token], value, atol=1e-4, rtol=1e-4)


def test_without_a_tokenizer_sizes_that_differ_are_refused(model: Make) -> None:
    base = open_checkpoint(model("base", WORDS))
    tuned = open_checkpoint(model("tuned", WORDS, Added(CHAT), seed=1))
    found = problems(MismatchError, lambda: merge([tuned], base=base, method="task_arithmetic"))
    where = f"in {base.source.reference} and [12, 16] in {tuned.source.reference}"
    advice = (
        "the vocabularies differ: pass tokenizer='base', 'union' or a model "
        "(--tokenizer base|union|MODEL) to have rows matched by token"
    )
    assert sorted(found) == [f"{name} is [11, 16] {where}; {advice}" for name in (HEAD, EMBEDDING)]
    found = problems(MismatchError, lambda: lines(base, tuned, alpha=0.5))
    assert all("--lines ALPHA,BETA --tokenizer union` matches rows by token" in t for t in found)


def test_the_same_size_with_other_ids_is_refused(model: Make) -> None:
    base = open_checkpoint(model("base", WORDS))
    swapped = [*WORDS[:3], WORDS[4], WORDS[3], *WORDS[5:]]
    tuned = open_checkpoint(model("tuned", swapped, seed=1))
    (text,) = problems(MismatchError, lambda: merge([tuned], base=base, method="task_arithmetic"))
    assert text == (
        f"{base.source.reference} and {tuned.source.reference} give tokens different ids: "
        f"'the' is 3 and 4, 'cat' is 4 and 3; pass tokenizer='base', 'union' or a model "
        f"(--tokenizer base|union|MODEL) to have rows matched by token"
    )
    other = open_checkpoint(model("other", [*WORDS[:-1], "fish"], seed=2))
    (text,) = problems(MismatchError, lambda: merge([base, other], method="linear"))
    assert "ids: 10 is 'ran' and 'fish';" in text


def test_a_token_in_another_s_padding_is_fine(model: Make) -> None:
    base = open_checkpoint(model("base", WORDS, rows=16))
    tuned = open_checkpoint(model("tuned", WORDS, Added(CHAT), rows=16, seed=1))
    assert merge([tuned], base=base, method="task_arithmetic")[EMBEDDING].shape == (16, 16)
    rival = open_checkpoint(model("rival", WORDS, Added("<rival>"), rows=16, seed=2))
    (text,) = problems(
        MismatchError, lambda: merge([tuned, rival], base=base, method="task_arithmetic")
    )
    assert f"ids: 11 is {CHAT!r} and '<rival>';" in text


@pytest.mark.parametrize("content", [None, b"nonsense", b'{"model": 1}'])
def test_without_a_readable_tokenizer_nothing_is_known(content: bytes | None, model: Make) -> None:
    folders = [model("base", WORDS), model("tuned", shuffled(WORDS, 1), seed=1)]
    path = folders[1] / "tokenizer.json"
    if content is None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folders[1] / name).unlink()
    else:
        path.write_bytes(content)
    base, tuned = opened(*folders)
    merge([tuned], base=base, method="task_arithmetic")  # sizes agree, and that is all there is
    error = NotFoundError if content is None else FormatError
    (text,) = problems(error, lambda: align_vocabulary([tuned], base=base, tokenizer="base"))
    if content is None:
        assert text.startswith(f"{folders[1]} has no tokenizer (no tokenizer.json, vocab.json or")
    else:
        said = "isn't JSON: " if content == b"nonsense" else "can't be read as a tokenizer: "
        assert text.startswith(f"{path} {said}")


def test_a_vocabulary_without_tokenizer_json(model: Make) -> None:
    folder = model("m", WORDS, Added(CHAT))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(WORDS)}))
    (folder / "added_tokens.json").write_text(json.dumps({CHAT: 11}))
    found = read_vocabulary(open_checkpoint(folder))
    assert found.ids == {word: at for at, word in enumerate([*WORDS, CHAT])}
    base = open_checkpoint(model("base", [*WORDS, "fish"], seed=1))
    _, (other,) = align_vocabulary(opened(folder), base=base, tokenizer="base")
    assert torch.equal(other[EMBEDDING].read(0, 11), open_checkpoint(folder)[EMBEDDING].read(0, 11))
    (text,) = problems(
        UnsupportedError,
        lambda: align_vocabulary([base], base=open_checkpoint(folder), tokenizer="union"),
    )
    assert text.startswith(f"{folder / 'vocab.json'}: tokens can only be added to a tokenizer.json")


def test_a_tokenizer_model_that_nothing_reads_is_named(model: Make) -> None:
    folder = model("m", WORDS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(b"\x00nothing")
    (text,) = problems(UnsupportedError, lambda: read_vocabulary(open_checkpoint(folder)))
    assert text.startswith(f"{folder / 'tokenizer.model'}: transformers can't make a tokenizer")
    assert text.endswith(
        "convert it to tokenizer.json first, with AutoTokenizer and save_pretrained"
    )


def test_ids_that_are_no_ids(model: Make) -> None:
    folder = model("m", WORDS)
    (folder / "tokenizer.json").unlink()
    for table, text in (
        ({"a": 0, "b": 0}, "gives the id 0 to both 'a' and 'b'"),
        ({"a": "x"}, "'a' has the id 'x', which is no number"),
        ({"a": -1}, "gives 'a' the id -1"),
    ):
        (folder / "vocab.json").write_text(json.dumps(table))
        (found,) = problems(FormatError, lambda: read_vocabulary(open_checkpoint(folder)))
        assert str(folder / "vocab.json") in found
        assert text in found


def test_a_tokenizer_that_leaves_ids_out_takes_no_new_ones(model: Make) -> None:
    """The tokenizers library counts on from the number of tokens, into an id that is taken."""
    base = model("base", WORDS, rows=16)
    table = json.loads((base / "tokenizer.json").read_text())
    table["model"]["vocab"]["ran"] = 12  # 11 tokens; the second new one would be the 12th
    (base / "tokenizer.json").write_text(json.dumps(table))
    tuned = model("tuned", WORDS, Added(CHAT), Added("<x>"), seed=1)
    (text,) = problems(
        UnsupportedError,
        lambda: align_vocabulary(opened(tuned), base=open_checkpoint(base), tokenizer="union"),
    )
    assert text == (
        f"{base / 'tokenizer.json'}: '<x>' can't be added to it: its id would be 12, which is "
        f"that of 'ran'; pass the tokenizer of one of the models, or base"
    )
    kept, (other,) = align_vocabulary(opened(tuned), base=open_checkpoint(base), tokenizer="base")
    assert kept is not None
    assert torch.equal(other[EMBEDDING].read(12, 13)[0], by_token(tuned)["ran"])
    assert torch.equal(other[EMBEDDING].read(10, 12), kept[EMBEDDING].read(10, 12))


def test_what_may_follow_the_vocabulary_is_refused_by_name(model: Make) -> None:
    folders = [model("base", WORDS), model("tuned", WORDS, Added(CHAT), seed=1)]
    for at, folder in enumerate(folders):
        tensors = load_file(folder / "model.safetensors")
        tensors["frequencies"] = torch.zeros(11 + at)
        tensors["model.embed_tokens_per_layer.weight"] = torch.zeros(9, 4)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base, tuned = opened(*folders)
    found = problems(
        UnsupportedError, lambda: align_vocabulary([tuned], base=base, tokenizer="base")
    )
    assert sorted(found) == [
        (
            f"frequencies is [12] in {folders[1]}, which has 12 tokens, and whether its rows "
            f"follow them isn't known"
        ),
        (
            f"model.embed_tokens_per_layer.weight is [9, 4] in {folders[1]}, and {EMBEDDING} has "
            f"12 rows: which of them are which tokens isn't known"
        ),
    ]


def test_models_that_have_no_rows_in_common(model: Make) -> None:
    base = open_checkpoint(model("base", WORDS))
    wide = open_checkpoint(model("wide", WORDS, Added(CHAT), hidden_size=32))
    found = problems(MismatchError, lambda: align_vocabulary([wide], base=base, tokenizer="union"))
    assert sorted(found) == [
        f"{name} has rows of [16] in {base.source.reference} and of [32] in {wide.source.reference}: "
        f"models of different widths have no rows in common"
        for name in (HEAD, EMBEDDING)
    ]


def test_arguments_that_cannot_be_meant(model: Make) -> None:
    base = open_checkpoint(model("base", WORDS))
    wrong: Any = "other"
    assert problems(
        ArgumentError,
        lambda: align_vocabulary([], tokenizer=wrong, pad_to_multiple_of=0),
    ) == [
        "there are no models to align",
        "tokenizer is 'other', and has to be 'base', 'union' or a checkpoint",
        "pad_to_multiple_of is 0, and has to be a number from 1 on",
    ]
    (text,) = problems(
        ArgumentError, lambda: merge([base, base], method="linear", pad_to_multiple_of=8)
    )
    assert text.startswith("pad_to_multiple_of pads the rows of a tokenizer: pass tokenizer=")


def test_aligning_again_changes_nothing(model: Make, tmp_path: Path) -> None:
    folders = [
        model("base", WORDS, rows=12),
        model("a", shuffled(WORDS, 1), Added(CHAT), seed=1),
        model("b", WORDS, Added("<b>"), Added(CHAT), rows=20, seed=2),
    ]
    base, *models = opened(*folders)
    for tokenizer in ("base", "union", models[0]):
        how: dict[str, Any] = {"tokenizer": tokenizer, "pad_to_multiple_of": 8}
        once, others = align_vocabulary(models, base=base, **how)
        if not isinstance(tokenizer, str):
            how["tokenizer"] = others[0]
        again, more = align_vocabulary(others, base=once, **how)
        assert once is not None
        assert again is not None
        for first, second in zip((once, *others), (again, *more), strict=True):
            assert all(second[name] is first[name] for name in first)
            assert second.companions == first.companions
            assert second.config == first.config


def test_threads_change_nothing(model: Make, tmp_path: Path) -> None:
    a = model("a", shuffled(WORDS, 1), Added(CHAT), seed=1)
    b = model("b", WORDS, Added("<b>"), Added(CHAT), rows=20, seed=2)
    edited = merge(opened(a, b), method="linear", tokenizer="union")
    outs = [write(edited, tmp_path / f"out{n}", threads=n).target for n in (1, 4)]
    assert files_in(outs[0]) == files_in(outs[1])


TOKENS = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


@given(
    vocabularies=st.lists(st.tuples(TOKENS, st.integers(0, 3)), min_size=1, max_size=4),
    target=TOKENS,
    spare=st.integers(0, 4),
    has_base=st.booleans(),
)
def test_every_row_of_every_model_is_where_its_token_is(
    vocabularies: list[tuple[list[str], int]], target: list[str], spare: int, has_base: bool
) -> None:
    every = [
        Rows.of(len(tokens) + padding, {t: at for at, t in enumerate(tokens)})
        for tokens, padding in vocabularies
    ]
    rows = Rows.of(len(target) + spare, {t: at for at, t in enumerate(target)})
    kept = len(target) + spare // 2
    matching = Matching(every, rows, kept, has_base, None)
    for at, own in enumerate(every):
        pieces, counts = matching.pieces(at)
        assert sum(piece.length for piece in pieces) == rows.count == sum(counts.values())
        flat = [
            (piece.holders, tuple(start + n for start in piece.starts))
            for piece in pieces
            for n in range(piece.length)
        ]
        for row, (holders, starts) in enumerate(flat):
            token = target[row] if row < len(target) else None
            if token is not None and token in own.ids:
                assert (holders, starts) == ((at,), (own.ids[token],))
            elif token is not None and has_base and token in every[0].ids:
                assert (holders, starts) == ((0,), (every[0].ids[token],))
            elif token is not None:
                have = [n for n, other in enumerate(every) if token in other.ids]
                assert holders == tuple(have)
                assert starts == tuple(every[n].ids[token] for n in have)
            else:
                assert len(holders) <= 1
                assert not holders or (row < kept and every[holders[0]].unnamed(starts[0]))
        aligned = Matching([rows] * len(every), rows, rows.count, has_base, 0)
        assert aligned.pieces(at)[0][0].length == rows.count


def test_vocab_size_follows_wherever_it_stands() -> None:
    config = {
        "vocab_size": 10,
        "text_config": {"vocab_size": 10, "hidden_size": 10},
        "vision_config": {"vocab_size": 10},
    }
    assert resized_config(config, 10, 12) == {
        "vocab_size": 12,
        "text_config": {"vocab_size": 12, "hidden_size": 10},
        "vision_config": {"vocab_size": 10},
    }
    assert resized_config({"text_config": {}}, 10, 12) == {"text_config": {"vocab_size": 12}}
    assert resized_config({}, 10, 12) == {}


def test_diff_shows_sizes_that_differ(model: Make) -> None:
    found = diff(*opened(model("a", WORDS), model("b", WORDS, Added(CHAT), seed=1)))
    assert found.reshaped == dict.fromkeys((HEAD, EMBEDDING), ((11, 16), (12, 16)))


def test_the_command_line(model: Make, tmp_path: Path) -> None:
    base, tuned = model("base", WORDS), model("tuned", WORDS, Added(CHAT), seed=1)
    out = tmp_path / "out"

    def surgery(*more: str) -> Any:
        args = ["merge", base, tuned, "--method", "task_arithmetic", "-o", out, *more]
        return CliRunner().invoke(app, [str(arg) for arg in args])

    refused = surgery()
    assert refused.exit_code == 3
    assert "(--tokenizer base|union|MODEL)" in refused.stderr
    assert surgery("--pad-to-multiple-of", "8").exit_code == 2
    planned = surgery("--tokenizer", "union", "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert not out.exists()
    done = surgery("--tokenizer", "union", "--pad-to-multiple-of", "8")
    assert done.exit_code == 0, done.stderr
    for text in ("another's", "11", "16", "Merged 1 model onto the base"):
        assert text in done.stdout
    assert load_file(out / "model.safetensors")[EMBEDDING].shape == (16, 16)
    again = surgery("--tokenizer", str(tuned), "--overwrite")
    assert again.exit_code == 0, again.stderr
    assert vocabulary(out) == vocabulary(tuned)
    gone = surgery("--tokenizer", str(tmp_path / "gone"), "--overwrite")
    assert gone.exit_code == 3
    assert "gone" in gone.stderr


def test_rows_that_are_copied_never_leave_the_files(model: Make) -> None:
    """All of an aligned model but averages and zeros is moved from file to file."""
    base, tuned = opened(model("base", WORDS), model("tuned", shuffled(WORDS, 1), seed=1))
    _, (other,) = align_vocabulary([tuned], base=base, tokenizer="base")
    for name in (EMBEDDING, HEAD):
        spans = other[name].file_spans()
        assert spans is not None
        assert all(isinstance(span, FileSpan) for span in spans)
