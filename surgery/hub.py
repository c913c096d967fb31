"""Reference -> local files; the only place that may use the network.

A local path is taken as it is. `org/name[@revision]` is fetched into the usual Hub cache: the one
set of safetensors that makes up the model and the small files beside it, nothing else heavy.
HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN and the like are huggingface_hub's to read.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, NotFoundError, OutputError, SurgeryError, UnsupportedError
from surgery.header import LENGTH_BYTES, LONGEST
from surgery.untrusted import parse_table, read_small

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SMALL = re.compile(
    r"\.(jsonl?|txt|model|py|jinja|md|ya?ml|toml|cfg|tiktoken|vocab|bpe|spm|codes|merges)$"
    r"|(^|/)(tokenizer|vocab|merges|LICEN[CS]E|NOTICE|COPYING)[^/]*$"
)
OTHER_WEIGHTS = re.compile(
    r"\.(bin|pth?|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|npz|tflite|ot|pkl|distcp)$"
)
OTHER_FOLDERS = re.compile(r"(^|/)(onnx|openvino|coreml|original|global_step\d*)/")
TRAINING_STATE = re.compile(r"(^|/)(training_args|optimizer|scheduler|scaler|rng_state)[^/]*$")
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
CONNECTIONS = 8
HOW_TO_NAME = "A model on the Hub is written org/name or org/name@revision"
MESSAGES = {  # by the exception of huggingface_hub, the more telling first
    "HFValidationError": "{given!r} is neither a directory here nor an id on the Hub. "
    + HOW_TO_NAME,
    "OfflineModeIsEnabled": "{given} isn't in the cache, or not all of it, and HF_HUB_OFFLINE "
    "forbids to fetch it: unset it, or give a local directory",
    "GatedRepoError": "{name} is gated: ask for access at {hub}/{name}, then log in with "
    "`hf auth login` or set HF_TOKEN",
    "RevisionNotFoundError": "{name} has no branch, tag or commit {revision!r}: see "
    "{hub}/{name}/tree/main for those it has",
    "RepositoryNotFoundError": "There is no directory {given!r} here and no model {name!r} on the "
    "Hub, or it is private: check the id, or log in with `hf auth login`",
    "HfHubHTTPError": "{given}: {hub} answered with HTTP status {status}. Try again later, or, if "
    "it is 401 or 403, check your token (`hf auth whoami`)",
    "Exception": "{given} is no directory here, it isn't in the cache, and it can't be "
    "fetched from {hub} ({reason}): check the network and HF_ENDPOINT, or give a local directory",
}


@dataclass(frozen=True)
class RemoteFile:
    """A safetensors file that stayed on the Hub: its `size` in bytes, its header's raw JSON."""

    size: int
    header: bytes


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies: `reference` as it was given, `path` a directory or one file.

    From the Hub, `path` is the snapshot in the cache and `revision` its commit hash. With
    `headers_only`, `remote_headers` has an entry for each weight file of the model, by name,
    unless all of them are in `path` already. `files` are the weight files that were opened, and
    their sizes in bytes.
    """

    reference: str
    path: Path
    repo_id: str | None = None
    revision: str | None = None
    remote_headers: Mapping[str, RemoteFile] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    step: bool = False
    """Whether this is a step of a recipe, by its name, which was made of what lies in `path`."""


def resolve(reference: str | Path, *, headers_only: bool = False, quiet: bool = False) -> Source:
    """Find `reference` on disk, or else fetch it from the Hub.

    `headers_only` fetches no tensor: small files, and the headers of the weight files. `quiet`
    hides the progress bars. One small request learns the commit even if all of it is cached;
    without network the commit that was cached last is used.

    Raises NotFoundError if it isn't there or can't be reached, FormatError and UnsupportedError
    if it isn't one safetensors checkpoint, OutputError if the cache can't be written.
    """
    text = str(reference)
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        if path.is_dir() or path.suffix == ".safetensors":
            return Source(text, path)
        raise FormatError(
            f"{text} is a file, and not a *.safetensors one: give the checkpoint's directory"
        )
    if isinstance(reference, Path) or _looks_like_path(text):
        kind = "file" if path.suffix == ".safetensors" else "directory"
        raise NotFoundError(f"{text!r}: there is no such {kind}. {HOW_TO_NAME}")
    repo_id, at, revision = text.partition("@")
    if at and (not revision or ".." in revision or revision.startswith("/")):
        raise NotFoundError(
            f"{text!r}: {revision!r} can't be a revision. After the @, give a branch, a tag or a "
            f"commit hash"
        )
    repo = _Repo(text, repo_id, revision or None, quiet)
    try:
        return _from_hub(repo, headers_only)
    except SurgeryError:
        raise
    except Exception as error:  # of huggingface_hub, or of the HTTP library that it uses
        raise _explain(repo, error) from error


def _looks_like_path(text: str) -> bool:
    name = text.partition("@")[0]  # a revision has slashes too: refs/pr/1
    marks = text.startswith((".", "/", "~")) or text.endswith(".safetensors") or "\\" in text
    return marks or name.count("/") > 1 or not text


@dataclass(frozen=True)
class _Repo:
    """A model on the Hub as the user named it, and the calls that get it."""

    reference: str
    repo_id: str
    revision: str | None
    quiet: bool

    def listing(self) -> tuple[str, dict[str, int]]:
        """The commit hash, and the bytes of each of its files: one small request."""
        from huggingface_hub import HfApi, constants

        info = HfApi().model_info(
            self.repo_id,
            revision=self.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,  # the default is to wait for ever
        )
        assert info.sha is not None, "the answer names no commit"
        return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def snapshot(
        self, names: Iterable[str], revision: str | None, *, local_only: bool = False
    ) -> Path:
        """The snapshot folder of `revision`, with the files `names` in it."""
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.repo_id,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            local_files_only=local_only,
            tqdm_class=_no_bar() if self.quiet else None,
        )
        return Path(folder)


def _from_hub(repo: _Repo, headers_only: bool) -> Source:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        commit, sizes = repo.listing()
    except RevisionNotFoundError:
        raise  # a branch that was deleted isn't served from the cache
    except Exception:
        cached = _cached(repo)
        if cached is None:
            raise
        return cached
    weights = _weights(repo, sizes)  # before anything is downloaded
    # By the user's name of the revision, so that the cache knows it when there is no network.
    folder = repo.snapshot([*_companions(sizes), *_indices(weights)], repo.revision)
    if folder.name != commit:  # somebody pushed between the two requests
        return _from_hub(repo, headers_only)
    folder.mkdir(parents=True, exist_ok=True)  # absent if there is no small file at all
    weights = _shards(repo, folder, weights, sizes)
    missing = [name for name in weights if not (folder / name).is_file()]
    remote: dict[str, RemoteFile] = {}
    if missing and headers_only:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = pool.map(lambda name: _remote(repo, name, commit, sizes[name]), weights)
            remote = dict(zip(weights, found, strict=True))
    elif missing:
        repo.snapshot(missing, commit)
    return Source(repo.reference, folder, repo.repo_id, commit, remote)


def _cached(repo: _Repo) -> Source | None:
    """What the cache has of `repo`, if that is a whole checkpoint. Uses no network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = repo.snapshot([], repo.revision, local_only=True)
        names = _cached_names(repo, folder)
        weights = _shards(repo, folder, _weights(repo, names), names)
    except (LocalEntryNotFoundError, SurgeryError, OSError):
        return None
    if not all((folder / name).is_file() for name in [*_companions(names), *weights]):
        return None
    return Source(repo.reference, folder, repo.repo_id, folder.name)


