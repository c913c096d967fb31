"""The inputs that models are compared on: tokens, images, videos and sounds, as the stock class
takes them.

There is no table of families. The arguments of `forward` say what kinds a model takes, the config
in which sizes, and a model without weights is run with one candidate after another until one goes
through. That run also says which MLPs the inputs reach: of the others the logits prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, UnsupportedError
from surgery.verification.media import Values, images, sounds, videos
from surgery.verification.outputs import main_output

if TYPE_CHECKING:
    import torch

    from surgery.modeling.hollow import HollowModel

BATCH, TOKENS = 2, 64
TEXT_TOKENS = 512
"""Of a text that is given, from its start."""
SHORT = 16
"""Tokens, for models that take fewer than their config says."""
FEW = 100
"""The size of a vocabulary that isn't known."""
MOST_TRIES = 64

Maker = Callable[[Any, Mapping[str, bool], int, int], Iterator[Values]]
_MEDIA: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "image": (images, ("get_image_features",)),
    "video": (videos, ("get_video_features",)),
    "sound": (sounds, ("get_audio_features", "get_speech_features")),
}
_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "media_placeholder_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "sound": ("audio_token_id", "audio_token_index"),
}
_TYPES = {"image": 1, "video": 2, "sound": 3}  # as `mm_token_type_ids` has them


@dataclass(frozen=True)
class Inputs:
    """Arguments of `forward`, what they are in words, and which MLPs they don't go through, as
    (stack, block, kind); None where that isn't known."""

    values: Mapping[str, torch.Tensor]
    what: str
    unreached: frozenset[tuple[str, int, str]] | None = None


@dataclass(frozen=True)
class _Candidate:
    """Arguments to try. `tokens` is how many; `media` what is with them, and how many of each."""

    values: Values
    tokens: int = 0
    media: Mapping[str, int] = field(default_factory=dict)
    given: bool = False

    @property
    def what(self) -> str:
        kind = "of the text" if self.given else "random"
        said = [f"{self.tokens} tokens {kind}" if self.given else f"{self.tokens} {kind} tokens"]
        said = said if self.tokens else []
        for name, count in self.media.items():
            said.append(f"{count} random {name}{'s' if count > 1 else ''}")
        return " and ".join(said)


def make_inputs(checkpoint: Checkpoint, *, seed: int = 0, text: Path | None = None) -> Inputs:
    """Inputs for the stock class of a checkpoint, random unless `text` has some for it.

    Where a model takes text and images, videos or sounds, they come together if that goes through,
    with as many placeholders among the tokens as there are features. Raises UnsupportedError if
    nothing that was tried goes through, FormatError if the text can't be had.
    """
    from surgery.modeling.hollow import HollowModel

    hollow = HollowModel(checkpoint)
    given = None if text is None else _tokenized(checkpoint, text)
    first: Exception | None = None
    for candidate in islice(_candidates(hollow, seed, given), MOST_TRIES):
        try:
            result, called = hollow.run(candidate.values)
        except Exception as error:  # noqa: BLE001  models raise all there is
            first = first or error
            continue
        if main_output(result) is not None:
            return Inputs(candidate.values, candidate.what, _unreached(checkpoint, hollow, called))
    if "input_ids" in hollow.accepts:  # the real model may take what one without values doesn't
        plain = next(_Texts(hollow, seed, given).alone())
        return Inputs(plain.values, plain.what)
    name = type(hollow.model).__name__
    why = f": {' '.join(str(first).split())[:200]}" if first is not None else ""
    raise UnsupportedError(
        f"{checkpoint.source.reference}: none of the inputs that were tried go through "
        f"{name}{why}; --no-logits leaves the certificate"
    )


