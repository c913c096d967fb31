"""Other inputs, by why a model refused the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery.modeling.hollow import Attempt
from surgery.verification.mending import mended


class Taking:
    """A model that is known by the arguments of its `forward` alone."""

    def __init__(self, *names: str) -> None:
        self.accepts = dict.fromkeys(names, False)
        self.config = self

    def get_text_config(self) -> Any:
        return type("Config", (), {"hidden_size": 12})


def mends(
    values: dict[str, torch.Tensor], error: Exception, module: Any = None, *given: tuple[int, ...]
) -> list[dict[str, tuple[int, ...]]]:
    attempt = Attempt(None, frozenset(), error, module, given)
    found = mended(values, attempt, Taking(*values, "bbox", "lengths", "vectors"), 0)  # type: ignore[arg-type]
    return [{name: tuple(value.shape) for name, value in one.items()} for one in found]


def test_a_layer_tells_how_many_features_it_takes():
    refused = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    sound = {"x": torch.zeros(2, 7, 10)}
    assert mends(sound, refused, nn.Linear(4, 3), (2, 7, 10))[0] == {"x": (2, 7, 4)}
    assert mends(sound, refused, nn.LayerNorm(4), (2, 7, 10))[0] == {"x": (2, 7, 4)}
    turned = {"x": torch.zeros(2, 10, 7)}
    assert mends(turned, refused, nn.Conv1d(4, 3, 1), (2, 10, 7))[0] == {"x": (2, 4, 7)}
    stacked = {"x": torch.zeros(2, 8, 5)}  # two steps at a time
    assert mends(stacked, refused, nn.Linear(6, 3), (2, 4, 10))[0] == {"x": (2, 8, 3)}
    image = {"x": torch.zeros(2, 3, 32, 32)}
    assert mends(image, refused, nn.Conv2d(1, 4, 2), (2, 3, 32, 32))[0] == {"x": (2, 1, 32, 32)}
    assert mends(image, refused, nn.Conv2d(3, 4, 2), (2, 3, 32, 32)) == []


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("Input image size (32*32) doesn't match model (48*40).", (2, 3, 48, 40)),
        ("the height must be divisible by 24", (2, 3, 48, 48)),
        ("Image size 32x32 is too small", (2, 3, 64, 64)),
    ],
)
def test_an_error_tells_the_size_of_an_image(said: str, wanted: tuple[int, ...]):
    assert {"x": wanted} in mends({"x": torch.zeros(2, 3, 32, 32)}, ValueError(said))


def test_a_mask_is_as_long_as_what_it_masks():
    values = {"x": torch.zeros(2, 128, 9), "mask": torch.ones(2, 128, dtype=torch.int64)}
    error = ValueError("the length has to be a multiple of `n * 2` (100), but got 128.")
    assert {"x": (2, 200, 9), "mask": (2, 200)} in mends(values, error)
    far = RuntimeError("The size of tensor a (128) must match the size of tensor b (99999999)")
    assert mends(values, far) == []


def test_an_argument_is_asked_for_by_name_or_by_the_line_that_failed():
    values = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
    found = mends(values, ValueError("You have to specify bbox"))
    assert found == [{"input_ids": (2, 16), "bbox": (2, 16, 4)}]
    vectors: Any = None
    with pytest.raises(AttributeError) as failed:
        vectors.append(1)
    assert mends(values, failed.value) == [{"input_ids": (2, 16), "vectors": (2, 16, 12)}]
    assert mends(values, ValueError("something else")) == []


def test_numbers_have_rows_in_the_table():
    values = {"at": torch.arange(20)[None]}
    attempt = Attempt(None, frozenset(), IndexError("out of range"), nn.Embedding(6, 2), ((1, 20),))
    (found,) = mended(values, attempt, Taking("at"), 0)  # type: ignore[arg-type]
    assert found["at"].tolist() == [[n % 6 for n in range(20)]]


def test_a_mask_of_what_is_filled_up_fills_nothing():
    values = {"mask": torch.ones(1, 4, dtype=torch.int64)}
    said = "masked_fill_ only supports boolean masks, but got mask with dtype long int"
    for text, wanted in ((said, False), ("expected a bool tensor", True)):
        attempt = Attempt(None, frozenset(), RuntimeError(text))
        (found,) = mended(values, attempt, Taking("mask"), 0)  # type: ignore[arg-type]
        assert found["mask"].tolist() == [[wanted] * 4]