def _cached_names(repo: _Repo, folder: Path) -> Collection[str]:
    """All files of the commit where the cache has their list, else those that are in `folder`."""
    try:
        from huggingface_hub import get_cached_repo_tree

        return {file.path for file in get_cached_repo_tree(repo.repo_id, revision=folder.name)}
    except Exception:  # noqa: BLE001  # older versions know no list; it is only a better answer
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def _companions(names: Iterable[str]) -> list[str]:
    """The small files that go with the weights, whichever these are."""
    others = (OTHER_WEIGHTS, OTHER_FOLDERS, re.compile(r"\.safetensors$|\.index\.json$"))
    return [n for n in names if SMALL.search(n) and not any(other.search(n) for other in others)]


def _indices(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(INDEX_SUFFIX)]


def _weights(repo: _Repo, names: Collection[str]) -> list[str]:
    """The files of `names` that are the model's weights, or the one index that names them."""
    top = sorted(name for name in names if "/" not in name)
    indices, usual = _indices(top), f"model{INDEX_SUFFIX}"
    for name in (usual, SINGLE):
        if name in top:
            return [name]
    if len(indices) == 1:
        return indices
    found = [name for name in top if name.endswith(".safetensors")]
    if _is_one_set(found):
        return found
    found = found or sorted(name for name in names if name.endswith(".safetensors"))
    if found:
        raise UnsupportedError(
            f"{repo.reference} has neither {SINGLE} nor {usual}, but {_some(found)}. Download the "
            f"model you mean, and give its directory"
        )
    other = [n for n in sorted(names) if OTHER_WEIGHTS.search(n) and not TRAINING_STATE.search(n)]
    raise NotFoundError(
        f"{repo.reference} has no *.safetensors, "
        + (f"only {_some(other)}. " if other else "and no other weights. ")
        + "Surgery unpickles nothing: if you trust the files, convert them to safetensors, and "
        "give that directory"
    )


