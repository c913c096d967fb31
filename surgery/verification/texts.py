"""Texts that models are compared on: tokens that mean nothing special, with placeholders where
images, videos and sounds go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from surgery.verification.draws import Values

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
_TYPES = {"image": 1, "video": 2, "sound": 3}  # as `mm_token_type_ids` has them


@dataclass(frozen=True)
class Candidate:
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
            plural = "s" if count > 1 and not name.endswith("s") else ""
            said.append(f"{count} random {name}{plural}")
        return " and ".join(said)

    def said(self, values: Values) -> str:
        """The same, with the arguments that were added to it."""
        more = ", ".join(name for name in values if name not in self.values)
        return " with ".join(part for part in (self.what, more and f"random {more}") if part)


@dataclass(frozen=True)
class Features:
    """Arguments that a model makes features of, how many, and the token that each replaces."""

    kind: str
    values: Values
    count: int
    token: int


class Texts:
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

    def alone(self) -> Iterator[Candidate]:
        for length, rows in product(self._lengths(), (1, self._codebooks)):
            ids = self._ids(BATCH * rows, length)
            more = self.targets(len(ids), length)
            yield Candidate(self._whole(ids) | more, ids.numel(), {}, self._given is not None)

    def beside(self, values: Values, media: Mapping[str, int]) -> Candidate:
        """Text with what has no place among the tokens: one for each of the batch."""
        ids = self._ids(BATCH, min(self._lengths()[0], SHORT))
        ids = ids.expand(BATCH, -1) if len(ids) < BATCH else ids
        whole = self._whole(ids) | self.targets(BATCH)
        return Candidate({**whole, **values}, ids.numel(), media, self._given is not None)

    def around(
        self, features: Sequence[Features], names: Sequence[str], length: int = TOKENS
    ) -> Candidate:
        """Text with placeholders in it, between the marks of their start and end if there are."""
        import torch

        text = self._ids(1, min(length, self._longest))
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
        return Candidate({**whole, **values}, text.numel(), media, self._given is not None)

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


def _vocabulary(config: Any) -> int:
    found = getattr(config, "vocab_size", None)
    return found if type(found) is int else 0


def _special(config: Mapping[str, Any]) -> set[int]:
    """The tokens that a config names."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _special(value)
        elif str(key).endswith(("token_id", "token_index", "token", "token_ids")):
            found |= {v for v in (value if isinstance(value, list) else [value]) if type(v) is int}
    return {token for token in found if token >= 0}


def named_token(config: Any, names: Sequence[str]) -> int | None:
    """The token that a config has under the first of these names."""
    for name in names:
        if type(value := getattr(config, name, None)) is int and value >= 0:
            return value
    return None


def _marks(config: Any, word: str, side: str) -> list[int]:
    """The token that a config names for the start or the end of a medium."""
    import re

    for key, value in config.to_dict().items():
        if re.fullmatch(rf"{word}_({side})token(_id)?", str(key)) and type(value) is int:
            return [value]
    return []