def _candidates(hollow: HollowModel, seed: int, given: torch.Tensor | None) -> Iterator[_Candidate]:
    """What to try, in order: everything together, then less."""
    accepts, config = hollow.accepts, hollow.config
    texts = _Texts(hollow, seed, given) if "input_ids" in accepts else None
    if texts is None and given is not None:
        raise UnsupportedError(f"{type(hollow.model).__name__} takes no text")
    if texts is not None and (found := _features(hollow, seed)):
        for count in range(len(found), 0, -1):
            for chosen in combinations(found, count):
                yield texts.around([found[name] for name in chosen], chosen)
    elif texts is not None:
        for name, (make, _) in _MEDIA.items():
            if name == "sound" or any(map(_about_pictures, accepts)):
                for values in islice(make(config, accepts, BATCH, seed), MOST_TRIES // 4):
                    yield texts.beside(values, {name: BATCH})
    if texts is not None:
        yield from texts.alone()
    for batch in (BATCH, 1):
        for name, (make, _) in _MEDIA.items():
            for values in make(config, accepts, batch, seed):
                more = (
                    texts.targets(batch)
                    if texts is not None
                    else _Texts(hollow, seed).targets(batch)
                )
                yield _Candidate(values | more, media={name: batch})
    yield from _hidden(hollow, seed)


def _about_pictures(name: str) -> bool:
    return "pixel" in name or "image" in name


@dataclass(frozen=True)
class _Features:
    """Arguments that a model makes features of, how many, and the token that each replaces."""

    kind: str
    values: Values
    count: int
    token: int


def _features(hollow: HollowModel, seed: int) -> dict[str, _Features]:
    """For every medium with a token of its own: the first arguments that give features."""
    found = {}
    width = getattr(hollow.config.get_text_config(), "hidden_size", 0)
    for kind, (make, methods) in _MEDIA.items():
        token = _token(hollow.config, _PLACEHOLDERS[kind])
        method = next((m for m in methods if hasattr(hollow.model, m)), None)
        if token is None or method is None or not width:
            continue
        for values in islice(make(hollow.config, hollow.accepts, 1, seed), MOST_TRIES):
            try:
                result, _ = hollow.run(values, method)
            except Exception:  # noqa: BLE001, S112  the next one may go
                continue
            size = _size(result)
            if size and size % width == 0:
                found[kind] = _Features(kind, values, size // width, token)
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


class _Texts:
    """Tokens, random or given, with what goes with them."""

    def __init__(self, hollow: HollowModel, seed: int, given: torch.Tensor | None = None) -> None:
        self._accepts, self._config, self._given = hollow.accepts, hollow.config, given
        self._seed = seed
        self._special = sorted(_special(hollow.config.to_dict()))
        encoder = hollow.config.get_text_config(encoder=True)
        decoder = hollow.config.get_text_config(decoder=True)
        self._vocabulary = _vocabulary(encoder) or _vocabulary(decoder) or FEW
        self._target_vocabulary = _vocabulary(decoder) or self._vocabulary
        limits = ("max_position_embeddings", "n_positions", "max_target_positions")
        sizes = [getattr(part, key, None) for part in (encoder, decoder) for key in limits]
        self._codebooks = getattr(hollow.config, "num_codebooks", 1)
        self._longest = min((n for n in sizes if type(n) is int and n > 0), default=TEXT_TOKENS)

    def alone(self) -> Iterator[_Candidate]:
        for length, rows in product(self._lengths(), (1, self._codebooks)):
            ids = self._ids(BATCH * rows, length)
            more = self.targets(len(ids), length)
            yield _Candidate(self._whole(ids) | more, ids.numel(), {}, self._given is not None)

    def beside(self, values: Values, media: Mapping[str, int]) -> _Candidate:
        """Text with what has no place among the tokens: one for each of the batch."""
        ids = self._ids(BATCH, min(self._lengths()[0], SHORT))
        ids = ids.expand(BATCH, -1) if len(ids) < BATCH else ids
        whole = self._whole(ids) | self.targets(BATCH)
        return _Candidate({**whole, **values}, ids.numel(), media, self._given is not None)

    def around(self, features: Sequence[_Features], names: Sequence[str]) -> _Candidate:
        """Text with placeholders in it, between the marks of their start and end if there are."""
        import torch

        text = self._ids(1, min(TOKENS, self._longest))
        half = text.shape[1] // 2
        ids, types = [text[:, :half]], [torch.zeros(1, half, dtype=torch.int64)]
        for one in features:
            word = {"image": "(vision|image)", "video": "(vision|video)", "sound": "audio"}[
                one.kind
            ]
            start = _marks(self._config, word, "start|bos|begin")
            end = _marks(self._config, word, "end|eos")
            row = torch.tensor([[*start, *[one.token] * one.count, *end]])
            ids.append(row)
            types.append((row == one.token).long() * _TYPES[one.kind])
        ids.append(text[:, half:])
        types.append(torch.zeros_like(text[:, half:]))
        whole = self._whole(torch.cat(ids, 1)) | self.targets(1)
        if "mm_token_type_ids" in self._accepts:
            whole["mm_token_type_ids"] = torch.cat(types, 1)
        values = {key: value for one in features for key, value in one.values.items()}
        media = dict.fromkeys(names, 1)
        return _Candidate({**whole, **values}, text.numel(), media, self._given is not None)

    def targets(self, batch: int, length: int = SHORT) -> Values:
        """What the decoder of an encoder-decoder gets."""
        if "decoder_input_ids" not in self._accepts:
            return {}
        return {"decoder_input_ids": self._random(batch, length, self._target_vocabulary, 1)}

    def _lengths(self) -> list[int]:
        if self._given is not None:
            return [min(self._given.shape[1], self._longest), SHORT]
        return [min(TOKENS, self._longest), SHORT]

    def _ids(self, batch: int, length: int) -> torch.Tensor:
        if self._given is not None:
            return self._given[:, :length]
        return self._random(batch, length, self._vocabulary, 0)

    def _whole(self, ids: torch.Tensor) -> Values:
        import torch

        few, ones = ids.clamp(max=FEW - 1), torch.ones_like(ids)
        more = {
            "attention_mask": ones,
            "lang_ids": torch.zeros_like(ids[:, 0]),  # X-MOD's language, of those it has
            "qformer_input_ids": few,  # InstructBLIP's second text, with a vocabulary of its own
            "qformer_attention_mask": ones,
        }
        accepted = {name: value for name, value in more.items() if name in self._accepts}
        return {"input_ids": ids, **accepted}

    def _random(self, batch: int, length: int, vocabulary: int, draw: int) -> torch.Tensor:
        """Tokens that mean nothing special: a placeholder for an image would want one."""
        import torch

        ordinary = torch.ones(vocabulary, dtype=torch.bool)
        ordinary[[token for token in self._special if token < len(ordinary)]] = False
        allowed = ordinary.nonzero()[:, 0] if bool(ordinary.any()) else torch.arange(len(ordinary))
        generator = torch.Generator().manual_seed(self._seed + draw)
        return allowed[torch.randint(0, len(allowed), (batch, length), generator=generator)]


def _hidden(hollow: HollowModel, seed: int) -> Iterator[_Candidate]:
    """For parts of a model: vectors as another part would have made them."""
    import torch

    width = getattr(hollow.config, "hidden_size", None)
    names = [n for n in ("inputs_embeds", "hidden_states") if hollow.accepts.get(n)]
    if type(width) is int and names:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn((BATCH, SHORT, width), generator=generator)
        yield _Candidate({names[0]: values}, media={"sequence of vectors": 1})


def _vocabulary(config: Any) -> int:
    found = getattr(config, "vocab_size", None)
    return found if type(found) is int else 0


def _special(config: Mapping[str, Any]) -> set[int]:
    """The tokens that a config names."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _special(value)
        elif str(key).endswith(("token_id", "token_index", "_token", "token_ids")):
            found |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
    return {token for token in found if token >= 0}


def _token(config: Any, names: Sequence[str]) -> int | None:
    for name in names:
        if type(value := getattr(config, name, None)) is int and value >= 0:
            return value
    return None


def _marks(config: Any, word: str, side: str) -> list[int]:
    """The token that a config names for the start or the end of a medium."""
    import re

    for key, value in config.to_dict().items():
        if re.fullmatch(rf"{word}_({side})_token(_id)?", str(key)) and type(value) is int:
            return [value]
    return []


def _unreached(
    checkpoint: Checkpoint, hollow: HollowModel, called: frozenset[str]
) -> frozenset[tuple[str, int, str]]:
    """The MLPs whose module wasn't called, or isn't known."""
    found, seen = set(), set()
    for mlp in checkpoint.anatomy.every_mlp:
        if mlp.block is None:
            continue
        key = mlp.stack, mlp.block, mlp.kind
        if key in seen and mlp.kind != "dense":  # experts are a module together
            continue
        seen.add(key)
        inner = checkpoint.anatomy.places[mlp.down.weight].inner
        if hollow.module_of(mlp.stack, mlp.block, inner) not in called:
            found.add(key)
    return frozenset(found)


def _tokenized(checkpoint: Checkpoint, path: Path) -> torch.Tensor:
    """The first tokens of a text by the checkpoint's own tokenizer, (1, count)."""
    from surgery.modeling.tokenizer import tokenize

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"the text {path} can't be read: {error}") from error
    ids = tokenize(checkpoint, text[: 64 * TEXT_TOKENS])[:, :TEXT_TOKENS]
    if not ids.numel():
        raise FormatError(f"the text {path} has no token")
    return ids
