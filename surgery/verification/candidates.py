"""Which inputs are tried on a model, in order.

There is no table of families: the arguments of `forward` say what kinds a model takes, the config
in which sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from surgery.errors import UnsupportedError
from surgery.verification.draws import Values, noise
from surgery.verification.media import FRAME_COUNTS, PLACEHOLDERS, images, sounds, videos
from surgery.verification.series import series
from surgery.verification.texts import (
    BATCH,
    SHORT,
    TOKENS,
    Candidate,
    Features,
    Texts,
    named_token,
)

if TYPE_CHECKING:
    import torch

    from surgery.modeling.hollow import HollowModel
    from surgery.verification.trials import Trials

MOST_TRIES = 64

Maker = Callable[[Any, Mapping[str, bool], int, int], Iterator[Values]]
_MEDIA: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "image": (images, ("get_image_features",)),
    "video": (videos, ("get_video_features",)),
    "sound": (sounds, ("get_audio_features", "get_speech_features")),
    "series": (series, ()),
}


def candidates(
    hollow: HollowModel, trials: Trials, seed: int, given: torch.Tensor | None
) -> Iterator[Candidate]:
    """What to try, in order: everything together, then less."""
    accepts, config = hollow.accepts, hollow.config
    texts = Texts(hollow, seed, given) if "input_ids" in accepts else None
    if texts is None and given is not None:
        raise UnsupportedError(f"{type(hollow.model).__name__} takes no text")
    if texts is not None and (found := _features(hollow, trials, seed)):
        for count in range(len(found), 0, -1):
            for chosen in combinations(found, count):
                for length in (TOKENS, SHORT):  # there may be no positions for more
                    yield texts.around([found[name] for name in chosen], chosen, length)
    elif texts is not None:
        for name, (make, _) in _MEDIA.items():
            token = named_token(config, PLACEHOLDERS.get(name, ()))
            placed = token is not None or "image_embeds_position_mask" in accepts
            if placed and not trials.mend:  # it may run, and nothing depends on what it sees
                continue
            if name == "sound" or any(map(_about_pictures, accepts)):
                for values in islice(make(config, accepts, BATCH, seed), MOST_TRIES // 4):
                    yield texts.beside(values, {name: BATCH})
    if texts is not None:
        yield from texts.alone()
    moving = any(hasattr(config, key) for key in FRAME_COUNTS)  # its frames may pass for images
    for batch in (BATCH, 1):
        for name in sorted(_MEDIA, key=lambda name: name != "video" or not moving):
            for values in _MEDIA[name][0](config, accepts, batch, seed):
                targets = (texts or Texts(hollow, seed)).targets(batch)
                yield Candidate(values | targets, media={name: batch})
    yield from _hidden(hollow, seed)
    yield Candidate({})


def _about_pictures(name: str) -> bool:
    return "pixel" in name or "image" in name


def _features(hollow: HollowModel, trials: Trials, seed: int) -> dict[str, Features]:
    """For every medium with a token of its own: the first arguments that give features."""
    found = {}
    width = getattr(hollow.config.get_text_config(), "hidden_size", 0)
    for kind, (make, methods) in _MEDIA.items():
        token = named_token(hollow.config, PLACEHOLDERS.get(kind, ()))
        method = next((m for m in methods if hasattr(hollow.model, m)), None)
        if token is None or method is None or not width:
            continue
        for values in islice(make(hollow.config, hollow.accepts, 1, seed), MOST_TRIES):
            if settled := trials.settle(values, lambda r: _size(r) % width == 0 < _size(r), method):
                taken, attempt = settled
                found[kind] = Features(kind, taken, _size(attempt.result) // width, token)
                break
    return found


def _size(result: Any) -> int:
    """How many values features are, one tensor or several."""
    import torch

    if isinstance(result, torch.Tensor):
        return result.numel()
    if isinstance(result, Mapping):
        pooled = result.get("pooler_output")
        return _size(result.get("last_hidden_state") if pooled is None else pooled)
    if isinstance(result, (list, tuple)):
        return sum(map(_size, result))
    return 0


def _hidden(hollow: HollowModel, seed: int) -> Iterator[Candidate]:
    """For parts of a model: vectors as another part would have made them."""
    width = getattr(hollow.config, "hidden_size", None)
    names = [n for n in ("inputs_embeds", "hidden_states") if hollow.accepts.get(n)]
    if type(width) is int and names:
        values = noise((BATCH, SHORT, width), seed)
        yield Candidate({names[0]: values}, media={"sequence of vectors": 1})
