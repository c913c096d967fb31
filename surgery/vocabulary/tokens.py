"""The tokens of a checkpoint and their ids, read from the tokenizer's files beside the weights."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, NotFoundError, SurgeryError, UnsupportedError
from surgery.untrusted import parse_table, read_small

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What tokenizers say of an added token: how it is found in a text, and if it is hidden."""
Flags = Mapping[str, bool]
PLAIN: Flags = dict.fromkeys(FLAGS, False)

TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template|spiece|sentencepiece"
    r"|tekken|tokenization_)[^/]*|[^/]*\.tiktoken|additional_chat_templates/.*"
)
MOST_ENTRIES = 8_000_000
"""Tokens and merges, each a list of two: the largest tokenizers have some 2,000,000."""
_FOR_TEXTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LOADED = re.compile(
    r"tokenizer\.model|sp[^/]*\.model|sentence[^/]*\.model|vocab\.txt|tekken\.json"
)
"""Files that transformers makes a tokenizer of; they name their tokens in formats of their own."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The id of every token, the flags of those that were added, and the `file` that says so."""

    ids: Mapping[str, int]
    added: Mapping[str, Flags] = field(default_factory=dict)
    file: str = ""

    @cached_property
    def names(self) -> Mapping[int, str]:
        """The token of every id that has one."""
        return {row: token for token, row in self.ids.items()}


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, Path | bytes]:
    """The companions that make up the tokenizer."""
    return {n: f for n, f in checkpoint.companions.items() if TOKENIZER_FILES.fullmatch(n)}


def companion_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    """A companion's content. Raises InputError if the file can't be read."""
    content = checkpoint.companions[name]
    return content if isinstance(content, bytes) else read_small(content)