def _is_one_set(names: list[str]) -> bool:
    """Whether `names` are one file, or all of x-00001-of-00003 to x-00003-of-00003."""
    stems = {re.sub(r"\d{5}(-of-\d{5}\.safetensors)$", r"\1", name) for name in names}
    count = re.search(r"-of-(\d{5})\.safetensors$", names[0]) if names else None
    return len(stems) == 1 and len(names) == (int(count[1]) if count else 1)


def _shards(repo: _Repo, folder: Path, weights: list[str], names: Collection[str]) -> list[str]:
    """`weights`, or the files that it names if it is an index. Raises FormatError."""
    if not _indices(weights):
        return weights
    where = f"{repo.reference}: {weights[0]}"
    try:
        index = parse_table(read_small(folder / weights[0]), where)
        shards = set(index["weight_map"].values())
    except (FormatError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where} has no weight_map of tensor -> file") from error
    # `names` are the repository's own files: a shard among them can't point outside of it.
    strange = sorted(str(name) for name in shards if name not in names or "/" in name)
    if strange or not shards:
        what = f"files that aren't beside it: {_some(strange)}" if strange else "no file"
        raise FormatError(f"{where} names {what}")
    if SINGLE in names and SINGLE not in shards:
        raise FormatError(
            f"{repo.reference} has both {SINGLE} and {weights[0]}, and loaders differ in which "
            f"they take. Download the set you mean, and give its directory"
        )
    return sorted(shards)


def _remote(repo: _Repo, name: str, commit: str, size: int) -> RemoteFile:
    """The header of a weight file of `size` bytes, by two range requests."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo.repo_id, name, revision=commit)
    length = int.from_bytes(_range(url, 0, LENGTH_BYTES), "little")
    if not 0 < length <= min(LONGEST, size - LENGTH_BYTES):
        raise FormatError(
            f"{repo.reference}: {name} isn't a safetensors file, or it was cut short: it has "
            f"{size:,} bytes and asks for a header of {length:,}"
        )
    return RemoteFile(size, _range(url, LENGTH_BYTES, LENGTH_BYTES + length))


def _range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of the file at `url`, whether or not the server knows ranges."""
    from huggingface_hub import constants, hf_raise_for_status
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # lazy, yet documented
        build_hf_headers,
        http_stream_backoff,
    )

    headers = build_hf_headers()
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    got = bytearray()
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        if response.status_code == 206:
            start, stop = 0, stop - start
        for chunk in response.iter_bytes():
            got += chunk
            if len(got) >= stop:  # a server without ranges would go on with the tensors
                break
    if len(got) < stop:
        raise ValueError(f"{url} ended {stop - len(got):,} bytes early")
    return bytes(got[start:stop])


def _no_bar() -> Any:
    """A progress bar that shows nothing, for one call: the library's own switch is global."""
    from huggingface_hub.utils.tqdm import tqdm

    bar: Any = tqdm

    def start(self: Any, *args: Any, **options: Any) -> None:
        bar.__init__(self, *args, **{**options, "disable": True})

    return type("HiddenBar", (tqdm,), {"__init__": start})


def _explain(repo: _Repo, error: BaseException) -> SurgeryError:
    """What to say about `error`, which is huggingface_hub's or was raised beneath it."""
    from huggingface_hub import HfApi

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            return OutputError(f"{repo.reference} can't be written into the Hub cache: {cause}")
    kinds = {base.__name__ for cause in causes for base in type(cause).__mro__}
    response = next((cause.response for cause in causes if hasattr(cause, "response")), None)
    message = next(text for kind, text in MESSAGES.items() if kind in kinds)
    return NotFoundError(
        message.format(
            given=repo.reference,
            name=repo.repo_id,
            revision=repo.revision,
            hub=HfApi().endpoint,
            status=getattr(response, "status_code", None),
            reason=str(causes[-1]) or type(causes[-1]).__name__,
        )
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
