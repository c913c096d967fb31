"""The vocabulary that models are brought to, with the tokenizer's files that go with it, and the
ids of special tokens in configs, which follow it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.vocabulary.rows import Rows
from surgery.vocabulary.tokens import (
    PLAIN,
    Flags,
    Vocabulary,
    companion_table,
    read_vocabulary,
    tokenizer_by_ids,
    tokenizer_files,
)

GENERATION = "generation_config.json"
_ID_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids",
             "forced_decoder_ids", "sequence_bias")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Target:
    """A vocabulary of `count` rows, of which those from `kept` on are new, its files, and the
    number of the model whose order it is (None: of none of those that are aligned)."""

    vocabulary: Vocabulary
    files: Mapping[str, Path | bytes]
    kept: int
    count: int
    owner: int | None
    added: int = 0
    """How many tokens the owner didn't have."""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> Rows:
        return Rows.of(self.count, self.vocabulary.ids)


def rounded_up(count: int, multiple: int | None) -> int:
    """The next multiple, or `count` itself."""
    return count if multiple is None else -(-count // multiple) * multiple


def union(
    every: Sequence[Checkpoint],
    vocabularies: Sequence[Vocabulary],
    rows: Sequence[Rows],
    multiple: int | None,
) -> Target:
    """The first model's vocabulary, then the tokens of the others that have a row there, in the
    order of models and of ids.

    New tokens come right after the last that has a name, into rows of padding if there are any.
    So no row that means something moves, and the matrix only grows when padding is used up.
    """
    new: dict[str, Flags | None] = {}
    for vocabulary, own in zip(vocabularies[1:], rows[1:], strict=True):
        for token in sorted(own.ids, key=lambda token: own.ids[token]):
            if token not in vocabularies[0].ids:
                new.setdefault(token, vocabulary.added.get(token))
    notes: tuple[str, ...] = ()
    files, vocabulary = tokenizer_files(every[0]), vocabularies[0]
    if new:
        files, vocabulary, notes = _extended(every[0], vocabulary, new)
    kept = rows[0].count
    least = max(kept, max(vocabulary.ids.values(), default=-1) + 1)
    return Target(vocabulary, files, kept, rounded_up(least, multiple), 0, len(new), notes)


def _extended(
    owner: Checkpoint, vocabulary: Vocabulary, new: Mapping[str, Flags | None]
) -> tuple[dict[str, Path | bytes], Vocabulary, tuple[str, ...]]:
    """The owner's tokenizer with these tokens, and notes. Added tokens, which have flags, are
    added tokens here too. The others are pieces that words are made of: as added tokens they
    would be cut out of any word that holds them, so they go into the model's own vocabulary,
    where it has one that gives every token its id.

    Raises UnsupportedError for a tokenizer that can't be extended.
    """
    name = "tokenizer.json"
    if name not in owner.companions:
        raise UnsupportedError(
            f"{vocabulary.file}: tokens can only be added to a tokenizer.json: make one with "
            f"AutoTokenizer and save_pretrained, or pass the tokenizer of one of the models"
        )
    table = companion_table(owner, name)
    model = table["model"]
    pieces = [token for token, flags in new.items() if flags is None]
    inside = bool(pieces) and isinstance(model["vocab"], dict) and model.get("type") != "WordPiece"
    if inside:
        top = max(vocabulary.ids.values(), default=-1) + 1
        ids = {**vocabulary.ids, **{token: top + at for at, token in enumerate(new)}}
        more = _beside(vocabulary, table) | {t: f for t, f in new.items() if f is not None}
        model["vocab"] |= {token: row for token, row in ids.items() if token not in model["vocab"]}
    else:
        flags = {token: PLAIN if given is None else given for token, given in new.items()}
        more = _beside(vocabulary, table) | flags
        ids = _once_added(tokenizer_by_ids(owner), vocabulary, more)
    entries = [{"id": ids[token], "content": token, **flags} for token, flags in more.items()]
    table["added_tokens"] = [*(table.get("added_tokens") or ()), *entries]
    files = tokenizer_files(owner) | {name: _as_bytes(table)} | _listed(owner, more, ids)
    notes = _piece_notes(pieces, inside, model)
    return files, _as_loaded(owner, files, ids), notes


def _beside(vocabulary: Vocabulary, table: Mapping[str, Any]) -> dict[str, Flags]:
    """Added tokens that only other files than tokenizer.json name, in the order of their ids."""
    have = {entry["content"] for entry in table.get("added_tokens") or ()}
    return {
        token: vocabulary.added[token]
        for token in sorted(vocabulary.added, key=lambda token: vocabulary.ids[token])
        if token not in have
    }


def _listed(
    owner: Checkpoint, more: Mapping[str, Flags], ids: Mapping[str, int]
) -> dict[str, Path | bytes]:
    """The other files that list added tokens by id, as transformers 4 wrote them, with more."""
    made: dict[str, Path | bytes] = {}
    config = companion_table(owner, "tokenizer_config.json")
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        entries = {str(ids[token]): {"content": token, **flags} for token, flags in more.items()}
        config["added_tokens_decoder"] = {**entries, **decoder}
        made["tokenizer_config.json"] = _as_bytes(config)
    if "added_tokens.json" in owner.companions:
        beside = companion_table(owner, "added_tokens.json")
        made["added_tokens.json"] = _as_bytes({token: ids[token] for token in more} | beside)
    return made


def _piece_notes(pieces: Sequence[str], inside: bool, model: Mapping[str, Any]) -> tuple[str, ...]:
    """What it means that pieces of another tokenizer came along."""
    if not pieces or (inside and not model.get("merges")):
        return ()
    shown = ", ".join(map(repr, pieces[:3])) + (", ..." if len(pieces) > 3 else "")
    if not inside:
        effect = "texts that hold one are encoded differently now"
    elif model.get("ignore_merges"):
        effect = "words that are one are encoded differently now"
    else:
        effect = "no text is encoded to them, since no merges of the owner's lead there"
    return (f"new tokens that are pieces of words: {len(pieces):,} ({shown}); {effect}",)


def _once_added(
    tokenizer: Any, vocabulary: Vocabulary, more: Mapping[str, Flags]
) -> dict[str, int]:
    """The id of every token once the tokenizers library has added those in `more`: it counts by
    itself, and would load no other ids."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, **flags) for token, flags in more.items()])
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    taken = {row: token for token, row in ids.items() if token not in more}
    UnsupportedError.raise_if(
        f"{vocabulary.file}: {token!r} can't be added to it: its id would be {ids.get(token)}"
        + (f", which is that of {taken[ids[token]]!r}" if token in ids else "")
        + "; pass the tokenizer of one of the models, or base"
        for token in more
        if token not in ids or ids[token] in taken
    )
    return ids


def _as_loaded(
    owner: Checkpoint, files: Mapping[str, Path | bytes], wanted: Mapping[str, int]
) -> Vocabulary:
    """The vocabulary of the files that were made, read back: every token has its own id."""
    found = read_vocabulary(replace(owner, companions=files))
    UnsupportedError.raise_if(
        f"{owner.source.reference}: {token!r} has the id {found.ids.get(token)} and not {row} when "
        f"the tokenizer with all tokens is loaded: pass the tokenizer of one of the models, or base"
        for token, row in wanted.items()
        if found.ids.get(token) != row
    )
    return found


def _as_bytes(table: Mapping[str, Any]) -> bytes:
    text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair: its escape


def with_tokenizer(model: Checkpoint, files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The companions of a model with these files for its tokenizer."""
    own = tokenizer_files(model)
    if own == dict(files):
        return dict(model.companions)
    return {n: f for n, f in model.companions.items() if n not in own} | dict(files)


def translation(own: Vocabulary, target: Vocabulary) -> Callable[[int], int | None]:
    """The id of the same token: None if the target lacks it, the id itself if it names none."""

    def translate(row: int) -> int | None:
        token = own.names.get(row)
        return row if token is None else target.ids.get(token)

    return translate


def translated(
    table: Mapping[str, Any],
    translate: Callable[[int], int | None],
    owners: Mapping[str, Any],
) -> dict[str, Any]:
    """A config whose special tokens are those of the `owners` config, and, where that is silent,
    the same tokens under their new ids."""
    made = {}
    for key, value in table.items():
        if key == "text_config" and isinstance(value, Mapping):
            inner = owners.get(key)
            made[key] = translated(value, translate, inner if isinstance(inner, Mapping) else {})
        elif key.endswith(_ID_ENDINGS):
            made[key] = owners[key] if key in owners else _moved(value, translate)
        else:
            made[key] = value
    added = {k: v for k, v in owners.items() if k.endswith(_ID_ENDINGS) and k not in made}
    return made | added


def _moved(value: Any, translate: Callable[[int], int | None]) -> Any:
    if isinstance(value, list):
        moved = [_moved(item, translate) for item in value]
        return [item for item in moved if item is not None] or None
    return translate(value) if type(value) is int else value


def translated_generation(
    model: Checkpoint,
    translate: Callable[[int], int | None],
    owner: Checkpoint | None,
) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """generation_config.json with the ids of the new vocabulary, and notes on what in it names
    tokens by id and couldn't follow."""
    given = companion_table(model, GENERATION)
    owners = {} if owner is None else companion_table(owner, GENERATION)
    made = translated(given, translate, owners)
    notes = [
        f"{GENERATION}: {key} names tokens by id, and isn't translated to the new vocabulary"
        for key in _ID_LISTS
        if given.get(key)
    ]
    if made == given:
        return {}, tuple(notes)
    return {GENERATION: _as_bytes(made)}, tuple(notes)