def companion_table(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A companion that is a JSON table; empty if there is none of that name."""
    if name not in checkpoint.companions:
        return {}
    raw = companion_bytes(checkpoint, name)
    return parse_table(raw, _where(checkpoint, name), most_values=MOST_ENTRIES)


def read_vocabularies(checkpoints: Iterable[Checkpoint]) -> list[Vocabulary]:
    """The vocabulary of each. Raises NotFoundError, FormatError or UnsupportedError, with all
    that can't be read."""
    found = try_vocabularies(checkpoints)
    errors = [each for each in found if isinstance(each, SurgeryError)]
    if errors:
        raise type(errors[0])(*dict.fromkeys(text for error in errors for text in error.problems))
    return [each for each in found if isinstance(each, Vocabulary)]


def try_vocabularies(checkpoints: Iterable[Checkpoint]) -> list[Vocabulary | SurgeryError]:
    """The vocabulary of each, or why there is none. Models with the same files share one, which
    is read once."""
    known: dict[tuple[tuple[str, bytes], ...], Vocabulary] = {}
    found: list[Vocabulary | SurgeryError] = []
    for checkpoint in checkpoints:
        try:
            files = telling_files(checkpoint)
            if not files or files not in known:
                known[files] = read_vocabulary(checkpoint)
            found.append(known[files])
        except SurgeryError as error:
            found.append(error)
    return found


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary by tokenizer.json; else by vocab.json; else by what transformers makes of
    the other files, without remote code. Tokens that only tokenizer_config.json or
    added_tokens.json adds count too.

    Raises NotFoundError without a tokenizer, FormatError or UnsupportedError for one that can't
    be read.
    """
    files = tokenizer_files(checkpoint)
    others = [name for name in files if _LOADED.fullmatch(name)]
    if "tokenizer.json" in files:
        file = "tokenizer.json"
        ids, added = _by_tokenizers(checkpoint)
    elif "vocab.json" in files:
        file = "vocab.json"
        ids, added = _table_of_ids(checkpoint, file), {}
    elif others:
        file = others[0]
        ids, added = _by_transformers(checkpoint, file)
    else:
        raise NotFoundError(
            f"{checkpoint.source.reference} has no tokenizer (no tokenizer.json, vocab.json or "
            f"tokenizer.model), so nobody knows which token has which row: put the files of the "
            f"tokenizer that it was trained with beside its weights"
        )
    _add_from_config(checkpoint, ids, added)
    where = _where(checkpoint, file)
    _check_ids(ids, where)
    ordered = sorted(ids, key=lambda token: ids[token])  # the library's order is none
    return Vocabulary({token: ids[token] for token in ordered}, added, where)


def _where(checkpoint: Checkpoint, name: str) -> str:
    content = checkpoint.companions[name]
    return str(content) if isinstance(content, Path) else f"{checkpoint.source.reference}: {name}"


def telling_files(checkpoint: Checkpoint) -> tuple[tuple[str, bytes], ...]:
    """All that the vocabulary is read from. Of tokenizer_config.json that is one table: the rest
    of it, such as a chat template, often differs between fine-tunes."""
    told = []
    for name in sorted(tokenizer_files(checkpoint)):
        if name == "tokenizer_config.json":
            decoder = companion_table(checkpoint, name).get("added_tokens_decoder")
            told.append((name, json.dumps(decoder).encode()))
        elif name in ("tokenizer.json", "vocab.json", "added_tokens.json") or _LOADED.fullmatch(
            name
        ):
            told.append((name, companion_bytes(checkpoint, name)))
    return tuple(told)


def tokenizer_by_ids(checkpoint: Checkpoint) -> Any:
    """The tokenizers library's reading of tokenizer.json, without what only texts go through: a
    normalizer's regular expressions are run on added tokens as they are read, and may not end.

    Raises FormatError.
    """
    from tokenizers import Tokenizer

    table = companion_table(checkpoint, "tokenizer.json")
    kept = {key: None if key in _FOR_TEXTS else value for key, value in table.items()}
    try:
        return Tokenizer.from_str(json.dumps(kept))
    except BaseException as error:  # a panic of the library's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(
            f"{_where(checkpoint, 'tokenizer.json')} can't be read as a tokenizer: {error}"
        ) from error


def _by_tokenizers(checkpoint: Checkpoint) -> tuple[dict[str, int], dict[str, Flags]]:
    """By the tokenizers library: it gives added tokens ids of its own counting, whatever the
    file says, and those are the ids that texts are encoded to."""
    tokenizer = tokenizer_by_ids(checkpoint)
    added: dict[str, Flags] = {
        str(token.content): {flag: bool(getattr(token, flag)) for flag in FLAGS}
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    return dict(tokenizer.get_vocab(with_added_tokens=True)), added


def _by_transformers(checkpoint: Checkpoint, file: str) -> tuple[dict[str, int], dict[str, Flags]]:
    """By AutoTokenizer, from copies of the files, none of which is code."""
    from transformers import AutoTokenizer

    from surgery.modeling.quiet import quiet

    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            for name in tokenizer_files(checkpoint):
                if "/" not in name and not name.endswith(".py"):
                    Path(folder, name).write_bytes(companion_bytes(checkpoint, name))
            Path(folder, "config.json").write_text(json.dumps(checkpoint.config))
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # anything: a missing library, an unknown class, a damaged file
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UnsupportedError(
            f"{_where(checkpoint, file)}: transformers can't make a tokenizer of it ({reason[0]}): "
            f"convert it to tokenizer.json first, with AutoTokenizer and save_pretrained"
        ) from error
    added: dict[str, Flags] = {
        str(token.content): {flag: bool(getattr(token, flag)) for flag in FLAGS}
        for token in tokenizer.added_tokens_decoder.values()
    }
    return dict(tokenizer.get_vocab()), added


def _table_of_ids(checkpoint: Checkpoint, name: str) -> dict[str, int]:
    table = companion_table(checkpoint, name)
    FormatError.raise_if(
        f"{_where(checkpoint, name)}: {token!r} has the id {row!r}, which is no number"
        for token, row in table.items()
        if type(row) is not int
    )
    return table


def _add_from_config(checkpoint: Checkpoint, ids: dict[str, int], added: dict[str, Flags]) -> None:
    """Tokens that the tokenizer itself doesn't have, and that its neighbours add."""
    decoder = companion_table(checkpoint, "tokenizer_config.json").get("added_tokens_decoder")
    for row, entry in decoder.items() if isinstance(decoder, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(token, str) and row.isdecimal():
            ids.setdefault(token, int(row))
            added.setdefault(token, {flag: entry.get(flag) is True for flag in FLAGS})
    for token, row in _table_of_ids(checkpoint, "added_tokens.json").items():
        ids.setdefault(token, row)
        added.setdefault(token, PLAIN)


def _check_ids(ids: Mapping[str, int], where: str) -> None:
    seen: dict[int, str] = {}
    problems = []
    for token, row in ids.items():
        if row < 0:
            problems.append(f"{where} gives {token!r} the id {row}")
        elif row in seen:
            problems.append(
                f"{where} gives the id {row} to both {seen[row]!r} and {token!r}: no row can be "
                f"both; mend the tokenizer first"
            )
        seen[row] = token
    FormatError.raise_if(problems)
