"""Width keys found by their names alone, for a model type that transformers doesn't know: the same
as those that it finds by building the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, build, config_of, variant
from mixtures import EVERY_MIXTURE, build_mixture

from surgery import UnsupportedError, grow, open_checkpoint


@pytest.mark.parametrize("name", [*EVERY_MIXTURE, *sorted(FAMILIES)])
def test_names_tell_what_building_tells(name: str, tmp_path: Path):
    source = build_mixture(name) if name in EVERY_MIXTURE else build(name)
    known = grow(open_checkpoint(source), factor=1.5).config
    assert known != config_of(source)
    unknown = open_checkpoint(variant(tmp_path / "m", source, model_type="made_up"))
    assert grow(unknown, factor=1.5).config == {**known, "model_type": "made_up"}


def refused(folder: Path, source: Path, config: dict[str, object], **how: object) -> list[str]:
    base = open_checkpoint(variant(folder, source, model_type="made_up", **config))
    with pytest.raises(UnsupportedError) as caught:
        grow(base, factor=2, **how)  # type: ignore[arg-type]
    return [*caught.value.problems]


def test_a_key_that_may_be_that_of_others_is_refused(tmp_path: Path):
    """Routed experts get another width than those that stay, and one key has both."""
    source = build_mixture("qwen2_moe")
    (problem,) = refused(tmp_path / "m", source, {}, layers="1", experts="routed")
    assert problem == (
        "moe_intermediate_size is 24 and MLPs of that width would get 24 and 48; transformers "
        "doesn't know the model type 'made_up', so that nothing tells whose it is: grow all of "
        "them alike"
    )


def test_a_width_that_no_key_holds_is_refused(tmp_path: Path):
    source = build_mixture("qwen2_moe")
    (problem,) = refused(tmp_path / "m", source, {"moe_intermediate_size": 25})
    assert problem.startswith("no key of config.json that sounds like a width holds 24, which is")


def test_experts_side_by_side_follow_the_key_of_one(tmp_path: Path):
    """Shared experts are twice as wide as a routed one: two of them, in one matrix."""
    source = build_mixture("deepseek_v3")
    base = open_checkpoint(variant(tmp_path / "m", source, model_type="made_up"))
    widths = {mlp.kind: mlp.width for mlp in base.anatomy.every_mlp}
    assert widths["shared"] == 2 * widths["routed"] == 48
    config = grow(base, factor=2).config
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (48, 2)
    (problem,) = refused(tmp_path / "other", source, {}, experts="routed")
    assert "holds 48, which is to stay, and may follow the key of another" in problem
