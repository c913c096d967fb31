"""One argument of `forward` that a model asks for, made by what it is called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from surgery.verification.draws import Values, noise, ones, table, whole
from surgery.verification.media import (
    IMAGES,
    PLACEHOLDERS,
    SOUNDS,
    VIDEOS,
    images,
    sounds,
    videos,
)
from surgery.verification.texts import named_token

if TYPE_CHECKING:
    from surgery.modeling.hollow import HollowModel

BATCH, SHORT = 2, 16
FEW = 2
"""Numbers that stand for something (a box's edges, a state) and that any table has rows for."""
MOST_MEDIA = 8

_WHOLE = re.compile(r"\w*(_ids?|ids|_codes|codes|tokens|_index|indices|timesteps?|labels|_idx)")
_BOXES = re.compile(r"\w*(bbox|boxes)")
_MASK = re.compile(r"\w*(mask|masked_pos)")
_LENGTHS = re.compile(r"\w*(lengths?|lens)")
_POINTS = re.compile(r"\w*points")


def argument(name: str, hollow: HollowModel, given: Values, seed: int) -> Iterator[Values]:
    """The argument, with what goes with it, in the shapes that it could have beside those that
    are given."""
    batch, length = _lengths(given)
    alike = [value for other, value in given.items() if name.endswith(f"_{other}")]
    if alike:  # prompt_pixel_values, decoder_attention_mask
        yield {name: alike[0].clone()}
    elif _WHOLE.fullmatch(name):
        yield {name: whole((batch, length), FEW, seed)}
    elif _BOXES.fullmatch(name):
        yield {name: whole((batch, length, 4), FEW, seed).sort(-1).values}
    elif _LENGTHS.fullmatch(name):
        longest = max((n for value in given.values() for n in value.shape[1:]), default=length)
        yield {name: table([longest] * batch)}
    elif _MASK.fullmatch(name):
        yield {name: ones((batch, length))}
        yield {name: ones((batch, length, 1))}  # of the tokens, for each image
        for value in given.values():
            if value.dim() == 4 and value.is_floating_point():
                yield {name: noise(tuple(value.shape), seed)}  # a picture itself
    elif _POINTS.fullmatch(name):
        yield {name: noise((batch, 1, 1, 2), seed).abs()}
    else:
        yield from _medium(name, hollow, given, batch, seed)
        width = getattr(hollow.config.get_text_config(), "hidden_size", SHORT)
        yield {name: noise((batch, length, width), seed)}


def _medium(
    name: str, hollow: HollowModel, given: Values, batch: int, seed: int
) -> Iterator[Values]:
    """Images, videos or sounds. Not where they would have placeholders in the text: without these
    a tower runs, and nothing depends on what it makes."""
    kinds = {"image": (IMAGES, images), "video": (VIDEOS, videos), "sound": (SOUNDS, sounds)}
    for kind, (names, make) in kinds.items():
        placed = named_token(hollow.config, PLACEHOLDERS[kind]) is not None
        if name not in names or name == "hidden_states" or (placed and "input_ids" in given):
            continue
        for made in islice(make(hollow.config, hollow.accepts, batch, seed), MOST_MEDIA):
            if name in made:
                yield made


def _lengths(given: Values) -> tuple[int, int]:
    """How many rows there are, and how long they are."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        if name in given and given[name].dim() > 1:
            return given[name].shape[0], given[name].shape[1]
    first = next(iter(given.values()), None)
    if first is None or not first.dim():
        return BATCH, SHORT
    return first.shape[0], first.shape[1] if first.dim() in (2, 3) else SHORT
