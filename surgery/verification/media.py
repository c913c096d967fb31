"""Images, videos and sounds in the shapes that a model could take, by its config and the names of
its arguments; the likeliest first. Which of them it takes is told by running it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from surgery.verification.draws import Values, noise, ones, table

if TYPE_CHECKING:
    import torch

IMAGES = ("pixel_values", "pixel_values_images", "images", "flattened_patches", "hidden_states")
VIDEOS = ("pixel_values_videos", "pixel_values")
SOUNDS = ("input_features", "input_values", "audio_values", "audio_features", "audio_mel")
PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "media_placeholder_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "sound": ("audio_token_id", "audio_token_index"),
}
"""Keys of the token that stands for one feature of a medium among the tokens of a text."""
_PATCH_MASKS = ("pixel_attention_mask", "patch_attention_mask")
_SOUND_MASKS = ("input_features_mask", "feature_attention_mask", "audio_mel_mask", "padding_mask")
_SOUND_LENGTHS = ("audio_feature_lengths", "feature_lens")

SIDES = (224, 64, 384)
"""Of an image, where the config has none, or one that doesn't go."""
LARGE = 512
FRAMES = 4
FRAME_COUNTS = ("num_frames", "frames_per_clip")
PATCHES = 4
"""Of an image that is cut up beforehand: so many times the patches that are merged, each way."""
SAMPLES = 19_200
"""More than a second; a multiple of what codecs cut sounds into."""
STEPS = 128
"""Of a sound that is given as a spectrum."""


class Settings:
    """The whole numbers of a config: of the part that is about `hint` first."""

    def __init__(self, config: Any, hint: str) -> None:
        self._parts = _parts(config.to_dict(), hint)

    def size(self, *keys: str) -> tuple[int, int] | None:
        """Height and width, or twice the one number that is there."""
        for part in self._parts:
            for key in keys:
                value = part.get(key)
                if isinstance(value, Mapping):
                    value = list(value.values())
                if isinstance(value, (list, tuple)) and value and type(value[-1]) is int:
                    return value[-2 % len(value)], value[-1]
                if type(value) is int and value > 0:
                    return value, value
        return None

    def number(self, *keys: str, default: int) -> int:
        found = self.size(*keys)
        return default if found is None else found[1]


def _parts(config: Mapping[str, Any], hint: str) -> list[Mapping[str, Any]]:
    about: list[Mapping[str, Any]] = []
    others: list[Mapping[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            (about if re.search(hint, str(key)) else others).append(value)
    inner = [part for value in (*about, *others) for part in _parts(value, hint)]
    return [*about, config, *inner]


def images(config: Any, accepts: Mapping[str, bool], batch: int, seed: int) -> Iterator[Values]:
    """Whole images, images cut into patches, several images (or the tiles of one) for each text."""
    settings = Settings(config, "vision|image|backbone|vit")
    channels = settings.number("num_channels", "in_channels", "in_chans", default=3)
    sides = _sides(settings.size("image_size", "img_size", "input_size"))
    for name in IMAGES:
        if name not in accepts:
            continue
        yield from _patched(name, settings, channels, accepts, seed)
        if name in ("flattened_patches", "hidden_states"):
            continue
        for height, width in sides:
            sizes = _known(accepts, image_sizes=table([[height, width]] * batch))
            for with_sizes in ({}, sizes) if sizes else ({},):  # where it may be left out it is
                yield {name: noise((batch, channels, height, width), seed), **with_sizes}
            for tiles in (1, 2, 5):
                shape = (batch, tiles, channels, height, width)
                mask = _known(accepts, pixel_attention_mask=ones((batch, tiles, height, width)))
                yield {name: noise(shape, seed), **sizes, **mask}
            yield from _tiled(name, settings, (channels, height, width), accepts, seed)


def _sides(own: tuple[int, int] | None) -> list[tuple[int, int]]:
    """The config's size first, unless it is that of a large image, which may only be a limit."""
    others = [(side, side) for side in SIDES]
    if own is None:
        return others
    at = int(max(own) > LARGE)
    return list(dict.fromkeys([*others[:at], own, *others[at:]]))


def videos(config: Any, accepts: Mapping[str, bool], batch: int, seed: int) -> Iterator[Values]:
    """Frames, before the channels or behind them; or cut into patches."""
    settings = Settings(config, "vision|video|image")
    channels = settings.number("num_channels", "in_channels", "in_chans", default=3)
    counts = [settings.number(*FRAME_COUNTS, default=FRAMES), FRAMES, 8]
    sides = [settings.size("image_size", "img_size", "input_size", "crop_size"), (224, 224)]
    for name in VIDEOS:
        if name not in accepts:
            continue
        yield from _patched(name, settings, channels, accepts, seed, frames=2)
        known = [side for side in dict.fromkeys(sides) if side is not None]
        for side, frames in product(known, dict.fromkeys(counts)):
            yield {name: noise((batch, frames, channels, *side), seed)}
            yield {name: noise((batch, channels, frames, *side), seed)}


def sounds(config: Any, accepts: Mapping[str, bool], batch: int, seed: int) -> Iterator[Values]:
    """A spectrum, with the steps behind the bands or before them; or the samples themselves."""
    settings = Settings(config, "audio|speech|sound|encoder")
    keys = ("num_mel_bins", "n_mels", "num_mel_filters", "mel_bins", "input_feat_per_channel")
    bands = settings.number(*keys, "input_feat_size", "feature_size", "mel_dim", "input_dim",
                            "num_channels", default=80)  # fmt: skip
    steps = settings.number("max_length", default=STEPS)
    positions = settings.number("max_source_positions", "n_ctx", default=0)
    counts = dict.fromkeys(n for n in (2 * positions, positions, STEPS, 2 * steps, steps) if n)
    for name in SOUNDS:
        if name not in accepts:
            continue
        spectra = [((batch, bands, n), (batch, n, bands), (batch, 1, n, bands)) for n in counts]
        shapes = [(shape, n) for n, of in zip(counts, spectra, strict=True) for shape in of]
        raw: list[tuple[tuple[int, ...], int]] = [
            ((batch, SAMPLES), SAMPLES),
            ((batch, 1, SAMPLES), SAMPLES),
        ]
        for shape, count in [*raw, *shapes] if name == "input_values" else [*shapes, *raw]:
            values = {name: noise(shape, seed)}
            masks = dict.fromkeys(_SOUND_MASKS, ones((batch, count)))
            lengths = dict.fromkeys(_SOUND_LENGTHS, table([count] * batch))
            yield values | _known(accepts, **masks, **lengths)
            if count == shape[-1] and len(shape) == 2:
                continue
            yield {**values, **_known(accepts, **lengths)}


def _patched(
    name: str,
    settings: Settings,
    channels: int,
    accepts: Mapping[str, bool],
    seed: int,
    frames: int = 1,
) -> Iterator[Values]:
    """One image as patches, with the argument that says how they lie."""
    patch = settings.number("patch_size", "spatial_patch_size", default=14)
    deep = settings.number("temporal_patch_size", default=1)
    merged = settings.number("spatial_merge_size", "merge_size", "merge_kernel_size", default=2)
    side = PATCHES * merged
    count = side * side
    grids = [g for g in ("image_grid_thw", "video_grid_thw", "grid_thw") if g in accepts]
    own = [g for g in grids if ("video" in g) == (frames > 1)] or [g for g in grids if g[0] == "g"]
    area = channels * patch * patch
    if own:
        where = _known(accepts, **{own[0]: table([[frames, side, side]])})
        where |= _known(accepts, merge_sizes=table([merged]))
        total = frames * count
        shapes: list[tuple[int, ...]] = [(total, deep * area), (total, area)]
        shapes += [(total, channels, patch, patch), (1, total, deep * area), (total, 2 * area)]
        yield from ({name: noise(shape, seed), **where} for shape in shapes)
    if name == "flattened_patches":  # row and column, counted from 1, lead each patch
        rows = table([[1 + n // side, 1 + n % side] for n in range(count)])
        area = settings.number("patch_embed_hidden_size", default=area)
        yield {name: _cat(rows[None], noise((1, count, area), seed))}
    shapes_of = _known(accepts, spatial_shapes=table([[side, side]]))
    places = table([[[n % side, n // side] for n in range(count)]])
    shapes_of |= _known(accepts, pixel_position_ids=places, image_position_ids=places)
    if shapes_of:
        masks = _known(accepts, **dict.fromkeys(_PATCH_MASKS, ones((1, count))))
        yield {name: noise((1, count, area), seed), **shapes_of, **masks}


def _tiled(
    name: str, settings: Settings, image: tuple[int, int, int], accepts: Mapping[str, bool],
    seed: int,
) -> Iterator[Values]:  # fmt: skip
    """Mllama: every image has room for so many tiles, of which the first is used."""
    if "aspect_ratio_ids" in accepts:
        tiles = settings.number("max_num_tiles", default=4)
        mask = ones((1, 1, tiles))
        mask[..., 1:] = 0
        ratios = {"aspect_ratio_ids": ones((1, 1)), "aspect_ratio_mask": mask}
        yield {name: noise((1, 1, tiles, *image), seed), **ratios}


def _known(accepts: Mapping[str, bool], **values: torch.Tensor) -> Values:
    return {name: value for name, value in values.items() if name in accepts}


def _cat(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([first.to(second.dtype), second], dim=-1)
